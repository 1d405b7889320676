//! A running node: what its tasks share, and how they are started and stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use standby_consensus::{Config as RaftConfig, Consensus, LogWriter, Member};
use standby_filestorage::{BlobDir, Reader, Source};
use standby_types::{Disk, LogIndex, Mutation, NodeId, Tid, mutation};
use standby_zeo::{MakeSpill, Retention, Value};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use crate::applier::{Applier, Work};
use crate::ask::{Ask, here};
use crate::causes::with_causes;
use crate::certificate;
use crate::config::{
    Address, Config, DEFAULT_RESERVE, DEFAULT_SCRUB_RATE, Profile, Secrets, Standby, ZeoAddress,
};
use crate::crashes;
use crate::disk::OsDisk;
use crate::engine::{Ended, Engine, Event, Internal};
use crate::founding;
use crate::gate::{self, Gate, StrangersLines};
use crate::lineage::Lineage;
use crate::listener;
use crate::log_thread::{self, Busy};
use crate::machine::{self, Instant, Lock, TcpListener};
use crate::memory::{self, Memory};
use crate::packing::Progress;
use crate::peers::{self, CatchUp, Introduction, Peers, Wire};
use crate::read_only;
use crate::replica::Replica;
use crate::rewind::{self, LostTail};
use crate::room::{self, Room};
use crate::scrub::{self, Helpers};
use crate::sessions::Sessions;
use crate::settings::{SEALED_LEVEL, Settings};
use crate::startup::{self, Beginning};
use crate::state::{Checkpoint, Note, StateDir, random_hex};
use crate::status::{MissingHistory, Moment, NodeReport, Reports};
use crate::stream::{Listener, listen};
use crate::sync::lock;
use crate::tls::Tls;
use crate::watchdog::Pulse;

/// Ticks until an election, at least.
const ELECTION_TICKS: usize = 16;
/// Ticks between heartbeats.
const HEARTBEAT_TICKS: usize = 2;
/// How long a primary that is to end waits for transactions that have voted.
const STOPPING_GRACE: Duration = Duration::from_secs(5);
/// Ticks without a word after which a link is closed.
const SILENT_TICKS: u32 = 60;
/// Bytes of committed entries that are held in memory until they are applied.
const UNAPPLIED_LEN: u64 = if cfg!(feature = "simulated") { 4 << 10 } else { 64 << 20 };
/// Requests of clients and messages of peers that wait for the engine.
const EVENTS: usize = 1024;
/// So many pieces of damage are shown; more are counted.
const SHOWN: usize = 10;
/// How often it is looked whether the lease has run out.
const LEASE_CHECK: Duration = Duration::from_millis(20);

/// What tasks that serve clients must know of the node's role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// This node is primary and may serve.
    pub serves: bool,
    /// Another node is primary; its peer address.
    pub other_primary: Option<String>,
    /// Read-only clients can be served.
    pub ready: bool,
}

/// Until when a primary may serve its clients without hearing from a majority.
///
/// Looked at by a thread that does nothing else, and before each request.
#[derive(Default)]
pub struct Lease {
    serves: AtomicBool,
    until: AtomicU64,
}

impl Lease {
    /// Sets it; `until` is a monotonic time.
    pub fn set(&self, serves: bool, until: Duration) {
        self.until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
        self.serves.store(serves, Ordering::Release);
    }

    /// True if this node serves and nobody else can be serving.
    pub fn holds(&self, now: Duration) -> bool {
        let stale = mutation::on(Mutation::StalePrimaryAnswers);
        self.serves.load(Ordering::Acquire)
            && (stale || u128::from(self.until.load(Ordering::Acquire)) > now.as_nanos())
    }

    /// True if it serves, but should not any more.
    fn overdue(&self, now: Duration) -> bool {
        self.serves.load(Ordering::Acquire) && !self.holds(now)
    }
}

/// Counters of a storage, as `server_status` shows them.
#[derive(Default)]
pub struct Stats {
    /// `loadBefore` calls.
    pub loads: AtomicU64,
    /// Objects stored.
    pub stores: AtomicU64,
    /// Transactions applied.
    pub commits: AtomicU64,
    /// Transactions aborted.
    pub aborts: AtomicU64,
    /// Votes that ended in a conflict.
    pub conflicts: AtomicU64,
    /// Votes that wait for locks.
    pub waiting: AtomicUsize,
    /// Transactions between vote and the end.
    pub active: AtomicUsize,
}

