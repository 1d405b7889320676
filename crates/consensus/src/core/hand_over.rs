//! The leadership is handed over (the Raft thesis, section 3.10).
//!
//! Raft ignores a hand-over to a node that knows of a committed change of membership and has not
//! applied it yet. The node applies it in a moment, and stands for election then.

use raft::StateRole;
use raft::eraftpb::Message;
use standby_types::NodeId;

use super::{Consensus, NotLeader, Output};

/// A hand-over waits for so many ticks at most. Whoever hands over waits for an election timeout,
/// leads on after it, and counts on that nobody stands for election: this must be well below.
const WAITS: usize = 3;

/// A hand-over to this node that Raft has ignored.
pub(super) struct Asked {
    message: Message,
    ticks: usize,
}

impl Consensus {
    /// Hands the leadership to another voter with data. Until that one has it, or it is given up
    /// after an election timeout, nothing is proposed; see [`Consensus::is_handing_over`].
    pub fn hand_over(&mut self, to: NodeId, outputs: &mut Vec<Output>) -> Result<(), NotLeader> {
        let may_lead = self.membership.data_voters().any(|id| id == to);
        if !self.role.leads || !may_lead || to == self.config.id {
            return Err(NotLeader);
        }
        self.raft.transfer_leader(to.0);
        self.handing_over = self.is_handing_over();
        self.flush(outputs);
        Ok(())
    }

    /// True while the leadership is being handed over.
    pub fn is_handing_over(&self) -> bool {
        self.role.leads && self.raft.raft.lead_transferee.is_some()
    }

    /// True while a change of membership is under way, as far as this node knows.
    pub fn is_changing(&self) -> bool {
        self.raft.raft.has_pending_conf() || !self.membership.outgoing.is_empty()
    }

    /// The leader hands over to this node.
    pub(super) fn asked_to_stand(&mut self, message: Message) {
        self.stand(Asked { message, ticks: WAITS });
    }

    /// Something was applied: Raft may stand for election now.
    pub(super) fn stand_if_asked(&mut self) {
        if let Some(asked) = self.asked_to_stand.take() {
            self.stand(asked);
        }
    }

    pub(super) fn tick_asked_to_stand(&mut self) {
        if let Some(asked) = &mut self.asked_to_stand {
            asked.ticks -= 1;
            self.asked_to_stand.take_if(|asked| asked.ticks == 0);
        }
    }

    fn stand(&mut self, asked: Asked) {
        let Asked { message, ticks } = asked;
        let term = self.raft.raft.term;
        // Raft refuses what does not fit; the sender finds out by itself.
        let _ = self.raft.step(message.clone());
        let ignored = self.raft.raft.state == StateRole::Follower && self.raft.raft.term == term;
        if ignored && message.term == term {
            self.asked_to_stand = Some(Asked { message, ticks });
        }
    }
}
