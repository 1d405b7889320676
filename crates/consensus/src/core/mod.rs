//! The machine: Raft with the decisions that are ours.
//!
//! One step is: an event goes into Raft; whatever Raft is then ready for comes out, until it is
//! ready for nothing more. Outputs are to be performed in their order.
//!
//! What is ours: messages that need the disk wait here (`unsent`); snapshots carry no data but
//! start a catch-up, and only when that is done does Raft see them; a primary whose process dies is
//! replaced at once (`PeerLost`); election timeouts come from a seed.
//!
//! A change of membership takes effect, on each node, only when it is durable there that it is
//! committed (`held`). A node that restarts from an older checkpoint then knows that there are
//! committed changes ahead, and does not stand for election before it has taken them. Otherwise the
//! first member of a cluster, restarted with the membership of its bootstrap, would elect itself
//! alone.

mod backlog;
mod broken;
mod catch_up;
mod hand_over;
mod lease;
mod outputs;
mod witness;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::{Entry, HardState, Message, MessageType};
use raft::{RawNode, StateRole};
use standby_types::{Disk, LogIndex, Mutation, NodeId, Term, mutation};

use self::backlog::Backlog;
pub use self::broken::Broken;
use self::hand_over::Asked;
use self::lease::{Heard, Patience};
use self::witness::Witnesses;
use crate::committed::{AppliedPoint, Committed, said};
use crate::log::{Batch, Fetch, Fetched, LogError, LogView, Point, Recovered, Written};
use crate::membership::{Change, Membership, encode_changes, to_raft};
use crate::message::PeerMessage;

/// Bytes of proposed entries that may be without a majority; then proposals are refused.
const UNCOMMITTED_LEN: u64 = 64 << 20;
/// Bytes of entries in one message.
const MESSAGE_LEN: u64 = 1 << 20;
/// Messages in flight to one follower.
const IN_FLIGHT: usize = 64;
/// Bytes of committed entries handed out in one step.
const COMMITTED_LEN: u64 = 16 << 20;

/// What a node must know to take part.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub id: NodeId,
    /// Ticks without a word from the leader before an election, at least; twice that at most.
    pub election_ticks: usize,
    /// Ticks for which nodes wait for each other at most where the network is slow; with no more
    /// than `election_ticks`, they do not look at that.
    pub most_patience_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Length of a tick.
    pub tick: Duration,
    /// Where election timeouts come from.
    pub seed: u64,
    /// This node votes, but holds no data and never stands for election.
    pub witness: bool,
    /// Bytes of committed entries that are handed out before the storage has applied them; more
    /// stay in the log.
    pub unapplied_len: u64,
}

/// Something has happened.
#[derive(Debug)]
pub enum Event {
    /// A tick's time has passed.
    Tick,
    /// A peer has sent something.
    Received(PeerMessage),
    /// Batches are durable.
    Persisted(Written),
    /// Entries are applied.
    Applied(AppliedPoint),
    /// Entries were read from the log.
    Fetched(Fetched),
    /// The connection to a peer was closed by the other side: its process is gone, most likely.
    PeerLost(NodeId),
    /// The storage holds all that the catch-up up to this index was to bring, durably.
    CaughtUp(LogIndex),
    /// What entries of the leader's log name is not to be had any more: this node is to catch up
    /// instead.
    CannotFollow,
    /// Tell by [`Output::ReadIndex`] up to where a read must see, to see all that is
    /// acknowledged by now.
    ReadIndex(u64),
}

