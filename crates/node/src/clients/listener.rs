//! The addresses for clients.
//!
//! On the read-write address a client that comes to a node which is not primary is *parked*: it is
//! accepted and hears nothing. In ZEO the server speaks first, so it waits. When the node becomes
//! primary, the session begins at once. If another node has been primary for a moment and the
//! client is still here, its bytes are forwarded to that node: clients do not try a node again
//! that has disappointed them.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use standby_config::ZeoAddress;
use standby_logging::error_text::with_causes;
use standby_primary::ServingState;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional, join};
use tokio::sync::watch;
use tracing::{debug, error};

use crate::cells::gate::{Gate, Pass};
use crate::cells::moving_address::moves;
use crate::cells::shared::Shared;
use crate::clients::connection;
use crate::clients::newcomer::Newcomer;
use crate::platform::{Instant, drain};
use crate::transport::handshake::{Purpose, connect};
use crate::transport::socket::Cutter;
use crate::transport::stream::{Listener, Stream};

/// How long a client is parked although another node is primary: most clients try all nodes at the
/// same time and find that one by themselves.
const PARK: Duration = Duration::from_millis(200);
/// A client whose machine has acknowledged nothing for so long is gone, and its locks with it. A
/// client that takes nothing for so long, while something is to be sent to it, counts as gone too.
/// One that is parked has nothing that others could miss, and is not watched.
const SILENCE: Duration = Duration::from_secs(10);
/// Time between two looks whether the lease holds again.
const LEASE: Duration = Duration::from_millis(20);
/// The longest greeting of a primary.
const GREETING: usize = 64;
/// Time between two looks at that.
const LOOK: Duration = Duration::from_secs(1);
/// How long a client stays with a primary that this node does not hear of any more.
const LOST_PRIMARY: Duration = Duration::from_secs(2);

/// Accepts clients that may write. While addresses move it does not listen.
pub(crate) async fn read_write(
    shared: Arc<Shared>,
    address: ZeoAddress,
    mut listener: Listener,
    mut stay: watch::Receiver<bool>,
) {
    loop {
        loop {
            let (stream, pass) = tokio::select! {
                biased;
                () = moves(&mut stay) => break,
                accepted = accept(&shared.clients, &listener) => accepted,
            };
            // It ends with the connection.
            tokio::spawn(park(shared.clone(), stream, pass, stay.clone()));
        }
        drop((listener, stay));
        (listener, stay) = listen_again(&shared, &address).await;
    }
}

/// Listens when addresses do not move any more. Another process may have taken the address: then
/// again and again.
async fn listen_again(shared: &Shared, address: &ZeoAddress) -> (Listener, watch::Receiver<bool>) {
    loop {
        let stay = shared.moving.stays().await;
        match Listener::bind(address).await {
            Ok(listener) => return (listener, stay),
            Err(error) => error!("no client can connect: {}", with_causes(&error)),
        }
        drop(stay);
        tokio::time::sleep(LOOK).await;
    }
}

/// Accepts clients that only read.
pub(crate) async fn read_only(shared: Arc<Shared>, listener: Listener) {
    loop {
        let (stream, pass) = accept(&shared.clients, &listener).await;
        // It ends with the connection.
        tokio::spawn(park_reader(shared.clone(), stream, pass));
    }
}

/// A node that has nothing yet, or is far behind, parks its readers too.
async fn park_reader(shared: Arc<Shared>, stream: Stream, pass: Pass) {
    let mut client = Newcomer::new(stream);
    let mut standing = shared.standing.subscribe();
    loop {
        let ready = tokio::select! {
            biased;
            () = pass.wanted() => false,
            found = standing.wait_for(|standing| standing.ready || standing.serves) => found.is_ok(),
            () = client.gone() => false,
        };
        if !ready {
            return;
        }
        match connection::serve(shared.clone(), client, true, &pass).await {
            Some(waiting) => client = waiting,
            None => return,
        }
        tokio::time::sleep(LEASE).await;
    }
}

/// Ends the sessions of clients that are gone.
pub(crate) async fn end_silent(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(LOOK).await;
        shared.sessions.end_silent(SILENCE);
    }
}

