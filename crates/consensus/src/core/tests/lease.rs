//! How long a leader may count on its followers, and what their disks have to do with it.

use super::*;

#[test]
fn the_lease_needs_a_majority() {
    let mut cluster = Cluster::of(3);
    cluster.ticks(5);
    let lease = |cluster: &Cluster| cluster.nodes[&NodeId(1)].consensus.lease(cluster.now).unwrap();
    assert!(lease(&cluster) > cluster.now);
    // Only answers to the leader count.
    let heard = cluster.nodes[&NodeId(1)].consensus.heard.clone();
    assert_eq!(heard.len(), 2);
    cluster.cut.extend([(NodeId(2), NodeId(1)), (NodeId(3), NodeId(1))]);
    cluster.ticks(14);
    assert!(lease(&cluster) <= cluster.now, "the lease outlives the majority");
    assert_eq!(cluster.nodes[&NodeId(2)].consensus.lease(cluster.now), None);
}

/// A primary that is reached again after a cut hears answers that are older than the cut.
#[test]
fn the_lease_counts_from_the_question_not_from_the_answer() {
    let mut cluster = Cluster::of(3);
    cluster.ticks(5);
    let lease = |cluster: &Cluster| cluster.nodes[&NodeId(1)].consensus.lease(cluster.now);
    cluster.far.insert(NodeId(1));
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(2);
    let before = lease(&cluster).unwrap();
    cluster.isolate(NodeId(1));
    cluster.ticks(13);
    assert!(before <= cluster.now);
    cluster.far.clear();
    for (to, message) in std::mem::take(&mut cluster.on_the_way) {
        cluster.event(to, Event::Received(message));
    }
    assert!(lease(&cluster).is_none_or(|until| until <= cluster.now), "renewed by old answers");
    // New answers renew it.
    cluster.cut.clear();
    cluster.ticks(2);
    assert!(lease(&cluster).unwrap() > cluster.now);
}

/// Clients that wait for a primary must not be sent away by the new one until its first heartbeat
/// is answered.
#[test]
fn who_serves_has_a_lease_at_once() {
    let mut cluster = Cluster::of(3);
    cluster.kill(NodeId(1));
    while cluster.primary().is_none() {
        cluster.ticks(1);
    }
    let primary = cluster.primary().unwrap();
    assert!(cluster.nodes[&primary].consensus.lease(cluster.now).unwrap() > cluster.now);
}

/// A follower forgets, when it restarts, that it has just heard the leader. It gives its vote to
/// nobody for as long as the leader may count on it.
#[test]
fn the_lease_outlives_a_follower_that_restarts() {
    let mut cluster = Cluster::of(3);
    cluster.isolate(NodeId(3));
    // It is about to stand for election.
    cluster.ticks(15);
    cluster.isolate(NodeId(1));
    cluster.cut.retain(|ids| *ids != (NodeId(2), NodeId(3)) && *ids != (NodeId(3), NodeId(2)));
    let lease = cluster.nodes[&NodeId(1)].consensus.lease(cluster.now).unwrap();
    assert!(lease > cluster.now);
    let second = cluster.nodes.remove(&NodeId(2)).unwrap();
    cluster.restart(NodeId(2), second);
    while cluster.now < lease {
        for id in [2, 3] {
            assert!(!cluster.nodes[&NodeId(id)].consensus.role().leads, "{id} leads too early");
        }
        cluster.ticks(1);
    }
    cluster.ticks(60);
    assert!(cluster.primary().is_some_and(|id| id != NodeId(1)));
}

/// Their answers say that they follow, not what they have. No other leader could do without them.
#[test]
fn followers_answer_heartbeats_while_their_disks_hang() {
    let mut cluster = Cluster::of(3);
    cluster.stalled.extend([NodeId(2), NodeId(3)]);
    cluster.propose(NodeId(1), b"one").unwrap();
    for _ in 0..10 {
        cluster.ticks(16);
        let lease = cluster.nodes[&NodeId(1)].consensus.lease(cluster.now);
        assert!(lease.unwrap() > cluster.now + 8 * TICK);
        assert!(cluster.data(1).is_empty(), "an answer to a heartbeat acknowledges no entry");
    }
    cluster.stalled.clear();
    for id in [2, 3] {
        cluster.disk_answers(NodeId(id));
    }
    assert_eq!(cluster.data(1), [b"one"]);
    assert_eq!(cluster.nodes[&NodeId(1)].consensus.role().term, Term(2));
}

/// Volumes in a cloud stall together: each sync takes longer than an election timeout.
#[test]
fn a_leader_is_elected_though_all_disks_are_slow() {
    for seed in 0..50 {
        let mut cluster = Cluster::of(3);
        cluster.slow_syncs = Some(20 + seed % 30);
        cluster.propose(NodeId(1), b"one").unwrap();
        cluster.ticks(200);
        assert_eq!(cluster.primary(), Some(NodeId(1)), "nothing is wrong with who leads");
        // Nobody hears anybody for a while.
        (1..=3).for_each(|id| cluster.isolate(NodeId(id)));
        cluster.ticks(40 + seed);
        assert_eq!(cluster.primary(), None);
        cluster.cut.clear();
        cluster.ticks(800);
        let primary = cluster.primary().expect("all of them are there");
        let term = cluster.nodes[&primary].consensus.role().term;
        cluster.propose(primary, b"two").unwrap();
        cluster.ticks(200);
        assert_eq!(cluster.data(primary.0), [b"one", b"two"]);
        assert_eq!(cluster.nodes[&primary].consensus.role().term, term);
    }
}
