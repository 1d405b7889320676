//! A running node: how its tasks are started and stopped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use standby_config::{Address, Config, ZeoAddress};
use standby_consensus::{Consensus, LogWriter};
use standby_disk::OsDisk;
use standby_logging::error_text::with_causes;
use standby_primary::command::Ask;
use standby_primary::consensus_config::raft_config;
use standby_primary::{Ended, Input};
use standby_replica::lost_transactions;
use standby_replica::machine::Replica;
use standby_replica::start::open::forget_index_of_link;
use standby_replica::start::prepared::Beginning;
use standby_replica::start::{Place, explain, prepare};
use standby_replica::state_dir::{Note, StateDir};
use standby_types::Disk;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use crate::cells::apply_task::ApplyTask;
use crate::cells::events::TaskReport;
use crate::cells::log_work::LogWork;
use crate::cells::shared::{Opened, Queues, Shared};
use crate::clients::listener;
use crate::peers::block::repairer;
use crate::peers::command::here;
use crate::peers::link::{dial, learn};
use crate::platform::crash_notes;
use crate::platform::{self, Lock, TcpListener};
use crate::start::{other_nodes, read_only};
use crate::tasks::applier::Applier;
use crate::tasks::primary::Primary;
use crate::tasks::{
    accept_peers, certificates, client_memory, disk_space, founding, log_writer, scrub,
};
use crate::transport::handshake::Wire;
use crate::transport::stream::{Listener, listen};
use crate::transport::tls::Tls;

/// How long a primary that is to end waits for transactions that have voted.
const STOPPING_GRACE: Duration = Duration::from_secs(5);
/// Requests of clients and messages of peers that wait for the primary's machine.
const EVENTS: usize = 1024;
/// How often it is looked whether the lease has run out.
const LEASE_CHECK: Duration = Duration::from_millis(20);

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
    primary: tokio::task::JoinHandle<anyhow::Result<Ended>>,
    _locks: Vec<Lock>,
}

/// Starts a node; returns when it listens.
pub async fn start(mut config: Config) -> anyhow::Result<Running> {
    config.follow_links()?;
    let disk = read_only::protect(&config, Arc::new(OsDisk))?;
    start_on(config, disk).await
}

/// Starts a node whose files are on this disk. What it only reads for others, and temporary files,
/// are the machine's.
pub async fn start_on(config: Config, disk: Arc<dyn Disk>) -> anyhow::Result<Running> {
    let as_configured = config.clone();
    begin_on(config, disk).await.map_err(|error| explain(error, &as_configured))
}

