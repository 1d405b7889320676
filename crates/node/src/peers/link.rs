//! Links: the connections over which consensus talks.
//!
//! The dialling side says [`LinkFrame`]s, at least one each second; the accepting side says
//! [`LinkSign`]s, one each second.
//!
//! A link over which nothing comes, or that takes nothing, for [`Shared::peer_silence`] is closed
//! and dialled anew: a firewall that forgets a connection says nothing to either side.

use std::sync::Arc;
use std::time::Duration;

use standby_primary::Input;
use standby_types::LogIndex;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::cells::events::Event;
use crate::cells::shared::Shared;
use crate::cells::wire::{Frame, LinkFrame, LinkSign, receive};
use crate::platform;
use crate::transport::frames::{PeerError, halves, silent, write_within};
use crate::transport::handshake::{Introduction, PeerInfo, Purpose, connect};
use crate::transport::stream::Stream;

/// Frames that wait for a slow peer; more are dropped, and Raft sends again.
const QUEUE: usize = 4096;
/// Time between attempts to reach a node.
const RETRY: Duration = Duration::from_millis(250);
/// The same if the node was reached, and refuses.
const RETRY_REFUSED: Duration = Duration::from_secs(1);
/// The same if there is a link to that node already, over another address.
const RETRY_LINKED: Duration = Duration::from_secs(15);
/// Time after which a side of a link that has nothing to say says so.
pub(crate) const SIGN: Duration = Duration::from_secs(1);
/// The longest reason that a node is told.
pub(crate) const MAX_REASON: usize = 4 << 10;

/// The addresses of the members are these: they are dialled, and remembered for the next start.
/// Until this node belongs to a cluster, they are added to what it knows.
pub(crate) fn learn(shared: &Arc<Shared>, addresses: impl IntoIterator<Item = String>, all: bool) {
    let own = &shared.member.peer_address;
    let found = addresses.into_iter().filter(|address| !address.is_empty() && address != own);
    let Some(found) = shared.peers.set_learned(found.collect(), all) else { return };
    for address in &found {
        dial(shared, address);
    }
    let shared = shared.clone();
    let remember = move || {
        let written =
            shared.peers.remember(|learned| shared.state.set_peers(&*shared.disk, learned));
        // Without it, a next start asks those whom its configuration names.
        if let Err(error) = written {
            warn!(%error, "cannot remember the addresses of the other nodes");
        }
    };
    drop(platform::spawn_blocking(remember));
}

/// True if a node is to be dialled at this address.
fn is_wanted(shared: &Shared, address: &str) -> bool {
    let named = shared.config.standby.iter().flat_map(|standby| standby.named_addresses());
    shared.peers.learned().contains(address)
        || named.into_iter().any(|named| named.to_string() == address)
}

/// Keeps a link to the node at this address from now on.
pub(crate) fn dial(shared: &Arc<Shared>, address: &str) {
    if address != shared.member.peer_address && shared.peers.begin_dialling(address) {
        // It ends with the process, or when the node there is none of the cluster any more.
        tokio::spawn(keep_dialling(shared.clone(), address.to_owned()));
    }
}

async fn keep_dialling(shared: Arc<Shared>, address: String) {
    while is_wanted(&shared, &address) {
        let epoch = shared.peers.epoch();
        let introduction = shared.introduction();
        let mut pause = RETRY;
        match connect(&introduction, &address, Purpose::Link).await {
            Ok((stream, info)) => {
                let id = info.id();
                debug!(peer = info.node, address, "link made");
                shared.peers.set_trouble(&address, None);
                learn(&shared, info.welcome.members.iter().cloned(), false);
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
                shared.peers.set_trouble(&address, Some(text.clone()));
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
    shared.peers.set_trouble(&address, None);
    shared.peers.end_dialling(&address);
    if is_wanted(&shared, &address) {
        // It has become so meanwhile.
        dial(&shared, &address);
    }
}

/// True if the other node knows that this one has acknowledged entries that it does not have any
/// more.
fn note_rollback(shared: &Shared, introduction: &Introduction, info: &PeerInfo) -> bool {
    let acknowledged = info.welcome.acknowledged;
    let same = !introduction.cluster_id.is_empty() && introduction.cluster_id == info.cluster_id;
    let lost = same && introduction.log_end.is_some_and(|end| end.0 < acknowledged);
    if lost {
        let (acknowledged, by) = (LogIndex(acknowledged), info.node.clone());
        shared.report(Input::RolledBack { acknowledged, by });
    }
    lost
}

/// Sends what is queued; ends when the other side closes, or is silent. False if the link is not
/// wanted.
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
                Err(_) => LinkFrame::Sign.encode()?,
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
            let next = receive::<LinkSign>(&mut read, MAX_REASON);
            let sign = match gives_signs {
                true => tokio::time::timeout(patience, next).await.map_err(|_| silent())??,
                false => next.await?,
            };
            let trouble = match sign {
                LinkSign::NotLetIn(reason) => {
                    Some(format!("{node} does not let this node in: {reason}"))
                }
                LinkSign::There => None,
            };
            if shared.peers.set_trouble(address, trouble.clone())
                && let Some(reason) = trouble
            {
                warn!(address, "{reason}");
            }
        }
    };
    let ended: Result<(), PeerError> = tokio::select! {
    biased;
    ended = send => ended,
    ended = hear => ended};
    if let Err(error) = ended {
        debug!(peer = node, address, %error, "a link ended");
    }
    // Whoever is told next must find no link.
    queue.close();
    shared.peers.remove(id, &link);
    true
}

/// A handshake has shown that another node has another history.
pub(crate) fn note_other_history(shared: &Shared, error: &PeerError) {
    match error {
        PeerError::OtherCluster { node, bootstrapped: Some(bootstrapped), .. } => {
            let (node, bootstrapped) = (node.clone(), *bootstrapped);
            shared.report(Input::OtherCluster { node, bootstrapped });
        }
        PeerError::Outdated(lineage) => shared.report(Input::Outdated(lineage.clone())),
        PeerError::Diverged { node, lineage } => shared.reports.note_diverged(node, lineage),
        _ => {}
    }
}
