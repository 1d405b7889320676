//! What the nodes say of themselves, and what is shown to people.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_consensus::Member;
use standby_filestorage::Hole;
use standby_primary::OwnState;
use standby_replica::lineage::{Fork, Lineage};
use standby_replica::lost_transactions::LostTail;
use standby_replica::settings::FEATURE_LEVEL;
use standby_types::lock::lock;
use standby_types::time::{time_of, utc};
use standby_types::{LogIndex, NodeId, Tid};
use tracing::warn;

use crate::cells::memory::Memory;
use crate::platform::{self, Instant};

/// Silence after which a node counts as down.
const SILENCE: Duration = Duration::from_millis(2500);
/// Lag above which a node counts as catching up.
const BEHIND: Duration = Duration::from_secs(5);

/// Seconds by which a transaction may be ahead of the clock before that is shown.
const FUTURE: u64 = 60;

/// Silence after which another process may have a node's identity: it reports twice a second.
const IDENTITY_SILENCE: Duration = Duration::from_millis(1500);

/// How far a catch-up is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CatchUp {
    /// Bytes that have come.
    pub bytes: u64,
    /// Bytes that were to come when it began, about.
    pub total_bytes: u64,
    /// Transactions that have come.
    pub transactions: u64,
    /// Since its beginning.
    pub seconds: f64,
}

/// A node's report of itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    cluster: String,
    node: String,
    id: String,
    group: String,
    serves: bool,
    primary: Option<String>,
    term: u64,
    catching_up: bool,
    applied_index: u64,
    last_tid: BTreeMap<String, String>,
    address: String,
    read_only_address: String,
    peer_address: String,
    admin_address: String,
    version: String,
    #[serde(default)]
    packing: BTreeMap<String, u32>,
    #[serde(default)]
    catch_up: Option<CatchUp>,
    /// Name, group and vote of every member.
    members: Vec<(String, String, bool)>,
    #[serde(default)]
    witness: bool,
    /// The names of the witnesses among the members.
    #[serde(default)]
    witnesses: Vec<String>,
    #[serde(default)]
    stale_seconds: Option<f64>,
    /// The highest feature level that the program knows; 0 stands for 1.
    #[serde(default)]
    knows_level: u32,
    #[serde(default)]
    feature_level: u32,
    #[serde(default)]
    failover: Vec<String>,
    #[serde(default)]
    moving_to: Option<String>,
    #[serde(default)]
    no_room: Option<String>,
    #[serde(default)]
    client_memory: (u64, u64),
    #[serde(default)]
    slow_disk: bool,
    /// How long a write of its log took of late, at worst.
    #[serde(default)]
    slowest_write_seconds: f64,
    /// Its clock when it reported, in seconds since 1970; 0 if it did not say.
    #[serde(default)]
    clock: f64,
    #[serde(default)]
    holes: BTreeMap<String, Vec<MissingHistory>>,
    #[serde(default)]
    backfilling: BTreeMap<String, u32>,
    /// The term and the index of the last entry of its log.
    #[serde(default)]
    log: (u64, u64),
    #[serde(default)]
    lineage: Lineage,
    #[serde(default)]
    lost: Vec<LostTail>,
    #[serde(default)]
    damage: Option<String>,
    #[serde(default)]
    differs: BTreeMap<String, String>,
    #[serde(default)]
    flapping: bool,
    #[serde(default)]
    crashes: bool,
    /// Its process.
    #[serde(default)]
    run: String,
    /// Up to where the members have acknowledged what is committed, by identity, as far as it
    /// knows.
    #[serde(default)]
    acknowledged: BTreeMap<String, u64>,
    #[serde(default)]
    waits: Option<String>,
    #[serde(default)]
    stopped: Option<String>,
    #[serde(default)]
    alarm: Option<String>,
    #[serde(default)]
    held_vote: Option<String>,
    #[serde(default)]
    no_lease: bool,
    #[serde(default)]
    not_let_in: BTreeMap<String, String>,
}

/// A part of the history that a node does not have: see [`standby_filestorage::Hole`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingHistory {
    /// The last transaction before it.
    pub after: String,
    /// Its last transaction.
    pub through: String,
    /// The same as times for people.
    pub from: String,
    /// See `from`.
    pub to: String,
}

