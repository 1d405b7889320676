//! What all tasks of a node share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use standby_config::{Config, DEFAULT_RESERVE, DEFAULT_SCRUB_RATE, Profile, Secrets, ZeoAddress};
use standby_consensus::Member;
use standby_filestorage::BlobDir;
use standby_primary::{OwnState, ServingState};
use standby_replica::lost_transactions::LostTail;
use standby_replica::settings::{SEALED_LEVEL, Settings};
use standby_replica::start::prepared::Prepared;
use standby_replica::start::self_as_member;
use standby_replica::state_dir::{Checkpoint, StateDir};
use standby_types::lock::lock;
use standby_types::{Disk, LogIndex, NodeId};
use standby_zeo::{MakeSpill, Retention, Value};
use tokio::sync::{mpsc, watch};
use tracing::{error, info};

use crate::cells::acknowledged::Acknowledged;
use crate::cells::apply_task::ApplyTask;
use crate::cells::disk_space::Room;
use crate::cells::events::{Event, TaskReport};
use crate::cells::gate::{self, Gate, StrangersLines};
use crate::cells::lease::Lease;
use crate::cells::log_work::Busy;
use crate::cells::memory::Memory;
use crate::cells::moving_address::MovingAddress;
use crate::cells::peer_links::Peers;
use crate::cells::progress::Progress;
use crate::cells::repair_sources::RepairSources;
use crate::cells::sessions::Sessions;
use crate::cells::status::{CatchUp, MissingHistory, NodeReport, Reports};
use crate::cells::storage::StorageShared;
use crate::platform::random::random_hex;
use crate::platform::watchdog::Pulse;
use crate::platform::{self, Instant};
use crate::transport::handshake::{Introduction, Wire};
use crate::transport::tls::Tls;

/// Ticks without a word after which a link is closed.
const SILENT_TICKS: u32 = 60;

/// So many pieces of damage are shown; more are counted.
const SHOWN: usize = 10;

/// What a node has opened before its tasks begin.
pub(crate) struct Opened {
    /// How clients' connections are secured.
    pub tls: Option<Tls>,
    /// How connections between nodes are secured.
    pub wire: Wire,
    /// Who may have what is damaged here.
    pub helpers: Arc<RepairSources>,
    /// What this node has lost by leaving timelines.
    pub lost: Vec<LostTail>,
}

/// Where what tasks tell each other goes.
pub(crate) struct Queues {
    /// To the primary's machine, from this process's own threads.
    pub internal: mpsc::UnboundedSender<TaskReport>,
    /// To the primary's machine, from tasks that serve others.
    pub events: mpsc::Sender<Event>,
    /// To the applier.
    pub work: mpsc::UnboundedSender<ApplyTask>,
}

/// What all tasks of a node share.
pub(crate) struct Shared {
    pub config: Config,
    /// Who this node is.
    pub id: NodeId,
    /// As the others know it.
    pub member: Member,
    /// Where the node's files are.
    pub disk: Arc<dyn Disk>,
    pub state: StateDir,
    pub storages: BTreeMap<String, StorageShared>,
    pub sessions: Sessions,
    pub peers: Peers,
    /// What the nodes say of themselves.
    pub reports: Reports,
    /// The node's role.
    pub standing: watch::Sender<ServingState>,
    /// Of the addresses at which clients write.
    pub moving: MovingAddress,
    pub lease: Lease,
    /// Storages that nobody may write to.
    pub read_only_storages: Arc<[String]>,
    /// How clients' connections are secured.
    pub tls: Option<Tls>,
    /// How connections between nodes are secured.
    pub wire: Wire,
    /// The cluster's feature level is known, and at that connections between nodes are not sealed.
    unsealed: AtomicBool,
    /// Makes temporary files.
    pub make_spill: MakeSpill,
    /// How long the log's disk takes.
    pub log_busy: Busy,
    /// Clients' connections, parked and forwarded ones included.
    pub clients: Arc<Gate>,
    /// What sessions of clients may hold.
    pub memory: Arc<Memory>,
    /// Connections to the peer address of which nobody knows yet who they are from.
    pub strangers: Arc<Gate>,
    /// What they cause in the log.
    pub strangers_lines: StrangersLines,
    /// Taken by who is about to promise this node to a bootstrap.
    pub promising: tokio::sync::Mutex<()>,
    /// Room on the disks.
    pub room: Room,
    /// Beats while the primary's machine works.
    pub pulse: Arc<Pulse>,
    /// Who may have what is damaged here.
    pub helpers: Arc<RepairSources>,
    /// What this node has lost by leaving timelines.
    pub lost: Vec<LostTail>,
    /// Up to where each node has acknowledged what is committed.
    pub acknowledged: Acknowledged,
    /// When the process started, since 1970.
    pub started: Duration,
    clock: Instant,
    run: String,
    cluster_id: Mutex<String>,
    settings: Mutex<Arc<Settings>>,
    catch_up: Mutex<Option<CatchUp>>,
    /// What the nodes prove to each other that they know.
    secrets: Mutex<Secrets>,
    /// What a bootstrap waits for.
    bootstrap: Mutex<Option<String>>,

