//! Links: the connections over which consensus talks.
//!
//! ```text
//! dialling node                                   accepting node
//!    'r' a message of consensus            ─────▶
//!    's' report, 'a' 'd' 'g' of uploads    ─────▶
//!    'k' nothing, after a second of it     ─────▶
//!                                          ◀─────  'k' nothing, every second
//!                                          ◀─────  'n' why the node is not let in as a member
//! ```
//!
//! A link over which nothing comes, or that takes nothing, for [`Shared::peer_silence`] is closed and dialled anew: a
//! firewall that forgets a connection says nothing to either side.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, Bytes};
use serde::Serialize;
use standby_consensus::decode_message;
use standby_types::{NodeId, Transfer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{
    Announcement, Introduction, MAX_FRAME, PeerError, PeerInfo, Progressing, Purpose, Welcome,
    answer, blob, block, catch_up, compare, connect, frame, read_frame, receive,
};
use crate::engine::{Event, Internal};
use crate::founding;
use crate::gate::Pass;
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
/// The same if the node was reached, and refuses.
const RETRY_REFUSED: Duration = Duration::from_secs(1);
/// Time between two log lines about the same trouble with the same node.
const QUIET: Duration = Duration::from_secs(60);
/// The same if there is a link to that node already, over another address.
const RETRY_LINKED: Duration = Duration::from_secs(15);
/// Troubles that are remembered, so that the log speaks of each only now and then.
const TROUBLES: usize = 256;
/// Time after which a side of a link that has nothing to say says so.
const SIGN: Duration = Duration::from_secs(1);
/// The longest reason that a node is told.
const MAX_REASON: usize = 4 << 10;

/// The nodes that this one can send to.
#[derive(Default)]
pub struct Peers {
    links: Mutex<BTreeMap<NodeId, mpsc::Sender<Bytes>>>,
    dialled: Mutex<BTreeSet<String>>,
    /// The members' addresses as far as they were learned from other nodes and from the log.
    learned: Mutex<BTreeSet<String>>,
    /// Held by who writes them down: one at a time.
    remembering: Mutex<()>,
    /// Why there is no link to a node, by its address, or why the node does not let this one in.
    troubles: Mutex<BTreeMap<String, String>>,
    /// The names of the nodes that this one, being primary, does not let in, and why.
    refusals: Mutex<BTreeMap<NodeId, (String, String)>>,
    /// What the log has spoken of, and when.
    told: Mutex<BTreeMap<String, Instant>>,
    /// How many links from each node there are: more than one if it dials two addresses, or comes again before this
    /// side has found out that it was gone.
    from: Mutex<BTreeMap<NodeId, usize>>,
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

    /// Lets messages go over a link that was made in this epoch; false if it is over, or if there is a link to the
    /// node already, over another address.
    fn add(&self, id: NodeId, link: mpsc::Sender<Bytes>, epoch: u64) -> bool {
        let mut links = lock(&self.links);
        let current = self.epoch() == epoch && !links.contains_key(&id);
        if current {
            links.insert(id, link);
        }
        current
    }

    fn remove(&self, id: NodeId, link: &mpsc::WeakSender<Bytes>) {
        let mut links = lock(&self.links);
        let link = link.upgrade();
        if links
            .get(&id)
            .is_some_and(|current| link.is_some_and(|link| current.same_channel(&link)))
        {
            links.remove(&id);
        }
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

    fn link_begins(&self, from: NodeId) {
        *lock(&self.from).entry(from).or_default() += 1;
    }

    /// True if it was the last one from that node.
    fn link_ends(&self, from: NodeId) -> bool {
        let mut links = lock(&self.from);
        let left = links.get_mut(&from).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            links.remove(&from);
        }
        left == 0
    }

    fn tell_all(&self, kind: u8, what: &impl Serialize) {
        let Ok(json) = serde_json::to_vec(what) else { return };
        let frame = frame(kind, &json);
        for link in lock(&self.links).values() {
            let _ = link.try_send(frame.clone());
        }
    }

    /// Says to a node, from now on, why it is not let in.
    pub fn refuse(&self, id: NodeId, name: String, reason: String) {
        lock(&self.refusals).insert(id, (name, reason));
    }

    /// A node is not refused any more, or is gone.
    pub fn let_in(&self, id: NodeId) {
        lock(&self.refusals).remove(&id);
    }

    /// The nodes that are not let in, and why.
    pub fn refusals(&self) -> BTreeMap<String, String> {
        lock(&self.refusals).values().cloned().collect()
    }

    /// What stands between this node and the others: why they cannot be reached, or do not let it in.
    pub fn troubles(&self) -> BTreeMap<String, String> {
        lock(&self.troubles).clone()
    }

    /// True if the log has not spoken of this for a while; from now on it has.
    fn may_tell(&self, what: String) -> bool {
        let mut told = lock(&self.told);
        told.retain(|_, at| at.elapsed() < QUIET);
        if told.contains_key(&what) || told.len() >= TROUBLES {
            return false;
        }
        told.insert(what, Instant::now());
        true
    }

    /// The addresses of the members are these: they are dialled, and remembered for the next start. Until this node
    /// belongs to a cluster, they are added to what it knows.
    pub fn learn(shared: &Arc<Shared>, addresses: impl IntoIterator<Item = String>, all: bool) {
        let own = &shared.member.peer_address;
        let found = addresses.into_iter().filter(|address| !address.is_empty() && address != own);
        let mut found: BTreeSet<String> = found.collect();
        {
            let mut learned = lock(&shared.peers.learned);
            if !all {
                found.extend(learned.iter().cloned());
            }
            if *learned == found {
                return;
            }
            *learned = found.clone();
        }
        for address in &found {
            Peers::dial(shared, address);
        }
        let shared = shared.clone();
        let remember = move || {
            let _turn = lock(&shared.peers.remembering);
            let learned = lock(&shared.peers.learned).clone();
            // Without it, a next start asks those whom its configuration names.
            if let Err(error) = shared.state.set_peers(&*shared.disk, &learned) {
                warn!(%error, "cannot remember the addresses of the other nodes");
            }
        };
        drop(machine::spawn_blocking(remember));
    }

    /// True if a node is to be dialled at this address.
    fn is_wanted(shared: &Shared, address: &str) -> bool {
        let named = shared.config.standby.iter().flat_map(|standby| standby.named_addresses());
        lock(&shared.peers.learned).contains(address)
            || named.into_iter().any(|named| named.to_string() == address)
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
    while Peers::is_wanted(&shared, &address) {
        let epoch = shared.peers.epoch();
        let introduction = shared.introduction();
        let mut pause = RETRY;
        match connect(&introduction, &address, Purpose::Link).await {
            Ok((stream, info)) => {
                let id = info.id();
                debug!(peer = info.node, address, "link made");
                lock(&shared.peers.troubles).remove(&address);
                Peers::learn(&shared, info.welcome.members.iter().cloned(), false);
                if note_rollback(&shared, &introduction, &info) {
                    pause = RETRY_REFUSED;
                } else if run_dialled(&shared, stream, info, epoch, &address).await {
                    shared.tell(Event::PeerLost(id)).await;
                } else {
                    pause = RETRY_LINKED;
                }
            }
            Err(error) => {
                note_other_history(&shared, &error);
                let text = error.to_string();
                lock(&shared.peers.troubles).insert(address.clone(), text.clone());
                let may_tell = shared.peers.may_tell(format!("{address} {text}"));
                match error {
                    PeerError::Io(_) if may_tell => {
                        info!(address, error = text, "cannot reach a node yet");
                    }
                    PeerError::Io(_) => {}
                    _ => {
                        pause = RETRY_REFUSED;
                        if may_tell {
                            warn!(address, error = text, "cannot join with a node");
                        }
                    }
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
    lock(&shared.peers.troubles).remove(&address);
    lock(&shared.peers.dialled).remove(&address);
    if Peers::is_wanted(&shared, &address) {
        // It has become so meanwhile.
        Peers::dial(&shared, &address);
    }
}

/// True if the other node knows that this one has acknowledged entries that it does not have any more.
fn note_rollback(shared: &Shared, introduction: &Introduction, info: &PeerInfo) -> bool {
    let acknowledged = info.welcome.acknowledged;
    let same = !introduction.cluster_id.is_empty() && introduction.cluster_id == info.cluster_id;
    let lost = same && introduction.log_end.is_some_and(|end| end.0 < acknowledged);
    if lost {
        shared.report(Internal::RolledBack { acknowledged, by: info.node.clone() });
    }
    lost
}

/// The two directions of a connection.
fn halves(
    stream: Stream,
) -> (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>) {
    match stream {
        Stream::Tcp(tcp) => {
            let (read, write) = tcp.into_split();
            (Box::new(read), Box::new(write))
        }
        other => {
            let (read, write) = tokio::io::split(other);
            (Box::new(read), Box::new(write))
        }
    }
}

fn silent() -> PeerError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, "nothing has come for too long").into()
}

/// Writes bytes, of which some must be taken within each `patience`.
async fn write_within(
    write: &mut (impl AsyncWrite + Unpin),
    mut bytes: Bytes,
    patience: Duration,
) -> Result<(), PeerError> {
    while bytes.has_remaining() {
        let written = tokio::time::timeout(patience, write.write(&bytes)).await;
        match written.map_err(|_| silent())?? {
            0 => return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into()),
            written => bytes.advance(written),
        }
    }
    Ok(tokio::time::timeout(patience, write.flush()).await.map_err(|_| silent())??)
}

/// Sends what is queued; ends when the other side closes, or is silent. False if the link is not wanted.
async fn run_dialled(
    shared: &Arc<Shared>,
    stream: Stream,
    info: PeerInfo,
    epoch: u64,
    address: &str,
) -> bool {
    let (id, patience) = (info.id(), shared.peer_silence());
    let gives_signs = info.gives_signs;
    let (sender, mut queue) = mpsc::channel(QUEUE);
    // Only the list of links holds the sender: a link that is taken out of it ends.
    let link = sender.downgrade();
    if !shared.peers.add(id, sender, epoch) {
        return false;
    }
    let node = info.node.clone();
    shared.tell(Event::PeerUp(info)).await;
    let (read, mut write) = halves(stream);
    let send = async {
        loop {
            let first = match tokio::time::timeout(SIGN, queue.recv()).await {
                Ok(Some(first)) => first,
                Ok(None) => return Ok(()),
                Err(_) => frame(b'k', b""),
            };
            let mut together = bytes::BytesMut::from(&first[..]);
            while together.len() < 1 << 20 {
                match queue.try_recv() {
                    Ok(next) => together.extend_from_slice(&next),
                    Err(_) => break,
                }
            }
            write_within(&mut write, together.freeze(), patience).await?;
        }
    };
    let hear = async {
        let mut read = tokio::io::BufReader::new(read);
        loop {
            // A node of an older version says nothing; reading tells when it is gone.
            let next = read_frame(&mut read, MAX_REASON);
            let (kind, content) = match gives_signs {
                true => tokio::time::timeout(patience, next).await.map_err(|_| silent())??,
                false => next.await?,
            };
            let mut troubles = lock(&shared.peers.troubles);
            match kind {
                b'n' => {
                    let reason = String::from_utf8_lossy(&content).into_owned();
                    let reason = format!("{node} does not let this node in: {reason}");
                    if troubles.insert(address.to_owned(), reason.clone()).as_ref() != Some(&reason)
                    {
                        warn!(address, "{reason}");
                    }
                }
                _ => drop(troubles.remove(address)),
            }
        }
    };
    let ended: Result<(), PeerError> = tokio::select! {
        biased;
        ended = send => ended,
        ended = hear => ended,
    };
    if let Err(error) = ended {
        debug!(peer = node, address, %error, "a link ended");
    }
    // Whoever is told next must find no link.
    queue.close();
    shared.peers.remove(id, &link);
    true
}

/// Accepts connections from other nodes.
pub async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Until the handshake is over, anybody may be there.
                if let Some(pass) = shared.strangers.enter(&from.to_string()) {
                    tokio::spawn(accept(shared.clone(), stream, pass));
                }
            }
            Err(error) => {
                shared.strangers.failed(&error);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(shared: Arc<Shared>, stream: TcpStream, stranger: Pass) {
    let from = stream.peer_addr();
    let from = from.as_ref().map_or_else(|_| "?".into(), ToString::to_string);
    let host = from.rsplit_once(':').map_or(from.as_str(), |(host, _)| host);
    let refused = |error: PeerError| match error {
        PeerError::Io(error) => debug!(from, %error, "a peer's handshake broke off"),
        error => {
            note_other_history(&shared, &error);
            if shared.peers.may_tell(format!("{host} {error}")) {
                shared.strangers_lines.tell(|untold| {
                    warn!(from, %error, untold, "refused a connection to the peer address");
                });
            }
        }
    };
    let epoch = shared.peers.epoch();
    let (mut stream, info) = match receive(&shared.introduction(), stream).await {
        Ok(received) => received,
        Err(error) => return refused(error),
    };
    let welcome = match (objection(&shared, &info), info.purpose) {
        (Some(reason), _) => Err(reason),
        (None, Purpose::Found) => founding::promise(&shared, &info).await,
        (None, _) => Ok(welcome(&shared, &info)),
    };
    let lacks = welcome.as_ref().map_or(0, |welcome| welcome.acknowledged);
    if let Err(error) = answer(&mut stream, welcome).await {
        return refused(error);
    }
    drop(stranger);
    match info.purpose {
        Purpose::Probe | Purpose::Found => {}
        Purpose::Link if info.log_end.is_some_and(|end| end < lacks) => {
            // It has been told, and joins anew.
            let node = &info.node;
            if shared.peers.may_tell(format!("{host} lacks")) {
                warn!(
                    node,
                    acknowledged = lacks,
                    has = info.log_end,
                    "a node lacks entries that it has acknowledged: its disk was put back to an earlier state"
                );
            }
        }
        Purpose::Link => {
            let id = info.id();
            let signs = info.gives_signs;
            let own = shared.introduction().cluster_id;
            if own.is_empty() || own == info.cluster_id {
                // Answers go over a link of this node's own, to wherever the other one says that it is now.
                Peers::learn(&shared, [info.peer_address.clone()], false);
            }
            let dialling = Dialling { id, address: info.peer_address.clone(), epoch, signs };
            shared.peers.link_begins(id);
            shared.tell(Event::PeerUp(info)).await;
            let (read, write) = halves(stream);
            let ended = tokio::select! {
                biased;
                ended = receive_all(&shared, read, dialling) => ended,
                ended = give_signs(&shared, write, id), if signs => ended,
            };
            if let Err(error) = ended {
                debug!(from, %error, "a link ended");
            }
            if shared.peers.link_ends(id) {
                shared.tell(Event::PeerLost(id)).await;
            }
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

/// What a node is told that is let in.
fn welcome(shared: &Shared, info: &PeerInfo) -> Welcome {
    let mut members = lock(&shared.peers.learned).clone();
    if shared.belongs() {
        members.insert(shared.member.peer_address.clone());
    }
    let acknowledged = shared.acknowledged(info.id()).0;
    Welcome { members: members.into_iter().collect(), acknowledged }
}

/// Lets the dialling side of a link know that this node is there, and why it does not let that one in.
async fn give_signs(
    shared: &Shared,
    mut write: impl AsyncWrite + Unpin,
    to: NodeId,
) -> Result<(), PeerError> {
    let patience = shared.peer_silence();
    loop {
        let refusal = lock(&shared.peers.refusals).get(&to).map(|(_, reason)| reason.clone());
        let sign = match refusal {
            Some(reason) => frame(b'n', reason.get(..MAX_REASON / 2).unwrap_or(&reason).as_bytes()),
            None => frame(b'k', b""),
        };
        write_within(&mut write, sign, patience).await?;
        tokio::time::sleep(SIGN).await;
    }
}

/// A handshake has shown that another node has another history.
fn note_other_history(shared: &Shared, error: &PeerError) {
    match error {
        PeerError::OtherCluster { node, founded: Some(founded), .. } => {
            let (node, founded) = (node.clone(), *founded);
            shared.report(Internal::OtherCluster { node, founded });
        }
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

/// The dialling side of a link.
struct Dialling {
    id: NodeId,
    /// Where it listens.
    address: String,
    /// Of the timeline in which the link was made.
    epoch: u64,
    /// It is to be heard every second.
    signs: bool,
}

async fn receive_all(
    shared: &Arc<Shared>,
    read: impl AsyncRead + Unpin,
    peer: Dialling,
) -> Result<(), PeerError> {
    let Dialling { id: from, address, epoch, signs } = peer;
    let mut address = Some(address);
    let patience = signs.then(|| shared.peer_silence());
    let mut read = tokio::io::BufReader::with_capacity(256 << 10, Progressing::new(read, patience));
    loop {
        let (kind, content) = read_frame(&mut read, MAX_FRAME).await?;
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
                // It takes part. If it joined while this node was away, nothing else tells this node where to answer.
                if let Some(address) = address.take() {
                    Peers::learn(shared, [address], false);
                }
                shared.tell(Event::Peer(message, epoch)).await;
            }
            b's' => {
                if let Ok(report) = serde_json::from_slice::<NodeReport>(&content) {
                    if is_gone(shared, report.node()) {
                        shared.reports.forget(from);
                        return Err(PeerError::Protocol("the node was removed".into()));
                    }
                    shared.note_acknowledged(&report);
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
            b'k' => {}
            // A newer version may say what this one does not know.
            other => debug!(%from, kind = other, "a frame of unknown kind"),
        }
    }
}
