//! Where the machines meet: consensus, the storages' transactions, the oids.
//!
//! One task owns them all. It waits for an event, steps, and performs what comes out; it never
//! blocks, and no lock is held. Events of this process (`TaskReport`) come before those of others:
//! whoever was told of a commit finds its locks free.
//!
//! A commit: `vote` → [`Transactions::vote`] (locks) → an examination (serials) → `finish` → a
//! place in `outgoing` → the tid and an entry of the log → durable on a majority → the applier,
//! which makes it visible and replies → `TaskReport::Applied` frees the locks.

mod alarms;
mod blob_gate;
mod candidacy;
mod clock;
mod commands;
mod disk_health;
mod held_votes;
mod membership;
mod outgoing;
mod pack_requests;
mod promotion;
mod read_index;
mod switchover;
mod votes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use standby_consensus::{
    AppliedPoint, Caution, Command, Committed, Consensus, Event as Happened, Output, Role,
};
use standby_logging::error_text::with_causes;
use standby_replica::lineage::Lineage;
use standby_replica::settings::Settings;
use standby_replica::state_dir::Note;
use standby_types::{LogIndex, Mutation, NodeId, Oid, Term, Tid, mutation};
use standby_zeo::{SessionId, Transactions, Value};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use crate::cells::apply_task::{ApplyTask, CatchUpItems, Origin};
use crate::cells::client_errors::unknown_storage;
use crate::cells::events::{Event, Request, TaskReport};
use crate::cells::log_work::LogWork;
use crate::cells::serving_state::ServingState;
use crate::cells::sessions::{Mail, SessionHandle};
use crate::cells::shared::Shared;
use crate::cells::status::OwnState;
use crate::cells::wire::LinkFrame;
use crate::peers::catch_up::fetch;
use crate::peers::link::learn;
use crate::platform;
use crate::platform::crash_notes;
use crate::primary::engine::blob_gate::Blobs;
use crate::primary::engine::clock::Clock;
use crate::primary::engine::commands::AwaitedAnswer;
use crate::primary::engine::disk_health::SlowestWrite;
use crate::primary::engine::held_votes::HeldVote;
use crate::primary::engine::outgoing::Outgoing;
use crate::primary::engine::pack_requests::PackRequest;
use crate::primary::engine::promotion::PromotionStage;
use crate::primary::engine::read_index::{Freshness, Readers};
use crate::primary::engine::switchover::Switchover;
use crate::primary::oids::{Exhausted, Oids, exhausted};
use crate::transport::handshake::PeerInfo;

/// Ticks after which a starting node serves readers although it has not heard of a primary: two
/// elections could have been held.
const ORIENTATION_TICKS: u64 = 64;
/// Entries by which a node may be behind when it is given a vote, or is to be primary.
const NEARLY: u64 = 100;
/// Bytes that an entry takes in the log beside its data, about.
const ENTRY_OVERHEAD: u64 = 64;

type Asker = (Arc<SessionHandle>, Value);

/// What the primary keeps for each storage.
struct Committing {
    transactions: Transactions,
    /// `None` unless this node serves.
    oids: Option<Oids<Asker>>,
    /// The last tid given out.
    last_tid: Tid,
}

/// An entry of ours that is not committed yet.
struct Pending {
    term: Term,
    len: usize,
    origin: Option<Origin>,
}

