//! `standby router`: a process beside stock clients, with one local address for those that write,
//! and one for those that only read.
//!
//! ```text
//!   client ──▶ writes ──┐                     ┌──▶ primary
//!                       ├── carry ── Picture ─┤
//!   client ──▶ reads  ──┘      ▲              └──▶ replica
//!                              │
//!             watch ─▶ machine ┘        (a watch for each node: signs of life, topology, commits)
//! ```
//!
//! It knows one or more nodes to begin with, and learns of the others from them. A stock client
//! waits for ever on a connection whose server's host has vanished or is frozen; the router asks
//! each node for signs of life, and breaks the connections to one that gives none. The client comes
//! back at once, and is held until there is a primary: in ZEO the server speaks first.
//!
//! Reading order: `topology.rs` (what nodes tell), `machine.rs` (what follows from it; pure),
//! `watch.rs`, `carry.rs`, `metrics.rs`.

#![warn(unreachable_pub)]

mod carry;
mod machine;
mod metrics;
mod topology;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use sd_notify::NotifyState;
use standby_config::{Address, SslSection, ZeoAddress};
use standby_node::sockets::{self, Gate, Listener, Tls};
use standby_types::lock::lock;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout};
use tracing::{info, warn};

use crate::carry::{End, Load};
use crate::machine::{Machine, Picture, Policy};

/// Time goes on for the machine so often when nothing is heard.
const TICK: Duration = Duration::from_millis(250);

/// What the administrator wants.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses for clients of one node or more.
    pub nodes: Vec<String>,
    /// A storage that the nodes serve.
    pub storage: String,
    /// For clients that write.
    pub writes: Option<ZeoAddress>,
    /// For clients that only read.
    pub reads: Option<ZeoAddress>,
    /// The cluster's name; without it, the first that is found.
    pub cluster: Option<String>,
    /// Groups whose replicas readers get, best first; without any, the nearest.
    pub groups: Vec<String>,
    /// A replica that lacks for longer what another node has is left.
    pub max_lag: Duration,
    /// A node that is silent for so long, after it was asked, is dead.
    pub dead_after: Duration,
    /// How long connections may go on when the router is to end.
    pub drain: Duration,
    /// Where metrics are served.
    pub metrics: Option<Address>,
    /// Certificates for the router's own connections.
    pub tls: Option<SslSection>,
}

/// What clients of an address want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Writes,
    Reads,
}

/// What all tasks share.
struct Router {
    began: Instant,
    machine: Mutex<Machine>,
    pictures: tokio::sync::watch::Sender<Picture>,
    /// True when the router is to end.
    stopping: tokio::sync::watch::Sender<bool>,
    gate: Arc<Gate>,
    load: Arc<Load>,
    counts: Counts,
    storage: String,
    dead_after: Duration,
    tls: Option<Tls>,
}

/// Of connections, for people. Those of two are for writers and readers.
#[derive(Default)]
struct Counts {
    accepted: [AtomicU64; 2],
    held: [AtomicU64; 2],
    /// Of each [`End`].
    ended: [AtomicU64; 4],
}

/// A client is held while this is there.
struct Held<'a>(&'a AtomicU64);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Router {
    /// Tells the machine what comes often and changes little: whatever follows from it is seen at the
    /// next tick.
    fn note(&self, tell: impl FnOnce(&mut Machine, Duration)) {
        tell(&mut lock(&self.machine), self.began.elapsed());
    }

    /// Tells the machine something; whatever follows from it is seen by all connections.
    fn step<T>(&self, tell: impl FnOnce(&mut Machine, Duration) -> T) -> T {
        let mut machine = lock(&self.machine);
        let now = self.began.elapsed();
        let result = tell(&mut machine, now);
        let picture = machine.picture(now);
        self.pictures.send_if_modified(|former| {
            let changed = *former != picture;
            if changed {
                self.say(&machine, former, &picture);
                *former = picture;
            }
            changed
        });
        result
    }