    /// The last entry of the log that is durable.
    log_end: AtomicU64,
    applied: AtomicU64,
    unconfirmed: AtomicBool,
    internal: mpsc::UnboundedSender<TaskReport>,
    events: mpsc::Sender<Event>,
    work: mpsc::UnboundedSender<ApplyTask>,
}

impl Shared {
    /// Of a node that was just opened.
    pub(crate) fn new(
        config: Config,
        disk: Arc<dyn Disk>,
        prepared: &Prepared,
        Opened { tls, wire, helpers, lost }: Opened,
        Queues { internal, events, work }: Queues,
    ) -> anyhow::Result<Shared> {
        let state = StateDir(config.state_dir());
        let spill_dir = state.0.clone();
        let standby = config.standby.as_ref();
        let storages = config.storages.iter().filter_map(|section| {
            let source = prepared.storages.get(&section.name)?.source();
            let blobs = prepared.blobs.get(&section.name).cloned();
            Some((section.name.clone(), StorageShared::new(source, &section.path, blobs)))
        });
        let (most_clients, most_strangers) = gate::limits()?;
        Ok(Shared {
            id: prepared.id,
            member: self_as_member(&config, prepared.id),
            storages: storages.collect(),
            sessions: Sessions::default(),
            peers: Peers::default(),
            reports: Reports::default(),
            standing: watch::Sender::new(ServingState::default()),
            moving: MovingAddress::new(standby.is_some_and(|s| s.on_replica.is_some())),
            lease: Lease::default(),
            read_only_storages: (config.storages.iter())
                .filter(|section| section.read_only)
                .map(|section| section.name.clone())
                .collect(),
            tls,
            wire,
            unsealed: AtomicBool::new(is_unsealed(&prepared.checkpoint)),
            make_spill: Arc::new(move || platform::temporary_file(&spill_dir)),
            log_busy: Busy::default(),
            clients: Gate::new("clients", most_clients),
            memory: Memory::new(standby.and_then(|standby| standby.client_memory)),
            strangers_lines: StrangersLines::default(),
            strangers: Gate::new("strangers at the peer address", most_strangers),
            promising: tokio::sync::Mutex::default(),
            room: Room::default(),
            pulse: Arc::default(),
            helpers,
            lost,
            started: platform::wall_clock(),
            clock: Instant::now(),
            run: random_hex(8)?,
            cluster_id: Mutex::new(prepared.checkpoint.cluster_id.clone()),
            settings: Mutex::new(Arc::new(prepared.checkpoint.settings.clone())),
            catch_up: Mutex::default(),
            secrets: Mutex::new(standby.map_or_else(Secrets::none, |s| s.secrets.clone())),
            bootstrap: Mutex::default(),
            acknowledged: Acknowledged::new(
                prepared.checkpoint.settings.lineage.clone(),
                prepared.checkpoint.acknowledged.clone(),
            ),
            log_end: AtomicU64::new(prepared.recovered.last_index().0),
            applied: AtomicU64::new(prepared.checkpoint.index.0),
            unconfirmed: AtomicBool::new(prepared.unconfirmed),
            internal,
            events,
            work,
            state,
            disk,
            config,
        })
    }

    /// A monotonic time.
    pub(crate) fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// The time of day, since 1970. Only tids and people look at it.
    pub(crate) fn wall_clock(&self) -> Duration {
        platform::wall_clock()
    }