impl MissingHistory {
    /// A hole as it is shown.
    pub fn of(hole: &Hole) -> MissingHistory {
        MissingHistory {
            after: hole.after.to_string(),
            through: hole.through.to_string(),
            from: utc(hole.after),
            to: utc(hole.through),
        }
    }
}

impl NodeReport {
    /// A report of this moment; `addresses` are those for clients, for readers, for peers and for
    /// administrators.
    pub fn new(
        member: &Member,
        run: &str,
        moment: &OwnState<'_>,
        last_tids: impl Iterator<Item = (String, Tid)>,
        addresses: [String; 4],
        cluster: &str,
    ) -> NodeReport {
        let [address, read_only_address, peer_address, admin_address] = addresses;
        let OwnState { role, membership, settings, .. } = *moment;
        let witnesses = membership.members.values().filter(|m| m.witness);
        let members = membership
            .members
            .values()
            .map(|m| (m.name.clone(), m.group.clone(), membership.is_voter(m.id)))
            .collect();
        NodeReport {
            cluster: cluster.into(),
            node: member.name.clone(),
            id: member.id.to_string(),
            group: member.group.clone(),
            serves: role.serves,
            primary: moment.primary.clone(),
            term: role.term.0,
            catching_up: moment.catching_up,
            applied_index: moment.applied.0,
            last_tid: last_tids.map(|(name, tid)| (name, tid.to_string())).collect(),
            address,
            read_only_address,
            peer_address,
            admin_address,
            version: env!("CARGO_PKG_VERSION").into(),
            packing: BTreeMap::new(),
            catch_up: None,
            members,
            witness: member.witness,
            witnesses: witnesses.map(|m| m.name.clone()).collect(),
            stale_seconds: moment.staleness.map(|age| age.as_secs_f64()),
            knows_level: FEATURE_LEVEL,
            feature_level: settings.level(),
            failover: settings.failover.iter().cloned().collect(),
            moving_to: settings.moving_to.clone(),
            no_room: None,
            client_memory: (0, 0),
            slow_disk: moment.slow_disk,
            slowest_write_seconds: moment.slowest_write.as_secs_f64(),
            clock: platform::wall_clock().as_secs_f64(),
            holes: BTreeMap::new(),
            backfilling: BTreeMap::new(),
            log: (moment.log.0.0, moment.log.1.0),
            lineage: settings.lineage.clone(),
            lost: Vec::new(),
            damage: None,
            differs: BTreeMap::new(),
            flapping: moment.flapping,
            crashes: moment.crash_looping,
            run: run.into(),
            acknowledged: BTreeMap::new(),
            waits: None,
            stopped: moment.stopped.map(Into::into),
            alarm: moment.alarm.map(Into::into),
            held_vote: moment.held_vote.map(Into::into),
            no_lease: moment.no_lease,
            not_let_in: BTreeMap::new(),
        }
    }

    /// The term that the node is in.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The same, with what it waits for to become a member, if it is none, and the nodes that it
    /// does not let in, and why.
    pub fn waiting(
        self,
        waits: Option<String>,
        not_let_in: BTreeMap<String, String>,
    ) -> NodeReport {
        NodeReport { waits, not_let_in, ..self }
    }

    /// The same, with the packs that are under way (the storages, and how far each is, in percent),
    /// and the catch-up.
    pub fn under_way(
        self,
        packing: BTreeMap<String, u32>,
        catch_up: Option<CatchUp>,
    ) -> NodeReport {
        NodeReport { packing, catch_up, ..self }
    }

    /// The same, with what it knows that the members have acknowledged.
    pub fn acknowledging(self, known: BTreeMap<NodeId, LogIndex>) -> NodeReport {
        let acknowledged = known.into_iter().map(|(id, index)| (id.to_string(), index.0));
        NodeReport { acknowledged: acknowledged.collect(), ..self }
    }

    /// What it knows that the members have acknowledged.
    pub fn acknowledged(&self) -> impl Iterator<Item = (NodeId, LogIndex)> {
        self.acknowledged.iter().filter_map(|(id, index)| {
            Some((NodeId(u64::from_str_radix(id, 16).ok()?), LogIndex(*index)))
        })
    }

    /// By how many seconds the last transaction is ahead of the node's clock, if that is much.
    fn future_seconds(&self) -> Option<u64> {
        let last = latest(self.last_tid.iter()).into_values().max()?;
        let ahead = time_of(last).as_secs().checked_sub(self.clock as u64)?;
        (self.clock > 0.0 && ahead > FUTURE).then_some(ahead)
    }