/// A storage, for those who read.
pub struct StorageShared {
    /// The data file as it is now.
    pub source: Source,
    /// The data file.
    pub path: PathBuf,
    /// The blobs.
    pub blobs: Option<BlobDir>,
    /// From this transaction on, the data file was not the primary's when they were compared.
    pub differs: Mutex<Option<Tid>>,
    /// How far a pack is.
    pub packing: Progress,
    /// How far the filling of its holes is.
    pub backfilling: Progress,
    /// Counters.
    pub stats: Stats,
}

impl StorageShared {
    /// Reads the data file as it is now; not to be kept for long, for a pack replaces the file.
    pub fn reader(&self) -> Reader {
        self.source.reader()
    }
}

/// What all tasks of a node share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Who this node is.
    pub id: NodeId,
    /// As the others know it.
    pub member: Member,
    /// Where the node's files are.
    pub disk: Arc<dyn Disk>,
    /// The state directory.
    pub state: StateDir,
    /// The storages.
    pub storages: BTreeMap<String, StorageShared>,
    /// The clients.
    pub sessions: Sessions,
    /// The other nodes.
    pub peers: Peers,
    /// What the nodes say of themselves.
    pub reports: Reports,
    /// The node's role.
    pub standing: watch::Sender<Standing>,
    /// The primary's lease.
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
    /// Clients' connections, held and passed on ones included.
    pub clients: Arc<Gate>,
    /// What sessions of clients may hold.
    pub memory: Arc<Memory>,
    /// Connections to the peer address of which nobody knows yet who they are from.
    pub strangers: Arc<Gate>,
    /// What they cause in the log.
    pub strangers_lines: StrangersLines,
    /// Taken by who is about to promise this node to a founding.
    pub promising: tokio::sync::Mutex<()>,
    /// Room on the disks.
    pub room: Room,
    /// Beats while the engine works.
    pub pulse: Arc<Pulse>,
    /// Who may have what is damaged here.
    pub helpers: Arc<Helpers>,
    /// What this node has lost by leaving timelines.
    pub lost: Vec<LostTail>,
    /// When the process started, since 1970.
    pub started: Duration,
    clock: Instant,
    run: String,
    cluster_id: Mutex<String>,
    settings: Mutex<Arc<Settings>>,
    catch_up: Mutex<Option<CatchUp>>,
    /// What the nodes prove to each other that they know.
    secrets: Mutex<Secrets>,
    /// What a founding waits for.
    founding: Mutex<Option<String>>,
    /// Up to where each node has acknowledged what is committed.
    acknowledged: Mutex<BTreeMap<NodeId, LogIndex>>,
    /// The last entry of the log that is durable.
    log_end: AtomicU64,
    applied: AtomicU64,
    unconfirmed: AtomicBool,
    internal: mpsc::UnboundedSender<Internal>,
    events: mpsc::Sender<Event>,
    work: mpsc::UnboundedSender<Work>,
}

impl Shared {
    /// A monotonic time.
    pub fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// The time of day, since 1970. Only tids and people look at it.
    pub fn wall_clock(&self) -> Duration {
        machine::wall_clock()
    }

    /// The length of a tick.
    pub fn tick(&self) -> Duration {
        self.profile().tick()
    }

    fn profile(&self) -> Profile {
        self.config.standby.as_ref().map_or(Profile::Lan, |s| s.profile)
    }

    /// After how long without a word another node, or its machine, counts as gone.
    pub fn peer_silence(&self) -> Duration {
        silence_at(self.tick())
    }

    /// The storages have what the log says up to here.
    pub fn set_applied(&self, index: LogIndex) {
        self.applied.store(index.0, Ordering::Release);
    }

    /// See [`Shared::set_applied`]. It may go back when the node begins another timeline.
    pub fn applied(&self) -> LogIndex {
        LogIndex(self.applied.load(Ordering::Acquire))
    }

    /// The log is durable up to here.
    pub fn set_log_end(&self, index: LogIndex) {
        self.log_end.store(index.0, Ordering::Release);
    }