    /// The length of a tick.
    pub(crate) fn tick(&self) -> Duration {
        self.profile().tick()
    }

    /// How patient the node is with its network.
    pub(crate) fn profile(&self) -> Profile {
        self.config.standby.as_ref().map_or(Profile::Lan, |s| s.profile)
    }

    /// After how long without a word another node, or its machine, counts as gone.
    pub(crate) fn peer_silence(&self) -> Duration {
        silence_at(self.tick())
    }

    /// The storages have what the log says up to here.
    pub(crate) fn set_applied(&self, index: LogIndex) {
        self.applied.store(index.0, Ordering::Release);
    }

    /// See [`Shared::set_applied`]. It may go back when the node begins another timeline.
    pub(crate) fn applied(&self) -> LogIndex {
        LogIndex(self.applied.load(Ordering::Acquire))
    }

    /// The log is durable up to here.
    pub(crate) fn set_log_end(&self, index: LogIndex) {
        self.log_end.store(index.0, Ordering::Release);
    }

    /// A bootstrap waits for this; `None` if there is none.
    pub(crate) fn set_bootstrap(&self, waits: Option<String>) {
        let mut bootstrap = lock(&self.bootstrap);
        if let Some(text) = waits.as_ref().filter(|_| *bootstrap != waits) {
            info!("{text}");
        }
        *bootstrap = waits;
    }

    /// What this node waits for to become a member, if it is none.
    pub(crate) fn waits(&self) -> Option<String> {
        self.config.standby.as_ref()?;
        if let Some(bootstrap) = lock(&self.bootstrap).clone() {
            return Some(bootstrap);
        }
        let troubles = self.peers.troubles();
        let troubles = troubles.iter().map(|(address, trouble)| format!("{address}: {trouble}"));
        let troubles: Vec<_> = troubles.collect();
        Some(match troubles.is_empty() {
            true => "it waits for a primary that takes it in".to_owned(),
            false => format!("it waits for a primary that takes it in; {}", troubles.join("; ")),
        })
    }

    /// What is remembered to answer `getInvalidations`. One node alone does what its zeo.conf says;
    /// in a cluster, clients must be able to come over from another node: never less than fits.
    pub(crate) fn retention(&self) -> Retention {
        match self.config.standby {
            None => self.config.zeo.retention,
            Some(_) => Retention::default(),
        }
    }

    /// Bytes that are left free on the disks.
    pub(crate) fn reserve(&self) -> u64 {
        self.config.standby.as_ref().map_or(DEFAULT_RESERVE, |s| s.reserve)
    }

    /// Bytes per second of the data files that are compared with their checksums; `None` for none.
    pub(crate) fn scrub_rate(&self) -> Option<u64> {
        self.config.standby.as_ref().map_or(Some(DEFAULT_SCRUB_RATE), |s| s.scrub_rate)
    }

    /// Says who may help out with what is damaged here: those that are up, the primary first.
    pub(crate) fn tell_helpers(&self) {
        let mut nodes = self.reports.status().nodes;
        nodes.retain(|node| {
            node.node != self.member.name
                && !node.peer_address.is_empty()
                && node.role != "witness"
                && node.state != "down"
        });
        nodes.sort_by_key(|node| node.role != "primary");
        let addresses: Vec<_> = nodes.into_iter().map(|node| node.peer_address).collect();
        // Just after the start nobody has been heard of: those of before may be there.
        if !addresses.is_empty() {
            self.helpers.set(self.introduction(), addresses);
        }
    }

    /// What is damaged in the data files and among the blobs, and has not been repaired.
    pub(crate) fn damage(&self) -> Option<String> {
        self.storages.iter().find_map(|(name, storage)| {
            let blocks = storage.reader().damage().blocks.into_iter();
            let blocks = blocks.map(|offset| format!("at byte {offset}"));
            let blobs = storage.blobs.as_ref().map(BlobDir::damage).unwrap_or_default().blobs;
            let blobs = blobs.into_iter().map(|(oid, tid)| format!("the blob of {oid} at {tid}"));
            let all: Vec<_> = blocks.chain(blobs).collect();
            let more = all.len().saturating_sub(SHOWN);
            let shown = all[..all.len() - more].join(", ");
            let more = if more > 0 { format!(", and {more} more") } else { String::new() };
            (!all.is_empty()).then(|| format!("storage {name}, {shown}{more}"))
        })
    }