    /// Which history the node has.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The same, with the disk that is full, if one is, and the memory that clients' sessions hold.
    pub fn room(self, no_room: Option<String>, memory: &Memory) -> NodeReport {
        let client_memory = (memory.used() as u64, memory.limit() as u64);
        NodeReport { no_room, client_memory, ..self }
    }

    /// The same, with what is damaged on its disk, and since which transactions its storages differ
    /// from the primary's.
    pub fn damage(self, damage: Option<String>, differs: BTreeMap<String, String>) -> NodeReport {
        NodeReport { damage, differs, ..self }
    }

    /// The same, with what the node has lost by leaving a timeline.
    pub fn lost(self, lost: Vec<LostTail>) -> NodeReport {
        NodeReport { lost, ..self }
    }

    /// The same, with what the storages lack, and how far the filling of it is, in percent.
    pub fn history(
        self,
        holes: BTreeMap<String, Vec<MissingHistory>>,
        backfilling: BTreeMap<String, u32>,
    ) -> NodeReport {
        NodeReport { holes, backfilling, ..self }
    }
}

/// The latest report of each node.
#[derive(Default)]
pub struct Reports {
    own: Mutex<NodeReport>,
    heard: Mutex<Heard>,
}

/// What others have said.
struct Heard {
    /// With the moment; `None` once the node's connection has closed.
    others: BTreeMap<NodeId, (NodeReport, Option<Instant>)>,
    progress: Progress,
    /// By the nodes' identities.
    skews: BTreeMap<String, Skew>,
    /// Nodes that have gone on by themselves, and their histories.
    diverged: BTreeMap<String, Lineage>,
    /// When each node was last heard, whatever became of its connection.
    last_heard: BTreeMap<NodeId, Instant>,
    /// When this node began to listen.
    begun: Instant,
}

impl Default for Heard {
    fn default() -> Heard {
        Heard {
            others: BTreeMap::new(),
            progress: Progress::default(),
            skews: BTreeMap::new(),
            diverged: BTreeMap::new(),
            last_heard: BTreeMap::new(),
            begun: Instant::now(),
        }
    }
}

/// By how much a node's clock differs from this one's, as far as reports tell that take some time
/// to come.
#[derive(Default)]
struct Skew {
    /// Of the last reports, the difference that is least.
    last: VecDeque<f64>,
    told: bool,
}

impl Skew {
    /// Reports that must agree.
    const AGREEING: usize = 4;
    /// A difference in seconds that is too much.
    const MUCH: f64 = 0.5;
    /// One with which a clock is not used any more.
    const TOO_MUCH: f64 = 3600.0;

    fn note(&mut self, node: &str, ahead: f64) {
        self.last.push_back(ahead);
        if self.last.len() > Skew::AGREEING {
            self.last.pop_front();
        }
        match self.ahead() {
            Some(seconds) if !self.told => {
                self.told = true;
                warn!(
                    node,
                    seconds,
                    "the clock of a node is not this one's: it is ahead by so much, or behind if \
                    that is negative"
                );
            }
            None => self.told = false,
            Some(_) => {}
        }
    }

    fn ahead(&self) -> Option<f64> {
        let least = self.last.iter().copied().min_by(|a, b| a.abs().total_cmp(&b.abs()))?;
        let known = self.last.len() == Skew::AGREEING && least.abs() > Skew::MUCH;
        known.then(|| tenths(least))
    }
}

/// When the primary had applied what: what lag is measured by.
#[derive(Default)]
struct Progress(VecDeque<(Instant, u64)>);

impl Progress {
    /// Samples that are kept, about two a second.
    const LEN: usize = 10_000;

    fn note(&mut self, now: Instant, index: u64) {
        let news = self.0.back().is_none_or(|(_, last)| index > *last);
        if news {
            self.0.push_back((now, index));
        }
        if self.0.len() > Progress::LEN {
            self.0.pop_front();
        }
    }

    /// For how long the primary has had more than this.
    fn lag(&self, now: Instant, index: u64) -> Duration {
        let missing = self.0.partition_point(|(_, applied)| *applied <= index);
        self.0.get(missing).map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at))
    }
}

