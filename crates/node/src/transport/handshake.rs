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
//! without showing it, and the nonces make every proof a new one. With `<peer-ssl>` all of this,
//! and what follows, goes over TLS, in which each side has shown a certificate that the other
//! trusts.
//!
//! Nodes that share a secret and have no certificates go over TLS too (`sealed.rs`): the proofs
//! cover a value that only the two ends of the connection know, and the dialling node proves first,
//! so that a stranger who dials gets nothing that was made with the secret. Clusters below feature
//! level 3 do without it, as nodes of older versions do.

use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use standby_config::{Secrets, Standby};
use standby_consensus::Member;
use standby_replica::lineage::{Lineage, Relation};
use standby_types::hex::{hex, unhex};
use standby_types::{LogIndex, NodeId};

use crate::platform::random::random_hex;
use crate::platform::{self, TcpStream, end_when_silent};
use crate::transport::frames::{PeerError, read_frame, within, write_frame};
use crate::transport::sealed::{Bound, Sealed};
use crate::transport::stream::Stream;
use crate::transport::tls::Tls;

const PROTOCOL: u32 = 1;
/// What the proofs of the two sides begin with.
const DIALLING: &str = "dialling";
const ACCEPTING: &str = "accepting";
/// Why a connection is refused that does not begin with TLS.
const UNSEALED: &str = "connections between the nodes of this cluster are encrypted: is the other \
                        one of an older version, or without the secret-file?";
/// A hello is short.
const MAX_HELLO: usize = 64 << 10;
/// How long a connection may take to be made: with round trips of a second, two of them fit.
const CONNECTING: Duration = Duration::from_secs(3);
/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Purpose {
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
    /// A client that is forwarded.
    Client,
    /// What an administrator has asked another node for.
    Ask,
    /// Only the hello is wanted.
    Probe,
    /// The dialling node bootstraps the cluster, and asks the other one to promise itself to it.
    #[serde(rename = "found")]
    Bootstrap,
}

/// How connections between nodes are protected beyond the handshake.
#[derive(Clone)]
pub(crate) enum Wire {
    /// Not at all: there is no secret, for all nodes are on one machine.
    Plain,
    /// Encrypted, and tied to the secret.
    Sealed(Arc<Sealed>),
    /// By certificates.
    Tls(Arc<Tls>),
}

impl Wire {
    /// As the configuration says.
    pub(crate) fn of(standby: Option<&Standby>) -> anyhow::Result<Wire> {
        Ok(match standby {
            Some(Standby { peer_ssl: Some(section), .. }) => {
                Wire::Tls(Arc::new(Tls::new(section)?))
            }
            Some(standby) if !standby.secrets.is_none() => Wire::Sealed(Arc::new(Sealed::new()?)),
            _ => Wire::Plain,
        })
    }
}

/// What this node says of itself, and the secret.
#[derive(Clone)]
pub(crate) struct Introduction {
    pub member: Member,
    pub cluster: String,
    /// The cluster's identity; empty if the node belongs to none yet.
    pub cluster_id: String,
    /// What the nodes prove to each other that they know.
    pub secrets: Secrets,
    /// How connections between nodes are protected.
    pub wire: Wire,
    /// The cluster still works at a feature level at which connections are not sealed.
    pub unsealed: bool,
    /// What proves that this node may join; empty if it needs no proof.
    pub join_token: String,
    /// Which history the node has.
    pub lineage: Lineage,
    /// Drawn by each process: tells two with the same identity apart.
    pub run: String,
    /// When its cluster was bootstrapped, in seconds since 1970, 0 if that was before it was noted;
    /// `None` if the node cannot tell.
    pub bootstrapped: Option<u64>,
    /// The last entry of its log; `None` before the log is open.
    pub log_end: Option<LogIndex>,
    /// After how long without an acknowledgement the other machine counts as gone.
    pub silence: Duration,
}

/// What an accepting node tells a node that it lets in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// The peer addresses of the members, as far as the node knows them.
    #[serde(default)]
    pub members: Vec<String>,
    /// The entry up to which the dialling node has acknowledged the log, and which is committed: it
    /// must have it.
    #[serde(default)]
    pub acknowledged: u64,
}

