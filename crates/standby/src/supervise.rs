//! `standby serve --supervise`: runs the node as a child, kills it when it is frozen, starts it
//! again.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use standby_config::Config;
use standby_node::SUPERVISED;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::serve::AGAIN;

/// How often the child is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// The wait before a node that crashed is started again: at first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A node that ran for so long crashes for a new reason.
const LONG: Duration = Duration::from_secs(60);

/// How a child has ended.
enum End {
    /// By itself, or because it was told to.
    Exited(ExitStatus),
    /// It gave no sign of life, and was killed.
    Frozen,
}

/// Runs the node until it ends by itself or this process is told to end.
pub async fn run(config: &Path, frozen_after: f64) -> anyhow::Result<()> {
    if !(0.5..=3600.0).contains(&frozen_after) {
        bail!("--frozen-after {frozen_after}: 0.5 to 3600 seconds are possible");
    }
    let patience = Duration::from_secs_f64(frozen_after);
    Config::read(config)?;
    if std::env::var_os("NOTIFY_SOCKET").is_some() {
        bail!("systemd watches this service itself (WatchdogSec): leave --supervise out");
    }
    let mut signals = forwarded()?;
    let mut backoff = BACKOFF.0;
    let mut again = false;
    loop {
        let mut node = Supervised::start(config, again)?;
        let started = Instant::now();
        match node.watch(patience, &mut signals).await? {
            End::Exited(status) if status.success() => return Ok(()),
            _ if node.stopping => bail!("the node was told to end, and had to be killed"),
            End::Frozen => {
                let seconds = patience.as_secs_f64();
                say(&format!("the node gave no sign of life for {seconds} s, and was killed"));
            }
            End::Exited(status) => match status.signal() {
                None => bail!("the node has ended, {status}; its log says why"),
                Some(_) => {
                    if started.elapsed() > LONG {
                        backoff = BACKOFF.0;
                    }
                    say(&format!("the node has crashed, {status}"));
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            },
        }
        say("starting it again");
        again = true;
    }
}

fn say(what: &str) {
    eprintln!("standby: supervisor: {what}");
}

/// The signals that are forwarded to the node, as they come.
fn forwarded() -> anyhow::Result<mpsc::UnboundedReceiver<Signal>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (kind, forwarded) in [
        (SignalKind::terminate(), Signal::TERM),
        (SignalKind::interrupt(), Signal::TERM),
        (SignalKind::hangup(), Signal::HUP),
        (SignalKind::user_defined2(), Signal::USR2),
    ] {
        let (mut signals, sender) = (signal(kind)?, sender.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() && sender.send(forwarded).is_ok() {}
        });
    }
    Ok(receiver)
}

/// A node that is watched.
struct Supervised {
    child: Child,
    /// Bytes that it has written: its signs of life.
    signs: Arc<AtomicU64>,
    /// It was told to end.
    stopping: bool,
}

impl Supervised {
    fn start(config: &Path, again: bool) -> anyhow::Result<Supervised> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg("-C")
            .arg(config)
            .env(SUPERVISED, "1")
            .envs(again.then_some((AGAIN, "1")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the node")?;
        let signs = Arc::new(AtomicU64::new(0));
        let mut pipe = child.stdout.take().context("the node has no standard output")?;
        let counted = signs.clone();
        std::thread::Builder::new().name("signs".into()).spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = pipe.read(&mut bytes) {
                counted.fetch_add(count as u64, Ordering::Relaxed);
            }
        })?;
        Ok(Supervised { child, signs, stopping: false })
    }

    /// Waits until it has ended, passing signals on; kills it after a silence of `patience`.
    async fn watch(
        &mut self,
        patience: Duration,
        signals: &mut mpsc::UnboundedReceiver<Signal>,
    ) -> anyhow::Result<End> {
        let mut heard = 0;
        let mut silence = Duration::ZERO;
        let mut looked = Instant::now();
        let mut killed = false;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(if killed { End::Frozen } else { End::Exited(status) });
            }
            // When the whole machine stood still, it was not the node's fault.
            silence += looked.elapsed().min(LOOK * 2);
            looked = Instant::now();
            let signs = self.signs.load(Ordering::Relaxed);
            if signs != heard {
                (heard, silence) = (signs, Duration::ZERO);
            }
            if silence > patience && !killed {
                self.child.kill()?;
                killed = true;
            }
            tokio::select! {
                Some(signal) = signals.recv() => {
                    self.stopping |= signal == Signal::TERM;
                    if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
                        let _ = kill_process(pid, signal);
                    }
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