/// Something is to be done.
#[derive(Debug)]
pub enum Output {
    /// Send to a peer; may be lost.
    Send(NodeId, Bytes),
    /// Make durable, then say so.
    Persist(Batch),
    /// Read these entries beside this machine, then say what came of it.
    Fetch(Fetch),
    /// Apply, in order, then say so.
    Commit(Vec<Committed>),
    /// The role, the term or the leader is another now.
    Role(Role),
    /// This node lacks what the leader's log no longer has: fetch the transactions from `from`,
    /// then say so. A later catch-up replaces an earlier one.
    CatchUp {
        /// Who has them.
        from: NodeId,
        /// The state to reach.
        target: AppliedPoint,
    },
    /// The answer to [`Event::ReadIndex`]. There is none if the leader is lost meanwhile.
    ReadIndex(u64, LogIndex),
    /// Entries up to this index may be removed from disk.
    Purge(LogIndex),
    /// Something is wrong that Raft rules out: a disk has forgotten what was durable on it.
    Broken(Broken),
}

/// What this node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Role {
    /// The term.
    pub term: Term,
    /// Who leads, if that is known.
    pub leader: Option<NodeId>,
    /// This node leads.
    pub leads: bool,
    /// This node leads, and has applied all that its predecessors committed: it may serve.
    pub serves: bool,
}

/// How far a follower is, as the leader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Entries up to here are durable there.
    pub matched: LogIndex,
    /// It has answered within an election timeout.
    pub active: bool,
    /// It is being brought up to date from the data file.
    pub catching_up: bool,
}

/// What a node does in elections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Candidacy {
    /// It stands, and it votes.
    #[default]
    Stands,
    /// It votes for others only.
    VotesOnly,
    /// It has lost some of what it had: it neither stands nor votes.
    Abstains,
}

/// A proposal was not taken: this node does not lead, or too much is without a majority already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this node is not the leader, or cannot take more entries now")]
pub struct NotLeader;

/// See the module.
pub struct Consensus {
    raft: RawNode<LogView>,
    config: Config,
    membership: Membership,
    role: Role,
    /// Where the storage stands.
    applied: LogIndex,
    /// Readies in order of their number, until they are durable.
    unsent: VecDeque<Unsent>,
    /// Committed entries from a change of membership on, with the ready that makes it durable
    /// that they are committed.
    held: VecDeque<(u64, Vec<Entry>)>,
    backlog: Backlog,
    /// What the storage is to get next is being read from the log.
    fetching: bool,
    /// A snapshot message that waits for the catch-up it asks for.
    catching_up: Option<Message>,
    /// For how many ticks each follower has not been heard to have caught up.
    awaited: BTreeMap<u64, usize>,
    /// When the last heartbeat was sent that each peer has answered, in this term; at least when
    /// the term began, if it has answered anything.
    heard: BTreeMap<NodeId, Heard>,
    patience: Patience,
    last_step: Duration,
    /// The term that this node will know of after a crash, at least.
    durable_term: u64,
    /// How long the last sync took.
    last_sync: Duration,
    /// Ticks for which it votes for nobody, unless a leader is heard before: until it started it
    /// may have followed one, who still counts on that.
    quiet: usize,
    /// Ticks until this node stands for election because the primary's process died, or because it
    /// handed the leadership to one that did not take it.
    stand_in: Option<usize>,
    /// The leadership is being handed over, or was when this node last led.
    handing_over: bool,
    /// This node was asked to take the leadership, and has to apply a change of membership first.
    asked_to_stand: Option<Asked>,
    /// Ticks since the leader was heard.
    leader_silence: usize,
    witnesses: Witnesses,
    candidacy: Candidacy,
    /// What Raft draws its timeout for; another one means a new draw.
    drawn_for: (u64, StateRole, u64),
    /// What was drawn, as a part of 2^32.
    drawn: u32,
    random: u64,
}

struct Unsent {
    number: u64,
    needs_disk: bool,
    term: u64,
    since: Duration,
    messages: Vec<Message>,
}