impl Reports {
    /// A peer has reported.
    pub fn note(&self, from: NodeId, report: NodeReport) {
        let heard = &mut *lock(&self.heard);
        // A node that began anew has another identity; its former self is forgotten.
        heard.others.retain(|id, (known, _)| *id == from || known.node != report.node);
        if report.serves {
            heard.progress.note(Instant::now(), report.applied_index);
        }
        if report.clock > 0.0 {
            let ahead = report.clock - platform::wall_clock().as_secs_f64();
            heard.skews.entry(report.id.clone()).or_default().note(&report.node, ahead);
        }
        heard.last_heard.insert(from, Instant::now());
        heard.others.insert(from, (report, Some(Instant::now())));
    }

    /// A peer does not belong to the cluster any more.
    pub fn forget(&self, peer: NodeId) {
        let mut heard = lock(&self.heard);
        heard.others.remove(&peer);
        heard.last_heard.remove(&peer);
    }

    /// Nodes that were removed and are no members any more are not shown.
    pub fn forget_removed(&self, removed: &BTreeSet<String>) {
        let own = self.own();
        let is_member = |node: &str| own.members.iter().any(|(member, _, _)| member == node);
        lock(&self.heard)
            .others
            .retain(|_, (report, _)| !removed.contains(&report.node) || is_member(&report.node));
    }

    /// A peer's connection has closed.
    pub fn lost(&self, peer: NodeId) {
        if let Some((_, at)) = lock(&self.heard).others.get_mut(&peer) {
            *at = None;
        }
    }

    /// True if another process than `run` has been this node until a moment ago.
    pub fn is_taken(&self, id: NodeId, run: &str) -> bool {
        let heard = lock(&self.heard);
        let Some((report, Some(at))) = heard.others.get(&id) else { return false };
        let known = !run.is_empty() && !report.run.is_empty();
        known && report.run != run && at.elapsed() < IDENTITY_SILENCE
    }

    /// True if a node with this name was a member when this node last reported.
    pub fn is_member(&self, name: &str) -> bool {
        lock(&self.own).members.iter().any(|(member, _, _)| member == name)
    }

    /// The highest feature level that a node is known to know.
    pub fn feature_level(&self, id: NodeId) -> u32 {
        let known = lock(&self.heard).others.get(&id).map(|(report, _)| report.knows_level);
        match id.to_string() == lock(&self.own).id {
            true => FEATURE_LEVEL,
            false => known.unwrap_or(0).max(1),
        }
    }

    /// A node has another history than this one, and neither is the beginning of the other.
    pub fn note_diverged(&self, node: &str, lineage: &Lineage) {
        lock(&self.heard).diverged.insert(node.to_owned(), lineage.clone());
    }

    /// The last transaction of each storage that any node has ever spoken of.
    pub fn last_tids(&self) -> BTreeMap<String, Tid> {
        let heard = lock(&self.heard);
        let tids = heard.others.values().flat_map(|(report, _)| &report.last_tid);
        latest(tids)
    }

    /// The last transaction of each storage that a node has lost by leaving a timeline.
    pub fn last_lost(&self) -> BTreeMap<String, Tid> {
        let own = self.own().lost;
        let heard = lock(&self.heard);
        let lost = heard.others.values().flat_map(|(report, _)| &report.lost).chain(&own);
        latest(lost.map(|tail| (&tail.storage, &tail.last)))
    }

    /// For how long a node has not been heard, or since when this one listens, if it never was.
    /// That a connection has closed does not matter here.
    pub fn silence_of(&self, id: NodeId) -> Duration {
        let heard = lock(&self.heard);
        heard.last_heard.get(&id).unwrap_or(&heard.begun).elapsed()
    }

    /// By how much this node's clock is ahead of those of a majority of the voters, if that is an
    /// hour or more: by the least of these.
    pub fn ahead_of_majority(&self, voters: &BTreeSet<NodeId>) -> Option<Duration> {
        let heard = lock(&self.heard);
        let behind = |voter: &NodeId| {
            let ahead = heard.skews.get(&voter.to_string())?.ahead()?;
            (ahead <= -Skew::TOO_MUCH).then_some(-ahead)
        };
        let behind: Vec<f64> = voters.iter().filter_map(behind).collect();
        let least = behind.iter().copied().min_by(f64::total_cmp)?;
        (behind.len() * 2 > voters.len()).then(|| Duration::from_secs_f64(least))
    }

