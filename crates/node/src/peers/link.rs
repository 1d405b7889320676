//! Links: the connections over which consensus talks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use standby_consensus::decode_message;
use standby_types::{NodeId, Transfer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{
    Announcement, Introduction, MAX_FRAME, PeerError, PeerInfo, Purpose, blob, block, catch_up,
    compare, connect, frame, read_frame, receive,
};
use crate::engine::{Event, Internal};
use crate::listener;
use crate::machine::{self, Instant, TcpListener, TcpStream};
use crate::node::Shared;
use crate::status::NodeReport;
use crate::stream::Stream;
use crate::sync::lock;

/// Frames that wait for a slow peer; more are dropped, and Raft sends again.
const QUEUE: usize = 4096;
/// Time between attempts to reach a node.
const RETRY: Duration = Duration::from_millis(250);
/// Time between two log lines about the same unreachable node.
const QUIET: Duration = Duration::from_secs(60);

/// The nodes that this one can send to.
#[derive(Default)]
pub struct Peers {
    links: Mutex<BTreeMap<NodeId, mpsc::Sender<Bytes>>>,
    dialled: Mutex<BTreeSet<String>>,
    /// How often this node has begun a timeline: links of before do not count.
    epoch: AtomicU64,
}

impl Peers {
    /// Counts the timelines that this node has begun.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// This node has begun a timeline: all links end, and the handshakes for new ones tell which nodes have come
    /// over to it.
    pub fn end_links(&self) {
        let mut links = lock(&self.links);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        links.clear();
    }

    /// Lets messages go over a link that was made in this epoch; false if it is over.
    fn add(&self, id: NodeId, link: mpsc::Sender<Bytes>, epoch: u64) -> bool {
        let mut links = lock(&self.links);
        let current = self.epoch() == epoch;
        if current {
            links.insert(id, link);
        }
        current
    }

    /// Sends a message of consensus; it may be lost.
    pub fn send(&self, to: NodeId, message: &[u8]) {
        if let Some(link) = lock(&self.links).get(&to) {
            machine::deliver(link, frame(b'r', message));
        }
    }

    /// Sends a report to all.
    pub fn broadcast(&self, report: &NodeReport) {
        self.tell_all(b's', report);
    }

    /// Says to all that an upload is to be had here.
    pub fn announce(&self, announcement: &Announcement) {
        self.tell_all(b'a', announcement);
    }

    /// Says to all that an upload's transaction was aborted.
    pub fn forget(&self, announcement: &Announcement) {
        self.tell_all(b'd', announcement);
    }

    /// Says to the node that announced an upload that it is durable here too.
    pub fn arrived(&self, to: NodeId, transfer: Transfer) {
        if let Some(link) = lock(&self.links).get(&to) {
            let _ = link.try_send(frame(b'g', &transfer.0));
        }
    }

    fn tell_all(&self, kind: u8, what: &impl Serialize) {
        let Ok(json) = serde_json::to_vec(what) else { return };
        let frame = frame(kind, &json);
        for link in lock(&self.links).values() {
            let _ = link.try_send(frame.clone());
        }
    }

    /// Keeps a link to the node at this address from now on.
    pub fn dial(shared: &Arc<Shared>, address: &str) {
        if address != shared.member.peer_address
            && lock(&shared.peers.dialled).insert(address.to_owned())
        {
            tokio::spawn(keep_dialling(shared.clone(), address.to_owned()));
        }
    }
}

async fn keep_dialling(shared: Arc<Shared>, address: String) {
    let mut last_told: Option<(String, Instant)> = None;
    loop {
        let epoch = shared.peers.epoch();
        match connect(&shared.introduction(), &address, Purpose::Link).await {
            Ok((stream, info)) => {
                last_told = None;
                let id = info.id();
                debug!(peer = info.node, address, "link made");
                run_dialled(&shared, stream, info, epoch).await;
                shared.tell(Event::PeerLost(id)).await;
            }
            Err(error) => {
                note_timelines(&shared, &error);
                let text = error.to_string();
                let told =
                    last_told.as_ref().is_some_and(|(t, at)| *t == text && at.elapsed() < QUIET);
                if !told {
                    match error {
                        PeerError::Io(_) => info!(address, error = text, "cannot reach a node yet"),
                        _ => warn!(address, error = text, "cannot join with a node"),
                    }
                    last_told = Some((text, Instant::now()));
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Sends what is queued; ends when the other side closes.
async fn run_dialled(shared: &Arc<Shared>, stream: Stream, info: PeerInfo, epoch: u64) {
    let id = info.id();
    let (sender, mut queue) = mpsc::channel(QUEUE);
    if !shared.peers.add(id, sender, epoch) {
        return;
    }
    shared.tell(Event::PeerUp(info)).await;
    let (mut read, mut write): (
        Box<dyn AsyncRead + Send + Unpin>,
        Box<dyn AsyncWrite + Send + Unpin>,
    ) = match stream {
        Stream::Tcp(tcp) => {
            let (read, write) = tcp.into_split();
            (Box::new(read), Box::new(write))
        }
        other => {
            let (read, write) = tokio::io::split(other);
            (Box::new(read), Box::new(write))
        }
    };
    let send = async {
        while let Some(first) = queue.recv().await {
            let mut together = bytes::BytesMut::from(&first[..]);
            while together.len() < 1 << 20 {
                match queue.try_recv() {
                    Ok(next) => together.extend_from_slice(&next),
                    Err(_) => break,
                }
            }
            if write.write_all(&together).await.is_err() || write.flush().await.is_err() {
                break;
            }
        }
    };
    let mut byte = [0];
    // The accepting side says nothing; reading tells when it is gone.
    tokio::select! {
        biased;
        () = send => {}
        _ = read.read(&mut byte) => {}
    }
    lock(&shared.peers.links).remove(&id);
}

/// Accepts connections from other nodes.
pub async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(accept(shared.clone(), stream));
            }
            Err(error) => {
                warn!(%error, "cannot accept a peer's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(shared: Arc<Shared>, stream: TcpStream) {
    let from = stream.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string());
    let objection = |info: &PeerInfo| objection(&shared, info);
    let epoch = shared.peers.epoch();
    let (mut stream, info) = match receive(&shared.introduction(), stream, objection).await {
        Ok(received) => received,
        Err(PeerError::Io(error)) => return debug!(from, %error, "a peer's handshake broke off"),
        Err(error) => {
            note_timelines(&shared, &error);
            return warn!(from, %error, "refused a connection to the peer address");
        }
    };
    match info.purpose {
        Purpose::Probe => {}
        Purpose::Link => {
            let id = info.id();
            shared.tell(Event::PeerUp(info)).await;
            if let Err(error) = receive_all(&shared, &mut stream, id, epoch).await {
                debug!(from, %error, "a link ended");
            }
            shared.tell(Event::PeerLost(id)).await;
        }
        Purpose::Blob => {
            if let Err(error) = blob::serve(&shared, stream).await {
                warn!(from, %error, "cannot send a blob to a node");
            }
        }
        Purpose::Block => {
            if let Err(error) = block::serve(&shared, stream).await {
                debug!(from, %error, "cannot send a block to a node");
            }
        }
        Purpose::Compare => {
            if let Err(error) = compare::serve(&shared, stream).await {
                debug!(from, %error, "cannot compare with a node");
            }
        }
        Purpose::Ask => {
            if let Err(error) = super::ask::serve(&shared, stream).await {
                debug!(from, %error, "cannot answer a node");
            }
        }
        Purpose::CatchUp => catch_up::serve(shared, stream, &info.node).await,
        Purpose::Client => listener::passed_on(shared, stream).await,
    }
}

/// A handshake has shown that another node has another history.
fn note_timelines(shared: &Shared, error: &PeerError) {
    match error {
        PeerError::Outdated(lineage) => shared.report(Internal::Outdated(lineage.clone())),
        PeerError::Diverged { node, lineage } => shared.reports.note_diverged(node, lineage),
        _ => {}
    }
}

/// Why a node that knows the secret is not let in.
fn objection(shared: &Shared, info: &PeerInfo) -> Option<String> {
    if shared.reports.is_taken(info.id(), &info.run) {
        Some(format!(
            "another process is node {} already, with the same identity: was its disk copied?",
            info.node
        ))
    } else if is_gone(shared, &info.node) {
        Some(format!("node {} was removed from the cluster", info.node))
    } else {
        None
    }
}

/// True if a node was removed. Until that is done its voice still counts.
fn is_gone(shared: &Shared, name: &str) -> bool {
    shared.settings().removed.contains(name) && !shared.reports.is_member(name)
}

async fn receive_all(
    shared: &Arc<Shared>,
    stream: &mut Stream,
    from: NodeId,
    epoch: u64,
) -> Result<(), PeerError> {
    let mut stream = tokio::io::BufReader::with_capacity(256 << 10, stream);
    loop {
        let (kind, content) = read_frame(&mut stream, MAX_FRAME).await?;
        if shared.peers.epoch() != epoch {
            return Err(PeerError::Protocol("this node has begun another timeline".into()));
        }
        match kind {
            b'r' => {
                let message = decode_message(content)
                    .map_err(|error| PeerError::Protocol(error.to_string()))?;
                if message.from() != from || message.to() != shared.id {
                    return Err(PeerError::Protocol("a message under another's name".into()));
                }
                shared.tell(Event::Peer(message, epoch)).await;
            }
            b's' => {
                if let Ok(report) = serde_json::from_slice::<NodeReport>(&content) {
                    if is_gone(shared, report.node()) {
                        shared.reports.forget(from);
                        return Err(PeerError::Protocol("the node was removed".into()));
                    }
                    shared.reports.note(from, report);
                }
            }
            b'a' | b'd' => {
                let announcement = serde_json::from_slice(&content)?;
                let event = match kind {
                    b'a' => Event::Announced(from, announcement),
                    _ => Event::Forgotten(announcement),
                };
                shared.tell(event).await;
            }
            b'g' => {
                let transfer = content[..].try_into().map(Transfer);
                let wrong = |_| PeerError::Protocol("a malformed name of an upload".into());
                shared.tell(Event::Arrived(from, transfer.map_err(wrong)?)).await;
            }
            // A newer version may say what this one does not know.
            other => debug!(%from, kind = other, "a frame of unknown kind"),
        }
    }
}

/// Asks the other members whether the cluster exists already; the node that says so.
pub async fn probe(me: &Introduction, addresses: &[String], patience: Duration) -> Option<String> {
    let deadline = Instant::now() + patience;
    let mut answered = BTreeSet::new();
    while Instant::now() < deadline && answered.len() < addresses.len() {
        for address in addresses {
            match connect(me, address, Purpose::Probe).await {
                Ok((_, info)) if info.cluster_id.is_empty() => {
                    answered.insert(address.clone());
                }
                Ok((_, info)) => return Some(info.node),
                Err(error) => debug!(address, %error, "no answer"),
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    None
}
