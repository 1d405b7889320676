//! The address for other nodes: whoever is let in is served according to its purpose.

use std::sync::Arc;
use std::time::Duration;

use standby_consensus::decode_message;
use standby_primary::Input;
use standby_types::NodeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::{debug, warn};

use crate::cells::events::Event;
use crate::cells::gate::Pass;
use crate::cells::shared::Shared;
use crate::cells::wire::{Frame, LinkFrame, LinkSign, receive as receive_frame};
use crate::clients::listener;
use crate::peers::link::{MAX_REASON, SIGN, learn, note_other_history};
use crate::peers::{blob_source, block, catch_up, command, compare};
use crate::platform::{TcpListener, TcpStream};
use crate::tasks::bootstrap;
use crate::transport::frames::{MAX_FRAME, PeerError, Progressing, halves, write_within};
use crate::transport::handshake::{PeerInfo, Purpose, Welcome, answer, receive};
use crate::transport::stream::Stream;

/// Accepts connections from other nodes.
pub(crate) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Until the handshake is over, anybody may be there.
                if let Some(pass) = shared.strangers.enter(&from.to_string()) {
                    // It ends with the connection.
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
        (None, Purpose::Bootstrap) => bootstrap::promise(&shared, &info).await,
        (None, _) => Ok(welcome(&shared, &info)),
    };
    let lacks = welcome.as_ref().map_or(0, |welcome| welcome.acknowledged);
    if let Err(error) = answer(&mut stream, welcome).await {
        return refused(error);
    }
    drop(stranger);
    if info.purpose == Purpose::Link && info.log_end.is_some_and(|end| end < lacks) {
        // It has been told, and joins anew.
        if shared.peers.may_tell(format!("{host} lacks")) {
            warn!(
                node = info.node,
                acknowledged = lacks,
                has = info.log_end,
                "a node lacks entries that it has acknowledged: its disk was put back to an \
                earlier state"
            );
        }
        return;
    }
    serve(shared, stream, info, epoch, &from).await;
}

/// Serves a node that was let in, until the connection ends.
async fn serve(shared: Arc<Shared>, stream: Stream, info: PeerInfo, epoch: u64, from: &str) {
    let purpose = info.purpose;
    let ended = match purpose {
        Purpose::Probe | Purpose::Bootstrap => Ok(()),
        Purpose::Link => link(&shared, stream, info, epoch).await,
        Purpose::Blob => {
            if let Err(error) = blob_source::serve(&shared, stream).await {
                warn!(from, %error, "cannot send a blob to a node");
            }
            Ok(())
        }
        Purpose::Block => block::serve(&shared, stream).await,
        Purpose::Compare => compare::serve(&shared, stream).await,
        Purpose::Ask => command::serve(&shared, stream).await,
        Purpose::CatchUp => return catch_up::serve(shared, stream, &info.node).await,
        Purpose::Client => return listener::forwarded(shared, stream).await,
    };
    if let Err(error) = ended {
        debug!(from, ?purpose, %error, "a connection of a node ended");
    }
}

/// Receives what a member says, and lets it know that this node is there.
async fn link(
    shared: &Arc<Shared>,
    stream: Stream,
    info: PeerInfo,
    epoch: u64,
) -> Result<(), PeerError> {
    let (id, signs) = (info.id(), info.gives_signs);
    let own = shared.introduction().cluster_id;
    if own.is_empty() || own == info.cluster_id {
        // Answers go over a link of this node's own, to wherever the other one says that it is now.
        learn(shared, [info.peer_address.clone()], false);
    }
    let dialling = Dialling { id, address: info.peer_address.clone(), epoch, signs };
    shared.peers.link_begins(id);
    shared.tell(Event::PeerUp(info)).await;
    let (read, write) = halves(stream);
    let ended = tokio::select! {
        biased;
        ended = receive_all(shared, read, dialling) => ended,
        ended = give_signs(shared, write, id), if signs => ended,
    };
    if shared.peers.link_ends(id) {
        shared.tell(Event::PeerLost(id)).await;
    }
    ended
}

/// What a node is told that is let in.
fn welcome(shared: &Shared, info: &PeerInfo) -> Welcome {
    let mut members = shared.peers.learned();
    if shared.belongs() {
        members.insert(shared.member.peer_address.clone());
    }
    let acknowledged = shared.acknowledged.of(info.id()).0;
    Welcome { members: members.into_iter().collect(), acknowledged }
}

/// Lets the dialling side of a link know that this node is there, and why it does not let that one
/// in.
async fn give_signs(
    shared: &Shared,
    mut write: impl AsyncWrite + Unpin,
    to: NodeId,
) -> Result<(), PeerError> {
    let patience = shared.peer_silence();
    loop {
        let refusal = shared.peers.refusal(to);
        let sign = match refusal {
            Some(reason) => {
                let short = reason.get(..MAX_REASON / 2).unwrap_or(&reason);
                LinkSign::NotLetIn(short.to_owned())
            }
            None => LinkSign::There,
        };
        write_within(&mut write, sign.encode()?, patience).await?;
        tokio::time::sleep(SIGN).await;
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
        let frame = receive_frame(&mut read, MAX_FRAME).await?;
        if shared.peers.epoch() != epoch {
            return Err(PeerError::Protocol("this node has begun another timeline".into()));
        }
        match frame {
            LinkFrame::Raft(message) => {
                let message = decode_message(message)
                    .map_err(|error| PeerError::Protocol(error.to_string()))?;
                if message.from() != from || message.to() != shared.id {
                    return Err(PeerError::Protocol("a message under another's name".into()));
                }
                // It takes part. If it joined while this node was away, nothing else tells this
                // node where to answer.
                if let Some(address) = address.take() {
                    learn(shared, [address], false);
                }
                shared.tell(Event::Peer(message, epoch)).await;
            }
            LinkFrame::Report(report) => {
                if is_gone(shared, report.node()) {
                    shared.reports.forget(from);
                    return Err(PeerError::Protocol("the node was removed".into()));
                }
                shared.acknowledged.note(report.lineage(), report.acknowledged());
                shared.reports.note(from, *report);
            }
            LinkFrame::Announced(announcement) => {
                if let Some(upload) = announcement.upload() {
                    let storage = announcement.storage().to_owned();
                    shared.tell(Input::Announced { from, storage, upload }).await;
                }
            }
            LinkFrame::Forgotten(announcement) => {
                if let Some(upload) = announcement.upload() {
                    let (storage, transfer) = (announcement.storage().to_owned(), upload.transfer);
                    shared.tell(Input::Forgotten { storage, transfer }).await;
                }
            }
            LinkFrame::Arrived(transfer) => shared.tell(Input::Arrived(from, transfer)).await,
            LinkFrame::Sign => {}
            // A newer version may say what this one does not know.
            LinkFrame::Unknown(kind) => debug!(%from, kind, "a frame of unknown kind"),
        }
    }
}
