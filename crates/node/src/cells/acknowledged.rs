//! Up to where each node has acknowledged what is committed. It is known of one log only: another
//! timeline has a log of its own, of which what was acknowledged before says nothing.

use std::collections::BTreeMap;
use std::sync::Mutex;

use standby_replica::lineage::Lineage;
use standby_types::lock::lock;
use standby_types::{LogIndex, NodeId};

/// See the module.
pub(crate) struct Acknowledged(Mutex<Known>);

struct Known {
    /// Whose log it is.
    lineage: Lineage,
    indices: BTreeMap<NodeId, LogIndex>,
}

impl Acknowledged {
    /// What a checkpoint knows.
    pub(crate) fn new(lineage: Lineage, indices: BTreeMap<NodeId, LogIndex>) -> Acknowledged {
        Acknowledged(Mutex::new(Known { lineage, indices }))
    }

    /// The log is this lineage's from now on. What is known of another one's is forgotten, and not
    /// taken any more.
    pub(crate) fn begin(&self, lineage: &Lineage) {
        let mut known = lock(&self.0);
        if known.lineage != *lineage {
            *known = Known { lineage: lineage.clone(), indices: BTreeMap::new() };
        }
    }

    /// Takes what another node says, unless that is of another log.
    pub(crate) fn note(
        &self,
        lineage: &Lineage,
        found: impl IntoIterator<Item = (NodeId, LogIndex)>,
    ) {
        let mut known = lock(&self.0);
        if known.lineage == *lineage {
            known.add(found);
        }
    }

    /// The primary, or this node itself, knows this of the members.
    pub(crate) fn add(&self, found: impl IntoIterator<Item = (NodeId, LogIndex)>) {
        lock(&self.0).add(found);
    }

    /// Who is no member any more has no promises to keep.
    pub(crate) fn retain(&self, is_member: impl Fn(NodeId) -> bool) {
        lock(&self.0).indices.retain(|id, _| is_member(*id));
    }

    /// Up to where a node has acknowledged, as far as this one knows.
    pub(crate) fn of(&self, node: NodeId) -> LogIndex {
        lock(&self.0).indices.get(&node).copied().unwrap_or(LogIndex(0))
    }

    /// The same of all nodes.
    pub(crate) fn all(&self) -> BTreeMap<NodeId, LogIndex> {
        lock(&self.0).indices.clone()
    }
}

impl Known {
    fn add(&mut self, found: impl IntoIterator<Item = (NodeId, LogIndex)>) {
        for (node, index) in found {
            let entry = self.indices.entry(node).or_default();
            *entry = index.max(*entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use standby_replica::lineage::Fork;

    use super::*;

    /// A report of the former timeline that came while a promotion was under way: a node that
    /// rejoined later was taken for one whose disk was put back, and began anew again and again.
    #[test]
    fn a_report_of_the_former_timeline_is_not_taken() {
        let former = Lineage::default();
        let known = Acknowledged::new(former.clone(), BTreeMap::from([(NodeId(1), LogIndex(6))]));
        let mut lineage = former.clone();
        lineage.begin(Fork::new("a".into(), "n4".into(), 1, Vec::new()));
        known.begin(&lineage);
        assert_eq!(known.all(), BTreeMap::new());
        known.note(&former, [(NodeId(1), LogIndex(6))]);
        assert_eq!(known.of(NodeId(1)), LogIndex(0));
        known.note(&lineage, [(NodeId(1), LogIndex(2)), (NodeId(1), LogIndex(1))]);
        known.begin(&lineage);
        assert_eq!(known.of(NodeId(1)), LogIndex(2));
    }
}
