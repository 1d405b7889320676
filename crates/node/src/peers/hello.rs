//! The handshake between nodes.
//!
//! ```text
//! dialling node                              accepting node
//!    'h' hello (JSON, with a nonce)   ─────▶
//!                                     ◀─────  'h' hello (JSON, with a nonce)
//!                                     ◀─────  'm' HMAC-SHA256(secret, "accepting" · both hellos)
//!    'm' HMAC-SHA256(secret,          ─────▶
//!        "dialling" · both hellos)
//!                                     ◀─────  'o' welcome (JSON)
//! ```
//!
//! Either side may send `'x'` with a reason instead and close. Both prove that they know the secret
//! without showing it, and the nonces make every proof a new one. With `<peer-ssl>` all of this, and
//! what follows, goes over TLS, in which each side has shown a certificate that the other trusts.

use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use standby_consensus::Member;
use standby_types::{LogIndex, NodeId};

use super::{PeerError, read_frame, within, write_frame};
use crate::config::Secrets;
use crate::hex::{hex, unhex};
use crate::lineage::{Lineage, Relation};
use crate::machine::{self, TcpStream, end_when_silent};
use crate::state::random_hex;
use crate::stream::Stream;
use crate::tls::Tls;

const PROTOCOL: u32 = 1;
/// A hello is short.
const MAX_HELLO: usize = 64 << 10;
/// How long a connection may take to be made: with round trips of a second, two of them fit.
const CONNECTING: Duration = Duration::from_secs(3);
/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Messages of consensus, and reports, from the dialling node.
    Link,
    /// Transactions for a node that is behind.
    CatchUp,
    /// A blob.
    Blob,
    /// A block of a data file that is damaged.
    Block,
    /// Checksums of transactions, to compare data files.
    Compare,
    /// A client that is passed on.
    Client,
    /// What an administrator has asked another node for.
    Ask,
    /// Only the hello is wanted.
    Probe,
    /// The dialling node founds the cluster, and asks the other one to promise itself to it.
    Found,
}

/// What this node says of itself, and the secret.
#[derive(Clone)]
pub struct Introduction {
    /// This node.
    pub member: Member,
    /// The cluster's name.
    pub cluster: String,
    /// The cluster's identity; empty if the node belongs to none yet.
    pub cluster_id: String,
    /// What the nodes prove to each other that they know.
    pub secrets: Secrets,
    /// How connections between nodes are encrypted.
    pub tls: Option<Arc<Tls>>,
    /// What proves that this node may join; empty if it needs no proof.
    pub join_token: String,
    /// Which history the node has.
    pub lineage: Lineage,
    /// Drawn by each process: tells two with the same identity apart.
    pub run: String,
    /// When its cluster was founded, in seconds since 1970, 0 if that was before it was noted; `None` if the node cannot
    /// tell.
    pub founded: Option<u64>,
    /// The last entry of its log; `None` before the log is open.
    pub log_end: Option<LogIndex>,
    /// After how long without an acknowledgement the other machine counts as gone.
    pub silence: Duration,
}

/// What an accepting node tells a node that it lets in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The peer addresses of the members, as far as the node knows them.
    #[serde(default)]
    pub members: Vec<String>,
    /// The entry up to which the dialling node has acknowledged the log, and which is committed: it must have it.
    #[serde(default)]
    pub acknowledged: u64,
}

/// Who a peer says it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerInfo {
    protocol: u32,
    /// What for.
    pub purpose: Purpose,
    /// The cluster's name.
    pub cluster: String,
    /// The cluster's identity; empty if the node belongs to none yet.
    pub cluster_id: String,
    id: String,
    /// The node's name.
    pub node: String,
    /// Its group.
    pub group: String,
    /// Where it listens for peers.
    pub peer_address: String,
    /// It is a witness.
    #[serde(default)]
    pub witness: bool,
    /// Which history it has.
    #[serde(default)]
    lineage: Lineage,
    /// Its process; empty from a node of an older version.
    #[serde(default)]
    pub run: String,
    /// When its cluster was founded, if it says so: see [`Introduction::founded`].
    #[serde(default)]
    pub founded: Option<u64>,
    /// The last entry of its log, if it says so.
    #[serde(default)]
    pub log_end: Option<u64>,
    /// Its clock, in seconds since 1970; 0 from a node of an older version.
    #[serde(default)]
    pub clock: u64,
    /// Over a link it is heard at least every second, and it wants to hear the other side as often.
    #[serde(default)]
    pub gives_signs: bool,
    /// What the accepting node has answered.
    #[serde(skip)]
    pub welcome: Welcome,
    /// HMAC-SHA256(join token, "join" · nonce) in hexadecimal; empty without a token.
    #[serde(default)]
    invitation: String,
    nonce: String,
}

