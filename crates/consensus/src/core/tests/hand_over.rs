//! Hand-overs beside changes of membership.

use super::*;

/// The members stay as they are, but the second node has not applied the change that says so.
fn changed_but_not_applied() -> Cluster {
    let mut cluster = Cluster::of(3);
    cluster.applies_late.insert(NodeId(2));
    let leader = &mut cluster.nodes.get_mut(&NodeId(1)).unwrap().consensus;
    let changes = leader.membership().moved(NodeId(3), "elsewhere:1".into());
    let mut outputs = Vec::new();
    leader.change_membership(&changes, &mut outputs).unwrap();
    assert!(leader.is_changing());
    cluster.perform(NodeId(1), outputs);
    cluster.ticks(10);
    assert!(!cluster.nodes[&NodeId(1)].consensus.is_changing());
    cluster
}

#[test]
fn who_is_handed_the_leadership_applies_what_has_changed_first() {
    let mut cluster = changed_but_not_applied();
    cluster.hand_over(1, 2).unwrap();
    cluster.ticks(2);
    assert_eq!(cluster.primary(), Some(NodeId(1)));
    cluster.applies(NodeId(2));
    assert_eq!(cluster.nodes[&NodeId(2)].consensus.role().leader, Some(NodeId(2)));
    cluster.ticks(3);
    assert_eq!(cluster.primary(), Some(NodeId(2)));
}

/// The one that handed over leads on, and counts on that nobody stands.
#[test]
fn who_applies_it_too_late_does_not_stand() {
    let mut cluster = changed_but_not_applied();
    let term = cluster.nodes[&NodeId(1)].consensus.role().term;
    cluster.hand_over(1, 2).unwrap();
    cluster.ticks(4);
    cluster.applies(NodeId(2));
    cluster.ticks(20);
    assert_eq!(cluster.primary(), Some(NodeId(1)));
    assert_eq!(cluster.nodes[&NodeId(1)].consensus.role().term, term);
    assert!(!cluster.nodes[&NodeId(1)].consensus.is_handing_over());
    cluster.propose(NodeId(1), b"one").unwrap();
}
