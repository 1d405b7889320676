//! Slow networks, and nodes that look at how slow they are.

use super::*;

const MOST: usize = 60;

/// Three nodes, these of which are patient, each message so many ticks on its way.
fn slow_cluster(patient: &[u64], delay: usize) -> Cluster {
    let mut cluster = Cluster::of(3);
    patient.iter().for_each(|id| be_patient(&mut cluster, *id));
    cluster.delay = delay;
    cluster.ticks(150);
    cluster
}

fn be_patient(cluster: &mut Cluster, id: u64) {
    let consensus = &mut cluster.nodes.get_mut(&NodeId(id)).unwrap().consensus;
    consensus.config.most_patience_ticks = MOST;
}

fn has_lease(cluster: &Cluster, id: NodeId) -> bool {
    cluster.nodes[&id].consensus.lease(cluster.now).is_some_and(|until| until > cluster.now)
}

#[test]
fn row_51_a_leader_asks_for_as_much_patience_as_its_network_needs() {
    // Round trips of no time to 1.2 s.
    for delay in 0..=12 {
        for patient in [&[][..], &[1, 2, 3]] {
            let mut cluster = slow_cluster(patient, delay);
            let leader = cluster.primary().unwrap();
            let mut with_lease = 0;
            for _ in 0..50 {
                cluster.ticks(1);
                with_lease += usize::from(has_lease(&cluster, leader));
            }
            let consensus = &cluster.nodes[&leader].consensus;
            match (patient.len(), delay) {
                (3, _) | (0, 0..=4) => assert_eq!(with_lease, 50, "delay {delay}"),
                (0, 6..) => assert_eq!(with_lease, 0, "delay {delay}"),
                _ => {}
            }
            if patient.len() == 3 {
                assert!(consensus.progress(NodeId(2)).unwrap().active);
            }
            if delay == 0 {
                assert_eq!(consensus.lease_length(), TICK * 12, "no more than is needed");
            }
        }
    }
}

/// However patient the nodes are, and whoever of them is: no other leader before the lease has
/// ended.
#[test]
fn nobody_is_elected_while_a_slow_leader_has_its_lease() {
    for delay in [0, 3, 6, 9, 12] {
        for patient in [&[1, 2, 3][..], &[1], &[1, 2], &[1, 3], &[2, 3]] {
            for restarts in [false, true] {
                let mut cluster = slow_cluster(patient, delay);
                let leader = cluster.primary().unwrap();
                cluster.isolate(leader);
                if restarts {
                    let id = cluster.nodes.keys().copied().find(|id| *id != leader).unwrap();
                    let node = cluster.nodes.remove(&id).unwrap();
                    cluster.restart(id, node);
                    if patient.contains(&id.0) {
                        be_patient(&mut cluster, id.0);
                        let consensus = &mut cluster.nodes.get_mut(&id).unwrap().consensus;
                        consensus.quiet = MOST;
                    }
                }
                let mut ticks = 0;
                while cluster.primary() == Some(leader) || cluster.primary().is_none() {
                    cluster.ticks(1);
                    ticks += 1;
                    if ticks == 1000 {
                        assert!(patient.len() < 3 && delay > 8, "delay {delay}: nobody is elected");
                        break;
                    }
                }
                assert!(!has_lease(&cluster, leader), "delay {delay}, patient {patient:?}");
            }
        }
    }
}

/// A cluster whose network is slow from its first moment, or all of whose nodes have restarted.
#[test]
fn somebody_is_elected_however_slow_the_network_is() {
    for delay in [6, 9, 12, 15] {
        let mut cluster = slow_cluster(&[1, 2, 3], delay);
        for id in [1, 2, 3].map(NodeId) {
            let node = cluster.nodes.remove(&id).unwrap();
            cluster.restart(id, node);
            be_patient(&mut cluster, id.0);
        }
        cluster.on_the_way_for.clear();
        let mut ticks = 0;
        while !cluster.primary().is_some_and(|leader| has_lease(&cluster, leader)) {
            cluster.ticks(1);
            ticks += 1;
            assert!(ticks < 1000, "delay {delay}");
        }
    }
}

proptest::proptest! {
    /// Whatever a peer writes there: heartbeats to a follower, and answers to the leader.
    #[test]
    fn any_context_is_read_or_ignored(context: Vec<u8>) {
        let mut cluster = Cluster::of(3);
        be_patient(&mut cluster, 1);
        cluster.ticks(5);
        for (kind, from, to) in [
            (raft::eraftpb::MessageType::MsgHeartbeat, 1, 2),
            (raft::eraftpb::MessageType::MsgHeartbeatResponse, 2, 1),
        ] {
            let mut message = Message::default();
            message.set_msg_type(kind);
            (message.from, message.to) = (from, to);
            message.term = cluster.nodes[&NodeId(1)].consensus.role().term.0;
            message.context = context.clone().into();
            cluster.event(NodeId(to), Event::Received(PeerMessage(message)));
        }
        cluster.ticks(5);
        assert_eq!(cluster.primary(), Some(NodeId(1)));
    }
}
