//! The addresses for clients.
//!
//! On the read-write address a client that comes to a node which is not primary is *held*: it is
//! accepted and hears nothing. In ZEO the server speaks first, so it waits. When the node becomes
//! primary, the session begins at once. If another node has been primary for a second and the
//! client is still here, its bytes are passed on to that node: clients do not try a node again
//! that has disappointed them.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, copy_bidirectional, join};
use tokio::sync::watch;
use tracing::debug;

use crate::cells::gate::{Gate, Pass};
use crate::cells::serving_state::ServingState;
use crate::cells::shared::Shared;
use crate::clients::connection;
use crate::platform::{Instant, drain};
use crate::transport::handshake::{Purpose, connect};
use crate::transport::socket::{Cutter, split};
use crate::transport::stream::{Listener, Stream};

/// How long a client is held although another node is primary: most clients try all nodes at the
/// same time and find that one by themselves.
const HOLD: Duration = Duration::from_secs(1);
/// A client whose machine has acknowledged nothing for so long is gone, and its locks with it. A client that takes
/// nothing for so long, while something is to be sent to it, counts as gone too. One that is held has nothing that others
/// could miss, and is not watched.
const SILENCE: Duration = Duration::from_secs(10);
/// Time between two looks at that.
const LOOK: Duration = Duration::from_secs(1);
/// How long a client stays with a primary that this node does not hear of any more.
const LOST_PRIMARY: Duration = Duration::from_secs(2);

/// Accepts clients that may write.
pub async fn read_write(shared: Arc<Shared>, listener: Listener) {
    loop {
        let (stream, pass) = accept(&shared.clients, &listener).await;
        tokio::spawn(hold(shared.clone(), stream, pass));
    }
}

/// Accepts clients that only read.
pub async fn read_only(shared: Arc<Shared>, listener: Listener) {
    loop {
        let (stream, pass) = accept(&shared.clients, &listener).await;
        let shared = shared.clone();
        tokio::spawn(async move {
            // A node that has nothing yet, or is far behind, holds its readers too.
            let waited = tokio::select! {
                biased;
                () = pass.wanted() => false,
                waited = wait_for(&shared, &stream, |standing| standing.ready || standing.serves) => waited,
            };
            if waited {
                connection::serve(shared, stream, true, &pass).await;
            }
        });
    }
}

/// Ends the sessions of clients that are gone.
pub async fn end_silent(shared: Arc<Shared>) {
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

/// A client that another node has passed on.
pub async fn passed_on(shared: Arc<Shared>, stream: Stream) {
    let Some(pass) = shared.clients.enter(&stream.peer()) else { return };
    // If this node is not primary (any more), the other one finds out by the closed connection.
    if shared.standing.borrow().serves {
        connection::serve(shared, stream, false, &pass).await;
    }
}

async fn hold(shared: Arc<Shared>, stream: Stream, pass: Pass) {
    let arrived = Instant::now();
    let mut primary_since: Option<(String, Instant)> = None;
    let mut standing = shared.standing.subscribe();
    loop {
        let ServingState { serves, other_primary, .. } = standing.borrow_and_update().clone();
        if serves {
            return connection::serve(shared, stream, false, &pass).await;
        }
        primary_since = match (other_primary, primary_since) {
            (None, _) => None,
            (Some(address), Some((known, since))) if known == address => Some((known, since)),
            (Some(address), _) => Some((address, Instant::now())),
        };
        let pass_on_at = primary_since.as_ref().map(|(_, since)| (*since).max(arrived) + HOLD);
        let due = async {
            match pass_on_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = standing.changed() => if changed.is_err() { return },
            () = stream.gone() => return,
            () = pass.wanted() => return,
            () = due => {
                let Some((address, _)) = &primary_since else { continue };
                let later = |address: &String| Some((address.clone(), Instant::now()));
                // The connection to the primary takes a descriptor, too.
                let Some(second) = shared.clients.enter(&stream.peer()) else {
                    primary_since = later(address);
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
                    connected = connect(&introduction, address, Purpose::Client) => connected,
                };
                match connected {
                    Ok((primary, _)) => {
                        let passes = [&pass, &second];
                        return pass_on(stream, primary, address, standing, passes).await;
                    }
                    Err(error) => {
                        debug!(address, %error, "cannot pass a client on");
                        primary_since = later(address);
                    }
                }
            }
        }
    }
}

/// Passes on what a client and the primary say to each other, as long as that node is primary. When either side
/// ends, both do: the client looks for a primary anew.
async fn pass_on(
    client: Stream,
    mut primary: Stream,
    address: &str,
    standing: watch::Receiver<ServingState>,
    [first, second]: [&Pass; 2],
) {
    let peer = client.peer();
    debug!(client = peer, "passing a client on to the primary");
    client.set_nodelay();
    let (read, write, cutter) = split(client);
    let mut client = join(read, write);
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut primary) => {}
        () = is_lost(address, standing) => {
            debug!(client = peer, address, "that node is not primary any more");
        }
        () = first.wanted() => {}
        () = second.wanted() => {}
        reason = is_gone(cutter.as_ref()) => debug!(client = peer, reason, "a client is gone"),
    }
    let _ = client.shutdown().await;
    drain(client).await;
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

/// Returns when this node serves, when another one than that at `address` is primary, or when none has been heard of
/// for [`LOST_PRIMARY`].
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

/// Waits until the node stands as wanted; false if the client leaves before.
async fn wait_for(
    shared: &Shared,
    stream: &Stream,
    wanted: impl Fn(&ServingState) -> bool,
) -> bool {
    let mut standing = shared.standing.subscribe();
    tokio::select! {
        biased;
        found = standing.wait_for(wanted) => found.is_ok(),
        () = stream.gone() => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(serves: bool, other_primary: Option<&str>) -> ServingState {
        ServingState { serves, other_primary: other_primary.map(Into::into), ready: true }
    }

    /// For how long a client stays with the primary at "a", when these are heard of, each after so many seconds.
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
