//! What the engine is told: by the threads of this process, and by others.

use std::collections::BTreeMap;
use std::sync::Arc;

use standby_consensus::{AppliedPoint, LogError, PeerMessage, Written};
use standby_replica::lineage::Lineage;
use standby_replica::settings::Settings;
use standby_types::{LogIndex, NodeId, Oid, Tid, Transfer};
use standby_zeo::{Buffer, ClientError, Examination, SessionId, Value, Vote, VoteAnswer};
use tokio::sync::oneshot;

use crate::cells::announcement::Announcement;
use crate::cells::command::{Ask, Asker};
use crate::cells::sessions::SessionHandle;
use crate::transport::handshake::PeerInfo;

/// A vote on more objects is examined beside the engine's task, like one on objects that are not in
/// memory.
pub const MANY: usize = if cfg!(feature = "simulated") { 2 } else { 1000 };

/// What this process's own threads tell.
pub enum TaskReport {
    /// Batches of the log are durable.
    Persisted(Result<Written, LogError>),
    /// Entries were read from the log.
    EntriesFetched(standby_consensus::Fetched),
    /// Entries are applied.
    Applied {
        /// Up to where.
        point: AppliedPoint,
        /// Oids up to these are reserved or in use.
        ceilings: BTreeMap<String, Oid>,
        /// What administrators have decided.
        settings: Arc<Settings>,
        /// Sessions whose transactions were among them.
        finished: Vec<SessionId>,
    },
    /// A vote was compared with what is applied.
    Examined {
        /// Its storage.
        storage: String,
        /// The vote.
        vote: Examination,
        /// What came of it.
        answer: Result<VoteAnswer, ClientError>,
    },
    /// A piece of a long transaction can go into the log.
    Encoded,
    /// A catch-up is complete and durable.
    CaughtUp(LogIndex),
    /// A fetch of a blob has ended.
    Obtained {
        /// Who announced it, or sent an entry that names it.
        from: NodeId,
        /// Its storage.
        storage: String,
        /// Its name.
        transfer: Transfer,
        /// How.
        how: Fetched,
    },
    /// The last entries of a timeline are applied, and a checkpoint says that another one begins.
    TimelineBegun(AppliedPoint),
    /// Another node has a history that goes on where this node's was left.
    Outdated(Lineage),
    /// A majority of the listed members has promised itself to this node's founding.
    Founds,
    /// Another node knows that this one has acknowledged an entry that it does not have.
    RolledBack {
        /// The entry.
        acknowledged: u64,
        /// That node's name.
        by: String,
    },
    /// A node belongs to another cluster of the same name.
    OtherCluster {
        /// Its name.
        node: String,
        /// When that cluster was founded, in seconds since 1970; 0 if that was before it was noted.
        founded: u64,
    },
    /// A checkpoint is durable: the log up to there is not needed for a restart.
    Checkpointed(LogIndex),
    /// This process must stop.
    Fatal(anyhow::Error),
}

/// What others tell.
pub enum Event {
    /// A peer's message, and the epoch (`Peers::epoch`) of the link over which it came.
    Peer(PeerMessage, u64),
    /// A peer has an upload.
    Announced(NodeId, Announcement),
    /// The transaction of an upload was aborted.
    Forgotten(Announcement),
    /// A peer has fetched an upload.
    Arrived(NodeId, Transfer),
    /// A peer can be reached, or reaches us.
    PeerUp(PeerInfo),
    /// A peer's connection has closed.
    PeerLost(NodeId),
    /// A client asks for something.
    Client(Request),
    /// An administrator asks for something.
    Ask(Ask, Asker),
    /// Somebody waits until the engine has done what it was told before.
    Settled(oneshot::Sender<()>),
    /// The process is to end in an orderly way.
    Stop,
}

/// A client's request.
pub enum Request {
    /// `register`
    Register { session: Arc<SessionHandle>, id: Value, storage: String, read_only: bool },
    /// `getInvalidations`
    Invalidations { session: Arc<SessionHandle>, storage: String, id: Value, since: Tid },
    /// `ping`: the client begins a transaction with what is committed by now
    Sync { session: Arc<SessionHandle>, id: Value },
    /// `new_oids`
    NewOids { session: Arc<SessionHandle>, storage: String, id: Value, count: usize },
    /// `vote`
    Vote { session: Arc<SessionHandle>, storage: String, vote: Vote },
    /// `tpc_finish`
    Finish { session: Arc<SessionHandle>, storage: String, id: Value, transaction: Box<Buffer> },
    /// `pack`
    Pack { session: Arc<SessionHandle>, storage: String, id: Option<Value>, time: f64, wait: bool },
    /// `tpc_abort`
    Abort { session: SessionId, storage: String },
    /// The connection is gone.
    Closed { session: SessionId, storage: Option<String> },
}

impl Request {
    /// True if it is counted as unanswered until the engine or the applier answers it. A vote is
    /// not: its transaction is open as long.
    pub fn awaits_answer(&self) -> bool {
        matches!(
            self,
            Request::Register { .. }
                | Request::Invalidations { .. }
                | Request::Sync { .. }
                | Request::NewOids { .. }
                | Request::Finish { .. }
                | Request::Pack { id: Some(_), .. }
        )
    }
}

/// How the fetch of a blob has ended.
pub enum Fetched {
    /// It is durable here.
    Here,
    /// It is tried again.
    Failed,
    /// A pack has removed its revision where the log comes from.
    PackedAway,
}
