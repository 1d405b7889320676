//! Runs the command that an administrator has configured for a change of this node's role: to move
//! a virtual address, for example.
//!
//! A command that fails, or takes too long, changes nothing: it is logged. Only the last role
//! counts: while a command runs, others wait, and those that are out of date by then are left out.
//!
//! While `on-replica` runs, nobody is connected to the addresses at which clients write: a client
//! that waits for its greeting at an address that leaves this machine would wait for ever, for it
//! has nothing to send, and what is sent to it from here does not reach it.

use std::ffi::OsString;
use std::pin::pin;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use standby_config::Standby;
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};
use tracing::{info, warn};

use crate::cells::shared::Shared;

/// After so long a command is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long those who are connected are waited for before `on-replica` runs.
const LEAVING: Duration = Duration::from_secs(1);
/// How long clients are refused while it runs: a command that takes longer has moved no address.
const REFUSED: Duration = Duration::from_secs(2);
/// How long the report of this node may be behind its role.
const REPORTED: Duration = Duration::from_secs(1);
/// How long the last words of a command that has failed are waited for.
const REST: Duration = Duration::from_millis(100);
/// Bytes of what a command writes to its standard error that are logged when it fails.
const SHOWN: usize = 1000;

/// Runs `on-replica` or `on-primary` when the node starts, and whenever its role changes.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let Some(standby) = &shared.config.standby else { return };
    if standby.on_primary.is_none() && standby.on_replica.is_none() {
        return;
    }
    let mut standing = shared.standing.subscribe();
    loop {
        let serves = standing.borrow_and_update().serves;
        let (key, command) = match serves {
            true => ("on-primary", &standby.on_primary),
            false => ("on-replica", &standby.on_replica),
        };
        if let Some(command) = command {
            if !serves && !shared.moving.clear(LEAVING).await {
                warn!("a client is still connected while on-replica runs");
            }
            reported(&shared, serves).await;
            let mut running = pin!(run(command, environment(&shared, standby, serves), PATIENCE));
            let ended = tokio::time::timeout(REFUSED, &mut running).await;
            shared.moving.end();
            let ended = match ended {
                Ok(ended) => ended,
                Err(_) => running.await,
            };
            match ended {
                Ok(()) => info!(command, "{key} has run"),
                Err(error) => warn!(command, error, "{key} has failed; the node goes on"),
            }
        }
        if standing.wait_for(|standing| standing.serves != serves).await.is_err() {
            return;
        }
    }
}

/// Waits until this node's report, which names the term, is of its present role.
async fn reported(shared: &Shared, serves: bool) {
    let is_so = async {
        while shared.reports.own().serves() != serves {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // The term is for the command's information only.
    let _ = tokio::time::timeout(REPORTED, is_so).await;
}

/// What a command gets to know.
fn environment(shared: &Shared, standby: &Standby, serves: bool) -> Vec<(&'static str, OsString)> {
    let addresses: Vec<String> =
        shared.config.zeo.addresses.iter().map(ToString::to_string).collect();
    let read_only = standby.read_only_address.as_ref();
    vec![
        ("STANDBY_ROLE", if serves { "primary" } else { "replica" }.into()),
        ("STANDBY_CLUSTER", standby.cluster.clone().into()),
        ("STANDBY_NODE", standby.node.clone().into()),
        ("STANDBY_GROUP", standby.group.clone().into()),
        ("STANDBY_TERM", shared.reports.own().term().to_string().into()),
        ("STANDBY_ADDRESS", addresses.join(" ").into()),
        (
            "STANDBY_READ_ONLY_ADDRESS",
            read_only.map(ToString::to_string).unwrap_or_default().into(),
        ),
        ("STANDBY_PEER_ADDRESS", standby.peer_address.to_string().into()),
    ]
}

/// Runs a command in a shell; says what is wrong if it fails.
async fn run(
    command: &str,
    environment: Vec<(&'static str, OsString)>,
    patience: Duration,
) -> Result<(), String> {
    let mut running = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("it cannot be started: {error}"))?;
    let (group, mut errors, mut said) = (running.id(), running.stderr.take(), Vec::new());
    let ended = tokio::select! {
        ended = running.wait() => Some(ended),
        () = tokio::time::sleep(patience) => None,
        () = read_for_good(&mut errors, &mut said) => None,
    };
    let Some(ended) = ended else {
        kill_group(group);
        // It is dead: this waits for nobody.
        let _ = running.wait().await;
        return Err(format!("it has not ended after {patience:?}, and was killed"));
    };
    let status = ended.map_err(|error| format!("it cannot be waited for: {error}"))?;
    if status.success() {
        return Ok(());
    }
    // What it has written and was not read yet; what it has started may go on writing.
    let _ = tokio::time::timeout(REST, read_for_good(&mut errors, &mut said)).await;
    Err(format!("{status}: {}", String::from_utf8_lossy(&said).trim()))
}

/// Reads what a command writes, and keeps the beginning. Does not return.
async fn read_for_good(errors: &mut Option<ChildStderr>, said: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Some(pipe) = errors {
        match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => *errors = None,
            Ok(read) => {
                let kept = read.min(SHOWN - said.len());
                said.extend_from_slice(&buffer[..kept]);
            }
        }
    }
    std::future::pending().await
}

/// Kills a command and what it has started.
fn kill_group(group: Option<u32>) {
    use rustix::process::{Pid, Signal, kill_process_group};
    let group = group.and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    // It may have ended just now.
    let _ = group.map(|group| kill_process_group(group, Signal::KILL));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_command_sees_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("said");
        let environment = vec![("STANDBY_ROLE", "primary".into()), ("F", file.clone().into())];
        run("echo $STANDBY_ROLE > \"$F\"", environment, LONG).await.unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "primary\n");
    }

    #[tokio::test]
    async fn a_command_that_fails_says_why() {
        let error = run("echo no such interface >&2; exit 3", Vec::new(), LONG).await.unwrap_err();
        assert_eq!(error, "exit status: 3: no such interface");
        let error = run("/no/such/program", Vec::new(), LONG).await.unwrap_err();
        assert!(error.starts_with("exit status: 127"), "{error}");
    }

    #[tokio::test]
    async fn of_many_words_the_first_are_kept() {
        let command = "yes no room on the device | head -c 10000000 >&2; exit 1";
        let error = run(command, Vec::new(), LONG).await.unwrap_err();
        assert!(error.starts_with("exit status: 1: no room") && error.len() < 1100, "{error}");
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_with_what_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let command = "sleep 1000 & echo $! > \"$F\"; wait";
        let environment = vec![("F", file.clone().into())];
        let error = run(command, environment, Duration::from_secs(1)).await.unwrap_err();
        assert!(error.contains("was killed"), "{error}");
        let pid = std::fs::read_to_string(file).unwrap().trim().to_owned();
        for _ in 0..500 {
            // Nobody may have waited for it yet.
            match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) if !stat.contains(") Z ") => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                _ => return,
            }
        }
        panic!("{pid} still runs");
    }
}