impl Consensus {
    /// Continues with a recovered log, of which entries up to `applied` have been applied.
    pub fn new(
        config: Config,
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        recovered: &Recovered,
        applied: AppliedPoint,
    ) -> Result<Consensus, LogError> {
        let conf_state = applied.membership.to_conf_state();
        let mut view = LogView::new(disk, dir.clone(), recovered, conf_state);
        view.set_commit(applied.index);
        let (index, membership) = (applied.index, applied.membership.clone());
        view.set_applied(applied);
        let raft_config = raft::Config {
            id: config.id.0,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied: index.0,
            max_size_per_msg: MESSAGE_LEN,
            max_inflight_msgs: IN_FLIGHT,
            check_quorum: !mutation::on(Mutation::StalePrimaryAnswers),
            pre_vote: true,
            max_uncommitted_size: UNCOMMITTED_LEN,
            max_committed_size_per_ready: COMMITTED_LEN,
            // Never reached: that of a node that does not stand for election.
            max_election_tick: usize::MAX,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft =
            RawNode::new(&raft_config, view, &logger).map_err(|error| LogError::Damaged {
                path: dir,
                offset: 0,
                reason: format!("the log does not fit the checkpoint: {error}"),
            })?;
        let mut consensus = Consensus {
            drawn_for: (u64::MAX, StateRole::Follower, 0),
            drawn: 0,
            random: config.seed,
            raft,
            membership,
            role: Role::default(),
            applied: index,
            unsent: VecDeque::new(),
            held: VecDeque::new(),
            backlog: Backlog::new(config.unapplied_len),
            fetching: false,
            catching_up: None,
            awaited: BTreeMap::new(),
            heard: BTreeMap::new(),
            patience: Patience::default(),
            last_step: Duration::ZERO,
            durable_term: recovered.hard_state.term,
            last_sync: Duration::ZERO,
            quiet: config.election_ticks.max(config.most_patience_ticks),
            stand_in: None,
            handing_over: false,
            asked_to_stand: None,
            leader_silence: 0,
            witnesses: Witnesses::default(),
            candidacy: Candidacy::Stands,
            config,
        };
        consensus.draw_election_timeout();
        if consensus.membership.voters.iter().eq([&consensus.config.id]) {
            // Nobody else to ask.
            let _ = consensus.raft.campaign();
        }
        Ok(consensus)
    }

    /// A log that holds nothing and begins after `applied`, in a term that is not below `term`, and
    /// what makes it so on disk: until that is durable ([`Written::begins_log`]), the machine must
    /// not be used. Nothing of the former log counts any more: only a forced promotion may do this.
    pub fn anew(
        config: Config,
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        applied: AppliedPoint,
        term: Term,
    ) -> Result<(Consensus, Batch), LogError> {
        let start = Point { index: applied.index, term: applied.term };
        let hard_state = HardState {
            term: term.0.max(start.term.0),
            commit: start.index.0,
            ..HardState::default()
        };
        let recovered = Recovered { hard_state: hard_state.clone(), start, ..Recovered::default() };
        let batch = Batch { reset: Some(start), hard_state: Some(hard_state), ..Batch::default() };
        Ok((Consensus::new(config, disk, dir, &recovered, applied)?, batch))
    }

    /// The entries after `index` up to the last one, whether they are known to be committed or not;
    /// changes of membership say nothing.
    ///
    /// A forced promotion applies them: whatever was acknowledged may be among them, and nobody is
    /// left who could tell.
    pub fn remaining(&self, index: LogIndex) -> Result<Vec<Committed>, LogError> {
        let entries = index.0 + 1..=self.last_index().0;
        let store = self.raft.store();
        entries
            .filter_map(|at| store.entry(LogIndex(at)).transpose())
            .map(|e| Ok(said(e?)))
            .collect()
    }

    /// Fails if an invariant does not hold: for builds with debug assertions, after each step.
    pub fn invariants(&self) {
        self.raft.store().invariants();
        self.membership.invariants();
        let Role { leads, serves, leader, .. } = self.role;
        assert!(leads || !serves, "this node serves and does not lead");
        assert!(!leads || leader == Some(self.config.id), "this node leads, and another one does");
    }

    /// What this node is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The committed membership, as far as it was handed out.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The highest index that is known to be committed.
    pub fn commit_index(&self) -> LogIndex {
        LogIndex(self.raft.raft.raft_log.committed)
    }

    /// The index of the last entry that is durable here.
    pub fn persisted_index(&self) -> LogIndex {
        LogIndex(self.raft.raft.raft_log.persisted)
    }

    /// The term of the last entry.
    pub fn last_term(&self) -> Term {
        Term(self.raft.raft.raft_log.last_term())
    }

    /// The index of the last entry.
    pub fn last_index(&self) -> LogIndex {
        LogIndex(self.raft.raft.raft_log.last_index())
    }

    /// How far a node is; `None` unless this one leads.
    pub fn progress(&self, id: NodeId) -> Option<Progress> {
        let progress = self.raft.raft.prs().get(id.0).filter(|_| self.role.leads)?;
        let heard = |heard: &Heard| heard.asked + self.patience() >= self.last_step;
        Some(Progress {
            matched: LogIndex(progress.matched),
            active: id == self.config.id || self.heard.get(&id).is_some_and(heard),
            catching_up: progress.state == raft::ProgressState::Snapshot,
        })
    }

    /// Appends an entry. What is returned names it; only if an entry with this index *and term* is
    /// committed has the proposal succeeded.
    pub fn propose(
        &mut self,
        data: Bytes,
        outputs: &mut Vec<Output>,
    ) -> Result<(LogIndex, Term), NotLeader> {
        if !self.role.leads {
            return Err(NotLeader);
        }
        self.raft.propose(Vec::new(), data.into()).map_err(|_| NotLeader)?;
        let point = (self.last_index(), self.role.term);
        self.flush(outputs);
        Ok(point)
    }

    /// Changes the membership; refused while another change is under way.
    pub fn change_membership(
        &mut self,
        changes: &[Change],
        outputs: &mut Vec<Output>,
    ) -> Result<(), NotLeader> {
        if !self.role.leads || self.raft.raft.has_pending_conf() {
            return Err(NotLeader);
        }
        let context = encode_changes(changes).to_vec();
        self.raft.propose_conf_change(context, to_raft(changes)).map_err(|_| NotLeader)?;
        self.flush(outputs);
        Ok(())
    }

    /// What this node does in elections from now on.
    pub fn set_candidacy(&mut self, candidacy: Candidacy) {
        self.candidacy = candidacy;
        if !self.may_stand() {
            self.stand_in = None;
        }
    }

    fn may_stand(&self) -> bool {
        !self.config.witness && self.candidacy == Candidacy::Stands
    }

    /// Forgets entries up to `index`, which must be in a durable checkpoint.
    pub fn compact(&mut self, index: LogIndex, outputs: &mut Vec<Output>) {
        self.raft.mut_store().compact(index);
        outputs.push(Output::Purge(index));
    }

    /// One step. `now` is a monotonic time.
    pub fn step(
        &mut self,
        now: Duration,
        event: Event,
        outputs: &mut Vec<Output>,
    ) -> Result<(), LogError> {
        self.last_step = now;
        match event {
            Event::Tick => self.tick(),
            Event::Received(message) => self.receive(message.0, outputs),
            Event::Persisted(written) => self.persisted(written, outputs),
            Event::Applied(point) => {
                self.applied = point.index;
                self.raft.mut_store().set_applied(point);
                self.advance_applied();
                self.backlog.applied(self.applied);
                self.hand_out_more(outputs)?;
            }
            Event::Fetched(fetched) => self.fetched(fetched, outputs)?,
            Event::PeerLost(peer) => self.peer_lost(peer),
            Event::CaughtUp(index) => {
                let arrived = |m: &Message| m.get_snapshot().get_metadata().index == index.0;
                if let Some(message) = self.catching_up.take_if(|m| arrived(m)) {
                    self.install(message);
                }
            }
            Event::CannotFollow => self.ask_for_catch_up(outputs),
            Event::ReadIndex(key) => {
                // The leader tells requests apart by this, those of all nodes.
                let context = [self.config.id.to_bytes(), key.to_be_bytes()].concat();
                self.raft.read_index(context);
            }
        }
        self.flush(outputs);
        Ok(())
    }

    /// Tells Raft how far the storage is. A catch-up brings the storage beyond what Raft has seen;
    /// Raft learns of that part when it has seen it.
    fn advance_applied(&mut self) {
        let log = &self.raft.raft.raft_log;
        let applied = self.applied.0.min(log.committed).min(log.persisted);
        if applied > log.applied {
            self.raft.advance_apply_to(applied);
            self.stand_if_asked();
        }
    }

    fn tick(&mut self) {
        self.raft.tick();
        self.leader_silence = self.leader_silence.saturating_add(1);
        self.quiet = self.quiet.saturating_sub(1);
        self.patience.tick();
        self.remind();
        self.tick_asked_to_stand();
        if let Some(ticks) = &mut self.stand_in {
            *ticks = ticks.saturating_sub(1);
            if *ticks == 0 {
                self.stand_in = None;
                if self.raft.raft.leader_id == 0 && self.raft.raft.promotable() {
                    let _ = self.raft.campaign();
                }
            }
        }
    }

    /// Raft waits for ever for a follower to say that it has caught up; what it says may be lost.
    /// Asking again costs little: a follower that is still catching up does not begin anew.
    fn remind(&mut self) {
        let patience = 2 * self.config.election_ticks;
        let waits = |progress: &raft::Progress| progress.state == raft::ProgressState::Snapshot;
        let leads = self.role.leads;
        let awaited: Vec<u64> = (self.raft.raft.prs().iter())
            .filter(|(_, progress)| leads && waits(progress))
            .map(|(id, _)| *id)
            .collect();
        self.awaited.retain(|id, _| awaited.contains(id));
        for id in awaited {
            let ticks = self.awaited.entry(id).or_default();
            *ticks += 1;
            if *ticks >= patience {
                *ticks = 0;
                self.raft.report_snapshot(id, raft::SnapshotStatus::Failure);
            }
        }
    }

    fn receive(&mut self, mut message: Message, outputs: &mut Vec<Output>) {
        let unwanted = match message.get_msg_type() {
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
                let asked_by_leader = message.context == raft::CAMPAIGN_TRANSFER;
                self.candidacy == Candidacy::Abstains
                    || (self.quiet > 0 || self.patience.is_promised()) && !asked_by_leader
            }
            // Whoever hands over does not know yet.
            MessageType::MsgTimeoutNow => !self.may_stand(),
            _ => false,
        };
        if unwanted {
            return;
        }
        if let Some(broken) = self.is_broken(&message) {
            outputs.push(Output::Broken(broken));
            return;
        }
        let mut asked = None;
        let follows = match message.get_msg_type() {
            MessageType::MsgHeartbeatResponse => {
                asked = self.take_answer(&mut message);
                true
            }
            // With nothing in it, it is an answer to what is out of date.
            MessageType::MsgAppendResponse => message.reject || message.index > 0,
            _ => false,
        };
        if follows && self.role.leads && message.term == self.raft.raft.term {
            self.witnesses.heard(NodeId(message.from));
            self.note_heard(NodeId(message.from), asked);
        }
        let leads = matches!(
            message.get_msg_type(),
            MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
        );
        if leads && message.term >= self.raft.raft.term {
            self.leader_silence = 0;
            self.quiet = 0;
            if message.get_msg_type() == MessageType::MsgHeartbeat {
                self.promise(&message);
            }
        }
        if message.get_msg_type() == MessageType::MsgSnapshot
            && message.term >= self.raft.raft.term
            && message.get_snapshot().get_metadata().index > self.raft.raft.raft_log.committed
        {
            self.begin_catch_up(message, outputs);
            return;
        }
        if message.get_msg_type() == MessageType::MsgTimeoutNow {
            self.asked_to_stand(message);
            return;
        }
        // Raft refuses what does not fit; the sender will find out by itself.
        let _ = self.raft.step(message);
    }