/// See the module.
pub struct Engine {
    shared: Arc<Shared>,
    consensus: Consensus,
    /// What consensus wants to be done. Doing one thing may ask consensus for more: that comes
    /// after all before it.
    outputs: VecDeque<Output>,
    performing: bool,
    log: mpsc::UnboundedSender<LogWork>,
    storages: BTreeMap<String, Committing>,
    ceilings: BTreeMap<String, Oid>,
    applied: LogIndex,
    pending: BTreeMap<LogIndex, Pending>,
    in_flight: usize,
    outgoing: VecDeque<Outgoing>,
    readers: Readers,
    freshness: Freshness,
    role: Role,
    settings: Arc<Settings>,
    /// The last decision that this node has proposed.
    decided: LogIndex,
    /// Nodes that were not let in, and of which the log has told.
    refused: BTreeSet<NodeId>,
    /// Answers to administrators that wait for something.
    watches: Vec<AwaitedAnswer>,
    switchover: Option<Switchover>,
    switchover_failed_at: Option<Duration>,
    /// When a better place for the primary was last looked for.
    moved_for_disks: Option<Duration>,
    /// How long the log takes.
    slowest_write: SlowestWrite,
    /// Something in a data file is damaged, and could not be mended.
    /// Something is damaged, and nobody has it: another node would be a better primary.
    is_damaged: bool,
    /// That is true of a data file.
    lacks_data: bool,
    /// The process had crashed again and again before it was started.
    crashes: bool,
    /// When this node has lost the leadership.
    losses: VecDeque<Duration>,
    /// When a primary was last known.
    primary_known_at: Duration,
    caution: Caution,
    held_vote: HeldVote,
    clock: Clock,
    /// A primary has been heard of since the start, or enough time has passed to give up on one:
    /// what this node has is as good as can be had.
    oriented: bool,
    catch_up: Option<JoinHandle<()>>,
    /// Peers whose connections are open, by identity: name, group, address.
    present: BTreeMap<NodeId, PeerInfo>,
    /// Checkpoints that the log still reaches back to, with the bytes committed before each.
    checkpoints: VecDeque<(LogIndex, u64)>,
    log_bytes: u64,
    ticks: u64,
    /// Packs that wait for undos to be applied.
    packs: Vec<PackRequest>,
    blobs: Blobs,
    /// A timeline is being begun: nothing is done for consensus meanwhile.
    turn: Option<PromotionStage>,
    /// This primary has not committed its timeline's first transactions yet.
    opening: bool,
    /// Why the engine is to end.
    ends: Option<Ended>,
    /// Why this node does not serve: there is an older cluster of the same name.
    superseded: Option<String>,
    /// Commits that were acknowledged are lost on some node.
    alarm: Option<String>,
    /// Since when this node leads without a lease.
    lease_lost_at: Option<Duration>,
    /// When the log last spoke of that.
    lease_told_at: Option<Duration>,
}

/// Why the engine has ended.
pub enum Ended {
    /// It was told to.
    Stopped,
    /// This node's timeline is over; to be started again, for another one.
    ComesOver(Lineage),
    /// To be started again, to found the cluster.
    Founds,
    /// This node's disk was put back to an earlier state, and how that is known; to be started
    /// again, as a new one.
    RolledBack(String),
}

impl Engine {
    /// An engine for a node that was just opened.
    pub fn new(
        shared: Arc<Shared>,
        consensus: Consensus,
        log: mpsc::UnboundedSender<LogWork>,
        ceilings: BTreeMap<String, Oid>,
        applied: LogIndex,
    ) -> Engine {
        let timeout = shared.config.zeo.transaction_timeout;
        let committing = |name: &String| {
            let committing = Committing {
                transactions: Transactions::new(timeout),
                oids: None,
                last_tid: Tid::NONE,
            };
            (name.clone(), committing)
        };
        let storages = shared.storages.keys().map(committing).collect();
        let first_question = shared.wall_clock().as_nanos() as u64;
        let settings = shared.settings();
        let superseded =
            shared.state.note(&*shared.disk, Note::Superseded).unwrap_or_else(|error| {
                error!("cannot read whether this node serves: {}", with_causes(&error));
                None
            });
        if let Some(text) = &superseded {
            error!("{text}");
        }
        let crashes = crash_notes::are_many(&*shared.disk, &shared.state.0);
        Engine {
            shared,
            consensus,
            outputs: VecDeque::new(),
            performing: false,
            log,
            storages,
            ceilings,
            applied,
            pending: BTreeMap::new(),
            in_flight: 0,
            outgoing: VecDeque::new(),
            readers: Readers::new(first_question),
            freshness: Freshness::default(),
            role: Role::default(),
            settings,
            decided: LogIndex(0),
            refused: BTreeSet::new(),
            watches: Vec::new(),
            switchover: None,
            switchover_failed_at: None,
            moved_for_disks: None,
            slowest_write: SlowestWrite::default(),
            is_damaged: false,
            lacks_data: false,
            crashes,
            losses: VecDeque::new(),
            primary_known_at: Duration::ZERO,
            caution: Caution::None,
            clock: Clock::default(),
            held_vote: HeldVote::default(),
            oriented: false,
            catch_up: None,
            present: BTreeMap::new(),
            checkpoints: VecDeque::new(),
            log_bytes: 0,
            ticks: 0,
            packs: Vec::new(),
            blobs: Blobs::default(),
            turn: None,
            opening: false,
            ends: None,
            superseded,
            alarm: None,
            lease_lost_at: None,
            lease_told_at: None,
        }
    }