/// Who a peer says it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PeerInfo {
    protocol: u32,
    pub purpose: Purpose,
    pub cluster: String,
    /// The cluster's identity; empty if the node belongs to none yet.
    pub cluster_id: String,
    id: String,
    pub node: String,
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
    /// When its cluster was bootstrapped, if it says so: see [`Introduction::bootstrapped`].
    #[serde(default, rename = "founded")]
    pub bootstrapped: Option<u64>,
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
            bootstrapped: me.bootstrapped,
            log_end: me.log_end.map(|index| index.0),
            clock: platform::wall_clock().as_secs(),
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
    pub(crate) fn is_invited_by(&self, token: &str) -> bool {
        let proof = invitation(token, &self.nonce);
        unhex(&self.invitation).is_some_and(|shown| proof.verify_slice(&shown).is_ok())
    }

    /// It as a member.
    pub(crate) fn member(&self) -> Member {
        Member {
            id: self.id(),
            name: self.node.clone(),
            group: self.group.clone(),
            peer_address: self.peer_address.clone(),
            witness: self.witness,
        }
    }

    pub(crate) fn id(&self) -> NodeId {
        NodeId(u64::from_str_radix(&self.id, 16).unwrap_or(0))
    }

    /// Why the two nodes do not belong together, if so.
    fn mismatch(&self, other: &PeerInfo) -> Option<PeerError> {
        if !self.cluster_id.is_empty()
            && !other.cluster_id.is_empty()
            && self.cluster == other.cluster
            && self.cluster_id != other.cluster_id
        {
            let (node, bootstrapped) = (other.node.clone(), other.bootstrapped);
            return Some(PeerError::OtherCluster {
                node,
                cluster: other.cluster.clone(),
                bootstrapped,
            });
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
    proof(token.as_bytes(), "join", [nonce.as_bytes(), b""], None)
}

fn proof(secret: &[u8], side: &str, hellos: [&[u8]; 2], bound: Option<&Bound>) -> Hmac<Sha256> {
    // HMAC takes keys of any length.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap_or_else(|_| unreachable!());
    mac.update(side.as_bytes());
    for hello in hellos {
        mac.update(&(hello.len() as u64).to_be_bytes());
        mac.update(hello);
    }
    if let Some(bound) = bound {
        mac.update(bound);
    }
    mac
}

/// What both sides of a handshake prove, and look at.
struct Proofs<'a> {
    secrets: &'a Secrets,
    /// The dialling node's, and the accepting node's.
    hellos: [&'a [u8]; 2],
    bound: Option<&'a Bound>,
    /// The two nodes, for people.
    names: [&'a str; 2],
}

impl Proofs<'_> {
    fn with(&self, secret: &[u8], side: &str) -> Hmac<Sha256> {
        proof(secret, side, self.hellos, self.bound)
    }

    async fn show(&self, stream: &mut Stream, side: &str) -> Result<(), PeerError> {
        let tag = self.with(self.secrets.own(), side).finalize().into_bytes();
        write_frame(stream, b'm', &tag).await
    }

    async fn look(&self, stream: &mut Stream, side: &str) -> Result<(), PeerError> {
        let tag = expect(stream, b'm').await?;
        let proves = |secret: &[u8]| self.with(secret, side).verify_slice(&tag).is_ok();
        // Any of the secrets; as many are tried whichever it is.
        if self.secrets.all().fold(false, |known, secret| known | proves(secret)) {
            return Ok(());
        }
        let [one, other] = self.names;
        Err(refuse(stream, &format!("nodes {one} and {other} have different secrets")).await)
    }
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
pub(crate) async fn connect(
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
    let (mut stream, bound) = match &me.wire {
        Wire::Sealed(sealed) if !me.unsealed => {
            let (tls, bound) = sealed.connect(tcp).await.map_err(not_sealed)?;
            (Stream::from_tls(tls), Some(bound))
        }
        Wire::Plain | Wire::Sealed(_) => (Stream::Tcp(tcp), None),
        Wire::Tls(tls) => (tls.connect(tcp).await.map(Stream::from_tls).map_err(no_tls)?, None),
    };
    let mine = PeerInfo::of(me, purpose)?;
    let my_hello = serde_json::to_vec(&mine)?;
    write_frame(&mut stream, b'h', &my_hello).await?;
    let (kind, their_hello) = read_frame(&mut stream, MAX_HELLO).await?;
    let mut theirs = parse(kind, &their_hello)?;
    let proofs = Proofs {
        secrets: &me.secrets,
        hellos: [&my_hello, &their_hello],
        bound: bound.as_ref(),
        names: [&mine.node, &theirs.node],
    };
    if bound.is_some() {
        proofs.show(&mut stream, DIALLING).await?;
        proofs.look(&mut stream, ACCEPTING).await?;
    } else {
        proofs.look(&mut stream, ACCEPTING).await?;
        proofs.show(&mut stream, DIALLING).await?;
    }
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
pub(crate) async fn receive(
    me: &Introduction,
    tcp: TcpStream,
) -> Result<(Stream, PeerInfo), PeerError> {
    within(PATIENCE, accept(me, tcp)).await
}

/// Lets a node in whose connection was taken, or tells it why not.
pub(crate) async fn answer(
    stream: &mut Stream,
    answer: Result<Welcome, String>,
) -> Result<(), PeerError> {
    match answer {
        Ok(welcome) => write_frame(stream, b'o', &serde_json::to_vec(&welcome)?).await,
        Err(reason) => Err(refuse(stream, &reason).await),
    }
}

async fn accept(me: &Introduction, tcp: TcpStream) -> Result<(Stream, PeerInfo), PeerError> {
    tcp.set_nodelay(true)?;
    end_when_silent(&tcp, me.silence)?;
    let (mut stream, bound) = match &me.wire {
        Wire::Plain => (Stream::Tcp(tcp), None),
        Wire::Tls(tls) => {
            (tls.acceptor().accept(tcp).await.map(Stream::from_tls).map_err(no_tls)?, None)
        }
        Wire::Sealed(sealed) if platform::begins_tls(&tcp).await? => {
            let (tls, bound) = sealed.accept(tcp).await.map_err(not_sealed)?;
            (Stream::from_tls(tls), Some(bound))
        }
        Wire::Sealed(_) if me.unsealed => (Stream::Tcp(tcp), None),
        Wire::Sealed(_) => return Err(refuse(&mut Stream::Tcp(tcp), UNSEALED).await),
    };
    let info = greet(me, &mut stream, bound.as_ref()).await?;
    Ok((stream, info))
}

fn not_sealed(error: std::io::Error) -> PeerError {
    PeerError::Protocol(format!(
        "no encryption between the nodes: {error}; is the other one a node of this version, with a \
         secret-file, and without <peer-ssl>?"
    ))
}

fn no_tls(error: std::io::Error) -> PeerError {
    PeerError::Protocol(format!(
        "no TLS between the nodes: {error}; is <peer-ssl> in the configuration of both, and does \
         each trust the other's certificate?"
    ))
}

async fn greet(
    me: &Introduction,
    stream: &mut Stream,
    bound: Option<&Bound>,
) -> Result<PeerInfo, PeerError> {
    let (kind, their_hello) = read_frame(stream, MAX_HELLO).await?;
    let theirs = parse(kind, &their_hello)?;
    let mine = PeerInfo::of(me, theirs.purpose)?;
    let my_hello = serde_json::to_vec(&mine)?;
    write_frame(stream, b'h', &my_hello).await?;
    let proofs = Proofs {
        secrets: &me.secrets,
        hellos: [&their_hello, &my_hello],
        bound,
        names: [&mine.node, &theirs.node],
    };
    if bound.is_some() {
        proofs.look(stream, DIALLING).await?;
        proofs.show(stream, ACCEPTING).await?;
    } else {
        proofs.show(stream, ACCEPTING).await?;
        proofs.look(stream, DIALLING).await?;
    }
    if let Some(error) = mine.mismatch(&theirs) {
        return Err(part(stream, error).await);
    }
    if let Err(error) = compare_timelines(&mine, &theirs) {
        return Err(part(stream, error).await);
    }
    Ok(theirs)
}

#[cfg(all(test, not(feature = "simulated")))]
mod tests {
    use tokio::io::copy_bidirectional;
    use tokio::net::TcpListener;

    use super::*;

    const SECRET: &str = "a secret that both nodes know";

    fn introduction(id: u64, secret: &str, wire: Wire) -> Introduction {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), secret).unwrap();
        Introduction {
            member: Member {
                id: NodeId(id),
                name: format!("n{id}"),
                group: "here".into(),
                peer_address: String::new(),
                witness: false,
            },
            cluster: "test".into(),
            cluster_id: String::new(),
            secrets: Secrets::read(file.path()).unwrap(),
            wire,
            unsealed: false,
            join_token: String::new(),
            lineage: Lineage::default(),
            run: String::new(),
            bootstrapped: None,
            log_end: None,
            silence: Duration::from_secs(10),
        }
    }

    fn sealed(id: u64, secret: &str) -> Introduction {
        introduction(id, secret, Wire::Sealed(Arc::new(Sealed::new().unwrap())))
    }

    /// What becomes of a handshake of two nodes, on both sides. `relay` gets the dialling node's
    /// connection, and where the accepting node listens.
    async fn shake<F>(
        dials: Introduction,
        accepts: Introduction,
        relay: impl FnOnce(TcpStream, String) -> F,
    ) -> [Result<(), String>; 2]
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let via = between.local_addr().unwrap().to_string();
        let accepting = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let (mut stream, _) = receive(&accepts, tcp).await?;
            answer(&mut stream, Ok(Welcome::default())).await
        });
        let dialling =
            tokio::spawn(async move { connect(&dials, &via, Purpose::Probe).await.map(|_| ()) });
        let (tcp, _) = between.accept().await.unwrap();
        let relaying = tokio::spawn(relay(tcp, to));
        let results = [dialling.await.unwrap(), accepting.await.unwrap()];
        relaying.abort();
        results.map(|result: Result<(), PeerError>| result.map_err(|error| error.to_string()))
    }

    /// Passes on what it cannot read.
    async fn passes_on(mut from: TcpStream, to: String) {
        let mut to = TcpStream::connect(to).await.unwrap();
        let _ = copy_bidirectional(&mut from, &mut to).await;
    }

    /// Ends the encryption of both, reads all, and passes it on.
    async fn reads(from: TcpStream, to: String) {
        let own = Sealed::new().unwrap();
        let (mut from, _) = own.accept(from).await.unwrap();
        let (mut to, _) = own.connect(TcpStream::connect(to).await.unwrap()).await.unwrap();
        let _ = copy_bidirectional(&mut from, &mut to).await;
    }

    #[tokio::test]
    async fn who_reads_between_two_nodes_is_noticed() {
        let results = shake(sealed(1, SECRET), sealed(2, SECRET), passes_on).await;
        assert_eq!(results, [Ok(()), Ok(())]);
        for result in shake(sealed(1, SECRET), sealed(2, SECRET), reads).await {
            assert!(result.unwrap_err().contains("nodes n2 and n1 have different secrets"));
        }
    }

    #[tokio::test]
    async fn a_stranger_who_dials_gets_nothing_that_was_made_with_the_secret() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let accepts = sealed(2, SECRET);
        let accepting = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            receive(&accepts, tcp).await.map(|_| ())
        });
        let stranger = sealed(1, "another secret of sixteen characters");
        let tcp = TcpStream::connect(to).await.unwrap();
        let (mut stream, _) = Sealed::new().unwrap().connect(tcp).await.unwrap();
        let hello = serde_json::to_vec(&PeerInfo::of(&stranger, Purpose::Probe).unwrap()).unwrap();
        write_frame(&mut stream, b'h', &hello).await.unwrap();
        write_frame(&mut stream, b'm', &[0; 32]).await.unwrap();
        let mut kinds = Vec::new();
        while let Ok((kind, _)) = read_frame(&mut stream, MAX_HELLO).await {
            kinds.push(kind);
        }
        assert_eq!(kinds, *b"hx");
        assert!(accepting.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn who_does_not_seal_is_let_in_below_that_level_only() {
        let before = |id| Introduction { unsealed: true, ..sealed(id, SECRET) };
        for (dials, accepts) in [(before(1), before(2)), (sealed(1, SECRET), before(2))] {
            assert_eq!(shake(dials, accepts, passes_on).await, [Ok(()), Ok(())]);
        }
        for dials in [before(1), introduction(1, SECRET, Wire::Plain)] {
            for result in shake(dials, sealed(2, SECRET), passes_on).await {
                assert!(result.unwrap_err().contains("of this cluster are encrypted"));
            }
        }
        let [dialled, accepted] =
            shake(sealed(1, SECRET), introduction(2, SECRET, Wire::Plain), passes_on).await;
        assert!(dialled.unwrap_err().contains("no encryption between the nodes"));
        assert!(accepted.unwrap_err().contains("neither <peer-ssl> nor a secret-file"));
    }
}