    /// True if another node has been heard a moment ago.
    pub fn is_up(&self, id: NodeId) -> bool {
        let heard = lock(&self.heard);
        heard.others.get(&id).is_some_and(|(_, at)| is_recent(at))
    }

    /// A node that is up, holds data, and has a log that goes beyond `(term, index)`, of the groups
    /// that count.
    pub fn ahead_of(&self, log: (u64, u64), counts: impl Fn(&str) -> bool) -> Option<String> {
        let heard = lock(&self.heard);
        let found = heard.others.values().find(|(report, at)| {
            is_recent(at) && !report.witness && report.log > log && counts(&report.group)
        });
        found.map(|(report, _)| report.node.clone())
    }

    /// True if a node has said that its log's disk is slow.
    pub fn is_slow(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_some_and(|(report, _)| report.slow_disk)
    }

    /// How long a write of a node's log took of late, at worst; nothing if it has not said so.
    pub fn slowest_write(&self, id: NodeId) -> Duration {
        let heard = lock(&self.heard);
        let seconds = heard.others.get(&id).map_or(0.0, |(report, _)| report.slowest_write_seconds);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// True if a node has said that its data file is damaged.
    pub fn is_damaged(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_some_and(|(report, _)| report.damage.is_some())
    }

    /// True unless a node has said that a disk of it is full.
    pub fn has_room(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_none_or(|(report, _)| report.no_room.is_none())
    }

    /// This node has something new to report.
    pub fn note_own(&self, report: NodeReport) {
        if report.serves {
            lock(&self.heard).progress.note(Instant::now(), report.applied_index);
        }
        *lock(&self.own) = report;
    }

    /// This node's report.
    pub fn own(&self) -> NodeReport {
        lock(&self.own).clone()
    }

    /// The whole picture, as this node sees it.
    pub fn status(&self) -> Status {
        let own = self.own();
        let now = Instant::now();
        let heard = lock(&self.heard);
        let picture = |report: &NodeReport, age: Duration| Seen {
            report: report.clone(),
            age,
            lag: heard.progress.lag(now, report.applied_index),
            clock_ahead: heard.skews.get(&report.id).and_then(Skew::ahead),
        };
        let age =
            |at: &Option<Instant>| at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let mut seen: Vec<Seen> =
            heard.others.values().map(|(report, at)| picture(report, age(at))).collect();
        seen.push(picture(&own, Duration::ZERO));
        let mut status = compose(&own, &seen);
        let forks = |(node, lineage): (&String, &Lineage)| (node.clone(), lineage.forks().to_vec());
        status.diverged = heard.diverged.iter().map(forks).collect();
        status
    }
}

/// True for a moment within [`SILENCE`].
fn is_recent(at: &Option<Instant>) -> bool {
    at.is_some_and(|at| at.elapsed() < SILENCE)
}

/// The highest of the tids, given as text, of each storage.
fn latest<'a>(tids: impl Iterator<Item = (&'a String, &'a String)>) -> BTreeMap<String, Tid> {
    let mut latest = BTreeMap::new();
    for (name, tid) in tids {
        let tid = Tid(u64::from_str_radix(tid, 16).unwrap_or(0));
        let known = latest.entry(name.clone()).or_insert(tid);
        *known = tid.max(*known);
    }
    latest
}

/// A cluster at a moment, as one node sees it. The names are those of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The cluster's name.
    pub cluster: String,
    /// Changes only by forced promotion.
    pub timeline: u64,
    /// The term.
    pub term: u64,
    /// The primary's name.
    pub primary: Option<String>,
    /// What the cluster may use: see `standby feature-level`.
    #[serde(default)]
    pub feature_level: u32,
    /// The groups whose nodes vote.
    #[serde(default)]
    pub failover_groups: Vec<String>,
    /// The group that the primary is being moved to.
    #[serde(default)]
    pub moving_to: Option<String>,
    /// The forced promotions so far.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forks: Vec<Fork>,
    /// The same of nodes that have gone on by themselves.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub diverged: BTreeMap<String, Vec<Fork>>,
    /// Nodes that the primary does not let in, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub not_let_in: BTreeMap<String, String>,
    /// All nodes.
    pub nodes: Vec<NodeStatus>,
}