    /// True if some of what the data files held is lost. A blob that is lost is not needed to
    /// commit, nor to vote.
    pub(crate) fn lacks_data(&self) -> bool {
        self.storages.values().any(|storage| !storage.reader().damage().blocks.is_empty())
    }

    /// Since when the data files are not those of the primary, if they are not.
    fn differences(&self) -> BTreeMap<String, String> {
        let since = |(name, storage): (&String, &StorageShared)| {
            lock(&storage.differs).map(|tid| (name.clone(), tid.to_string()))
        };
        self.storages.iter().filter_map(since).collect()
    }

    /// Bytes of log that are kept for nodes that are behind.
    pub(crate) fn log_tail(&self) -> u64 {
        self.config.standby.as_ref().map_or(16 << 20, |s| s.log_tail)
    }

    /// What this node says of itself to others.
    pub(crate) fn introduction(&self) -> Introduction {
        let standby = self.config.standby.as_ref();
        Introduction {
            member: self.member.clone(),
            cluster: self.cluster_name().into(),
            cluster_id: self.cluster_id(),
            secrets: lock(&self.secrets).clone(),
            wire: self.wire.clone(),
            unsealed: self.unsealed.load(Ordering::Acquire),
            join_token: standby.map_or_else(String::new, |s| s.join_token.clone()),
            lineage: self.settings().lineage.clone(),
            run: self.run.clone(),
            bootstrapped: Some(self.settings().bootstrapped),
            log_end: Some(LogIndex(self.log_end.load(Ordering::Acquire))),
            silence: self.peer_silence(),
        }
    }

    pub(crate) fn cluster_name(&self) -> &str {
        self.config.standby.as_ref().map_or("alone", |s| &s.cluster)
    }

    /// True if this node belongs to a cluster.
    pub(crate) fn belongs(&self) -> bool {
        !lock(&self.cluster_id).is_empty()
    }

    /// Drawn when the cluster was bootstrapped; empty as long as this node belongs to none.
    pub(crate) fn cluster_id(&self) -> String {
        lock(&self.cluster_id).clone()
    }

    /// This node belongs to that cluster from now on.
    pub(crate) fn set_cluster_id(&self, id: &str) {
        *lock(&self.cluster_id) = id.to_owned();
    }

    /// A catch-up is so far, or has ended.
    pub(crate) fn show_catch_up(&self, progress: Option<CatchUp>) {
        *lock(&self.catch_up) = progress;
    }

