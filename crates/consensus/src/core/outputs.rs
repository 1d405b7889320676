//! What Raft wants to be done.

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, Message, MessageType, Snapshot};
use raft::{ReadState, StateRole};
use standby_types::{LogIndex, Mutation, NodeId, Term, mutation};

use crate::codec::Malformed;
use crate::committed::{Committed, said};
use crate::core::{Consensus, Output, Role, Unsent};
use crate::log::{Batch, Point};
use crate::membership::{Membership, decode_changes, to_raft};
use crate::message::encode_message;

impl Consensus {
    /// Takes out of Raft what it is ready for.
    pub(super) fn flush(&mut self, outputs: &mut Vec<Output>) {
        loop {
            self.note_role(outputs);
            if !self.raft.has_ready() {
                break;
            }
            let mut ready = self.raft.ready();
            let messages = ready.take_messages();
            self.send(messages, outputs);
            let mut batch = Batch { number: ready.number(), ..Batch::default() };
            if !ready.snapshot().is_empty() {
                batch.reset = Some(self.reset_to(ready.snapshot()));
            }
            batch.entries = ready.take_entries();
            self.raft.mut_store().append(&batch.entries);
            let entries = ready.take_committed_entries();
            let changes = entries.iter().any(|e| e.get_entry_type() != EntryType::EntryNormal);
            // The commit index alone is not worth a sync: it is found again by election. But see
            // the module's comment.
            let mut must_sync = ready.must_sync() || changes;
            if mutation::on(Mutation::ForgetVote)
                && batch.entries.is_empty()
                && batch.reset.is_none()
            {
                must_sync = false;
            }
            if mutation::on(Mutation::ApplyBeforeCommit) && !self.role.leads {
                let early = batch.entries.iter().cloned().map(said).collect();
                outputs.push(Output::Commit(early));
            }
            batch.hard_state = must_sync.then(|| self.raft.raft.hard_state());
            let states = ready.take_read_states();
            outputs.extend(states.iter().filter_map(|state| self.read_index_of(state)));
            let mut messages = ready.take_persisted_messages();
            let at_once = messages.extract_if(.., |m| self.says_only_that_it_follows(m));
            let at_once = at_once.collect();
            self.send(at_once, outputs);
            let number = ready.number();
            let (term, since) = (self.raft.raft.term, self.last_step);
            self.raft.advance_append_async(ready);
            if !must_sync && self.unsent.is_empty() {
                self.send(messages, outputs);
                self.raft.on_persist_ready(number);
            } else {
                let unsent = Unsent { number, needs_disk: must_sync, term, since, messages };
                self.unsent.push_back(unsent);
            }
            if must_sync {
                outputs.push(Output::Persist(batch));
            }
            if changes || !self.held.is_empty() {
                self.held.push_back((number, entries));
            } else if !entries.is_empty() {
                self.hand_out(entries, outputs);
            }
        }
        let fetches = self.raft.mut_store().take_fetches();
        outputs.extend(fetches.into_iter().map(Output::Fetch));
        self.release_to_witnesses(outputs);
    }

    /// The log begins anew after a snapshot; the storage stands there already.
    fn reset_to(&mut self, snapshot: &Snapshot) -> Point {
        let metadata = snapshot.get_metadata();
        let point = Point { index: LogIndex(metadata.index), term: Term(metadata.term) };
        self.raft.mut_store().reset(point);
        // Raft must not look for the entries before.
        self.raft.raft.raft_log.applied = point.index.0;
        self.held.clear();
        self.backlog.clear();
        if let Ok((membership, _)) = Membership::decode(snapshot.data.clone()) {
            self.membership = membership;
        }
        point
    }

    /// The answer to a read index that this node has asked for.
    fn read_index_of(&self, state: &ReadState) -> Option<Output> {
        let own = state.request_ctx.strip_prefix(&self.config.id.to_bytes())?;
        let key = u64::from_be_bytes(<[u8; 8]>::try_from(own).ok()?);
        Some(Output::ReadIndex(key, LogIndex(state.index)))
    }

    /// An answer to a heartbeat says nothing of entries. It needs the disk for a new term only; a
    /// leader whose followers write for long would lose its lease otherwise, and no other leader
    /// could do without their disks.
    pub(super) fn says_only_that_it_follows(&self, message: &Message) -> bool {
        message.get_msg_type() == MessageType::MsgHeartbeatResponse
            && message.term == self.durable_term
    }

    pub(super) fn send(&mut self, messages: Vec<Message>, outputs: &mut Vec<Output>) {
        for mut message in messages {
            self.put_context(&mut message);
            if message.get_msg_type() == MessageType::MsgSnapshot
                && let Some(progress) = self.raft.raft.mut_prs().get_mut(message.to)
            {
                // Raft would send another one to a follower that has asked for this one and has it.
                progress.pending_request_snapshot = raft::INVALID_INDEX;
            }
            if message.get_msg_type() == MessageType::MsgAppend
                && self.membership.is_witness(NodeId(message.to))
            {
                self.witnesses.keep(self.last_step, message);
            } else {
                send(&message, outputs);
            }
        }
    }

    pub(super) fn take_committed(&mut self, entries: Vec<Entry>) -> Vec<Committed> {
        let mut committed = Vec::with_capacity(entries.len());
        for entry in entries {
            committed.push(match entry.get_entry_type() {
                EntryType::EntryNormal => said(entry),
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    let (index, term) = (LogIndex(entry.index), Term(entry.term));
                    self.apply_change(entry.context);
                    Committed::Membership(index, term, self.membership.clone())
                }
            });
        }
        committed
    }

    /// Every node has the same log, so every node refuses the same changes here.
    pub(super) fn apply_change(&mut self, context: Bytes) {
        let applied = decode_changes(context).map_err(|Malformed(_)| ()).and_then(|changes| {
            let state = self.raft.apply_conf_change(&to_raft(&changes)).map_err(|_| ())?;
            Ok(self.membership.changed(&state, &changes))
        });
        if let Ok(membership) = applied {
            self.heard.retain(|id, _| membership.contains(*id));
            self.membership = membership;
        }
    }

    pub(super) fn note_role(&mut self, outputs: &mut Vec<Output>) {
        self.draw_election_timeout();
        let raft = &self.raft.raft;
        let leads = raft.state == StateRole::Leader;
        // Who may not stand for election hears Raft say nothing of a leader that is silent.
        let silent = !leads && self.leader_silence > 2 * self.config.election_ticks;
        let role = Role {
            term: Term(raft.term),
            leader: (raft.leader_id != 0 && !silent).then_some(NodeId(raft.leader_id)),
            leads,
            serves: leads && raft.apply_to_current_term(),
        };
        if role == self.role {
            return;
        }
        if self.handing_over && !(leads && raft.lead_transferee.is_some()) {
            self.handing_over = false;
            if self.role.leads && !leads {
                // Goes forward soon, also if the other one dies now.
                self.stand_in = Some(self.config.election_ticks / 2);
            }
        }
        if role.leader.is_some() {
            self.stand_in = None;
        }
        if role.term != self.role.term || role.leads != self.role.leads {
            self.heard.clear();
            self.begin_patience(leads);
            self.witnesses.begin_term(self.last_step);
        }
        self.role = role;
        outputs.push(Output::Role(role));
    }
}

pub(super) fn send(message: &Message, outputs: &mut Vec<Output>) {
    if let Some(bytes) = encode_message(message) {
        outputs.push(Output::Send(NodeId(message.to), bytes));
    }
}
