//! Connections of clients: each is held until there is a node for it, and its bytes are passed on
//! as they are. Nothing of them is read, so that TLS goes through.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use standby_node::sockets::{self, Listener, Pass, Stream};
use standby_types::lock::lock;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::machine::Picture;
use crate::{Purpose, Router};

/// How long a node may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(1);
/// Before another attempt.
const AGAIN: Duration = Duration::from_millis(50);
/// Bytes that a client may send before there is a node for it: the beginning of TLS. Whoever says
/// more is no ZEO client.
const EARLY: usize = 64 << 10;
/// Bytes that are passed on at once, in each direction.
const AT_ONCE: usize = 16 << 10;
/// A machine that has acknowledged nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(10);
/// A connection on which nothing has passed for so long may be ended without harm: nobody waits for
/// an answer.
const QUIET: Duration = Duration::from_millis(200);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// A connection to a node that serves its purpose less well than others is ended after so long.
const SETTLED: Duration = Duration::from_secs(5);
/// A reader that is never quiet leaves its node after so long all the same: the call that is under
/// way fails, and is tried again. What it would read instead may be old without an end.
const OVERDUE: Duration = Duration::from_secs(10);

/// Connections to each address.
#[derive(Default)]
pub(crate) struct Load(Mutex<BTreeMap<String, usize>>);

impl Load {
    /// Takes the address that has fewest.
    fn take(self: &Arc<Self>, addresses: &[String]) -> Option<Place> {
        let mut load = lock(&self.0);
        let count = |address: &&String| load.get(*address).copied().unwrap_or(0);
        let address = addresses.iter().min_by_key(count)?.clone();
        *load.entry(address.clone()).or_default() += 1;
        Some(Place { load: self.clone(), address })
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<String, usize> {
        lock(&self.0).clone()
    }
}

/// A connection to an address. Given back when it is dropped.
struct Place {
    load: Arc<Load>,
    address: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut load = lock(&self.load.0);
        if let Some(count) = load.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                load.remove(&self.address);
            }
        }
    }
}

/// Why a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client or the node has ended it.
    Closed,
    /// The node does not answer any more.
    Dead,
    /// Another node serves it better.
    Moved,
    /// The router ends, or needs its place.
    Drained,
}