    /// Runs until told to stop.
    pub async fn run(
        mut self,
        mut internal: mpsc::UnboundedReceiver<TaskReport>,
        mut events: mpsc::Receiver<Event>,
    ) -> anyhow::Result<Ended> {
        let mut ticker = tokio::time::interval(self.shared.tick());
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.publish_standing();
        self.report_status();
        loop {
            let event = tokio::select! {
                biased;
                Some(told) = internal.recv() => {
                    self.internal(told)?;
                    None
                }
                _ = ticker.tick() => {
                    self.tick()?;
                    None
                }
                Some(event) = events.recv() => Some(event),
            };
            if let Some(event) = event {
                while let Ok(told) = internal.try_recv() {
                    self.internal(told)?;
                }
                if !self.event(event)? {
                    return Ok(Ended::Stopped);
                }
            }
            if let Some(ended) = self.ends.take() {
                return Ok(ended);
            }
            self.pump()?;
            self.tick_switchover()?;
            self.publish_lease();
            if cfg!(debug_assertions) {
                self.invariants();
            }
        }
    }

    /// Fails if an invariant does not hold: after each event in builds with debug assertions, as the
    /// simulator's is.
    fn invariants(&self) {
        let in_flight: usize = self.pending.values().map(|pending| pending.len).sum();
        assert_eq!(self.in_flight, in_flight, "bytes of entries that are not committed");
        let last = self.consensus.last_index();
        assert!(self.pending.keys().all(|index| *index <= last), "an entry beyond the log");
        let idle = self.pending.is_empty() && self.outgoing.is_empty() && self.packs.is_empty();
        assert!(self.role.serves || idle, "something is under way, and this node is not primary");
        for (name, storage) in &self.storages {
            assert!(self.role.serves || storage.oids.is_none(), "oids of {name} are handed out");
            storage.transactions.invariants();
        }
    }

    fn internal(&mut self, told: TaskReport) -> anyhow::Result<()> {
        match told {
            TaskReport::Persisted(written) => match written? {
                written if written.begins_log() => self.log_begun(),
                written => self.step(Happened::Persisted(written)),
            },
            TaskReport::EntriesFetched(fetched) => self.step(Happened::Fetched(fetched)),
            TaskReport::Applied { point, ceilings, settings, finished } => {
                self.applied = point.index;
                self.ceilings = ceilings;
                if !Arc::ptr_eq(&self.settings, &settings) {
                    self.shared.set_settings(settings.clone());
                    self.settings = settings;
                }
                self.step(Happened::Applied(point))?;
                let (now, shared) = (self.shared.now(), self.shared.clone());
                for session in finished {
                    for name in shared.storages.keys() {
                        self.unlocked(name, |t| t.applied(now, session));
                    }
                }
                self.give_oids()?;
                self.admit_readers();
                self.tick_opening();
                self.tick_watches();
                Ok(())
            }
            TaskReport::Examined { storage, vote, answer } => {
                self.examined(&storage, &vote, answer);
                Ok(())
            }
            // The engine looks after each event at what can go into the log.
            TaskReport::Encoded => Ok(()),
            TaskReport::CaughtUp(index) => {
                self.catch_up = None;
                self.step(Happened::CaughtUp(index))?;
                self.publish_standing();
                Ok(())
            }
            TaskReport::Obtained { from, storage, transfer, how } => {
                self.obtained(from, &storage, transfer, how)
            }
            TaskReport::TimelineBegun(point) => self.timeline_begun(point),
            TaskReport::Outdated(lineage) => {
                self.outdated(lineage);
                Ok(())
            }
            TaskReport::Founds => {
                self.founds();
                Ok(())
            }
            TaskReport::RolledBack { acknowledged, by } => {
                self.rolled_back(LogIndex(acknowledged), &by);
                Ok(())
            }
            TaskReport::OtherCluster { node, founded } => {
                self.note_other_cluster(&node, founded);
                Ok(())
            }
            TaskReport::Checkpointed(index) => self.compact(index),
            TaskReport::Fatal(error) => Err(error),
        }
    }