impl Status {
    /// How many voters there are, how many of them count when another one is lost, and how many a
    /// majority is. A voter that is full, behind, cut off or damaged counts for nothing; none does
    /// without a primary that may serve.
    pub fn voters(&self) -> (usize, usize, usize) {
        let voters = || self.nodes.iter().filter(|node| node.voter);
        let able = voters().filter(|node| node.state == "up" && node.no_room.is_none());
        let serves = self.nodes.iter().any(|node| node.role == "primary" && !node.no_lease);
        let able = if serves { able.count() } else { 0 };
        (voters().count(), able, voters().count() / 2 + 1)
    }
}

/// A node at a moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Its group.
    pub group: String,
    /// `primary`, `replica` or `witness`.
    pub role: String,
    /// Its vote counts.
    pub voter: bool,
    /// `up`, `catching-up`, `down`, `cut-off` or `damaged`.
    pub state: String,
    /// The last transaction of each storage.
    pub last_tid: BTreeMap<String, String>,
    /// The last entry applied.
    pub applied_index: u64,
    /// For how long the primary has had more than this node; `None` without a primary.
    pub lag_seconds: Option<f64>,
    /// How old what its readers see may be; `None` if that is not known.
    #[serde(default)]
    pub stale_seconds: Option<f64>,
    /// For clients that write.
    pub address: String,
    /// For clients that read.
    pub read_only_address: String,
    /// For the other nodes.
    pub peer_address: String,
    /// For administrators.
    pub admin_address: String,
    /// The program's version.
    pub version: String,
    /// Packs that are under way: the storages, and how far each is, in percent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub packing: BTreeMap<String, u32>,
    /// How far it is, while it is brought up to date from a data file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catch_up: Option<CatchUp>,
    /// Writes of its log take, or took a moment ago, longer than a second.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub slow_disk: bool,
    /// By how many seconds its clock is ahead of this node's, if that is much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ahead_seconds: Option<f64>,
    /// Which of its disks is full, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_room: Option<String>,
    /// Bytes of memory that sessions of clients hold, and may hold.
    #[serde(default)]
    pub client_memory: (u64, u64),
    /// Whose vote has waited long for whose transaction, if one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_vote: Option<String>,
    /// What its storages lack of the history.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub holes: BTreeMap<String, Vec<MissingHistory>>,
    /// How far the filling of them is, in percent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub backfilling: BTreeMap<String, u32>,
    /// The term and the index of the last entry of its log.
    #[serde(default)]
    pub log: (u64, u64),
    /// When it was last heard, in seconds since 1970 by its own clock; 0 if it was not.
    #[serde(default)]
    pub heard: f64,
    /// What it has lost by leaving a timeline.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<LostTail>,
    /// What is damaged on its disk, and no node that it reaches has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
    /// What it waits for to become a member, if it is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<String>,
    /// Why it does not serve any more: there is an older cluster of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// It leads, and a majority answers too late for it to serve.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_lease: bool,
    /// By how many seconds the last transaction is ahead of the node's clock, if that is more than
    /// a minute: a pack to the present removes nothing that was committed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub future_seconds: Option<u64>,
    /// The storages that differed from the primary's when they were compared, and from which
    /// transaction on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub differs: BTreeMap<String, String>,
    /// It has lost the leadership again and again, and does not stand for election.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub flapping: bool,
    /// Its process has crashed again and again, and it does not stand for election.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crashes: bool,
}

/// A node's report, its age, for how long the primary has had more, and by how many seconds its
/// clock is ahead.
struct Seen {
    report: NodeReport,
    age: Duration,
    lag: Duration,
    clock_ahead: Option<f64>,
}

fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

