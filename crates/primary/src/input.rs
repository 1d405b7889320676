//! What the machine is told.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use standby_consensus::{AppliedPoint, Batch, Consensus, Fetched, Member, PeerMessage, Written};
use standby_replica::lineage::Lineage;
use standby_replica::settings::Settings;
use standby_types::{LogIndex, NodeId, Oid, Tid, TransactionToken, Transfer, Upload};
use standby_zeo::{Blobs, ClientError, Examination, Meta, SessionId, Value, Vote, VoteAnswer};

use crate::caller::{Asker, Caller};
use crate::command::Ask;

/// Something has happened.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Input {
    /// A tick's time has passed.
    Tick,
    /// A client asks for something.
    Client(Request),
    /// An administrator asks for something.
    Ask(Ask, Asker),
    /// A message of consensus has come.
    Peer(PeerMessage),
    /// A node can be reached, or reaches this one.
    PeerUp(Arrival),
    /// The connection of a node has closed.
    PeerLost(NodeId),
    /// A node has an upload.
    Announced { from: NodeId, storage: String, upload: Upload },
    /// The transaction of an upload was aborted.
    Forgotten { storage: String, transfer: Transfer },
    /// A node has fetched an upload.
    Arrived(NodeId, Transfer),
    /// Batches of the log are durable.
    Persisted(Written),
    /// Entries were read from the log.
    EntriesFetched(Fetched),
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
    /// A vote was compared with what is applied ([`crate::Action::Examine`]).
    Examined {
        storage: String,
        vote: Examination,
        /// What came of it.
        answer: Result<VoteAnswer, ClientError>,
    },
    /// A piece of a long transaction can go into the log ([`Pieces`]).
    Encoded,
    /// A catch-up is complete and durable.
    CaughtUp(LogIndex),
    /// The fetch of a blob has ended ([`crate::Action::Obtain`]).
    Obtained {
        /// Who announced it, or sent an entry that names it.
        from: NodeId,
        storage: String,
        transfer: Transfer,
        /// How.
        how: Obtained,
    },
    /// The last entries of a timeline are applied, and a checkpoint says that another one begins.
    TimelineBegun(AppliedPoint),
    /// The log of the new timeline ([`crate::Action::BeginLog`]), and what makes it so on disk.
    LogBegins(Box<Consensus>, Batch),
    /// Another node has a history that goes on where this node's was left.
    Outdated(Lineage),
    /// A majority of the listed members has promised itself to this node's bootstrap.
    Bootstraps,
    /// Another node knows that this one has acknowledged an entry that it does not have.
    RolledBack {
        acknowledged: LogIndex,
        /// That node's name.
        by: String,
    },
    /// A node belongs to another cluster of the same name.
    OtherCluster {
        node: String,
        /// When that cluster was bootstrapped, in seconds since 1970; 0 if that was before it was
        /// noted.
        bootstrapped: u64,
    },
    /// A checkpoint is durable: the log up to there is not needed for a restart.
    Checkpointed(LogIndex),
    /// The process is to end in an orderly way.
    Stop,
}

/// A client's request.
#[allow(missing_docs, reason = "the fields are the arguments of the calls")]
pub enum Request {
    /// `register`
    Register { caller: Caller, storage: String, read_only: bool },
    /// `getInvalidations`
    Invalidations { caller: Caller, storage: String, since: Tid },
    /// `ping`: the client begins a transaction with what is committed by now
    Sync { caller: Caller },
    /// `new_oids`
    NewOids { caller: Caller, storage: String, count: usize },
    /// `vote`
    Vote { session: SessionId, storage: String, vote: Vote },
    /// `tpc_finish`
    Finish { caller: Caller, storage: String, transaction: Finished },
    /// `transaction_outcome`
    Outcome(OutcomeQuestion),
    /// `pack`
    Pack(PackRequest),
    /// `tpc_abort`
    Abort { session: SessionId, storage: String },
    /// The connection is gone.
    Closed { session: SessionId, storage: Option<String> },
}

impl Request {
    /// True if it is counted as unanswered until it is answered. A vote is not: its transaction is
    /// open as long.
    pub fn awaits_answer(&self) -> bool {
        match self {
            Request::Register { .. }
            | Request::Invalidations { .. }
            | Request::Sync { .. }
            | Request::NewOids { .. }
            | Request::Finish { .. }
            | Request::Outcome(_) => true,
            Request::Pack(request) => request.id.is_some(),
            Request::Vote { .. } | Request::Abort { .. } | Request::Closed { .. } => false,
        }
    }
}

/// `transaction_outcome`
#[derive(Debug, Clone, PartialEq)]
pub struct OutcomeQuestion {
    /// Who asks.
    pub caller: Caller,
    /// In which storage.
    pub storage: String,
    /// For which transaction.
    pub token: TransactionToken,
    /// The client knew this transaction before it finished the one that it asks for.
    pub since: Tid,
}

/// `pack`
pub struct PackRequest {
    /// Who asks.
    pub session: SessionId,
    /// What to pack.
    pub storage: String,
    /// The call; `None` if no answer is wanted.
    pub id: Option<Value>,
    /// In seconds since 1970.
    pub time: f64,
    /// The answer is to come when this node has packed.
    pub wait: bool,
}

/// A transaction that its client has finished.
pub struct Finished {
    /// Its head.
    pub meta: Meta,
    /// Its blobs. Dropped before the log is to name them, they are removed.
    pub blobs: Blobs,
    /// Its records, as they go into the log.
    pub records: Records,
}

/// The records of a transaction, as they go into the log.
pub enum Records {
    /// All that are not in the log yet, no longer than a part.
    Rest(Bytes),
    /// They are encoded beside the machine, and come piece by piece.
    Coming(Box<dyn Pieces>),
    /// This part comes next.
    Part(Bytes, Box<dyn Pieces>),
    /// What the client has stored cannot be read back.
    Unreadable(io::Error),
}

/// A long transaction, encoded beside the machine. [`Input::Encoded`] says when to ask again.
pub trait Pieces: Send {
    /// The next piece; `None` if it is not there yet.
    fn take(&mut self) -> io::Result<Option<Piece>>;
}

/// A piece of a long transaction.
pub enum Piece {
    /// An entry of its own.
    Part(Bytes),
    /// The last one, no longer than a part.
    Rest(Bytes),
}

/// A node whose connection is open.
pub struct Arrival {
    /// Who it says it is.
    pub member: Member,
    /// True if it has proved that it knows this join token.
    pub knows: Box<dyn Fn(&str) -> bool + Send>,
}

/// How the fetch of a blob has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obtained {
    /// It is durable here.
    Here,
    /// It is tried again.
    Failed,
    /// A pack has removed its revision where the log comes from.
    PackedAway,
}
