//! The machine: what it has, and how a step goes.

pub(crate) mod alarms;
pub(crate) mod blob_gate;
pub(crate) mod candidacy;
pub(crate) mod clock;
pub(crate) mod commands;
pub(crate) mod commits;
pub(crate) mod disk_health;
pub(crate) mod held_votes;
pub(crate) mod leading;
pub(crate) mod membership;
pub(crate) mod outcomes;
pub(crate) mod pack_requests;
pub(crate) mod promotion;
pub(crate) mod read_index;
pub(crate) mod requests;
pub(crate) mod serving;
pub(crate) mod switchover;
pub(crate) mod votes;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use standby_config::Config;
use standby_consensus::{
    AppliedPoint, Consensus, Event as Happened, Member, Membership, Output, Role,
};
use standby_replica::settings::Settings;
use standby_types::{LogIndex, NodeId, Oid, Term, Tid};
use standby_zeo::{SessionId, Transactions};
use tracing::error;

use crate::Result;
use crate::action::{Action, Ended};
use crate::caller::Caller;
use crate::facts::Facts;
use crate::input::{Input, OutcomeQuestion, PackRequest};
use crate::log_tail::LogTail;
use crate::machine::alarms::Alarms;
use crate::machine::blob_gate::Blobs;
use crate::machine::candidacy::Suitability;
use crate::machine::clock::Clock;
use crate::machine::commands::AwaitedAnswer;
use crate::machine::commits::Commits;
use crate::machine::disk_health::Disks;
use crate::machine::held_votes::HeldVote;
use crate::machine::membership::Members;
use crate::machine::promotion::PromotionStage;
use crate::machine::read_index::{Freshness, Readers};
use crate::machine::switchover::Switchover;
use crate::oids::Oids;

/// Ticks after which a starting node serves readers although it has not heard of a primary: two
/// elections could have been held.
const ORIENTATION_TICKS: u64 = 64;
/// Entries by which a node may be behind when it is given a vote, or is to be primary.
pub(crate) const NEARLY: u64 = 100;

/// What the primary keeps for each storage.
pub(crate) struct Committing {
    pub(crate) transactions: Transactions,
    /// `None` unless this node serves.
    pub(crate) oids: Option<Oids<Caller>>,
    /// The last tid given out.
    pub(crate) last_tid: Tid,
}

/// What a machine begins with.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Beginning {
    pub config: Config,
    /// This node, as the others know it.
    pub me: Member,
    /// The names of the storages that are open.
    pub storages: Vec<String>,
    /// Bytes of log that are kept for nodes that are behind.
    pub log_tail: u64,
    pub applied: LogIndex,
    /// Oids up to these are reserved or in use.
    pub ceilings: BTreeMap<String, Oid>,
    /// What administrators have decided.
    pub settings: Arc<Settings>,
    /// Why this node does not serve, as a former run has noted.
    pub superseded: Option<String>,
    /// The process has crashed again and again of late.
    pub crash_looping: bool,
}