    /// False if the engine is to end.
    fn event(&mut self, event: Event) -> anyhow::Result<bool> {
        match event {
            Event::Peer(message, epoch) if epoch == self.shared.peers.epoch() => {
                self.received(message)?;
            }
            // It was meant for this node's former timeline.
            Event::Peer(..) => {}
            Event::Announced(from, announcement) => self.announced(from, &announcement),
            Event::Forgotten(announcement) => self.forgotten(&announcement),
            Event::Arrived(at, transfer) => self.arrived(at, transfer),
            Event::PeerUp(info) => {
                self.present.insert(info.id(), info);
            }
            Event::PeerLost(peer) => {
                self.present.remove(&peer);
                self.refused.remove(&peer);
                self.shared.peers.let_in(peer);
                self.shared.reports.lost(peer);
                self.step(Happened::PeerLost(peer))?;
            }
            Event::Client(request) => self.request(request)?,
            Event::Ask(ask, asker) => self.ask(ask, asker)?,
            // Who waits may have gone.
            Event::Settled(waits) => drop(waits.send(())),
            Event::Stop => {
                self.tick_acknowledged();
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        self.ticks += 1;
        self.shared.pulse.beat();
        self.step(Happened::Tick)?;
        if !self.oriented && self.ticks > ORIENTATION_TICKS {
            self.oriented = true;
            self.publish_standing();
        }
        let now = self.shared.now();
        for name in self.shared.clone().storages.keys() {
            let expired =
                self.storages.get(name).map_or_else(Vec::new, |s| s.transactions.expired(now));
            for session in expired {
                let timeout = self.shared.config.zeo.transaction_timeout.unwrap_or_default();
                // In the words of the Python server: sites watch their logs for them.
                error!(
                    session = session.0,
                    "CRITICAL ZEO.StorageServer Transaction timeout after {} seconds",
                    timeout.as_secs()
                );
                self.end_transaction(name, session, "its transaction took too long");
            }
        }
        self.give_up_on_primary()?;
        if self.lets_clients_go() {
            // Those too that have come since.
            self.shared.sessions.let_writers_leave();
        }
        self.switchover_lost();
        self.tick_disks();
        self.tick_caution();
        self.tick_lease();
        if self.opening {
            self.open_timeline()?;
        }
        self.tick_watches();
        self.packs_that_waited()?;
        self.tick_held_votes();
        if self.ticks.is_multiple_of(2) {
            self.tick_membership()?;
        }
        if self.ticks.is_multiple_of(10) {
            self.tick_blobs()?;
            self.tick_freshness()?;
            self.tick_lost()?;
            self.tick_acknowledged();
            self.tick_clock();
            self.publish_standing();
            self.report_status();
        }
        Ok(())
    }

    /// Takes the locks from a transaction that holds them for too long, and closes its session.
    fn end_transaction(&mut self, storage: &str, session: SessionId, reason: &str) {
        let now = self.shared.now();
        if let Some(session) = self.shared.sessions.get(session) {
            session.cut(reason);
        }
        self.unlocked(storage, |t| t.abort(now, session));
    }

    fn step(&mut self, event: Happened) -> anyhow::Result<()> {
        if self.turn.is_some() {
            return Ok(());
        }
        let mut outputs = Vec::new();
        self.consensus.step(self.shared.now(), event, &mut outputs)?;
        // Before anything is acknowledged.
        self.shared.set_log_end(self.consensus.persisted_index());
        self.perform(outputs)
    }

    fn perform(&mut self, outputs: Vec<Output>) -> anyhow::Result<()> {
        self.outputs.extend(outputs);
        if std::mem::replace(&mut self.performing, true) {
            return Ok(());
        }
        while let Some(output) = self.outputs.pop_front() {
            match output {
                Output::Send(to, message) => self.shared.peers.send(to, message),
                Output::Persist(batch) => self.to_log(LogWork::Persist(batch))?,
                Output::Fetch(fetch) => {
                    let shared = self.shared.clone();
                    drop(platform::spawn_blocking(move || {
                        shared.report(TaskReport::EntriesFetched(fetch.read()));
                    }));
                }
                Output::Commit(entries) => self.committed(entries),
                Output::Role(role) => self.role_changed(role)?,
                Output::CatchUp { from, target } => self.begin_catch_up(from, target),
                Output::ReadIndex(number, index) => self.read_index(number, index)?,
                Output::Purge(index) => self.to_log(LogWork::Purge(index))?,
                Output::Broken(broken) => self.broken(broken),
            }
        }
        self.performing = false;
        Ok(())
    }

    fn to_log(&self, work: LogWork) -> anyhow::Result<()> {
        self.log.send(work).map_err(|_| anyhow::anyhow!("the log's thread has ended"))
    }

    fn committed(&mut self, entries: Vec<Committed>) {
        let mut work = Vec::with_capacity(entries.len());
        let mut changes = false;
        for entry in entries {
            let (index, term) = entry.point();
            self.blobs.committed(&entry);
            if let Committed::Command(_, _, data) = &entry {
                self.log_bytes += data.len() as u64;
            }
            self.log_bytes += ENTRY_OVERHEAD;
            let pending = self.pending.remove(&index);
            let origin = pending.and_then(|pending| {
                self.in_flight = self.in_flight.saturating_sub(pending.len);
                pending.origin.filter(|_| pending.term == term)
            });
            if let Committed::Membership(_, _, membership) = &entry {
                changes = true;
                let addresses = membership.members.values().map(|m| m.peer_address.clone());
                learn(&self.shared, addresses, true);
                self.shared.retain_acknowledged(|id| membership.contains(id));
                info!(
                    voters = membership.voters.len(), learners = membership.learners.len(),
                    members = ?membership.members.values().map(|m| &m.name).collect::<Vec<_>>(),
                    "the membership has changed"
                );
            }
            work.push((entry, origin));
        }
        self.shared.apply(ApplyTask::Entries(work));
        if changes {
            // It may tell where the primary is.
            self.publish_standing();
        }
    }

    fn role_changed(&mut self, role: Role) -> anyhow::Result<()> {
        let before = std::mem::replace(&mut self.role, role);
        if before.serves && !(role.serves && role.term == before.term) {
            if self.switchover.is_none() {
                self.note_lost_leadership();
            }
            self.demoted();
        }
        self.switchover_role_changed();
        if role.serves && !(before.serves && role.term == before.term) {
            self.promoted()?;
        }
        self.oriented |= role.leader.is_some();
        if role.leader != before.leader {
            self.blobs.leader_changed();
        }
        if role.leader.is_some() && role.leader != before.leader {
            let settled = |session: &SessionHandle| session.settled.load(Ordering::Acquire);
            let count = self.shared.sessions.cut("a primary has appeared", settled);
            let name = role.leader.and_then(|id| self.name_of(id)).unwrap_or_else(|| "?".into());
            info!(primary = name, term = %role.term, closed = count, "the primary is known");
        } else if role.leader.is_none() && before.leader.is_some() {
            warn!(term = %role.term, "there is no primary");
        }
        self.publish_standing();
        if role.serves != before.serves || role.leader != before.leader {
            self.report_status();
        }
        Ok(())
    }

    fn demoted(&mut self) {
        let count = self.shared.sessions.send_all_writers_away("this node is not primary any more");
        warn!(closed = count, "this node is not primary any more");
        for committing in self.storages.values_mut() {
            committing.transactions.clear();
            committing.oids = None;
        }
        self.pending.clear();
        self.decided = LogIndex(0);
        // What they wait for may be lost: whoever asked is told that the primary has changed.
        self.watches.clear();
        self.opening = false;
        for storage in self.shared.storages.values() {
            // A pack that was asked for may never be committed. One that runs says so again.
            storage.packing.set(None);
        }
        self.packs.clear();
        self.outgoing.clear();
        self.blobs.demoted();
        self.in_flight = 0;
    }

    fn promoted(&mut self) -> anyhow::Result<()> {
        info!(term = %self.role.term, "this node is primary");
        for (name, committing) in &mut self.storages {
            let Some(storage) = self.shared.storages.get(name) else { continue };
            let used = storage.reader().highest_oid().unwrap_or(Oid(0));
            let ceiling = self.ceilings.get(name).copied().unwrap_or(Oid(0));
            committing.last_tid = storage.reader().last_tid();
            let known = if mutation::on(Mutation::ReuseOids) { used } else { ceiling.max(used) };
            committing.oids = Some(Oids::above(known));
        }
        self.open_timeline()?;
        self.give_oids()
    }

    fn begin_catch_up(&mut self, from: NodeId, target: AppliedPoint) {
        if self.shared.member.witness {
            // It has no data to fetch.
            return self
                .shared
                .apply(ApplyTask::CatchUp { items: CatchUpItems::nothing(), target });
        }
        let address = self.address_of(from);
        let address = address
            .or_else(|| target.membership.members.get(&from).map(|m| m.peer_address.clone()));
        let Some(address) = address else {
            return warn!(node = %from, "a catch-up is asked for, but its source has no address");
        };
        if let Some(running) = self.catch_up.take() {
            running.abort();
        }
        let task = fetch(self.shared.clone(), from, address, target);
        self.catch_up = Some(tokio::spawn(task));
        self.publish_standing();
    }

    fn compact(&mut self, checkpointed: LogIndex) -> anyhow::Result<()> {
        self.checkpoints.push_back((checkpointed, self.log_bytes));
        let tail = self.shared.log_tail();
        let mut begin = None;
        while let Some((index, bytes)) = self.checkpoints.front() {
            if self.log_bytes - bytes < tail {
                break;
            }
            begin = Some(*index);
            self.checkpoints.pop_front();
        }
        if let Some(index) = begin {
            let mut outputs = Vec::new();
            self.consensus.compact(index, &mut outputs);
            self.perform(outputs)?;
        }
        Ok(())
    }

    // Clients.

    fn request(&mut self, request: Request) -> anyhow::Result<()> {
        let now = self.shared.now();
        match request {
            Request::Register { session, id, storage, read_only } => {
                self.register(session, id, storage, read_only)?;
            }
            Request::Invalidations { session, storage, id, since } => {
                self.shared.apply(ApplyTask::Invalidations { storage, session, id, since });
            }
            Request::Sync { session, id } => self.sync(session, id)?,
            Request::NewOids { session, storage, id, count } => {
                match self.storages.get_mut(&storage).and_then(|s| s.oids.as_mut()) {
                    Some(oids) => oids.want((session, id), count),
                    None => session.cut("this node is not primary"),
                }
                self.give_oids()?;
            }
            Request::Vote { session, storage, vote } => self.vote(&session, &storage, vote),
            Request::Finish { session, storage, id, transaction } => {
                self.finish(session, storage, id, transaction);
            }
            Request::Pack { session, storage, id, time, wait } => {
                self.pack(PackRequest { session, storage, id, time, wait })?;
            }
            Request::Abort { session, storage } => {
                self.unlocked(&storage, |t| t.abort(now, session));
            }
            Request::Closed { session, storage } => {
                self.shared.sessions.remove(session);
                if let Some(storage) = storage {
                    self.unlocked(&storage, |t| t.abort(now, session));
                }
            }
        }
        Ok(())
    }

    fn register(
        &mut self,
        session: Arc<SessionHandle>,
        id: Value,
        storage: String,
        read_only: bool,
    ) -> anyhow::Result<()> {
        if !self.storages.contains_key(&storage) {
            let _ = session.mailbox.send(Mail::Registered(false));
            session.answer(session.encoding().error(&id, &unknown_storage(&storage)));
            return Ok(());
        }
        if !read_only && !self.serves() {
            session.send_away("this node is not primary");
            return Ok(());
        }
        self.when_level(ApplyTask::Register { storage, session, id })
    }

    fn propose(
        &mut self,
        command: Command,
        origin: Option<Origin>,
    ) -> anyhow::Result<Option<LogIndex>> {
        let data = command.encode();
        let len = data.len();
        let mut outputs = Vec::new();
        let Ok((index, term)) = self.consensus.propose(data, &mut outputs) else {
            return Ok(None);
        };
        // Before the outputs: with a single voter, none of them can be the commit of this entry,
        // for it is not on disk yet.
        self.pending.insert(index, Pending { term, len, origin });
        self.in_flight += len;
        self.perform(outputs)?;
        Ok(Some(index))
    }

    fn give_oids(&mut self) -> anyhow::Result<()> {
        for name in self.shared.clone().storages.keys() {
            let committed = self.ceilings.get(name).copied().unwrap_or(Oid(0));
            let used = self.shared.storages[name].reader().highest_oid().unwrap_or(Oid(0));
            let Some(oids) = self.storages.get_mut(name).and_then(|s| s.oids.as_mut()) else {
                continue;
            };
            oids.committed(committed, used);
            while let Some(((session, id), granted)) = oids.grant() {
                let encoding = session.encoding();
                session.answer(match granted {
                    Ok(oids) => {
                        let list = oids.iter().map(|oid| oid.to_bytes().into()).collect();
                        encoding.reply(&id, Value::List(list))
                    }
                    Err(Exhausted) => encoding.error(&id, &exhausted()),
                });
            }
            if let Some(ceiling) = oids.proposal() {
                let command = Command::OidCeiling { storage: name.clone(), ceiling };
                if self.propose(command, None)?.is_none()
                    && let Some(oids) = self.storages.get_mut(name).and_then(|s| s.oids.as_mut())
                {
                    oids.not_taken();
                }
            }
        }
        Ok(())
    }

    // What others look at.

    fn name_of(&self, id: NodeId) -> Option<String> {
        let member = self.consensus.membership().members.get(&id).map(|m| m.name.clone());
        member.or_else(|| self.present.get(&id).map(|info| info.node.clone()))
    }

    fn publish_standing(&self) {
        // Whoever hears that this node serves looks at the lease at once.
        self.publish_lease();
        let leader = self.role.leader.filter(|id| *id != self.shared.id);
        let members = &self.consensus.membership().members;
        let address = leader.and_then(|id| self.address_of(id));
        let standing = ServingState {
            serves: self.serves() && !self.lets_clients_go(),
            other_primary: address,
            ready: self.catch_up.is_none()
                && !members.is_empty()
                && self.oriented
                && self.shared.is_whole()
                && self.superseded.is_none()
                && !self.freshness.refuses,
        };
        self.shared.standing.send_if_modified(|old| {
            let changed = *old != standing;
            if changed {
                *old = standing;
            }
            changed
        });
    }

    fn publish_lease(&self) {
        let alone = self.consensus.membership().voters.len() <= 1;
        let until = match self.consensus.lease(self.shared.now()) {
            Some(_) if alone => Duration::MAX,
            Some(until) => until,
            None => Duration::ZERO,
        };
        self.shared.lease.set(self.serves(), until);
    }

    fn report_status(&self) {
        let role = Role { serves: self.serves(), ..self.role };
        self.shared.reports.note_own(
            self.shared.own_report(OwnState {
                role: &role,
                membership: self.consensus.membership(),
                applied: self.applied,
                catching_up: self.catch_up.is_some(),
                primary: self.name_of(self.role.leader.unwrap_or_default()),
                staleness: self.staleness(),
                slowest_write: self.slowest_write(),
                slow_disk: self.is_slow(),
                settings: &self.settings,
                log: (self.consensus.last_term(), self.consensus.last_index()),
                flapping: self.is_flapping(),
                crashes: self.crashes,
                waits: (!self.consensus.membership().contains(self.shared.id))
                    .then(|| self.shared.waits())
                    .flatten(),
                stopped: self.superseded.clone(),
                alarm: self.alarm.clone(),
                held_vote: self.held_vote.text.clone(),
                no_lease: self
                    .lease_lost_at
                    .is_some_and(|at| self.shared.now() > at + alarms::NO_LEASE),
                not_let_in: self.shared.peers.refusals(),
            }),
        );
        self.shared.reports.forget_removed(&self.settings.removed);
        let own = Box::new(self.shared.reports.own());
        self.shared.peers.tell_all(&LinkFrame::Report(own));
    }
}