fn compose(own: &NodeReport, seen: &[Seen]) -> Status {
    let fresh = |seen: &&Seen| seen.age < SILENCE;
    let primary = seen
        .iter()
        .filter(|seen| seen.report.serves && fresh(seen))
        .map(|seen| &seen.report)
        .max_by_key(|report| report.term);
    // The primary knows the members; without it, whoever was last told.
    let members = primary.unwrap_or(own).members.clone();
    let mut nodes: Vec<NodeStatus> = seen
        .iter()
        .map(|one| {
            let report = &one.report;
            let voter = members.iter().any(|(name, _, voter)| *name == report.node && *voter);
            let is_primary = primary.is_some_and(|p| p.id == report.id);
            let state = if !fresh(&one) {
                "down"
            } else if report.damage.is_some() || report.alarm.is_some() {
                "damaged"
            } else if report.stopped.is_some() {
                "cut-off"
            } else if report.catching_up || one.lag > BEHIND {
                "catching-up"
            } else if report.primary.is_none() {
                "cut-off"
            } else {
                "up"
            };
            NodeStatus {
                node: report.node.clone(),
                group: report.group.clone(),
                role: match (is_primary, report.witness) {
                    (true, _) => "primary",
                    (false, true) => "witness",
                    (false, false) => "replica",
                }
                .into(),
                voter,
                state: state.into(),
                // What a node said of itself grows older with its report.
                stale_seconds: report
                    .stale_seconds
                    .filter(|_| !report.witness && one.age < Duration::MAX)
                    .map(|seconds| tenths(seconds + one.age.as_secs_f64())),
                last_tid: report.last_tid.clone(),
                applied_index: report.applied_index,
                lag_seconds: primary.map(|_| tenths(one.lag.as_secs_f64())),
                address: report.address.clone(),
                read_only_address: report.read_only_address.clone(),
                peer_address: report.peer_address.clone(),
                admin_address: report.admin_address.clone(),
                version: report.version.clone(),
                packing: report.packing.clone(),
                catch_up: report.catch_up.clone().filter(|_| state == "catching-up"),
                slow_disk: report.slow_disk,
                clock_ahead_seconds: one.clock_ahead,
                no_room: report.no_room.clone(),
                client_memory: report.client_memory,
                held_vote: report.held_vote.clone(),
                holes: report.holes.clone(),
                backfilling: report.backfilling.clone(),
                log: report.log,
                heard: report.clock,
                lost: report.lost.clone(),
                damage: report.damage.clone().or_else(|| report.alarm.clone()),
                waits: report.waits.clone(),
                stopped: report.stopped.clone(),
                no_lease: report.no_lease,
                future_seconds: report.future_seconds(),
                differs: report.differs.clone(),
                flapping: report.flapping,
                crashes: report.crashes,
            }
        })
        .collect();
    for (name, group, voter) in &members {
        if !nodes.iter().any(|node| node.node == *name) {
            nodes.push(NodeStatus {
                node: name.clone(),
                group: group.clone(),
                role: match own.witnesses.contains(name) {
                    true => "witness",
                    false => "replica",
                }
                .into(),
                voter: *voter,
                state: "down".into(),
                stale_seconds: None,
                last_tid: BTreeMap::new(),
                applied_index: 0,
                lag_seconds: None,
                address: String::new(),
                read_only_address: String::new(),
                peer_address: String::new(),
                admin_address: String::new(),
                version: String::new(),
                packing: BTreeMap::new(),
                catch_up: None,
                slow_disk: false,
                clock_ahead_seconds: None,
                no_room: None,
                client_memory: (0, 0),
                held_vote: None,
                holes: BTreeMap::new(),
                backfilling: BTreeMap::new(),
                log: (0, 0),
                heard: 0.0,
                lost: Vec::new(),
                damage: None,
                waits: None,
                stopped: None,
                no_lease: false,
                future_seconds: None,
                differs: BTreeMap::new(),
                flapping: false,
                crashes: false,
            });
        }
    }
    nodes.sort_by(|a, b| a.node.cmp(&b.node));
    Status {
        cluster: own.cluster.clone(),
        timeline: own.lineage.timeline(),
        term: seen.iter().map(|seen| seen.report.term).max().unwrap_or(0),
        primary: primary.map(|p| p.node.clone()),
        feature_level: primary.unwrap_or(own).feature_level,
        failover_groups: primary.unwrap_or(own).failover.clone(),
        moving_to: primary.unwrap_or(own).moving_to.clone(),
        forks: own.lineage.forks().to_vec(),
        diverged: BTreeMap::new(),
        not_let_in: primary.map_or_else(BTreeMap::new, |primary| primary.not_let_in.clone()),
        nodes,
    }
}

/// A time as `time.ctime` of Python writes it, in UTC.
pub fn ctime(since_epoch: Duration) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = since_epoch.as_secs();
    let (year, month, day) = standby_types::time::date_of(since_epoch);
    format!(
        "{} {} {day:2} {:02}:{:02}:{:02} {year}",
        DAYS[(seconds / 86_400 % 7) as usize],
        MONTHS[(month as usize - 1) % 12],
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests;