/// See the crate.
pub struct Machine {
    pub(crate) facts: Box<dyn Facts>,
    pub(crate) config: Config,
    pub(crate) me: Member,
    /// The moment of this step.
    pub(crate) now: Duration,
    pub(crate) consensus: Consensus,
    /// What consensus wants to be done. Doing one thing may ask consensus for more: that comes
    /// after all before it.
    pub(crate) outputs: VecDeque<Output>,
    pub(crate) performing: bool,
    /// What this step wants to be done.
    actions: Vec<Action>,
    /// The names of the storages.
    pub(crate) names: Arc<[String]>,
    pub(crate) storages: BTreeMap<String, Committing>,
    /// Transactions have come or gone, or have got their locks, since the caller last counted them.
    pub(crate) transactions_changed: bool,
    pub(crate) ceilings: BTreeMap<String, Oid>,
    pub(crate) applied: LogIndex,
    pub(crate) commits: Commits,
    /// Clients that ask what became of a transaction. The node lets a client have a thousand calls
    /// without an answer.
    pub(crate) outcomes: Vec<OutcomeQuestion>,
    pub(crate) readers: Readers,
    pub(crate) freshness: Freshness,
    pub(crate) role: Role,
    /// Until when this node may serve, as was published last.
    pub(crate) lease: Option<Duration>,
    pub(crate) settings: Arc<Settings>,
    /// Answers to administrators that wait for something.
    pub(crate) watches: Vec<AwaitedAnswer>,
    pub(crate) switchover: Option<Switchover>,
    pub(crate) switchover_failed_at: Option<Duration>,
    pub(crate) disks: Disks,
    pub(crate) suitability: Suitability,
    pub(crate) held_vote: HeldVote,
    pub(crate) clock: Clock,
    /// A primary has been heard of since the start, or enough time has passed to give up on one:
    /// what this node has is as good as can be had.
    pub(crate) oriented: bool,
    /// A catch-up is under way.
    pub(crate) catching_up: bool,
    pub(crate) members: Members,
    pub(crate) log_tail: LogTail,
    pub(crate) ticks: u64,
    /// Packs that wait for undos to be applied.
    pub(crate) packs: Vec<PackRequest>,
    pub(crate) blobs: Blobs,
    /// A timeline is being begun: nothing is done for consensus meanwhile.
    pub(crate) promotion: Option<PromotionStage>,
    /// This primary has not committed its timeline's first transactions yet.
    pub(crate) opening: bool,
    pub(crate) alarms: Alarms,
    ends: Option<Ended>,
}

/// What a node is at a moment.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct OwnState<'a> {
    pub role: Role,
    pub membership: &'a Membership,
    /// The last entry applied.
    pub applied: LogIndex,
    /// It is being brought up to date from a data file.
    pub catching_up: bool,
    pub primary: Option<String>,
    /// How old its data may be; `None` if it was never level with a primary.
    pub staleness: Option<Duration>,
    /// What administrators have decided.
    pub settings: &'a Settings,
    /// Writes of the log take too long.
    pub slow_disk: bool,
    /// How long a write of the log took of late, at worst.
    pub slowest_write: Duration,
    /// The term and the index of the log's last entry.
    pub log: (Term, LogIndex),
    /// It has lost the leadership again and again.
    pub flapping: bool,
    /// Its process has crashed again and again.
    pub crash_looping: bool,
    /// It is a member of the cluster.
    pub is_member: bool,
    /// Why it does not serve, if there is an older cluster of the same name.
    pub stopped: Option<&'a str>,
    /// Commits that were acknowledged are lost on some node.
    pub alarm: Option<&'a str>,
    /// Whose vote waits long for whose, if one does.
    pub held_vote: Option<&'a str>,
    /// It leads, and a majority answers too late for it to serve.
    pub no_lease: bool,
}

impl Machine {
    /// A machine for a node that was just opened, at the monotonic time `now`, and what it wants to
    /// be done first.
    pub fn new(
        facts: Box<dyn Facts>,
        beginning: Beginning,
        consensus: Consensus,
        now: Duration,
    ) -> (Machine, Vec<Action>) {
        let Beginning { config, me, storages, log_tail, applied, ceilings, settings, .. } =
            beginning;
        let timeout = config.zeo.transaction_timeout;
        let committing = |name: &String| {
            let committing = Committing {
                transactions: Transactions::new(timeout),
                oids: None,
                last_tid: Tid::NONE,
            };
            (name.clone(), committing)
        };
        if let Some(text) = &beginning.superseded {
            error!("{text}");
        }
        let mut machine = Machine {
            now,
            readers: Readers::new(facts.wall_clock().as_nanos() as u64),
            storages: storages.iter().map(committing).collect(),
            names: storages.into(),
            alarms: Alarms::new(beginning.superseded),
            suitability: Suitability::new(beginning.crash_looping),
            log_tail: LogTail::new(log_tail),
            facts,
            config,
            me,
            consensus,
            outputs: VecDeque::new(),
            performing: false,
            actions: Vec::new(),
            transactions_changed: false,
            ceilings,
            applied,
            commits: Commits::default(),
            outcomes: Vec::new(),
            freshness: Freshness::default(),
            role: Role::default(),
            lease: None,
            settings,
            watches: Vec::new(),
            switchover: None,
            switchover_failed_at: None,
            disks: Disks::default(),
            held_vote: HeldVote::default(),
            clock: Clock::default(),
            oriented: false,
            catching_up: false,
            members: Members::default(),
            ticks: 0,
            packs: Vec::new(),
            blobs: Blobs::default(),
            promotion: None,
            opening: false,
            ends: None,
        };
        machine.publish_serving();
        machine.report();
        let first = std::mem::take(&mut machine.actions);
        (machine, first)
    }

