//! Signs of life for whoever kills this process when it is frozen: `standby serve --supervise`, or
//! systemd.
//!
//! A stock ZEO client waits for ever on a connection whose server neither answers nor closes it.
//! When the process is killed, its connections break, and the clients go to another node.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::{error, warn};

/// Set by the supervisor: a byte on standard output is a sign of life.
pub const SUPERVISED: &str = "STANDBY_SUPERVISED";

/// Between two signs of life.
const EVERY: Duration = Duration::from_millis(100);
/// How long the primary's machine may take for one step.
const PATIENCE: Duration = Duration::from_secs(1);
/// What systemd is asked for while the node starts: a large data file may have no index.
const STARTING: Duration = Duration::from_secs(60);

/// Counts the ticks of the primary's machine.
#[derive(Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// The primary's machine works.
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Gives signs of life while the pulse of the primary's machine beats, and before there is one.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<OnceLock<Arc<Pulse>>>);

impl Watchdog {
    /// Starts to give signs, if anybody looks for them.
    pub fn start() -> std::io::Result<Watchdog> {
        let watchdog = Watchdog::default();
        let supervised = std::env::var_os(SUPERVISED).is_some();
        let systemd = sd_notify::watchdog_enabled().is_some();
        if supervised || systemd {
            let watched = watchdog.clone();
            std::thread::Builder::new()
                .name("watchdog".into())
                .spawn(move || watched.run(supervised))?;
        }
        Ok(watchdog)
    }

    /// The node runs: its engine is watched from now on.
    pub fn watch(&self, pulse: Arc<Pulse>) {
        let _ = self.0.set(pulse);
        // Nothing happens unless systemd has started this process.
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            warn!(%error, "cannot tell systemd that the node is ready");
        }
    }

    fn run(&self, supervised: bool) {
        let (mut last, mut seen, mut told) = (0, Instant::now(), false);
        loop {
            let starting = match self.0.get().map(|pulse| pulse.count()) {
                Some(count) if count == last => false,
                count => {
                    (last, seen, told) = (count.unwrap_or(0), Instant::now(), false);
                    count.is_none()
                }
            };
            if seen.elapsed() > PATIENCE {
                if !std::mem::replace(&mut told, true) {
                    error!("the engine does not answer: no signs of life are given");
                }
            } else {
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                if starting {
                    let more = STARTING.as_micros() as u32;
                    let _ = sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(more)]);
                }
                let mut out = std::io::stdout();
                if supervised && out.write_all(b".").and_then(|()| out.flush()).is_err() {
                    // The system ends this process with its supervisor.
                    return;
                }
            }
            std::thread::sleep(EVERY);
        }
    }
}
