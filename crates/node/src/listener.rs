//! The addresses for clients.
//!
//! On the read-write address a client that comes to a node which is not primary is *held*: it is
//! accepted and hears nothing. In ZEO the server speaks first, so it waits. When the node becomes
//! primary, the session begins at once. If another node has been primary for a second and the
//! client is still here, its bytes are passed on to that node: clients do not try a node again
//! that has disappointed them.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tracing::{debug, warn};

use crate::connection;
use crate::machine::Instant;
use crate::node::{Shared, Standing};
use crate::peers::{Purpose, connect};
use crate::stream::{Listener, Stream};

/// How long a client is held although another node is primary: most clients try all nodes at the
/// same time and find that one by themselves.
const HOLD: Duration = Duration::from_secs(1);

/// Accepts clients that may write.
pub async fn read_write(shared: Arc<Shared>, listener: Listener) {
    loop {
        let stream = accept(&listener).await;
        tokio::spawn(hold(shared.clone(), stream));
    }
}

/// Accepts clients that only read.
pub async fn read_only(shared: Arc<Shared>, listener: Listener) {
    loop {
        let stream = accept(&listener).await;
        let shared = shared.clone();
        tokio::spawn(async move {
            // A node that has nothing yet, or is far behind, holds its readers too.
            if wait_for(&shared, &stream, |standing| standing.ready || standing.serves).await {
                connection::serve(shared, stream, true).await;
            }
        });
    }
}

async fn accept(listener: &Listener) -> Stream {
    loop {
        match listener.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                warn!(%error, "cannot accept a client's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A client that another node has passed on.
pub async fn passed_on(shared: Arc<Shared>, stream: Stream) {
    // If this node is not primary (any more), the other one finds out by the closed connection.
    if shared.standing.borrow().serves {
        connection::serve(shared, stream, false).await;
    }
}

async fn hold(shared: Arc<Shared>, stream: Stream) {
    let arrived = Instant::now();
    let mut primary_since: Option<(String, Instant)> = None;
    let mut standing = shared.standing.subscribe();
    loop {
        let Standing { serves, other_primary, .. } = standing.borrow_and_update().clone();
        if serves {
            return connection::serve(shared, stream, false).await;
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
            () = due => {
                let Some((address, _)) = &primary_since else { continue };
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
                    Ok((primary, _)) => return pass_on(stream, primary).await,
                    Err(error) => {
                        debug!(address, %error, "cannot pass a client on");
                        primary_since = Some((address.clone(), Instant::now()));
                    }
                }
            }
        }
    }
}

async fn pass_on(mut client: Stream, mut primary: Stream) {
    debug!(client = client.peer(), "passing a client on to the primary");
    client.set_nodelay();
    // When either side ends, both do: the client looks for a primary anew.
    let _ = copy_bidirectional(&mut client, &mut primary).await;
}

/// Waits until the node stands as wanted; false if the client leaves before.
async fn wait_for(shared: &Shared, stream: &Stream, wanted: impl Fn(&Standing) -> bool) -> bool {
    let mut standing = shared.standing.subscribe();
    tokio::select! {
        biased;
        found = standing.wait_for(wanted) => found.is_ok(),
        () = stream.gone() => false,
    }
}