    /// One step. `now` is a monotonic time.
    pub fn step(&mut self, now: Duration, input: Input) -> Result<Vec<Action>> {
        self.now = now;
        self.take(input)?;
        if let Some(ended) = self.ends.take() {
            self.act(Action::End(ended));
            return Ok(std::mem::take(&mut self.actions));
        }
        self.pump()?;
        self.answer_outcomes();
        self.tick_switchover()?;
        self.publish_lease();
        if cfg!(debug_assertions) {
            self.invariants();
        }
        Ok(std::mem::take(&mut self.actions))
    }

    /// The log is durable up to here.
    pub fn persisted_index(&self) -> LogIndex {
        self.consensus.persisted_index()
    }

    /// What administrators have decided.
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// True if what [`Machine::transactions`] tells may have changed since this was last asked: to
    /// count them takes as long as they are many.
    pub fn take_transactions_changed(&mut self) -> bool {
        std::mem::take(&mut self.transactions_changed)
    }

    /// Of each storage, the votes that wait for locks and the transactions between vote and the
    /// end.
    pub fn transactions(&self) -> impl Iterator<Item = (&str, usize, usize)> {
        self.storages.iter().map(|(name, storage)| {
            (name.as_str(), storage.transactions.waiting(), storage.transactions.len())
        })
    }

