//! What a leader tells a witness.
//!
//! A witness gets entries without their data, and votes. An entry that only the leader and the
//! witness have is lost to the others when the leader dies: the witness then refuses everybody
//! whose log is shorter, and holds nothing that could be copied. So it hears of an entry only when
//! a majority would be reached without it, or when too few of the voters with data are there to
//! reach one.
//!
//! With two data nodes and a witness: as long as both data nodes are there, everything that is
//! acknowledged is on both. When one is lost, or makes no progress, the other goes on with the
//! witness.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use raft::eraftpb::{EntryType, Message};
use standby_types::NodeId;

use super::outputs::send;
use super::{Consensus, Output};

/// Messages that are kept for one witness; more are dropped, and Raft sends again.
const KEPT: usize = 1024;

/// See the module.
#[derive(Default)]
pub(super) struct Witnesses {
    /// Messages with entries, in order, each with the time from which it was kept.
    kept: BTreeMap<u64, VecDeque<(Duration, Message)>>,
    /// Peers whose connections have closed and who have not been heard since.
    lost: BTreeSet<NodeId>,
    /// Nodes that are there, but for which a message was kept too long; until they are level.
    slow: BTreeSet<NodeId>,
    /// When this node's role in the term began.
    pub(super) since: Duration,
}

impl Witnesses {
    pub(super) fn keep(&mut self, now: Duration, mut message: Message) {
        for entry in message.mut_entries().iter_mut() {
            if entry.get_entry_type() == EntryType::EntryNormal {
                entry.data.clear();
            }
        }
        let kept = self.kept.entry(message.to).or_default();
        if kept.len() < KEPT {
            kept.push_back((now, message));
        }
    }

    pub(super) fn heard(&mut self, peer: NodeId) {
        self.lost.remove(&peer);
    }

    pub(super) fn lost(&mut self, peer: NodeId) {
        self.lost.insert(peer);
    }

    pub(super) fn begin_term(&mut self, now: Duration) {
        self.kept.clear();
        self.slow.clear();
        self.since = now;
    }
}

impl Consensus {
    /// Sends witnesses what they may know by now.
    pub(super) fn release_to_witnesses(&mut self, outputs: &mut Vec<Output>) {
        let mut kept = std::mem::take(&mut self.witnesses.kept);
        let mut slow = std::mem::take(&mut self.witnesses.slow);
        slow.retain(|id| !self.has(*id, self.raft.raft.raft_log.committed));
        self.witnesses.slow = slow;
        kept.retain(|_, messages| {
            while let Some((_, message)) = messages.pop_front_if(|(since, message)| {
                self.witness_may_know(*since, message.index + message.entries.len() as u64)
            }) {
                send(&message, outputs);
            }
            !messages.is_empty()
        });
        self.witnesses.kept = kept;
    }

    fn has(&self, id: NodeId, index: u64) -> bool {
        self.raft.raft.prs().get(id.0).is_some_and(|progress| progress.matched >= index)
    }

    fn witness_may_know(&mut self, kept_since: Duration, index: u64) -> bool {
        let (having, lacking): (BTreeSet<_>, BTreeSet<_>) =
            self.membership.data_voters().partition(|id| self.has(*id, index));
        if self.membership.is_quorum(&having) {
            return true;
        }
        if self.last_step > kept_since + self.patience() / 2 {
            self.witnesses.slow.extend(lacking);
        }
        self.needs_witnesses()
    }

    /// True if the voters with data that are there are no majority: witnesses must make it up.
    fn needs_witnesses(&self) -> bool {
        let present = self.membership.data_voters().filter(|id| self.is_present(*id)).collect();
        !self.membership.is_quorum(&present)
    }

    fn is_present(&self, id: NodeId) -> bool {
        let last = self.heard.get(&id).map_or(self.witnesses.since, |heard| heard.asked);
        let witnesses = &self.witnesses;
        id == self.config.id
            || !witnesses.lost.contains(&id)
                && !witnesses.slow.contains(&id)
                && self.last_step <= last + self.patience() / 2
    }

    /// True if what is durable on `nodes` and on this one is safe: they are a majority, or are one
    /// together with the witnesses, and no other voter with data is there.
    pub fn is_safe_on(&self, nodes: &BTreeSet<NodeId>) -> bool {
        let mut nodes = nodes.clone();
        nodes.insert(self.config.id);
        if self.membership.is_quorum(&nodes) {
            return true;
        }
        let voters = self.membership.voters.iter().chain(&self.membership.outgoing);
        nodes.extend(voters.copied().filter(|id| self.membership.is_witness(*id)));
        self.needs_witnesses() && self.membership.is_quorum(&nodes)
    }
}
