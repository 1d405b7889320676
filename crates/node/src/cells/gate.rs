//! How many connections of a kind may be open at a time. The one that is too many is refused at
//! once: whoever is served already does not suffer, and neither do the node's own files. One
//! address does not take the places of all others: if it has most connections, its last one goes
//! when somebody comes from an address that has fewer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::ensure;
use standby_types::lock::lock;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use crate::platform::{self, Instant};

/// Time between two log lines about refused connections.
const QUIET: Duration = Duration::from_secs(10);
/// With fewer descriptors a node cannot do its work.
const FEWEST_DESCRIPTORS: u64 = 128;
/// Descriptors that are kept for the log, the data files, the other nodes and the administrators,
/// at least.
const OWN_DESCRIPTORS: u64 = 64;

/// See the module.
pub struct Gate {
    /// The connections, for people.
    what: &'static str,
    limit: usize,
    inside: Mutex<Inside>,
    refused: AtomicU64,
    told: Mutex<Option<Instant>>,
}

/// The connections of each address, which are told by their number when they are to end.
#[derive(Default)]
struct Inside {
    next: u64,
    count: usize,
    by_host: BTreeMap<String, BTreeMap<u64, Arc<Notify>>>,
}

impl Inside {
    fn add(&mut self, host: &str) -> (u64, Arc<Notify>) {
        self.next += 1;
        self.count += 1;
        let wanted = Arc::new(Notify::new());
        self.by_host.entry(host.to_owned()).or_default().insert(self.next, wanted.clone());
        (self.next, wanted)
    }

    /// Nothing happens if its place was given to somebody else.
    fn remove(&mut self, host: &str, number: u64) {
        let Some(of_host) = self.by_host.get_mut(host) else { return };
        if of_host.remove(&number).is_some() {
            self.count -= 1;
        }
        if of_host.is_empty() {
            self.by_host.remove(host);
        }
    }

    /// Takes the last place from the host that has most, for one that will have fewer; returns
    /// whose it was.
    fn take_for(&mut self, host: &str) -> Option<String> {
        let mine = self.by_host.get(host).map_or(0, BTreeMap::len);
        let (most, places) = self.by_host.iter().max_by_key(|(_, places)| places.len())?;
        if mine + 1 >= places.len() {
            return None;
        }
        let (number, wanted) = places.last_key_value()?;
        wanted.notify_one();
        let (most, number) = (most.clone(), *number);
        self.remove(&most, number);
        Some(most)
    }
}

/// Lets one connection be open. Given back when it is dropped.
pub struct Pass {
    gate: Arc<Gate>,
    host: String,
    number: u64,
    wanted: Arc<Notify>,
}

impl Pass {
    /// Returns when the connection is to end, for somebody else needs its place.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        lock(&self.gate.inside).remove(&self.host, self.number);
    }
}

impl Gate {
    /// Lets `limit` connections be open.
    pub fn new(what: &'static str, limit: usize) -> Arc<Gate> {
        let (inside, refused, told) = (Mutex::default(), AtomicU64::new(0), Mutex::new(None));
        Arc::new(Gate { what, limit, inside, refused, told })
    }

    /// Lets one more in, or refuses it, and says so in the log. `from` is an address, with or
    /// without a port.
    pub fn enter(self: &Arc<Self>, from: &str) -> Option<Pass> {
        let host = from.rsplit_once(':').map_or(from, |(host, _)| host);
        let mut inside = lock(&self.inside);
        let mut taken = None;
        if inside.count >= self.limit {
            taken = inside.take_for(host);
        }
        if inside.count < self.limit {
            let (number, wanted) = inside.add(host);
            drop(inside);
            if let Some(most) = taken
                && self.may_tell()
            {
                let (limit, what) = (self.limit, self.what);
                warn!(
                    limit,
                    "too many connections of {what}: {most} has most, and its last one ends for \
                    {host}"
                );
            }
            return Some(Pass { gate: self.clone(), host: host.to_owned(), number, wanted });
        }
        drop(inside);
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
        lock(&self.inside).count
    }

    /// How many may be.
    pub(crate) fn limit(&self) -> usize {
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
pub(crate) struct StrangersLines(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

impl StrangersLines {
    /// Writes a line by `write`, which gets how many were left out before it, or leaves it out.
    pub(crate) fn tell(&self, write: impl FnOnce(u64)) {
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

/// Handshakes at the peer address at a time: at least, and at most. Many clients may be forwarded
/// at the same moment.
const STRANGERS: (u64, u64) = (16, 1024);

/// Raises the limit of descriptors as far as the system lets it. Returns how many connections of
/// clients fit beside what the node needs for itself, and how many of strangers at the peer address
/// may be open.
pub fn limits() -> anyhow::Result<(usize, usize)> {
    let (limit, before) = platform::descriptors()?;
    ensure!(
        limit >= FEWEST_DESCRIPTORS,
        "this process may have {limit} files and connections open at a time; a node needs \
         {FEWEST_DESCRIPTORS}, and one more for each client (ulimit -Hn; LimitNOFILE= of systemd)"
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
        let enter = || gate.enter("127.0.0.1:1");
        let first = enter().unwrap();
        let second = enter().unwrap();
        assert!(enter().is_none() && enter().is_none());
        assert_eq!((gate.inside(), gate.refused()), (2, 2));
        drop(first);
        let third = enter().unwrap();
        assert!(enter().is_none());
        drop((second, third));
        assert_eq!(gate.inside(), 0);
    }

    #[tokio::test]
    async fn who_has_most_makes_room_for_others() {
        let gate = Gate::new("clients", 4);
        let enter = |host: &str, port: u16| gate.enter(&format!("{host}:{port}"));
        let crowd: Vec<_> = (0..4).map(|port| enter("[::1]", port).unwrap()).collect();
        assert!(enter("[::1]", 9).is_none());
        let others = [enter("10.0.0.1", 1).unwrap(), enter("10.0.0.1", 2).unwrap()];
        // As many as the others: nobody has to go.
        assert!(enter("10.0.0.1", 3).is_none());
        assert_eq!(gate.inside(), 4);
        for (pass, goes) in crowd.iter().zip([false, false, true, true]) {
            let wanted = tokio::time::timeout(Duration::ZERO, pass.wanted()).await.is_ok();
            assert_eq!(wanted, goes);
        }
        drop(crowd);
        assert_eq!(gate.inside(), 2);
        drop(others);
        assert_eq!(gate.inside(), 0);
        assert!(lock(&gate.inside).by_host.is_empty());
    }
}
