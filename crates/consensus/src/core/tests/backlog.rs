//! A storage that applies more slowly than the log grows.

use super::*;

const ENTRY: &[u8] = &[7; 900];

fn of_entries(cluster: &Cluster, id: u64) -> usize {
    cluster.data(id).iter().filter(|data| **data == ENTRY).count()
}

/// A cluster in which one node has not applied what the primary has proposed since.
fn with_a_slow_one(slow: u64, entries: usize) -> Cluster {
    let mut cluster = Cluster::of(3);
    cluster.applies_late.insert(NodeId(slow));
    for _ in 0..entries {
        cluster.propose(NodeId(1), ENTRY).unwrap();
    }
    cluster
}

/// The primary and a follower alike, and also if the log has nothing in memory any more.
#[test]
fn what_a_slow_storage_has_not_applied_stays_in_the_log() {
    for slow in [1, 2] {
        let mut cluster = with_a_slow_one(slow, 100);
        cluster.propose(NodeId(1), b"last").unwrap();
        cluster.ticks(20);
        let held = of_entries(&cluster, slow);
        assert!(held >= 2 && held * ENTRY.len() <= UNAPPLIED_LEN as usize, "{held} entries");
        assert_eq!(of_entries(&cluster, 3), 100);
        // It takes no part in what others do.
        assert_eq!(cluster.primary(), Some(NodeId(1)));

        for _ in 0..3 {
            let before = of_entries(&cluster, slow);
            let point = cluster.nodes[&NodeId(slow)].point.clone();
            cluster.event(NodeId(slow), Event::Applied(point));
            let more = of_entries(&cluster, slow) - before;
            assert!(more >= 2 && more * ENTRY.len() <= UNAPPLIED_LEN as usize, "{more} entries");
        }
        cluster.applies(NodeId(slow));
        cluster.ticks(20);
        assert_eq!(cluster.data(slow), cluster.data(3));
    }
}

#[test]
fn a_change_of_membership_waits_with_the_entries_before_it() {
    let mut cluster = with_a_slow_one(2, 20);
    cluster.change(NodeId(1), Change::Remove(NodeId(3)));
    cluster.ticks(20);
    let members =
        |cluster: &Cluster, id| cluster.nodes[&NodeId(id)].consensus.membership().members.len();
    assert_eq!((members(&cluster, 1), members(&cluster, 2)), (2, 3));
    cluster.applies(NodeId(2));
    cluster.ticks(20);
    assert_eq!(members(&cluster, 2), 2);
    assert_eq!(cluster.data(2), cluster.data(1));
}

/// A restart begins with what the storage has; the rest is handed out again.
#[test]
fn what_has_waited_is_handed_out_after_a_restart() {
    let mut cluster = with_a_slow_one(2, 50);
    cluster.ticks(20);
    let node = cluster.kill(NodeId(2));
    cluster.applies_late.clear();
    cluster.restart(NodeId(2), node);
    cluster.ticks(40);
    assert_eq!(cluster.data(2), cluster.data(1));
}

/// While entries are read for the storage, a catch-up brings it beyond them, and their segments go.
#[test]
fn what_was_read_in_vain_does_no_harm() {
    let mut cluster = with_a_slow_one(2, 30);
    cluster.reads_late = true;
    cluster.applies(NodeId(2));
    let (id, fetch) = cluster.late.pop().expect("a read from the log");
    assert_eq!(id, NodeId(2));
    cluster.reads_late = false;
    let node = cluster.nodes.get_mut(&NodeId(2)).unwrap();
    // As a snapshot does that Raft takes when the catch-up is complete.
    node.consensus.backlog.clear();
    for path in node.memory.list(Path::new(DIR)).unwrap() {
        node.memory.remove(&path).unwrap();
    }
    let fetched = Event::Fetched(fetch.read());
    node.consensus.step(cluster.now, fetched, &mut Vec::new()).unwrap();
}