/// Accepts clients until the router ends.
pub(crate) async fn accept(router: Arc<Router>, purpose: Purpose, listener: Listener) {
    let mut stopping = router.stopping.subscribe();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => return,
            accepted = listener.accept(SILENCE) => accepted,
        };
        match accepted {
            Ok(client) => {
                let Some(pass) = router.gate.enter(&client.peer()) else { continue };
                let router = router.clone();
                router.count(purpose);
                // It ends with the connection, and all connections with the router.
                tokio::spawn(async move {
                    let end = carry(&router, purpose, client, &pass).await;
                    router.ended(end);
                });
            }
            Err(error) => {
                router.gate.failed(&error);
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(router: &Router, purpose: Purpose, mut client: Stream, pass: &Pass) -> End {
    if let Stream::Tcp(tcp) = &client
        && let Err(error) = sockets::end_when_silent(tcp, SILENCE)
    {
        debug!(%error, "a client is gone at once");
        return End::Closed;
    }
    client.set_nodelay();
    let mut said = BytesMut::new();
    let (place, node) = tokio::select! {
        found = find(router, purpose) => found,
        () = gone(&mut client, &mut said) => return End::Closed,
        () = pass.wanted() => return End::Drained,
        () = router.stopped() => return End::Drained,
    };
    let heard = Heard::new();
    let left = leave(router, purpose, &place.address, &heard);
    tokio::select! {
        () = pass_on(client, node, &said, &heard) => End::Closed,
        end = left => end,
        () = pass.wanted() => End::Drained,
    }
}

/// Returns when a client that is held has left, or says too much. What it says is kept.
async fn gone(client: &mut Stream, said: &mut BytesMut) {
    while said.len() < EARLY {
        match client.read_buf(said).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// A connection to the best node.
async fn find(router: &Router, purpose: Purpose) -> (Place, TcpStream) {
    let _held = router.hold(purpose);
    let mut pictures = router.pictures.subscribe();
    loop {
        let place = loop {
            let addresses = targets(&pictures.borrow_and_update(), purpose);
            if let Some(place) = router.load.take(&addresses) {
                break place;
            }
            if pictures.changed().await.is_err() {
                // The router ends; so does whoever waits for this.
                std::future::pending::<()>().await;
            }
        };
        match timeout(CONNECT, TcpStream::connect(&place.address)).await {
            Ok(Ok(node)) if sockets::end_when_silent(&node, SILENCE).is_ok() => {
                let _ = node.set_nodelay(true);
                return (place, node);
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => debug!(address = place.address, %error, "cannot connect"),
            Err(_) => debug!(address = place.address, "cannot connect in time"),
        }
        drop(place);
        sleep(AGAIN).await;
    }
}

fn targets(picture: &Picture, purpose: Purpose) -> Vec<String> {
    match purpose {
        Purpose::Writes => picture.writes.iter().cloned().collect(),
        Purpose::Reads => picture.reads.clone(),
    }
}

/// When something has passed last.
struct Heard {
    began: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
}

impl Heard {
    fn new() -> Heard {
        Heard { began: Instant::now(), last: AtomicU64::new(0) }
    }

    fn note(&self) {
        self.last.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn is_quiet(&self) -> bool {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(last) >= QUIET
    }
}

/// Returns when the connection to `address` is to end.
async fn leave(router: &Router, purpose: Purpose, address: &str, heard: &Heard) -> End {
    let mut pictures = router.pictures.subscribe();
    let mut stopping = router.stopping.subscribe();
    let mut better_since = None;
    loop {
        let (dead, better) = {
            let picture = pictures.borrow_and_update();
            let targets = targets(&picture, purpose);
            let better = !targets.is_empty() && targets.iter().all(|target| target != address);
            (picture.dead.contains(address), better)
        };
        if dead {
            return End::Dead;
        }
        let (stops, quiet) = (*stopping.borrow_and_update(), heard.is_quiet());
        if stops && quiet {
            return End::Drained;
        }
        better_since = better.then(|| better_since.unwrap_or_else(Instant::now));
        let overdue = purpose == Purpose::Reads
            && better_since.is_some_and(|since| since.elapsed() >= OVERDUE);
        if overdue || better && quiet && heard.began.elapsed() >= SETTLED {
            return End::Moved;
        }
        tokio::select! {
            changed = pictures.changed() => if changed.is_err() { return End::Drained },
            changed = stopping.changed() => if changed.is_err() { return End::Drained },
            () = sleep(LOOK), if stops || better => {}
        }
    }
}

/// Passes on what both say, until either has ended.
async fn pass_on(client: Stream, node: TcpStream, said: &[u8], heard: &Heard) {
    let (mut from_client, mut to_client) = split(client);
    let (mut from_node, mut to_node) = node.into_split();
    if to_node.write_all(said).await.is_err() {
        return;
    }
    tokio::select! {
        () = pump(&mut from_client, &mut to_node, heard) => {
            // The node sees that the client has left, in order.
            let _ = to_node.shutdown().await;
        }
        () = pump(&mut from_node, &mut to_client, heard) => {
            let _ = timeout(CONNECT, to_client.shutdown()).await;
        }
    }
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    heard: &Heard,
) {
    let mut bytes = BytesMut::with_capacity(AT_ONCE);
    loop {
        bytes.clear();
        match from.read_buf(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(_) => heard.note(),
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_spread() {
        let load = Arc::new(Load::default());
        let both = ["a".to_owned(), "b".to_owned()];
        let places: Vec<_> = (0..5).filter_map(|_| load.take(&both)).collect();
        assert_eq!(load.all(), [("a".to_owned(), 3), ("b".to_owned(), 2)].into());
        drop(places);
        assert!(load.all().is_empty());
        assert!(load.take(&[]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_quiet_at_once() {
        let heard = Heard::new();
        assert!(!heard.is_quiet());
        sleep(QUIET).await;
        assert!(heard.is_quiet());
        heard.note();
        assert!(!heard.is_quiet());
    }
}