impl PeerInfo {
    fn of(me: &Introduction, purpose: Purpose) -> Result<PeerInfo, PeerError> {
        let member = &me.member;
        let nonce = random_hex(32).map_err(|error| PeerError::Protocol(error.to_string()))?;
        Ok(PeerInfo {
            protocol: PROTOCOL,
            purpose,
            cluster: me.cluster.clone(),
            cluster_id: me.cluster_id.clone(),
            id: member.id.to_string(),
            node: member.name.clone(),
            group: member.group.clone(),
            peer_address: member.peer_address.clone(),
            witness: member.witness,
            lineage: me.lineage.clone(),
            run: me.run.clone(),
            founded: me.founded,
            log_end: me.log_end.map(|index| index.0),
            clock: machine::wall_clock().as_secs(),
            gives_signs: true,
            welcome: Welcome::default(),
            invitation: match me.join_token.as_str() {
                "" => String::new(),
                token => hex(&invitation(token, &nonce).finalize().into_bytes()),
            },
            nonce,
        })
    }

    /// True if it has proved that it knows this token.
    pub fn is_invited_by(&self, token: &str) -> bool {
        let proof = invitation(token, &self.nonce);
        unhex(&self.invitation).is_some_and(|shown| proof.verify_slice(&shown).is_ok())
    }

    /// It as a member.
    pub fn member(&self) -> Member {
        Member {
            id: self.id(),
            name: self.node.clone(),
            group: self.group.clone(),
            peer_address: self.peer_address.clone(),
            witness: self.witness,
        }
    }

    /// Its identity.
    pub fn id(&self) -> NodeId {
        NodeId(u64::from_str_radix(&self.id, 16).unwrap_or(0))
    }

    /// Why the two nodes do not belong together, if so.
    fn mismatch(&self, other: &PeerInfo) -> Option<PeerError> {
        if !self.cluster_id.is_empty()
            && !other.cluster_id.is_empty()
            && self.cluster == other.cluster
            && self.cluster_id != other.cluster_id
        {
            let (node, founded) = (other.node.clone(), other.founded);
            return Some(PeerError::OtherCluster { node, cluster: other.cluster.clone(), founded });
        }
        let reason = if self.protocol != other.protocol {
            Some(format!("protocol {} here, {} there", self.protocol, other.protocol))
        } else if self.cluster != other.cluster {
            Some(format!(
                "node {} belongs to cluster {:?}, node {} to {:?}",
                self.node, self.cluster, other.node, other.cluster
            ))
        } else if other.id().0 == 0 {
            Some(format!("node {} has no identity", other.node))
        } else if self.id == other.id {
            Some(format!(
                "node {} has the identity of node {}: was its disk copied?",
                other.node, self.node
            ))
        } else {
            None
        };
        reason.map(PeerError::Protocol)
    }
}

/// Whether the two are of one timeline. A node that belongs to no cluster yet takes any.
fn compare_timelines(mine: &PeerInfo, theirs: &PeerInfo) -> Result<(), PeerError> {
    if mine.cluster_id.is_empty() || mine.cluster_id != theirs.cluster_id {
        return Ok(());
    }
    let (ours, other) = (&mine.lineage, &theirs.lineage);
    match ours.relation(other) {
        Relation::Same => Ok(()),
        Relation::Older => Err(PeerError::Outdated(other.clone())),
        Relation::Newer => Err(PeerError::Protocol(format!(
            "node {} is of timeline {}, node {} still of timeline {}",
            mine.node,
            ours.timeline(),
            theirs.node,
            other.timeline()
        ))),
        Relation::Diverged => {
            Err(PeerError::Diverged { node: theirs.node.clone(), lineage: other.clone() })
        }
    }
}

fn invitation(token: &str, nonce: &str) -> Hmac<Sha256> {
    proof(token.as_bytes(), "join", [nonce.as_bytes(), b""])
}

fn proof(secret: &[u8], side: &str, hellos: [&[u8]; 2]) -> Hmac<Sha256> {
    // HMAC takes keys of any length.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap_or_else(|_| unreachable!());
    mac.update(side.as_bytes());
    for hello in hellos {
        mac.update(&(hello.len() as u64).to_be_bytes());
        mac.update(hello);
    }
    mac
}

/// True if the tag proves any of the secrets.
fn knows(secrets: &Secrets, side: &str, hellos: [&[u8]; 2], tag: &[u8]) -> bool {
    let proves = |secret: &[u8]| proof(secret, side, hellos).verify_slice(tag).is_ok();
    secrets.all().fold(false, |known, secret| known | proves(secret))
}

fn parse(kind: u8, content: &[u8]) -> Result<PeerInfo, PeerError> {
    match kind {
        b'h' => serde_json::from_slice(content)
            .map_err(|error| PeerError::Protocol(format!("a malformed hello: {error}"))),
        b'x' => Err(PeerError::Refused(String::from_utf8_lossy(content).into_owned())),
        _ => Err(PeerError::Protocol("no hello: is this the peer-address of a node?".into())),
    }
}

async fn refuse(stream: &mut Stream, reason: &str) -> PeerError {
    let _ = write_frame(stream, b'x', reason.as_bytes()).await;
    PeerError::Protocol(reason.into())
}