async fn accept(gate: &Arc<Gate>, listener: &Listener) -> (Stream, Pass) {
    loop {
        match listener.accept(SILENCE).await {
            Ok(stream) => {
                if let Some(pass) = gate.enter(&stream.peer()) {
                    return (stream, pass);
                }
            }
            Err(error) => {
                gate.failed(&error);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A client that another node has forwarded.
pub(crate) async fn forwarded(shared: Arc<Shared>, stream: Stream) {
    let Some(pass) = shared.clients.enter(&stream.peer()) else { return };
    // If this node is not primary (any more), the other one finds out by the closed connection, and
    // parks its client again.
    if shared.standing.borrow().serves {
        connection::serve(shared, Newcomer::new(stream), false, &pass).await;
    }
}

async fn park(shared: Arc<Shared>, stream: Stream, pass: Pass, mut stay: watch::Receiver<bool>) {
    let mut client = Newcomer::new(stream);
    let mut arrived = Instant::now();
    let mut primary_since: Option<(String, Instant)> = None;
    let mut standing = shared.standing.subscribe();
    loop {
        let ServingState { serves, other_primary, .. } = standing.borrow_and_update().clone();
        if serves && shared.lease.holds(shared.now()) {
            match connection::serve(shared.clone(), client, false, &pass).await {
                Some(waiting) => client = waiting,
                None => return,
            }
            arrived = Instant::now();
            continue;
        }
        primary_since = since_when(other_primary, primary_since);
        let forward_at = primary_since.as_ref().map(|(_, since)| (*since).max(arrived) + PARK);
        let due = async {
            match forward_at {
                // Nobody tells that the lease holds again.
                _ if serves => tokio::time::sleep(LEASE).await,
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = standing.changed() => if changed.is_err() { return },
            () = client.gone() => return,
            () = pass.wanted() => return,
            () = moves(&mut stay) => return,
            () = due => {
                let other = primary_since.clone().filter(|_| !serves);
                let Some((address, _)) = other else { continue };
                // The connection to the primary takes a descriptor, too.
                let Some(second) = shared.clients.enter(&client.peer) else {
                    primary_since = Some((address, Instant::now()));
                    continue;
                };
                let introduction = shared.introduction();
                // The primary may be frozen: its successor must not wait for an answer from it.
                let connected = tokio::select! {
                    biased;
                    changed = standing.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                    connected = connect(&introduction, &address, Purpose::Client) => connected,
                };
                match connected {
                    Ok((primary, _)) => {
                        let passes = [&pass, &second];
                        let encrypted = shared.tls.is_some();
                        let lost = is_lost(&address, standing.clone());
                        let forwarded = tokio::select! {
                            biased;
                            () = moves(&mut stay) => return,
                            forwarded = forward(client, primary, encrypted, lost, passes) => forwarded,
                        };
                        match forwarded {
                            Some(waiting) => client = waiting,
                            None => return,
                        }
                    }
                    Err(error) => debug!(address, %error, "cannot forward a client"),
                }
                primary_since = Some((address, Instant::now()));
            }
        }
    }
}

/// A primary with the moment since which it is known.
fn since_when(
    other: Option<String>,
    known: Option<(String, Instant)>,
) -> Option<(String, Instant)> {
    let other = other?;
    Some(known.filter(|(known, _)| *known == other).unwrap_or_else(|| (other, Instant::now())))
}

/// Forwards what a client and the primary say to each other, until that node is `lost`. When
/// either side ends, both do: the client looks for a primary anew. Before the client is registered
/// it is returned instead.
async fn forward(
    mut client: Newcomer,
    primary: Stream,
    encrypted: bool,
    lost: impl Future<Output = ()>,
    [first, second]: [&Pass; 2],
) -> Option<Newcomer> {
    debug!(client = client.peer, "forwarding a client to the primary");
    let mut lost = pin!(lost);
    let mut primary = BufReader::new(primary);
    let registering = tokio::select! {
        biased;
        ended = forward_newcomer(&mut client, &mut primary, encrypted) => ended,
        () = &mut lost => Registering::Lost,
        () = first.wanted() => return None,
        () = second.wanted() => return None,
    };
    match registering {
        Registering::Done => {}
        Registering::Gone => return None,
        Registering::Lost => {
            debug!(client = client.peer, "the primary has not served a client: it waits on");
            return Some(client);
        }
    }
    let Newcomer { read, write, cutter, peer, .. } = client;
    let mut client = join(read, write);
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut primary) => {}
        () = lost => debug!(client = peer, "that node is not primary any more"),
        () = first.wanted() => {}
        () = second.wanted() => {}
        reason = is_gone(cutter.as_deref()) => debug!(client = peer, reason, "a client is gone"),
    }
    let _ = client.shutdown().await;
    drain(client).await;
    None
}

/// How it has ended that a client was to be registered by the primary.
enum Registering {
    /// The primary has said something that only this client, in this session, can go on with.
    Done,
    /// The client has left.
    Gone,
    /// The primary is gone.
    Lost,
}

/// Forwards until the primary says more than its greeting.
async fn forward_newcomer(
    client: &mut Newcomer,
    primary: &mut BufReader<Stream>,
    encrypted: bool,
) -> Registering {
    if primary.write_all(&client.said).await.is_err() {
        return Registering::Lost;
    }
    // The greeting: a length of 4 bytes, and so many bytes.
    let mut greeting = BytesMut::new();
    loop {
        let said = client.said.len();
        let whole =
            || Some(4 + greeting.first_chunk::<4>().map(|len| u32::from_be_bytes(*len))? as usize);
        let missing = match whole() {
            _ if encrypted => 0,
            Some(whole) => whole.saturating_sub(greeting.len()),
            None => 4 - greeting.len(),
        };
        tokio::select! {
            biased;
            heard = client.hear() => {
                if heard.is_err() {
                    return Registering::Gone;
                }
                if primary.write_all(&client.said[said..]).await.is_err() {
                    return Registering::Lost;
                }
            }
            // Whoever copies what follows takes it from the buffer.
            come = primary.fill_buf() => {
                let Ok(come) = come else { return Registering::Lost };
                if come.is_empty() {
                    return Registering::Lost;
                }
                if missing == 0 {
                    return Registering::Done;
                }
                let len = come.len().min(missing);
                greeting.extend_from_slice(&come[..len]);
                primary.consume(len);
                if greeting.len() > GREETING {
                    return Registering::Lost;
                }
                let is_whole = greeting.len() > 4 && len == missing;
                if is_whole && !client.greeted {
                    client.greeted = true;
                    if client.write.write_all(&greeting).await.is_err() {
                        return Registering::Gone;
                    }
                }
            }
        }
    }
}

/// Returns when the client counts as gone, with the reason.
async fn is_gone(client: Option<&Cutter>) -> &'static str {
    loop {
        tokio::time::sleep(LOOK).await;
        if let Some(reason) = client.and_then(|client| client.gone(SILENCE)) {
            return reason;
        }
    }
}

/// Returns when this node serves, when another one than that at `address` is primary, or when none
/// has been heard of for [`LOST_PRIMARY`].
async fn is_lost(address: &str, mut standing: watch::Receiver<ServingState>) {
    let is_primary = |standing: &ServingState| {
        !standing.serves && standing.other_primary.as_deref() == Some(address)
    };
    let changed = |standing: &ServingState| standing.serves || standing.other_primary.is_some();
    loop {
        if standing.wait_for(|standing| !is_primary(standing)).await.is_err() {
            return;
        }
        let known = tokio::time::timeout(LOST_PRIMARY, standing.wait_for(changed)).await;
        match known {
            Ok(Ok(standing)) if is_primary(&standing) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(serves: bool, other_primary: Option<&str>) -> ServingState {
        ServingState { serves, other_primary: other_primary.map(Into::into), ready: true }
    }

    /// For how long a client stays with the primary at "a", when these are heard of, each after so
    /// many seconds.
    async fn stays(heard: &[(u64, ServingState)]) -> Duration {
        let begun = Instant::now();
        let (told, hears) = watch::channel(standing(false, Some("a")));
        let ended = tokio::spawn(async move {
            is_lost("a", hears).await;
            begun.elapsed()
        });
        for (after, standing) in heard {
            tokio::time::sleep_until(begun + Duration::from_secs(*after)).await;
            told.send_replace(standing.clone());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let ended = ended.await.unwrap();
        drop(told);
        Duration::from_secs(ended.as_secs())
    }

    #[tokio::test]
    async fn row_49_a_client_that_is_passed_on_goes_with_the_primary() {
        tokio::time::pause();
        let seconds = Duration::from_secs;
        assert_eq!(stays(&[(5, standing(true, None))]).await, seconds(5), "this node serves");
        assert_eq!(stays(&[(5, standing(false, Some("b")))]).await, seconds(5), "another serves");
        assert_eq!(stays(&[(5, standing(false, None))]).await, seconds(7), "nobody is heard of");
        let comes_back = [(5, standing(false, None)), (6, standing(false, Some("a")))];
        let and_goes = [&comes_back[..], &[(20, standing(false, None))]].concat();
        assert_eq!(stays(&and_goes).await, seconds(22), "it was there again");
        let another = [(5, standing(false, None)), (6, standing(false, Some("b")))];
        assert_eq!(stays(&another).await, seconds(6));
    }
}
