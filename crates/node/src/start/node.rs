//! A running node: how its tasks are started and stopped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use standby_config::{Config, ZeoAddress};
use standby_consensus::{Consensus, LogWriter};
use standby_disk::OsDisk;
use standby_logging::error_text::with_causes;
use standby_primary::command::Ask;
use standby_primary::consensus_config::raft_config;
use standby_primary::{Ended, Input};
use standby_replica::lost_transactions;
use standby_replica::machine::Replica;
use standby_replica::start::prepared::{Beginning, Prepared, Repairers};
use standby_replica::start::{Place, explain, prepare};
use standby_replica::state_dir::{Checkpoint, Note, StateDir};
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
use crate::platform::{self, Lock};
use crate::start::handle::Handle;
use crate::start::listeners::Listeners;
use crate::start::locks::lock_files;
use crate::start::{other_nodes, read_only};
use crate::tasks::applier::Applier;
use crate::tasks::primary::Primary;
use crate::tasks::{
    accept_peers, bootstrap, certificates, client_memory, disk_space, log_writer, scrub, topology,
};
use crate::transport::handshake::Wire;
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
    let wire = Wire::of(config.standby.as_ref())?;
    let helpers = other_nodes::find(&config, &*disk, &state, wire.clone()).await?;
    let listeners = Listeners::bind(&config).await?;
    let tls = config.zeo.ssl.as_ref().map(Tls::new).transpose()?;
    let locks = lock_files(&config, &*disk)?;
    let repaired = config.storages.iter().filter(|_| config.standby.is_some());
    let repairers = repaired.map(|s| (s.name.clone(), repairer(&helpers, &s.name))).collect();
    let prepared = prepare_files(&config, &disk, &state, repairers).await?;
    if cfg!(not(feature = "simulated")) {
        crash_notes::watch(&disk, &state.0);
    }
    let lost = {
        let (config, disk) = (config.clone(), disk.clone());
        platform::spawn_blocking(move || lost_transactions::lost_tails(&config, &disk)).await??
    };

    // A report for each piece of work that the machine has asked for.
    let (internal, internal_receiver) = mpsc::unbounded_channel();
    let (events, events_receiver) = mpsc::channel(EVENTS);
    // The machine bounds what is committed and not applied, in bytes: on the primary by `Commits`,
    // on a follower by the backlog of consensus.
    let (work, work_receiver) = mpsc::unbounded_channel();
    // The leader's window bounds it: more entries come when those before are acknowledged, for
    // which they must be durable.
    let (log, log_receiver) = mpsc::unbounded_channel();
    let opened = Opened { tls, wire, helpers, lost };
    let queues = Queues { internal, events, work };
    let shared = Arc::new(Shared::new(config, disk.clone(), &prepared, opened, queues)?);

    let Prepared { checkpoint, storages, blobs, recovered, writer, .. } = prepared;
    let consensus = Consensus::new(
        raft_config(shared.id, shared.member.witness, shared.profile()),
        disk.clone(),
        state.log(),
        &recovered,
        checkpoint.applied_point(),
    )?;
    let outcomes = shared.storages.iter().map(|(name, s)| (name.clone(), s.outcomes.clone()));
    let replica = Replica::new(&checkpoint, storages, blobs, shared.make_spill.clone())
        .skipping(state.skipped(&*disk)?)
        .sharing(outcomes);
    let primary = Primary::new(shared.clone(), consensus, log, &replica);
    start_threads(&shared, &disk, replica, writer, work_receiver, log_receiver)?;
    // `Running` joins it.
    let primary = tokio::spawn(primary.run(internal_receiver, events_receiver));
    start_tasks(&shared, listeners, &checkpoint);
    if let Some(path) = &shared.config.zeo.pid_file {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if shared.config.zeo.addresses.is_empty() {
        info!(node = shared.member.name, "a witness: it votes, and holds no data");
    }
    for address in &shared.config.zeo.addresses {
        info!(node = shared.member.name, %address, "listening");
    }
    Ok(Running { shared, primary, _locks: locks })
}

/// Opens the node's files, which may take long, beside the runtime.
async fn prepare_files(
    config: &Config,
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    repairers: Repairers,
) -> anyhow::Result<Prepared> {
    let beginning = beginning(config);
    let (config, disk, state) = (config.clone(), disk.clone(), state.clone());
    let opening = platform::spawn_blocking(move || {
        let platform = platform::for_start();
        let place =
            Place { config: &config, disk: &disk, state: &state, repairers: &repairers, platform };
        prepare(&place, beginning)
    });
    opening.await?
}

/// Starts the tasks that live as long as the node.
fn start_tasks(shared: &Arc<Shared>, listeners: Listeners, checkpoint: &Checkpoint) {
    if let Some(peer) = listeners.peer {
        run(accept_peers::listen(shared.clone(), peer));
    }
    let members = checkpoint.membership.members.values();
    let members = members.map(|member| member.peer_address.clone());
    learn(shared, members.chain(shared.state.peers(&*shared.disk)), false);
    if let Some(standby) = &shared.config.standby {
        for address in standby.named_addresses() {
            dial(shared, &address.to_string());
        }
    }
    if bootstrap::is_first_member(shared) && checkpoint.cluster_id.is_empty() {
        run(bootstrap::run(shared.clone()));
    }
    if let Some(read_only) = listeners.read_only {
        run(listener::read_only(shared.clone(), read_only));
    }
    #[cfg(not(feature = "simulated"))]
    if let Some(admin) = listeners.admin {
        run(crate::admin::http::listen(shared.clone(), admin));
    }
    for (address, zeo) in listeners.zeo {
        // Before a command may move the address.
        let stay = shared.moving.stay();
        run(listener::read_write(shared.clone(), address, zeo, stay));
    }
    #[cfg(not(feature = "simulated"))]
    run(crate::tasks::role_command::watch(shared.clone()));
    run(listener::end_silent(shared.clone()));
    run(topology::tell_clients(shared.clone()));
    run(client_memory::guard(shared.clone()));
    run(certificates::watch(shared.clone()));
}

/// Runs a task that ends with the process, which runs a node once.
fn run(task: impl Future<Output = ()> + Send + 'static) {
    // Nobody joins it.
    tokio::spawn(task);
}

/// What a new node does: among several listed members, even the first one waits for the others.
fn beginning(config: &Config) -> Beginning {
    let Some(standby) = &config.standby else { return Beginning::Bootstrap };
    let alone = standby.members.len() == 1 && standby.members[0].name == standby.node;
    if alone { Beginning::Bootstrap } else { Beginning::Join }
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
    /// The node, for who runs it.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
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
                Ok(Ended::Bootstraps) => {
                    info!("a majority of the listed members agrees: this node bootstraps the cluster");
                    self.shared.state.set_note(&*self.shared.disk, Note::Bootstraps, "")?;
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
        for address in &self.shared.config.zeo.addresses {
            if let ZeoAddress::Unix(path) = address {
                let _ = std::fs::remove_file(path);
            }
        }
        info!("stopped");
        Ok(next)
    }
}
