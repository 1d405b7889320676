//! The cluster as one node sees it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_replica::lineage::Fork;
use standby_replica::lost_transactions::LostTail;

use crate::cells::status::SILENCE;
use crate::cells::status::report::{CatchUp, MissingHistory, NodeReport};
/// Lag above which a node counts as catching up.
const BEHIND: Duration = Duration::from_secs(5);

/// A cluster at a moment, as one node sees it. The names are those of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Status {
    pub cluster: String,
    /// Changes only by forced promotion.
    pub timeline: u64,
    pub term: u64,
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
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct NodeStatus {
    pub node: String,
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
pub(super) struct Seen {
    pub(super) report: NodeReport,
    pub(super) age: Duration,
    pub(super) lag: Duration,
    pub(super) clock_ahead: Option<f64>,
}

impl Seen {
    fn is_fresh(&self) -> bool {
        self.age < SILENCE
    }

    fn state(&self) -> &'static str {
        let report = &self.report;
        if !self.is_fresh() {
            "down"
        } else if report.damage.is_some() || report.alarm.is_some() {
            "damaged"
        } else if report.stopped.is_some() {
            "cut-off"
        } else if report.catching_up || self.lag > BEHIND {
            "catching-up"
        } else if report.primary.is_none() {
            "cut-off"
        } else {
            "up"
        }
    }
}

impl NodeStatus {
    /// A node as its report shows it. The primary is known, or not; the node votes, or not.
    fn of(one: &Seen, primary: Option<&NodeReport>, voter: bool) -> NodeStatus {
        let report = &one.report;
        let state = one.state();
        let is_primary = primary.is_some_and(|p| p.id == report.id);
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
    }

    /// A member of which nothing was ever heard.
    fn unheard(name: &str, group: &str, witness: bool, voter: bool) -> NodeStatus {
        NodeStatus {
            node: name.into(),
            group: group.into(),
            role: if witness { "witness" } else { "replica" }.into(),
            voter,
            state: "down".into(),
            ..NodeStatus::default()
        }
    }
}

pub(super) fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

pub(super) fn compose(own: &NodeReport, seen: &[Seen]) -> Status {
    let primary = seen
        .iter()
        .filter(|seen| seen.report.serves && seen.is_fresh())
        .map(|seen| &seen.report)
        .max_by_key(|report| report.term);
    // The primary knows the members; without it, whoever was last told.
    let members = primary.unwrap_or(own).members.clone();
    let votes = |name: &String| members.iter().any(|(one, _, voter)| one == name && *voter);
    let mut nodes: Vec<NodeStatus> =
        seen.iter().map(|one| NodeStatus::of(one, primary, votes(&one.report.node))).collect();
    for (name, group, voter) in &members {
        if !nodes.iter().any(|node| node.node == *name) {
            let witness = own.witnesses.contains(name);
            nodes.push(NodeStatus::unheard(name, group, witness, *voter));
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