async fn begin_on(config: Config, disk: Arc<dyn Disk>) -> anyhow::Result<Running> {
    for note in &config.notes {
        info!("{note}");
    }
    let state = StateDir(config.state_dir());
    let standby = config.standby.as_ref();
    let wire = Wire::of(standby)?;
    let helpers = other_nodes::find(&config, &*disk, &state, wire.clone()).await?;
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
            .and_then(|()| platform::lock_file(&state_dir.join("identity")))
            .map(|lock| locks.push(lock))
            .with_context(|| format!("cannot use state-dir {}", state_dir.display()))?;
    }
    // As Python, which reads beside a program that writes.
    for storage in config.storages.iter().filter(|section| !section.protected) {
        let mut lock = |path: &Path| {
            let cannot =
                || format!("cannot use {} (from {})", path.display(), config.file.display());
            platform::lock_file(path).with_context(cannot).map(|lock| locks.push(lock))
        };
        lock(&storage.named)?;
        if storage.named != storage.path {
            // Another program may know the file by its own name.
            lock(&storage.path)?;
            info!(file = %storage.named.display(), target = %storage.path.display(), "a symbolic \
            link is followed");
            forget_index_of_link(&*disk, &storage.named)?;
        }
    }
    let beginning = beginning(&config);
    let opening = {
        let (config, disk, state) = (config.clone(), disk.clone(), state.clone());
        let repaired = config.storages.iter().filter(|_| config.standby.is_some());
        let repairers = repaired.map(|s| (s.name.clone(), repairer(&helpers, &s.name))).collect();
        platform::spawn_blocking(move || {
            let platform = platform::for_start();
            let place = Place {
                config: &config,
                disk: &disk,
                state: &state,
                repairers: &repairers,
                platform,
            };
            prepare(&place, beginning)
        })
    };
    let prepared = opening.await??;
    if cfg!(not(feature = "simulated")) {
        crash_notes::watch(&disk, &state.0);
    }
    let lost = {
        let (config, disk) = (config.clone(), disk.clone());
        platform::spawn_blocking(move || lost_transactions::lost_tails(&config, &disk)).await??
    };

    let (internal, internal_receiver) = mpsc::unbounded_channel();
    let (events, events_receiver) = mpsc::channel(EVENTS);
    let (work, work_receiver) = mpsc::unbounded_channel();
    let (log, log_receiver) = mpsc::unbounded_channel();
    let opened = Opened { tls, wire, helpers, lost };
    let queues = Queues { internal, events, work };
    let shared = Arc::new(Shared::new(config, disk.clone(), &prepared, opened, queues)?);

    let point = prepared.checkpoint.applied_point();
    let consensus = Consensus::new(
        raft_config(shared.id, shared.member.witness, shared.profile()),
        disk.clone(),
        state.log(),
        &prepared.recovered,
        point,
    )?;
    let replica = Replica::new(
        &prepared.checkpoint,
        prepared.storages,
        prepared.blobs,
        shared.make_spill.clone(),
    )
    .skipping(state.skipped(&*disk)?);
    let primary = Primary::new(shared.clone(), consensus, log, &replica);
    start_threads(&shared, &disk, replica, prepared.writer, work_receiver, log_receiver)?;
    let primary = tokio::spawn(primary.run(internal_receiver, events_receiver));

    if let Some(peer) = peer {
        tokio::spawn(accept_peers::listen(shared.clone(), peer));
    }
    let members = prepared.checkpoint.membership.members.values();
    let members = members.map(|member| member.peer_address.clone());
    learn(&shared, members.chain(shared.state.peers(&*disk)), false);
    if let Some(standby) = &shared.config.standby {
        for address in standby.named_addresses() {
            dial(&shared, &address.to_string());
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
        tokio::spawn(crate::admin::http::listen(shared.clone(), admin));
    }
    #[cfg(feature = "simulated")]
    drop(admin);
    if let Some(zeo) = zeo {
        tokio::spawn(listener::read_write(shared.clone(), zeo));
        tokio::spawn(listener::end_silent(shared.clone()));
    }
    tokio::spawn(client_memory::guard(shared.clone()));
    tokio::spawn(certificates::watch(shared.clone()));
    if let Some(path) = &shared.config.zeo.pid_file {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match &shared.config.zeo.address {
        Some(address) => info!(node = shared.member.name, %address, "listening"),
        None => info!(node = shared.member.name, "a witness: it votes, and holds no data"),
    }
    Ok(Running { shared, primary, _locks: locks })
}

async fn bind(address: &Address, key: &str) -> anyhow::Result<TcpListener> {
    listen(address).await.with_context(|| format!("cannot listen on {key} {address}"))
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
    work: mpsc::UnboundedReceiver<ApplyTask>,
    log: mpsc::UnboundedReceiver<LogWork>,
) -> anyhow::Result<()> {
    let applier = Applier::new(shared.clone(), replica, disk.clone())?;
    let fatal = shared.clone();
    platform::thread("applier", async move {
        if let Err(error) = applier.run(work).await {
            fatal.report(TaskReport::Fatal(error.context("cannot apply committed transactions")));
        }
    })?;
    let reports = shared.clone();
    let preparing = Arc::new(AtomicBool::new(false));
    let (disk, dir) = (disk.clone(), shared.state.log());
    let prepare = move || prepare_segment(&preparing, &disk, &dir);
    platform::thread("log", async move {
        let busy = |begins: bool| reports.log_busy.set(begins.then(|| reports.now()));
        log_writer::run(writer, log, busy, prepare, |written| {
            reports.report(TaskReport::Persisted(written))
        })
        .await;
    })?;
    for name in shared.storages.keys() {
        let (scrubbed, name) = (shared.clone(), name.clone());
        platform::thread("scrub", async move { scrub::run(&scrubbed, &name).await })?;
    }
    platform::thread("room", disk_space::watch(shared.clone()))?;
    let guarded = shared.clone();
    platform::every("lease", LEASE_CHECK, move || guard_lease(&guarded))?;
    Ok(())
}

/// Makes the next segment of the log beside the commits.
fn prepare_segment(preparing: &Arc<AtomicBool>, disk: &Arc<dyn Disk>, dir: &Path) {
    if preparing.swap(true, Ordering::AcqRel) {
        return;
    }
    let (beside, disk, dir) = (preparing.clone(), disk.clone(), dir.to_owned());
    let started = platform::background("segment", move || {
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

/// Cuts the writers off when the lease has run out, whatever the other threads are doing. It does
/// no disk I/O.
fn guard_lease(shared: &Shared) {
    if shared.lease.overdue(shared.now()) {
        let count =
            shared.sessions.send_all_writers_away("this primary has not heard of a majority");
        if count > 0 {
            warn!(closed = count, "no majority is heard of: clients are sent away");
        }
    }
}

impl Running {
    /// What the node's tasks share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A primary that is to end makes another node primary first: clients do not notice then.
    /// Without another one it just ends.
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

    /// A panic of the primary's task counts as a crash of the process.
    fn noted<T, E>(&self, ended: Result<T, E>) -> Result<T, E> {
        ended.inspect_err(|_| crash_notes::note(&*self.shared.disk, &self.shared.state.0))
    }

    /// Waits until the node fails or `stop` says to end; then ends it in an orderly way. The
    /// process is to begin anew if the node has left its timeline.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<Next> {
        let next = tokio::select! {
            biased;
            ended = &mut self.primary => match self.noted(ended)? {
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
                Ok(Ended::Rejoins(lineage)) => {
                    let timeline = lineage.timeline();
                    warn!(timeline, "the timeline of this node is over: it begins anew, on another \
                    one");
                    self.shared.state.set_rejoining(&*self.shared.disk, &lineage)?;
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
        self.shared.lease.set(None);
        self.shared.sessions.cut("the server stops", |_| true);
        self.shared.tell(Input::Stop).await;
        let (done, stopped) = oneshot::channel();
        self.shared.apply(ApplyTask::Stop(done));
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
