//! How many connections of a kind may be open at a time. The one that is too many is refused at once: whoever is
//! served already does not suffer, and neither do the node's own files.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::ensure;
use tracing::{error, info, warn};

use crate::machine::{self, Instant};
use crate::sync::lock;

/// Time between two log lines about refused connections.
const QUIET: Duration = Duration::from_secs(10);
/// With fewer descriptors a node cannot do its work.
const FEWEST_DESCRIPTORS: u64 = 128;
/// Descriptors that are kept for the log, the data files, the other nodes and the administrators, at least.
const OWN_DESCRIPTORS: u64 = 64;

/// See the module.
pub struct Gate {
    /// The connections, for people.
    what: &'static str,
    limit: usize,
    inside: AtomicUsize,
    refused: AtomicU64,
    told: Mutex<Option<Instant>>,
}

/// Lets one connection be open. Given back when it is dropped.
pub struct Pass(Arc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate {
    /// Lets `limit` connections be open.
    pub fn new(what: &'static str, limit: usize) -> Arc<Gate> {
        let (inside, refused, told) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(None));
        Arc::new(Gate { what, limit, inside, refused, told })
    }

    /// Lets one more in, or refuses it, and says so in the log.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        let one_more = |inside: usize| (inside < self.limit).then_some(inside + 1);
        if self.inside.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok() {
            return Some(Pass(self.clone()));
        }
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if self.may_tell() {
            let (limit, what) = (self.limit, self.what);
            warn!(limit, refused, "too many connections of {what}: one more was refused");
        }
        None
    }

    /// A connection could not be accepted.
    pub fn failed(&self, error: &std::io::Error) {
        if self.may_tell() {
            error!(%error, "cannot accept a connection of {}", self.what);
        }
    }

    fn may_tell(&self) -> bool {
        let mut told = lock(&self.told);
        let may = told.is_none_or(|at| at.elapsed() >= QUIET);
        if may {
            *told = Some(Instant::now());
        }
        may
    }

    /// How many connections are open.
    pub fn inside(&self) -> usize {
        self.inside.load(Ordering::Acquire)
    }

    /// How many may be.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How many were refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// Log lines that strangers cause in a second.
const STRANGERS_LINES: u32 = 5;

/// Bounds the log lines of those who can only reach a port: some in each second, then a count.
#[derive(Default)]
pub struct StrangersLines(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

impl StrangersLines {
    /// Writes a line by `write`, which gets how many were left out before it, or leaves it out.
    pub fn tell(&self, write: impl FnOnce(u64)) {
        let mut lines = lock(&self.0);
        if lines.since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            (lines.since, lines.told) = (Some(Instant::now()), 0);
        }
        if lines.told == STRANGERS_LINES {
            lines.untold += 1;
            return;
        }
        lines.told += 1;
        let untold = std::mem::take(&mut lines.untold);
        drop(lines);
        write(untold);
    }
}

/// Handshakes at the peer address at a time: at least, and at most. Many clients may be passed on at the same moment.
const STRANGERS: (u64, u64) = (16, 1024);

/// Raises the limit of descriptors as far as the system lets it. Returns how many connections of clients fit beside what
/// the node needs for itself, and how many of strangers at the peer address may be open.
pub fn limits() -> anyhow::Result<(usize, usize)> {
    let (limit, before) = machine::descriptors()?;
    ensure!(
        limit >= FEWEST_DESCRIPTORS,
        "this process may have {limit} files and connections open at a time; a node needs {FEWEST_DESCRIPTORS}, and one \
         more for each client (ulimit -Hn; LimitNOFILE= of systemd)"
    );
    let clients = limit - OWN_DESCRIPTORS.max(limit / 4);
    info!(
        before,
        limit, clients, "so many files and connections may be open; so many of them clients"
    );
    let strangers = (limit / 16).clamp(STRANGERS.0, STRANGERS.1);
    Ok((usize::try_from(clients).unwrap_or(usize::MAX), strangers as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_write_some_lines_and_then_a_count() {
        let lines = StrangersLines::default();
        let mut told = Vec::new();
        for _ in 0..100 {
            lines.tell(|untold| told.push(untold));
        }
        assert_eq!(told, [0; STRANGERS_LINES as usize]);
        lock(&lines.0).since = None;
        lines.tell(|untold| told.push(untold));
        assert_eq!(told.last(), Some(&95));
    }

    #[test]
    fn row_47_the_one_that_is_too_many_is_refused() {
        let gate = Gate::new("clients", 2);
        let first = gate.enter().unwrap();
        let second = gate.enter().unwrap();
        assert!(gate.enter().is_none() && gate.enter().is_none());
        assert_eq!((gate.inside(), gate.refused()), (2, 2));
        drop(first);
        let third = gate.enter().unwrap();
        assert!(gate.enter().is_none());
        drop((second, third));
        assert_eq!(gate.inside(), 0);
    }
}