    fn persisted(&mut self, written: Written, outputs: &mut Vec<Output>) {
        self.raft.mut_store().placed(&written.entries);
        let mut number = 0;
        while let Some(unsent) = self.unsent.front() {
            // What needs no disk was only waiting for those before it.
            if unsent.number > written.number && unsent.needs_disk {
                break;
            }
            number = unsent.number;
            self.durable_term = unsent.term;
            if unsent.needs_disk {
                self.last_sync = self.last_step.saturating_sub(unsent.since);
            }
            let Some(unsent) = self.unsent.pop_front() else { break };
            self.send(unsent.messages, outputs);
        }
        if number > 0 {
            self.raft.on_persist_ready(number);
            self.advance_applied();
        }
        while let Some((_, entries)) = self.held.pop_front_if(|(held, _)| *held <= number) {
            self.hand_out(entries, outputs);
        }
    }

    fn peer_lost(&mut self, peer: NodeId) {
        self.heard.remove(&peer);
        self.witnesses.lost(peer);
        if self.role.leads {
            self.raft.report_unreachable(peer.0);
            let catching_up = |p: &raft::Progress| p.state == raft::ProgressState::Snapshot;
            if self.raft.raft.prs().get(peer.0).is_some_and(catching_up) {
                // It will ask again when it is back.
                self.raft.report_snapshot(peer.0, raft::SnapshotStatus::Failure);
            }
        } else if self.raft.raft.leader_id == peer.0 {
            let term = self.raft.raft.term;
            self.raft.raft.become_follower(term, 0);
            // One after the other, so that the survivors do not split their votes. The first waits
            // a tick too, until the others have noticed as well: who still hears the leader
            // refuses.
            let me = self.config.id;
            let before = |id: &NodeId| *id < me && *id != peer;
            let rank = self.membership.data_voters().filter(before).count();
            self.stand_in = self.may_stand().then_some(1 + 3 * rank);
        }
    }