    /// What this node is now.
    pub fn own_state(&self) -> OwnState<'_> {
        OwnState {
            role: Role { serves: self.serves(), ..self.role },
            membership: self.consensus.membership(),
            applied: self.applied,
            catching_up: self.catching_up,
            primary: self.name_of(self.role.leader.unwrap_or_default()),
            staleness: self.staleness(),
            slowest_write: self.slowest_write(),
            slow_disk: self.is_slow(),
            settings: &self.settings,
            log: (self.consensus.last_term(), self.consensus.last_index()),
            flapping: self.is_flapping(),
            crash_looping: self.suitability.crash_looping,
            is_member: self.consensus.membership().contains(self.me.id),
            stopped: self.alarms.superseded.as_deref(),
            alarm: self.alarms.lost.as_deref(),
            held_vote: self.held_vote.text.as_deref(),
            no_lease: self.has_no_lease(),
        }
    }

    /// Fails if an invariant does not hold.
    fn invariants(&self) {
        self.consensus.invariants();
        self.commits.invariants(self.consensus.last_index());
        self.blobs.invariants();
        self.readers.invariants();
        assert_eq!(self.lease.is_some(), self.serves(), "the lease says who serves");
        assert!(self.role.serves || !self.opening, "a timeline is opened by a replica");
        let idle = self.commits.is_idle() && self.packs.is_empty() && self.outcomes.is_empty();
        assert!(self.role.serves || idle, "something is under way, and this node is not primary");
        for (name, storage) in &self.storages {
            assert!(self.role.serves || storage.oids.is_none(), "oids of {name} are handed out");
            storage.transactions.invariants();
        }
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(crate) fn end(&mut self, ended: Ended) {
        self.ends = Some(ended);
    }

    fn take(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Tick => return self.tick(),
            Input::Client(request) => return self.request(request),
            Input::Ask(ask, asker) => return self.ask(ask, asker),
            Input::Peer(message) => return self.received(message),
            Input::PeerUp(arrival) => self.members.arrived(arrival),
            Input::PeerLost(peer) => {
                self.members.gone(peer);
                return self.consensus_step(Happened::PeerLost(peer));
            }
            Input::Announced { from, storage, upload } => self.announced(from, storage, upload),
            Input::Forgotten { storage, transfer } => self.forgotten(storage, transfer),
            Input::Arrived(at, transfer) => self.arrived(at, transfer),
            Input::Persisted(written) if written.begins_log() => return self.log_begun(),
            Input::Persisted(written) => {
                return self.consensus_step(Happened::Persisted(written));
            }
            Input::EntriesFetched(fetched) => {
                return self.consensus_step(Happened::Fetched(fetched));
            }
            Input::Applied { point, ceilings, settings, finished } => {
                self.ceilings = ceilings;
                self.settings = settings;
                return self.was_applied(point, finished);
            }
            Input::Examined { storage, vote, answer } => self.examined(&storage, &vote, answer),
            // Each step looks at what can go into the log.
            Input::Encoded => {}
            Input::CaughtUp(index) => {
                self.catching_up = false;
                self.consensus_step(Happened::CaughtUp(index))?;
                self.publish_serving();
            }
            Input::Obtained { from, storage, transfer, how } => {
                return self.obtained(from, storage, transfer, how);
            }
            Input::TimelineBegun(point) => self.timeline_begun(point),
            Input::LogBegins(consensus, batch) => self.log_begins(consensus, batch),
            Input::Outdated(lineage) => self.outdated(lineage),
            Input::Bootstraps => self.bootstraps(),
            Input::RolledBack { acknowledged, by } => self.rolled_back(acknowledged, &by),
            Input::OtherCluster { node, bootstrapped } => {
                self.note_other_cluster(&node, bootstrapped)
            }
            Input::Checkpointed(index) => return self.compact(index),
            Input::Stop => {
                self.tick_acknowledged();
                self.end(Ended::Stopped);
            }
        }
        Ok(())
    }

    fn was_applied(&mut self, point: AppliedPoint, finished: Vec<SessionId>) -> Result<()> {
        self.applied = point.index;
        self.consensus_step(Happened::Applied(point))?;
        let (now, names) = (self.now, self.names.clone());
        for session in finished {
            for name in &*names {
                self.unlocked(name, |t| t.applied(now, session));
            }
        }
        self.give_oids()?;
        self.admit_readers();
        self.tick_opening();
        self.tick_watches();
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.ticks += 1;
        self.consensus_step(Happened::Tick)?;
        if !self.oriented && self.ticks > ORIENTATION_TICKS {
            self.oriented = true;
            self.publish_serving();
        }
        self.tick_transactions();
        self.give_up_on_primary()?;
        if self.lets_clients_go() {
            // Those too that have come since.
            self.act(Action::LetWritersLeave);
        }
        self.switchover_lost();
        self.tick_disks();
        self.tick_candidacy();
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
            self.publish_serving();
            self.report();
        }
        Ok(())
    }

    /// Ends transactions that hold their locks for too long.
    fn tick_transactions(&mut self) {
        let (now, names) = (self.now, self.names.clone());
        for name in &*names {
            let expired =
                self.storages.get(name).map_or_else(Vec::new, |s| s.transactions.expired(now));
            for session in expired {
                let timeout = self.config.zeo.transaction_timeout.unwrap_or_default();
                // In the words of the Python server: sites watch their logs for them.
                error!(
                    session = session.0,
                    "CRITICAL ZEO.StorageServer Transaction timeout after {} seconds",
                    timeout.as_secs()
                );
                self.end_transaction(name, session, "its transaction took too long");
            }
        }
    }

    /// Takes the locks from a transaction that holds them for too long, and ends its session.
    pub(crate) fn end_transaction(
        &mut self,
        storage: &str,
        session: SessionId,
        reason: &'static str,
    ) {
        self.act(Action::Cut(session, reason));
        let now = self.now;
        self.unlocked(storage, |t| t.abort(now, session));
    }

    pub(crate) fn name_of(&self, id: NodeId) -> Option<String> {
        let member = self.consensus.membership().members.get(&id);
        member.or_else(|| self.members.present(id)).map(|member| member.name.clone())
    }

    pub(crate) fn report(&mut self) {
        self.act(Action::Report);
    }
}
