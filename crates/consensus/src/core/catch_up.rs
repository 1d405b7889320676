//! A follower that lacks what the leader's log no longer has.

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};
use standby_types::{LogIndex, NodeId, Term};

use crate::committed::AppliedPoint;
use crate::core::{Consensus, Output};
use crate::membership::Membership;

impl Consensus {
    pub(super) fn begin_catch_up(&mut self, message: Message, outputs: &mut Vec<Output>) {
        let metadata = message.get_snapshot().get_metadata();
        let data = message.get_snapshot().data.clone();
        let Ok((membership, state)) = Membership::decode(data) else { return };
        let target = AppliedPoint {
            index: LogIndex(metadata.index),
            term: Term(metadata.term),
            membership,
            state,
            open_parts: false,
        };
        // The sender leads: hearing of it now must not end in an election.
        let mut heartbeat = Message::default();
        heartbeat.set_msg_type(MessageType::MsgHeartbeat);
        (heartbeat.from, heartbeat.to) = (message.from, message.to);
        heartbeat.term = message.term;
        let _ = self.raft.step(heartbeat);
        if self.catching_up.as_ref().is_some_and(|running| running.from == message.from) {
            // Only a reminder.
            return;
        }
        outputs.push(Output::CatchUp { from: NodeId(message.from), target });
        self.catching_up = Some(message);
    }

    /// Asks the leader for what it has applied. Raft's own `request_snapshot` asks only if this
    /// node's log ends in the leader's term, and would refuse all entries until the answer comes.
    pub(super) fn ask_for_catch_up(&mut self, outputs: &mut Vec<Output>) {
        let raft = &self.raft.raft;
        let (committed, last) = (raft.raft_log.committed, raft.raft_log.last_index());
        let Ok(last_term) = raft.raft_log.term(last) else { return };
        if raft.leader_id == 0 || raft.leader_id == raft.id {
            return;
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgAppendResponse);
        (message.from, message.to) = (raft.id, raft.leader_id);
        message.term = raft.term;
        message.index = last;
        message.commit = committed;
        message.reject = true;
        (message.reject_hint, message.log_term) = (last, last_term);
        message.request_snapshot = committed + 1;
        self.send(vec![message], outputs);
    }

    /// Lets Raft begin from where a catch-up has led. That state is committed, so this is right in
    /// any term, also in a later one than that of the leader who asked for it.
    pub(super) fn install(&mut self, mut message: Message) {
        if message.term == self.raft.raft.term {
            let _ = self.raft.step(message);
            return;
        }
        if self.raft.raft.state != StateRole::Follower {
            let term = self.raft.raft.term;
            self.raft.raft.become_follower(term, 0);
            self.patience.leader_lost();
        }
        self.raft.raft.restore(message.take_snapshot());
    }
}