    /// What administrators have decided, as far as it is applied here.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        lock(&self.settings).clone()
    }

    /// It is another now.
    pub(crate) fn set_settings(&self, settings: Arc<Settings>) {
        let unsealed = settings.level() < SEALED_LEVEL;
        self.acknowledged.begin(&settings.lineage);
        *lock(&self.settings) = settings;
        let was_unsealed = self.unsealed.swap(unsealed, Ordering::AcqRel);
        if was_unsealed && !unsealed && matches!(self.wire, Wire::Sealed(_)) {
            self.peers.end_links();
        }
    }

    /// True if a peer must still confirm that the data files belong to the cluster's history.
    pub(crate) fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.load(Ordering::Acquire)
    }

    /// A peer has confirmed it.
    pub(crate) fn confirm(&self) {
        self.unconfirmed.store(false, Ordering::Release);
    }

    /// Tells the primary's machine, from a thread of this process.
    pub(crate) fn report(&self, told: impl Into<TaskReport>) {
        // Without one the process is ending.
        let _ = self.internal.send(told.into());
    }

    /// Tells the primary's machine, from a task that serves others.
    pub(crate) async fn tell(&self, event: impl Into<Event>) {
        let _ = self.events.send(event.into()).await;
    }

    /// Gives work to the applier.
    pub(crate) fn apply(&self, work: ApplyTask) {
        let _ = self.work.send(work);
    }

    /// What `info` tells clients.
    pub(crate) fn short_info(&self, storage: &str) -> Value {
        let Some(storage) = self.storages.get(storage) else { return Value::Dict(Vec::new()) };
        Value::Dict(vec![
            (Value::str("length"), Value::Int(storage.reader().len() as i64)),
            (Value::str("size"), Value::Int(storage.reader().size() as i64)),
        ])
    }

    /// What this node says of itself.
    pub(crate) fn own_report(&self, moment: &OwnState<'_>) -> NodeReport {
        fn text(address: Option<&impl ToString>) -> String {
            address.map_or_else(String::new, ToString::to_string)
        }
        let standby = self.config.standby.as_ref();
        let last_tids =
            |(name, s): (&String, &StorageShared)| (name.clone(), s.reader().last_tid());
        // The one that others can use, if there are several.
        let mut zeo = self.config.zeo.addresses.iter();
        let tcp = zeo.find(|address| matches!(address, ZeoAddress::Tcp(_)));
        let addresses = [
            text(tcp.or(self.config.zeo.addresses.first())),
            text(standby.and_then(|s| s.read_only_address.as_ref())),
            self.member.peer_address.clone(),
            text(standby.map(|s| &s.admin_address)),
        ];
        let tids = self.storages.iter().map(last_tids);
        let cluster = self.cluster_name();
        NodeReport::new(&self.member, &self.run, moment, tids, addresses, cluster)
            .waiting((!moment.is_member).then(|| self.waits()).flatten(), self.peers.refusals())
            .under_way(self.percents(|storage| &storage.packing), lock(&self.catch_up).clone())
            .room(self.room.reason(), &self.memory)
            .acknowledging(self.acknowledged.all())
            .history(self.holes(), self.percents(|storage| &storage.backfilling))
            .lost(self.lost.clone())
            .damage(self.damage(), self.differences())
    }

    fn percents(&self, of: impl Fn(&StorageShared) -> &Progress) -> BTreeMap<String, u32> {
        let percent = |(name, storage): (&String, &StorageShared)| {
            of(storage).percent().map(|percent| (name.clone(), percent))
        };
        self.storages.iter().filter_map(percent).collect()
    }

    fn holes(&self) -> BTreeMap<String, Vec<MissingHistory>> {
        let missing = |(name, storage): (&String, &StorageShared)| {
            let holes: Vec<_> = storage.reader().holes().iter().map(MissingHistory::of).collect();
            (!holes.is_empty()).then(|| (name.clone(), holes))
        };
        self.storages.iter().filter_map(missing).collect()
    }

    /// True if what the data files show is a moment that was.
    pub(crate) fn is_whole(&self) -> bool {
        self.storages.values().all(|storage| storage.reader().is_whole())
    }

    /// Those for clients, and those for the other nodes.
    pub(crate) fn certificates(&self) -> impl Iterator<Item = &Tls> {
        let of_peers = match &self.wire {
            Wire::Tls(tls) => Some(&**tls),
            Wire::Plain | Wire::Sealed(_) => None,
        };
        self.tls.iter().chain(of_peers)
    }

    /// Reads the certificates and the secrets again; connections that are open keep theirs.
    pub(crate) fn reload_certificates(&self) {
        let file = self.config.standby.as_ref().and_then(|standby| standby.secret_file.as_ref());
        match file.map(|file| Secrets::read(file)) {
            Some(Ok(secrets)) => {
                info!(secrets = secrets.all().count(), "the secret-file was read again");
                *lock(&self.secrets) = secrets;
            }
            Some(Err(error)) => error!("the former secrets stay in use: {error}"),
            None => {}
        }
        for tls in self.certificates() {
            match tls.reload() {
                Ok(()) => info!("the certificates were read again"),
                Err(error) => error!("the former certificates stay in use: {error:#}"),
            }
        }
    }
}

/// True if the cluster is known to work at a level at which connections between nodes are not
/// sealed. What a node that has nothing of the cluster yet takes for its settings says nothing.
pub(crate) fn is_unsealed(checkpoint: &Checkpoint) -> bool {
    checkpoint.index > LogIndex(0) && checkpoint.settings.level() < SEALED_LEVEL
}

/// After how long without a word a node counts as gone: long after its election timeout.
pub(crate) fn silence_at(tick: Duration) -> Duration {
    tick * SILENT_TICKS
}