/// Tells the other side why the two do not belong together.
async fn part(stream: &mut Stream, error: PeerError) -> PeerError {
    let _ = write_frame(stream, b'x', error.to_string().as_bytes()).await;
    error
}

async fn expect(stream: &mut Stream, expected: u8) -> Result<bytes::Bytes, PeerError> {
    match read_frame(stream, MAX_HELLO).await? {
        (kind, content) if kind == expected => Ok(content),
        (b'x', reason) => Err(PeerError::Refused(String::from_utf8_lossy(&reason).into_owned())),
        _ => Err(PeerError::Protocol("the handshake is out of order".into())),
    }
}

/// Dials a node and proves who we are.
pub async fn connect(
    me: &Introduction,
    address: &str,
    purpose: Purpose,
) -> Result<(Stream, PeerInfo), PeerError> {
    within(PATIENCE, dial(me, address, purpose)).await
}

async fn dial(
    me: &Introduction,
    address: &str,
    purpose: Purpose,
) -> Result<(Stream, PeerInfo), PeerError> {
    let tcp = within(CONNECTING, TcpStream::connect(address)).await?;
    tcp.set_nodelay(true)?;
    end_when_silent(&tcp, me.silence)?;
    let mut stream = match &me.tls {
        None => Stream::Tcp(tcp),
        Some(tls) => tls.connect(tcp).await.map(Stream::from_tls).map_err(no_tls)?,
    };
    let mine = PeerInfo::of(me, purpose)?;
    let my_hello = serde_json::to_vec(&mine)?;
    write_frame(&mut stream, b'h', &my_hello).await?;
    let (kind, their_hello) = read_frame(&mut stream, MAX_HELLO).await?;
    let mut theirs = parse(kind, &their_hello)?;
    let hellos = [&my_hello[..], &their_hello[..]];
    let tag = expect(&mut stream, b'm').await?;
    if !knows(&me.secrets, "accepting", hellos, &tag) {
        let reason = format!("nodes {} and {} have different secrets", mine.node, theirs.node);
        return Err(refuse(&mut stream, &reason).await);
    }
    let tag = proof(me.secrets.own(), "dialling", hellos).finalize().into_bytes();
    write_frame(&mut stream, b'm', &tag).await?;
    compare_timelines(&mine, &theirs)?;
    if let Some(error) = mine.mismatch(&theirs) {
        return Err(part(&mut stream, error).await);
    }
    let welcome = expect(&mut stream, b'o').await?;
    // A node of an older version says nothing more.
    theirs.welcome = serde_json::from_slice(&welcome).unwrap_or_default();
    Ok((stream, theirs))
}

/// Takes a node's connection, or refuses it. The node waits for [`answer`] then.
pub async fn receive(me: &Introduction, tcp: TcpStream) -> Result<(Stream, PeerInfo), PeerError> {
    within(PATIENCE, accept(me, tcp)).await
}

/// Lets a node in whose connection was taken, or tells it why not.
pub async fn answer(stream: &mut Stream, answer: Result<Welcome, String>) -> Result<(), PeerError> {
    match answer {
        Ok(welcome) => write_frame(stream, b'o', &serde_json::to_vec(&welcome)?).await,
        Err(reason) => Err(refuse(stream, &reason).await),
    }
}

async fn accept(me: &Introduction, tcp: TcpStream) -> Result<(Stream, PeerInfo), PeerError> {
    tcp.set_nodelay(true)?;
    end_when_silent(&tcp, me.silence)?;
    let mut stream = match &me.tls {
        None => Stream::Tcp(tcp),
        Some(tls) => tls.acceptor().accept(tcp).await.map(Stream::from_tls).map_err(no_tls)?,
    };
    let info = greet(me, &mut stream).await?;
    Ok((stream, info))
}

fn no_tls(error: std::io::Error) -> PeerError {
    PeerError::Protocol(format!(
        "no TLS between the nodes: {error}; is <peer-ssl> in the configuration of both, and does each \
         trust the other's certificate?"
    ))
}

async fn greet(me: &Introduction, stream: &mut Stream) -> Result<PeerInfo, PeerError> {
    let (kind, their_hello) = read_frame(stream, MAX_HELLO).await?;
    let theirs = parse(kind, &their_hello)?;
    let mine = PeerInfo::of(me, theirs.purpose)?;
    let my_hello = serde_json::to_vec(&mine)?;
    let hellos = [&their_hello[..], &my_hello[..]];
    write_frame(stream, b'h', &my_hello).await?;
    let tag = proof(me.secrets.own(), "accepting", hellos).finalize().into_bytes();
    write_frame(stream, b'm', &tag).await?;
    let tag = expect(stream, b'm').await?;
    if !knows(&me.secrets, "dialling", hellos, &tag) {
        let reason = format!("nodes {} and {} have different secrets", mine.node, theirs.node);
        return Err(refuse(stream, &reason).await);
    }
    if let Some(error) = mine.mismatch(&theirs) {
        return Err(part(stream, error).await);
    }
    if let Err(error) = compare_timelines(&mine, &theirs) {
        return Err(part(stream, error).await);
    }
    Ok(theirs)
}
