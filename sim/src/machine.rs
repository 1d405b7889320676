//! A simulated machine and the program that runs on it.

use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use standby_config::Config;
use standby_node::simulated::{Host, Network, Random, fill_random};
use standby_node::{Handle, Next, start_on};
use standby_types::Disk;
use tokio::runtime::{Builder, RngSeed, Runtime};

use crate::disk::SimDisk;

/// Why a program has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It begins anew in the same process.
    Again,
    /// It was told to.
    Ended,
    /// It could not go on.
    Failed(String),
}

/// What a running program shows.
#[derive(Default)]
struct Shown {
    exit: Option<Exit>,
    node: Option<Handle>,
}

/// See the module.
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Where its program is.
    pub host: Arc<Host>,
    /// Its disk, which survives the program.
    pub disk: SimDisk,
    /// How fast its clock goes.
    pub rate: f64,
    /// Its program is stopped.
    pub paused: bool,
    /// How often a program was started, or has ended.
    pub changes: u64,
    runtime: Option<(Runtime, tokio::time::Instant)>,
    /// How far the program's clock is.
    clock: Duration,
    shown: Arc<Mutex<Shown>>,
}

impl Machine {
    /// A machine on which nothing runs.
    pub fn new(name: &str, address: IpAddr, network: &Network, random: &mut Random) -> Machine {
        Machine {
            name: name.into(),
            host: Arc::new(Host::new(address, network.clone(), random.fork())),
            disk: SimDisk::new(),
            rate: 1.0,
            paused: false,
            changes: 0,
            runtime: None,
            clock: Duration::ZERO,
            shown: Arc::default(),
        }
    }

    /// True if a program runs.
    pub fn runs(&self) -> bool {
        self.runtime.is_some()
    }

    /// Starts a program.
    pub fn start(&mut self, program: impl Future<Output = ()> + Send + 'static) {
        let mut lots = [0; 32];
        self.host.enter(|| fill_random(&mut lots)).expect("randomness from a seed");
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .rng_seed(RngSeed::from_bytes(&lots))
            .build();
        let runtime = runtime.expect("a runtime without I/O");
        let begun = self.host.enter(|| {
            let begun = runtime.block_on(async { tokio::time::Instant::now() });
            runtime.spawn(program);
            begun
        });
        self.runtime = Some((runtime, begun));
        self.clock = Duration::ZERO;
        self.paused = false;
        self.changes += 1;
    }

    /// Starts a node.
    pub fn start_node(&mut self, config: &Config) {
        let shown = Arc::<Mutex<Shown>>::default();
        self.shown = shown.clone();
        let (config, disk) = (config.clone(), Arc::new(self.disk.clone()) as Arc<dyn Disk>);
        self.start(async move {
            let show = |exit| lock(&shown).exit = Some(exit);
            match start_on(config, disk).await {
                Err(error) => show(Exit::Failed(format!("{error:#}"))),
                Ok(running) => {
                    lock(&shown).node = Some(running.handle());
                    show(match running.run_until(std::future::pending()).await {
                        Ok(Next::Again) => Exit::Again,
                        Ok(Next::End) => Exit::Ended,
                        Err(error) => Exit::Failed(format!("{error:#}")),
                    });
                }
            }
        });
    }

    /// The program is killed; what it has written stays.
    pub fn kill(&mut self) {
        self.host.network.close_all(self.host.address);
        let runtime = self.runtime.take();
        self.changes += 1;
        self.host.enter(|| drop(runtime));
        *lock(&self.shown) = Shown::default();
    }

    /// Lets time pass for the program.
    pub fn step(&mut self, by: Duration) {
        if self.paused {
            // It finds out when it goes on.
            self.clock += by.mul_f64(self.rate);
            return;
        }
        let Some((runtime, begun)) = &self.runtime else { return };
        self.clock += by.mul_f64(self.rate);
        let until = *begun + self.clock;
        self.host.enter(|| runtime.block_on(async move { tokio::time::sleep_until(until).await }));
    }

    /// Why the program has ended, if it has; to be asked once.
    pub fn exit(&self) -> Option<Exit> {
        lock(&self.shown).exit.take()
    }

    /// The running node.
    pub fn node(&self) -> Option<Handle> {
        lock(&self.shown).node.clone()
    }

    /// Runs a task on the machine, beside its program.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some((runtime, _)) = &self.runtime {
            self.host.enter(|| drop(runtime.spawn(task)));
        }
    }

    /// Its clock is wrong by this from now on.
    pub fn set_skew(&self, skew: i64) {
        self.host.skew.store(skew, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