    /// A founding waits for this; `None` if there is none.
    pub fn set_founding(&self, waits: Option<String>) {
        let mut founding = lock(&self.founding);
        if let Some(text) = waits.as_ref().filter(|_| *founding != waits) {
            info!("{text}");
        }
        *founding = waits;
    }

    /// Up to where a node has acknowledged what is committed, as far as this one knows.
    pub fn acknowledged(&self, node: NodeId) -> LogIndex {
        lock(&self.acknowledged).get(&node).copied().unwrap_or(LogIndex(0))
    }

    /// The same of all nodes.
    pub fn all_acknowledged(&self) -> BTreeMap<NodeId, LogIndex> {
        lock(&self.acknowledged).clone()
    }

    /// Another timeline begins, with a log of its own.
    pub fn forget_acknowledged(&self) {
        lock(&self.acknowledged).clear();
    }

    /// Who is no member any more has no promises to keep.
    pub fn retain_acknowledged(&self, is_member: impl Fn(NodeId) -> bool) {
        lock(&self.acknowledged).retain(|id, _| is_member(*id));
    }

    /// The primary, or this node itself, knows this of the members.
    pub fn add_acknowledged(&self, found: impl IntoIterator<Item = (NodeId, LogIndex)>) {
        let mut known = lock(&self.acknowledged);
        for (node, index) in found {
            let entry = known.entry(node).or_default();
            *entry = index.max(*entry);
        }
    }

    /// Takes what another node says of the same log.
    pub fn note_acknowledged(&self, report: &NodeReport) {
        if report.lineage() == &self.settings().lineage {
            self.add_acknowledged(report.acknowledged());
        }
    }

