//! `standby serve`

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use rustix::process::{Signal, set_parent_process_death_signal};
use standby_config::Config;
use standby_logging as logging;
use standby_node::{Next, SUPERVISED, Watchdog, start};
use tokio::signal::unix::{SignalKind, signal};

/// In the environment of a process that has run the node before: what it made is its own.
pub const AGAIN: &str = "STANDBY_AGAIN";

pub async fn run(file: &Path, check: bool) -> anyhow::Result<()> {
    let config = Config::read(file)?;
    if check {
        for note in &config.notes {
            println!("{note}");
        }
        println!("{} is fine", file.display());
        return Ok(());
    }
    if std::env::var_os(AGAIN).is_none() {
        config.check_create()?;
    }
    if std::env::var_os(SUPERVISED).is_some() {
        // Without its supervisor a node would go on unwatched, and be in its successor's way.
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let log_files = logging::start(config.eventlog.as_ref())?;
    config.warn_of_exposed_files();
    let watchdog = Watchdog::start()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut reload = signal(SignalKind::hangup())?;
    let mut reopen = signal(SignalKind::user_defined2())?;
    tokio::spawn(async move {
        while reopen.recv().await.is_some() {
            log_files.reopen();
        }
    });
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(stop);
    // A signal during a long start (an index being built) ends it at once.
    let node = tokio::select! {
        started = start(config) => started?,
        () = &mut stop => return Ok(()),
    };
    let handle = node.handle();
    watchdog.watch(handle.pulse());
    tokio::spawn(async move {
        while reload.recv().await.is_some() {
            handle.reload_certificates();
        }
    });
    match node.run_until(stop).await? {
        Next::End => Ok(()),
        Next::Again => Err(begin_anew()).context("cannot run this program again"),
    }
}

/// Puts a new process in the place of this one, with its id: whoever watches it need not know.
/// Nothing of this one stays: no socket, no lock.
fn begin_anew() -> std::io::Error {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    // The file may have been replaced by a new version, or be gone.
    let program = std::env::current_exe().ok().filter(|path| path.exists());
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    Command::new(program).arg0(name).args(arguments).env(AGAIN, "1").exec()
}
