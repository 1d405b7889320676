//! What a node says of itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use standby_consensus::Member;
use standby_filestorage::Hole;
use standby_primary::OwnState;
use standby_replica::lineage::Lineage;
use standby_replica::lost_transactions::LostTail;
use standby_replica::settings::FEATURE_LEVEL;
use standby_types::time::{time_of, utc};
use standby_types::{LogIndex, NodeId, Tid};

use crate::cells::memory::Memory;
use crate::cells::status::latest;
use crate::platform::{self};

/// Seconds by which a transaction may be ahead of the clock before that is shown.
const FUTURE: u64 = 60;

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
    pub(super) cluster: String,
    pub(super) node: String,
    pub(super) id: String,
    pub(super) group: String,
    pub(super) serves: bool,
    pub(super) primary: Option<String>,
    pub(super) term: u64,
    pub(super) catching_up: bool,
    pub(super) applied_index: u64,
    pub(super) last_tid: BTreeMap<String, String>,
    pub(super) address: String,
    pub(super) read_only_address: String,
    pub(super) peer_address: String,
    pub(super) admin_address: String,
    pub(super) version: String,
    #[serde(default)]
    pub(super) packing: BTreeMap<String, u32>,
    #[serde(default)]
    pub(super) catch_up: Option<CatchUp>,
    /// Name, group and vote of every member.
    pub(super) members: Vec<(String, String, bool)>,
    #[serde(default)]
    pub(super) witness: bool,
    /// The names of the witnesses among the members.
    #[serde(default)]
    pub(super) witnesses: Vec<String>,
    #[serde(default)]
    pub(super) stale_seconds: Option<f64>,
    /// The highest feature level that the program knows; 0 stands for 1.
    #[serde(default)]
    pub(super) knows_level: u32,
    #[serde(default)]
    pub(super) feature_level: u32,
    #[serde(default)]
    pub(super) failover: Vec<String>,
    #[serde(default)]
    pub(super) moving_to: Option<String>,
    #[serde(default)]
    pub(super) no_room: Option<String>,
    #[serde(default)]
    pub(super) client_memory: (u64, u64),
    #[serde(default)]
    pub(super) slow_disk: bool,
    /// How long a write of its log took of late, at worst.
    #[serde(default)]
    pub(super) slowest_write_seconds: f64,
    /// Its clock when it reported, in seconds since 1970; 0 if it did not say.
    #[serde(default)]
    pub(super) clock: f64,
    #[serde(default)]
    pub(super) holes: BTreeMap<String, Vec<MissingHistory>>,
    #[serde(default)]
    pub(super) backfilling: BTreeMap<String, u32>,
    /// The term and the index of the last entry of its log.
    #[serde(default)]
    pub(super) log: (u64, u64),
    #[serde(default)]
    pub(super) lineage: Lineage,
    #[serde(default)]
    pub(super) lost: Vec<LostTail>,
    #[serde(default)]
    pub(super) damage: Option<String>,
    #[serde(default)]
    pub(super) differs: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) flapping: bool,
    #[serde(default)]
    pub(super) crashes: bool,
    #[serde(default)]
    pub(super) run: String,
    /// Up to where the members have acknowledged what is committed, by identity, as far as it
    /// knows.
    #[serde(default)]
    pub(super) acknowledged: BTreeMap<String, u64>,
    #[serde(default)]
    pub(super) waits: Option<String>,
    #[serde(default)]
    pub(super) stopped: Option<String>,
    #[serde(default)]
    pub(super) alarm: Option<String>,
    #[serde(default)]
    pub(super) held_vote: Option<String>,
    #[serde(default)]
    pub(super) no_lease: bool,
    #[serde(default)]
    pub(super) not_let_in: BTreeMap<String, String>,
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

    /// True if it is primary and may serve.
    pub fn serves(&self) -> bool {
        self.serves
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
    pub(super) fn future_seconds(&self) -> Option<u64> {
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