    /// What this node waits for to become a member, if it is none.
    pub fn waits(&self) -> Option<String> {
        self.config.standby.as_ref()?;
        if let Some(founding) = lock(&self.founding).clone() {
            return Some(founding);
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
    pub fn retention(&self) -> Retention {
        match self.config.standby {
            None => self.config.zeo.retention,
            Some(_) => Retention::default(),
        }
    }

    /// Bytes that are left free on the disks.
    pub fn reserve(&self) -> u64 {
        self.config.standby.as_ref().map_or(DEFAULT_RESERVE, |s| s.reserve)
    }

    /// Bytes per second of the data files that are compared with their checksums; `None` for none.
    pub fn scrub_rate(&self) -> Option<u64> {
        self.config.standby.as_ref().map_or(Some(DEFAULT_SCRUB_RATE), |s| s.scrub_rate)
    }

    /// Says who may help out with what is damaged here: those that are up, the primary first.
    pub fn tell_helpers(&self) {
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

    /// What is damaged in the data files and among the blobs, and has not been mended.
    pub fn damage(&self) -> Option<String> {
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

    /// True if some of what the data files held is lost. A blob that is lost is not needed to commit, nor to vote.
    pub fn lacks_data(&self) -> bool {
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
    pub fn log_tail(&self) -> u64 {
        self.config.standby.as_ref().map_or(16 << 20, |s| s.log_tail)
    }

    /// What this node says of itself to others.
    pub fn introduction(&self) -> Introduction {
        let standby = self.config.standby.as_ref();
        Introduction {
            member: self.member.clone(),
            cluster: self.cluster_name().into(),
            cluster_id: lock(&self.cluster_id).clone(),
            secrets: lock(&self.secrets).clone(),
            wire: self.wire.clone(),
            unsealed: self.unsealed.load(Ordering::Acquire),
            join_token: standby.map_or_else(String::new, |s| s.join_token.clone()),
            lineage: self.settings().lineage.clone(),
            run: self.run.clone(),
            founded: Some(self.settings().founded),
            log_end: Some(LogIndex(self.log_end.load(Ordering::Acquire))),
            silence: self.peer_silence(),
        }
    }

    /// The cluster's name.
    pub fn cluster_name(&self) -> &str {
        self.config.standby.as_ref().map_or("alone", |s| &s.cluster)
    }

    /// True if this node belongs to a cluster.
    pub fn belongs(&self) -> bool {
        !lock(&self.cluster_id).is_empty()
    }

    /// This node belongs to that cluster from now on.
    pub fn set_cluster_id(&self, id: &str) {
        *lock(&self.cluster_id) = id.to_owned();
    }

    /// A catch-up is so far, or has ended.
    pub fn show_catch_up(&self, progress: Option<CatchUp>) {
        *lock(&self.catch_up) = progress;
    }

    /// What administrators have decided, as far as it is applied here.
    pub fn settings(&self) -> Arc<Settings> {
        lock(&self.settings).clone()
    }

    /// It is another now.
    pub fn set_settings(&self, settings: Arc<Settings>) {
        let unsealed = settings.level() < SEALED_LEVEL;
        *lock(&self.settings) = settings;
        let was_unsealed = self.unsealed.swap(unsealed, Ordering::AcqRel);
        if was_unsealed && !unsealed && matches!(self.wire, Wire::Sealed(_)) {
            self.peers.end_links();
        }
    }

    /// True if a peer must still confirm that the data files belong to the cluster's history.
    pub fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.load(Ordering::Acquire)
    }

    /// A peer has confirmed it.
    pub fn confirm(&self) {
        self.unconfirmed.store(false, Ordering::Release);
    }

    /// Tells the engine, from a thread of this process.
    pub fn report(&self, told: Internal) {
        // Without an engine the process is ending.
        let _ = self.internal.send(told);
    }

    /// Tells the engine, from a task that serves others.
    pub async fn tell(&self, event: Event) {
        let _ = self.events.send(event).await;
    }

    /// Gives work to the applier.
    pub fn apply(&self, work: Work) {
        let _ = self.work.send(work);
    }

    /// What `info` tells clients.
    pub fn short_info(&self, storage: &str) -> Value {
        let Some(storage) = self.storages.get(storage) else { return Value::Dict(Vec::new()) };
        Value::Dict(vec![
            (Value::str("length"), Value::Int(storage.reader().len() as i64)),
            (Value::str("size"), Value::Int(storage.reader().size() as i64)),
        ])
    }

    /// What this node says of itself.
    pub fn own_report(&self, moment: Moment<'_>) -> NodeReport {
        fn text(address: Option<&impl ToString>) -> String {
            address.map_or_else(String::new, ToString::to_string)
        }
        let standby = self.config.standby.as_ref();
        let last_tids =
            |(name, s): (&String, &StorageShared)| (name.clone(), s.reader().last_tid());
        let addresses = [
            text(self.config.zeo.address.as_ref()),
            text(standby.and_then(|s| s.read_only_address.as_ref())),
            self.member.peer_address.clone(),
            text(standby.map(|s| &s.admin_address)),
        ];
        let tids = self.storages.iter().map(last_tids);
        let cluster = self.cluster_name();
        NodeReport::new(&self.member, &self.run, moment, tids, addresses, cluster)
            .under_way(self.percents(|storage| &storage.packing), lock(&self.catch_up).clone())
            .room(self.room.reason(), &self.memory)
            .acknowledging(self.all_acknowledged())
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
    pub fn is_whole(&self) -> bool {
        self.storages.values().all(|storage| storage.reader().is_whole())
    }
}

/// What the process is to do after a node has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// End.
    End,
    /// Run the node again, from the beginning.
    Again,
}

/// A running node.
pub struct Running {
    shared: Arc<Shared>,
    engine: tokio::task::JoinHandle<anyhow::Result<Ended>>,
    _locks: Vec<Lock>,
}

/// Starts a node; returns when it listens.
pub async fn start(mut config: Config) -> anyhow::Result<Running> {
    config.follow_links()?;
    let disk = read_only::protect(&config, Arc::new(OsDisk))?;
    start_on(config, disk).await
}

/// Starts a node whose files are on this disk. What it only reads for others, and temporary files, are the machine's.
pub async fn start_on(config: Config, disk: Arc<dyn Disk>) -> anyhow::Result<Running> {
    let as_configured = config.clone();
    begin_on(config, disk).await.map_err(|error| startup::explain(error, &as_configured))
}

async fn begin_on(config: Config, disk: Arc<dyn Disk>) -> anyhow::Result<Running> {
    for note in &config.notes {
        info!("{note}");
    }
    let state = StateDir(config.state_dir());
    let standby = config.standby.as_ref();
    let wire = Wire::of(standby)?;
    let helpers = find_others(&config, &*disk, &state, wire.clone()).await?;
    // First the addresses: a second start of the same node must fail before it touches a file.
    let zeo = match &config.zeo.address {
        Some(address) => Some(Listener::bind(address).await?),
        None => None,
    };
    let tls = config.zeo.ssl.as_ref().map(Tls::new).transpose()?;
    let read_only = match standby.and_then(|s| s.read_only_address.as_ref()) {
        Some(address) => Some(Listener::Tcp(bind(address, "read-only-address").await?)),
        None => None,
    };
    let peer = match standby {
        Some(standby) => Some(bind(&standby.peer_address, "peer-address").await?),
        None => None,
    };
    let admin = match standby {
        Some(standby) => Some(bind(&standby.admin_address, "admin-address").await?),
        None => None,
    };
    let mut locks = Vec::new();
    if config.storages.is_empty() {
        // A witness has no data file whose lock would tell that the node runs already.
        let state_dir = config.state_dir();
        disk.create_private_dir(&state_dir)
            .and_then(|()| machine::lock_file(&state_dir.join("identity")))
            .map(|lock| locks.push(lock))
            .with_context(|| format!("cannot use state-dir {}", state_dir.display()))?;
    }
    // As Python, which reads beside a program that writes.
    for storage in config.storages.iter().filter(|section| !section.protected) {
        let mut lock = |path: &Path| {
            let cannot =
                || format!("cannot use {} (from {})", path.display(), config.file.display());
            machine::lock_file(path).with_context(cannot).map(|lock| locks.push(lock))
        };
        lock(&storage.named)?;
        if storage.named != storage.path {
            // Another program may know the file by its own name.
            lock(&storage.path)?;
            info!(file = %storage.named.display(), target = %storage.path.display(), "a symbolic link is followed");
            startup::forget_index_of_link(&*disk, &storage.named)?;
        }
    }
    let beginning = beginning(&config);
    let opening = {
        let (config, disk, state) = (config.clone(), disk.clone(), state.clone());
        let mended = config.storages.iter().filter(|_| config.standby.is_some());
        let menders = mended.map(|s| (s.name.clone(), helpers.mender(&s.name))).collect();
        machine::spawn_blocking(move || {
            startup::prepare(&config, &disk, &state, beginning, &menders)
        })
    };
    let prepared = opening.await??;
    if cfg!(not(feature = "simulated")) {
        crashes::watch(&disk, &state.0);
    }
    let lost = {
        let (config, disk) = (config.clone(), disk.clone());
        machine::spawn_blocking(move || rewind::lost_tails(&config, &disk)).await??
    };

    let (internal, internal_receiver) = mpsc::unbounded_channel();
    let (events, events_receiver) = mpsc::channel(EVENTS);
    let (work, work_receiver) = mpsc::unbounded_channel();
    let (log, log_receiver) = mpsc::unbounded_channel();
    let spill_dir = state.0.clone();
    let make_spill: MakeSpill = Arc::new(move || machine::temporary_file(&spill_dir));
    let storages = config.storages.iter().filter_map(|section| {
        let source = prepared.storages.get(&section.name)?.source();
        let path = section.path.clone();
        let (packing, backfilling) = (Progress::default(), Progress::default());
        let blobs = prepared.blobs.get(&section.name).cloned();
        let stats = Stats::default();
        let differs = Mutex::default();
        let shared = StorageShared { source, path, blobs, differs, packing, backfilling, stats };
        Some((section.name.clone(), shared))
    });
    let member = startup::self_as_member(&config, prepared.id);
    let (most_clients, most_strangers) = gate::limits()?;
    let shared = Arc::new(Shared {
        id: prepared.id,
        member,
        storages: storages.collect(),
        sessions: Sessions::default(),
        peers: Peers::default(),
        reports: Reports::default(),
        standing: watch::Sender::new(Standing::default()),
        lease: Lease::default(),
        read_only_storages: (config.storages.iter())
            .filter(|section| section.read_only)
            .map(|section| section.name.clone())
            .collect(),
        tls,
        wire,
        unsealed: AtomicBool::new(is_unsealed(&prepared.checkpoint)),
        make_spill: make_spill.clone(),
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
        started: machine::wall_clock(),
        clock: Instant::now(),
        run: random_hex(8)?,
        cluster_id: Mutex::new(prepared.checkpoint.cluster_id.clone()),
        settings: Mutex::new(Arc::new(prepared.checkpoint.settings.clone())),
        catch_up: Mutex::default(),
        secrets: Mutex::new(standby.map_or_else(Secrets::none, |s| s.secrets.clone())),
        founding: Mutex::default(),
        acknowledged: Mutex::new(prepared.checkpoint.acknowledged.clone()),
        log_end: AtomicU64::new(prepared.recovered.last_index().0),
        applied: AtomicU64::new(prepared.checkpoint.index.0),
        unconfirmed: AtomicBool::new(prepared.unconfirmed),
        internal,
        events,
        work,
        state: state.clone(),
        disk: disk.clone(),
        config,
    });

    let point = prepared.checkpoint.applied_point();
    let consensus = Consensus::new(
        raft_config(&shared),
        disk.clone(),
        state.log(),
        &prepared.recovered,
        point,
    )?;
    let replica = Replica::new(&prepared.checkpoint, prepared.storages, prepared.blobs, make_spill)
        .skipping(state.skipped(&*disk)?);
    let ceilings = replica.ceilings();
    let applied = replica.index();
    start_threads(&shared, &disk, replica, prepared.writer, work_receiver, log_receiver)?;
    let engine = Engine::new(shared.clone(), consensus, log, ceilings, applied);
    let engine = tokio::spawn(engine.run(internal_receiver, events_receiver));

    if let Some(peer) = peer {
        tokio::spawn(peers::listen(shared.clone(), peer));
    }
    let members = prepared.checkpoint.membership.members.values();
    let members = members.map(|member| member.peer_address.clone());
    Peers::learn(&shared, members.chain(shared.state.peers(&*disk)), false);
    if let Some(standby) = &shared.config.standby {
        for address in standby.named_addresses() {
            Peers::dial(&shared, &address.to_string());
        }
    }
    if founding::is_founder(&shared) && prepared.checkpoint.cluster_id.is_empty() {
        tokio::spawn(founding::run(shared.clone()));
    }
    if let Some(read_only) = read_only {
        tokio::spawn(listener::read_only(shared.clone(), read_only));
    }
    #[cfg(not(feature = "simulated"))]
    if let Some(admin) = admin {
        tokio::spawn(crate::admin::listen(shared.clone(), admin));
    }
    #[cfg(feature = "simulated")]
    drop(admin);
    if let Some(zeo) = zeo {
        tokio::spawn(listener::read_write(shared.clone(), zeo));
        tokio::spawn(listener::end_silent(shared.clone()));
    }
    tokio::spawn(memory::guard(shared.clone()));
    tokio::spawn(certificate::watch(shared.clone()));
    if let Some(path) = &shared.config.zeo.pid_file {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match &shared.config.zeo.address {
        Some(address) => info!(node = shared.member.name, %address, "listening"),
        None => info!(node = shared.member.name, "a witness: it votes, and holds no data"),
    }
    Ok(Running { shared, engine, _locks: locks })
}

/// How the node takes part in consensus.
pub fn raft_config(shared: &Shared) -> RaftConfig {
    RaftConfig {
        id: shared.id,
        election_ticks: ELECTION_TICKS,
        most_patience_ticks: shared.profile().most_patience_ticks(),
        heartbeat_ticks: HEARTBEAT_TICKS,
        tick: shared.tick(),
        seed: shared.id.0,
        witness: shared.member.witness,
        unapplied_len: UNAPPLIED_LEN,
    }
}

async fn bind(address: &Address, key: &str) -> anyhow::Result<TcpListener> {
    listen(address).await.with_context(|| format!("cannot listen on {key} {address}"))
}

/// How a node introduces itself before it takes part in anything.
fn asker(config: &Config, standby: &Standby, id: NodeId, wire: Wire) -> Introduction {
    Introduction {
        member: startup::self_as_member(config, id),
        cluster: standby.cluster.clone(),
        cluster_id: String::new(),
        secrets: standby.secrets.clone(),
        wire,
        unsealed: false,
        join_token: String::new(),
        lineage: Lineage::default(),
        run: String::new(),
        founded: None,
        log_end: None,
        silence: silence_at(standby.profile.tick()),
    }
}

/// True if the cluster is known to work at a level at which connections between nodes are not sealed. What a node that has
/// nothing of the cluster yet takes for its settings says nothing.
fn is_unsealed(checkpoint: &Checkpoint) -> bool {
    checkpoint.index > LogIndex(0) && checkpoint.settings.level() < SEALED_LEVEL
}

/// After how long without a word a node counts as gone: long after its election timeout.
fn silence_at(tick: Duration) -> Duration {
    tick * SILENT_TICKS
}

/// The other nodes, if this one was a member before: finds out whether it has been left behind by a forced
/// promotion, and who can help out if its data file is damaged.
async fn find_others(
    config: &Config,
    disk: &dyn Disk,
    state: &StateDir,
    wire: Wire,
) -> anyhow::Result<Arc<Helpers>> {
    let helpers = Arc::<Helpers>::default();
    let Some(standby) = &config.standby else { return Ok(helpers) };
    let (identity, checkpoint) = (state.identity(disk)?, state.checkpoint(disk)?);
    let (Some(identity), Some(checkpoint)) = (identity, checkpoint) else { return Ok(helpers) };
    let me = Introduction {
        cluster_id: checkpoint.cluster_id.clone(),
        lineage: checkpoint.settings.lineage.clone(),
        founded: Some(checkpoint.settings.founded),
        unsealed: is_unsealed(&checkpoint),
        ..asker(config, standby, identity.node_id()?, wire)
    };
    let lines = standby.named_addresses().map(ToString::to_string);
    let members = checkpoint.membership.members.values();
    let members = members.map(|member| member.peer_address.clone()).chain(state.peers(disk));
    let mut addresses: BTreeSet<String> = lines.chain(members).collect();
    addresses.remove(&standby.peer_address.to_string());
    rewind::ask_around(disk, state, &checkpoint, me.clone(), addresses.clone()).await?;
    helpers.set(me, addresses.into_iter().collect());
    Ok(helpers)
}

/// What a new node does: among several listed members, even the first one waits for the others.
fn beginning(config: &Config) -> Beginning {
    let Some(standby) = &config.standby else { return Beginning::Found };
    let alone = standby.members.len() == 1 && standby.members[0].name == standby.node;
    if alone { Beginning::Found } else { Beginning::Join }
}

fn start_threads(
    shared: &Arc<Shared>,
    disk: &Arc<dyn Disk>,
    replica: Replica,
    writer: LogWriter,
    work: mpsc::UnboundedReceiver<Work>,
    log: mpsc::UnboundedReceiver<log_thread::LogWork>,
) -> anyhow::Result<()> {
    let applier = Applier::new(shared.clone(), replica, disk.clone())?;
    let fatal = shared.clone();
    machine::thread("applier", async move {
        if let Err(error) = applier.run(work).await {
            fatal.report(Internal::Fatal(error.context("cannot apply committed transactions")));
        }
    })?;
    let reports = shared.clone();
    let preparing = Arc::new(AtomicBool::new(false));
    let (disk, dir) = (disk.clone(), shared.state.log());
    let prepare = move || prepare_segment(&preparing, &disk, &dir);
    machine::thread("log", async move {
        let busy = |begins: bool| reports.log_busy.set(begins.then(|| reports.now()));
        log_thread::run(writer, log, busy, prepare, |written| {
            reports.report(Internal::Persisted(written))
        })
        .await;
    })?;
    for name in shared.storages.keys() {
        let (scrubbed, name) = (shared.clone(), name.clone());
        machine::thread("scrub", async move { scrub::run(&scrubbed, &name).await })?;
    }
    machine::thread("room", room::watch(shared.clone()))?;
    let guarded = shared.clone();
    machine::every("lease", LEASE_CHECK, move || guard_lease(&guarded))?;
    Ok(())
}

/// Makes the next segment of the log beside the commits.
fn prepare_segment(preparing: &Arc<AtomicBool>, disk: &Arc<dyn Disk>, dir: &Path) {
    if preparing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (beside, disk, dir) = (preparing.clone(), disk.clone(), dir.to_owned());
    let started = machine::background("segment", move || {
        // Without it the segment grows as it is written, a little slower.
        if let Err(error) = LogWriter::prepare(&*disk, &dir) {
            warn!(%error, "cannot prepare a segment of the log");
        }
        beside.store(false, Ordering::Release);
    });
    if let Err(error) = started {
        warn!(%error, "cannot prepare a segment of the log");
        preparing.store(false, Ordering::Release);
    }
}

/// Cuts the writers off when the lease has run out, whatever the other threads are doing. It does no
/// disk I/O.
fn guard_lease(shared: &Shared) {
    if shared.lease.overdue(shared.now()) {
        let count = shared.sessions.cut_writers("this primary has not heard of a majority");
        if count > 0 {
            warn!(closed = count, "no majority is heard of: clients are sent away");
        }
    }
}

impl Shared {
    /// Those for clients, and those for the other nodes.
    pub fn certificates(&self) -> impl Iterator<Item = &Tls> {
        let of_peers = match &self.wire {
            Wire::Tls(tls) => Some(&**tls),
            Wire::Plain | Wire::Sealed(_) => None,
        };
        self.tls.iter().chain(of_peers)
    }

    /// Reads the certificates and the secrets again; connections that are open keep theirs.
    pub fn reload_certificates(&self) {
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

impl Running {
    /// What the node's tasks share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A primary that is to end makes another node primary first: clients do not notice then. Without another one it
    /// just ends.
    async fn hand_over(&self) {
        if self.shared.config.standby.is_none() || !self.shared.standing.borrow().serves {
            return;
        }
        let ask = Ask::Switchover { to: None, grace: STOPPING_GRACE.as_secs_f64() };
        match tokio::time::timeout(2 * STOPPING_GRACE, here(&self.shared, ask)).await {
            Ok(Ok(done)) => info!("{}", done.text),
            Ok(Err(reason)) => info!(reason, "no other node takes over in an orderly way"),
            Err(_) => warn!("the switchover takes too long: this node ends without it"),
        }
    }

    /// Waits until the node fails or `stop` says to end; then ends it in an orderly way. The process is to begin
    /// anew if the node has left its timeline.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<Next> {
        let next = tokio::select! {
            biased;
            ended = &mut self.engine => match ended.inspect_err(|_| crashes::note(&*self.shared.disk, &self.shared.state.0))? {
                Ok(Ended::Stopped) => return Ok(Next::End),
                Ok(Ended::Founds) => {
                    info!("a majority of the listed members agrees: this node founds the cluster");
                    self.shared.state.set_note(&*self.shared.disk, Note::Founds, "")?;
                    Next::Again
                }
                Ok(Ended::RolledBack(reason)) => {
                    error!("{reason}: it gives up its vote, and joins anew");
                    self.shared.state.set_note(&*self.shared.disk, Note::RolledBack, &reason)?;
                    Next::Again
                }
                Ok(Ended::ComesOver(lineage)) => {
                    let timeline = lineage.timeline();
                    warn!(timeline, "the timeline of this node is over: it begins anew, on another one");
                    self.shared.state.set_coming_over(&*self.shared.disk, &lineage)?;
                    Next::Again
                }
                Err(error) => {
                    error!("stopping: {}", with_causes(&error));
                    return Err(error);
                }
            },
            () = stop => Next::End,
        };
        info!("stopping");
        if next == Next::End {
            self.hand_over().await;
        }
        self.shared.lease.set(false, Duration::ZERO);
        self.shared.sessions.cut("the server stops", |_| true);
        self.shared.tell(Event::Stop).await;
        let (done, stopped) = oneshot::channel();
        self.shared.apply(Work::Stop(done));
        let _ = tokio::time::timeout(Duration::from_secs(30), stopped).await;
        if let Some(path) = &self.shared.config.zeo.pid_file {
            let _ = std::fs::remove_file(path);
        }
        if let Some(ZeoAddress::Unix(path)) = &self.shared.config.zeo.address {
            let _ = std::fs::remove_file(path);
        }
        info!("stopped");
        Ok(next)
    }
}