    /// How long the disk takes for a sync: the last one, or the one that it is at.
    fn sync_time(&self) -> Duration {
        let running = self.unsent.iter().find(|unsent| unsent.needs_disk);
        let running =
            running.map_or(Duration::ZERO, |first| self.last_step.saturating_sub(first.since));
        running.max(self.last_sync)
    }

    /// While nobody leads an election timeout is longer by what three syncs take: an election is
    /// one of the candidate and one of its voters, and who leads has to sync an entry. Who began
    /// anew before that would never be elected if all disks are slow at the same time.
    fn ticks_of_syncs(&self) -> usize {
        match self.raft.raft.leader_id {
            0 => self.ticks_in(3 * self.sync_time()),
            _ => 0,
        }
    }

    /// Raft draws its election timeout from the system's randomness. Here it comes from the seed:
    /// a new one whenever role, term or leader change.
    fn draw_election_timeout(&mut self) {
        let raft = &self.raft.raft;
        let drawn_for = (raft.term, raft.state, raft.leader_id);
        if drawn_for != self.drawn_for {
            self.drawn_for = drawn_for;
            // SplitMix64 (Steele, Lea, Flood 2014).
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            self.drawn = (z ^ (z >> 31)) as u32;
        }
        let timeout = match self.may_stand() {
            false => usize::MAX - 1,
            true => {
                let ticks = self.patience_ticks() + self.ticks_of_syncs();
                // Between once and twice that.
                ticks + ((ticks as u64 * u64::from(self.drawn)) >> 32) as usize
            }
        };
        let raft = &mut self.raft.raft;
        if raft.randomized_election_timeout() != timeout {
            raft.set_randomized_election_timeout(timeout);
        }
    }

    /// The hard state's term and vote, for tests that compare them with what was persisted.
    #[cfg(test)]
    fn hard_state(&self) -> raft::eraftpb::HardState {
        self.raft.raft.hard_state()
    }
}

#[cfg(test)]
mod tests;