    fn say(&self, machine: &Machine, former: &Picture, picture: &Picture) {
        if former.writes != picture.writes {
            match &picture.writes {
                Some(address) => {
                    let name = machine.name_of(address);
                    info!("writers go to {name}");
                    // Nothing happens unless systemd has started this process.
                    let _ = sd_notify::notify(&[NotifyState::Status(&format!("primary: {name}"))]);
                }
                None => warn!("no primary answers: writers are held until there is one"),
            }
        }
        if former.reads != picture.reads {
            let names: Vec<_> =
                picture.reads.iter().map(|address| machine.name_of(address)).collect();
            match names.is_empty() {
                false => info!("readers go to {}", names.join(", ")),
                true => warn!("no node answers: readers are held until one does"),
            }
        }
        let load = self.load.all();
        for address in picture.dead.difference(&former.dead) {
            let connections = load.get(address).copied().unwrap_or(0);
            if connections > 0 {
                let name = machine.name_of(address);
                warn!(connections, "{name} does not answer: connections to it are broken");
            }
        }
    }

    fn count(&self, purpose: Purpose) {
        self.counts.accepted[purpose as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn ended(&self, end: End) {
        self.counts.ended[end as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn hold(&self, purpose: Purpose) -> Held<'_> {
        let held = &self.counts.held[purpose as usize];
        held.fetch_add(1, Ordering::Relaxed);
        Held(held)
    }

    /// Returns when the router is to end.
    async fn stopped(&self) {
        // The sender is in `self`.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }
}

/// Runs a router until `stop` returns, and its connections have ended.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    if config.nodes.is_empty() {
        bail!("no node is given");
    }
    let tls = config.tls.as_ref().map(Tls::new).transpose()?;
    // Each client takes two descriptors: one on either side.
    let clients = sockets::limits()?.0 / 2;
    let router = Arc::new(Router {
        began: Instant::now(),
        machine: Mutex::new(Machine::new(Policy {
            seeds: config.nodes.clone(),
            cluster: config.cluster.clone(),
            groups: config.groups.clone(),
            max_lag: config.max_lag,
        })),
        pictures: tokio::sync::watch::Sender::default(),
        stopping: tokio::sync::watch::Sender::default(),
        gate: Gate::new("clients", clients),
        load: Arc::default(),
        counts: Counts::default(),
        storage: config.storage.clone(),
        dead_after: config.dead_after,
        tls,
    });
    let mut listeners = Vec::new();
    for (purpose, address) in [(Purpose::Writes, &config.writes), (Purpose::Reads, &config.reads)] {
        if let Some(address) = address {
            listeners.push((purpose, Listener::bind(address).await?));
            info!("{} connect to {address}", purpose.name());
        }
    }
    if listeners.is_empty() {
        bail!("no address for clients is given");
    }
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(address) = &config.metrics {
        let listening = sockets::listen(address).await;
        let listening = listening.with_context(|| format!("cannot listen on {address}"))?;
        tasks.spawn(metrics::serve(router.clone(), listening));
    }
    for (purpose, listener) in listeners {
        tasks.spawn(carry::accept(router.clone(), purpose, listener));
    }
    tasks.spawn(watch_all(router.clone()));
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!(%error, "cannot tell systemd that the router is ready");
    }
    stop.await;
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    router.stopping.send_replace(true);
    let connections = router.gate.inside();
    let seconds = config.drain.as_secs_f64();
    info!(connections, "connections end as soon as they are quiet, within {seconds} s");
    let drained = async {
        while router.gate.inside() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(config.drain, drained).await.is_err() {
        warn!(connections = router.gate.inside(), "connections are broken");
    }
    for address in [&config.writes, &config.reads] {
        if let Some(ZeoAddress::Unix(path)) = address {
            // A new router would remove it too.
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Purpose::Writes => "writers",
            Purpose::Reads => "readers",
        }
    }
}

/// Has a connection to each node that the machine wants to be watched.
async fn watch_all(router: Arc<Router>) {
    let mut watches: BTreeMap<String, JoinHandle<()>> = BTreeMap::new();
    let mut pictures = router.pictures.subscribe();
    let mut tick = interval(TICK);
    loop {
        tokio::select! {
            _ = tick.tick() => router.step(|_, _| ()),
            changed = pictures.changed() => if changed.is_err() { return },
        }
        let wanted = pictures.borrow_and_update().watched.clone();
        watches.retain(|address, watch| {
            let stays = wanted.contains(address);
            if !stays {
                watch.abort();
            }
            stays
        });
        for address in wanted {
            watches.entry(address.clone()).or_insert_with(|| {
                let router = router.clone();
                // It is aborted when nobody wants it, above.
                tokio::spawn(async move { watch::watch(&router, &address).await })
            });
        }
    }
}
