//! Promises that a disk has broken: it was put back to an earlier state, or has lost what was
//! durable.

use raft::eraftpb::{Message, MessageType};
use standby_types::{LogIndex, NodeId};

use super::Consensus;

/// What only a disk can have done that was put back to an earlier state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Broken {
    /// The leader counts on this node's having an entry that it does not have.
    LostHere {
        /// That entry.
        acknowledged: LogIndex,
        leader: NodeId,
    },
    /// The leader's log has another entry in the place of one that is committed here: it lacks what
    /// was acknowledged. What it sends is not taken.
    LeaderLacks {
        /// The committed entry.
        committed: LogIndex,
        leader: NodeId,
    },
    /// This node leads, and another one has committed entries beyond its log. They do not count.
    AheadOfLeader { node: NodeId, committed: LogIndex },
}

impl Consensus {
    /// Raft takes a promise that was made as one that is kept, and ends the process if it finds
    /// otherwise.
    pub(super) fn is_broken(&self, message: &Message) -> Option<Broken> {
        let log = &self.raft.raft.raft_log;
        let from = NodeId(message.from);
        if message.term < self.raft.raft.term {
            return None;
        }
        // 0 if the log does not reach there.
        let differs = |index: u64, term: u64| {
            index <= log.committed
                && matches!(log.term(index), Ok(known) if known != 0 && known != term)
        };
        match message.get_msg_type() {
            MessageType::MsgHeartbeat if message.commit > log.last_index() => {
                Some(Broken::LostHere { acknowledged: LogIndex(message.commit), leader: from })
            }
            MessageType::MsgAppend => {
                let entries = message.entries.iter().map(|entry| (entry.index, entry.term));
                let (index, _) = std::iter::once((message.index, message.log_term))
                    .chain(entries)
                    .find(|(index, term)| differs(*index, *term))?;
                Some(Broken::LeaderLacks { committed: LogIndex(index), leader: from })
            }
            MessageType::MsgAppendResponse
                if self.role.leads && !message.reject && message.index > log.last_index() =>
            {
                Some(Broken::AheadOfLeader { node: from, committed: LogIndex(message.index) })
            }
            _ => None,
        }
    }
}
