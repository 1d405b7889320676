//! What the machine wants to be done.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use standby_consensus::{AppliedPoint, Batch, Committed, Fetch};
use standby_replica::lineage::{Lineage, Promotion};
use standby_types::{LogIndex, NodeId, Oid, Term, Tid, Transfer, Upload};
use standby_zeo::{ClientError, Examination, SessionId, Value, VoteOutcome};

use crate::caller::{Asker, Caller};
use crate::command::Answer;
use crate::input::OutcomeQuestion;

/// Something is to be done. The module says in which order.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Action {
    /// Send a message of consensus to a node; may be lost.
    Send(NodeId, Bytes),
    /// Make durable, then say so.
    Persist(Batch),
    /// Read these entries of the log beside the machine, then say what came of it.
    Fetch(Fetch),
    /// Entries of the log up to this index may be removed from disk.
    Purge(LogIndex),
    /// Make a log that holds nothing and begins after `point`: [`crate::Input::LogBegins`].
    BeginLog {
        point: AppliedPoint,
        /// The log's term is not below this one.
        term: Term,
    },

    /// Apply, in order, then say so; reply to the callers.
    Apply(Vec<(Committed, Option<Caller>)>),
    /// Answer after what was to be applied before.
    Read(Reading),
    /// End the sessions that may write, after what was to be applied before has been sent.
    SendWritersAwayWhenApplied,
    /// Fetch what this node lacks from a node; a catch-up that runs ends.
    CatchUp {
        from: NodeId,
        /// Where that node listens.
        address: String,
        /// The state to reach.
        target: AppliedPoint,
    },
    /// This node has no data: it takes the state as reached.
    CatchUpWithoutData(AppliedPoint),
    /// Fill the holes of a storage.
    Backfill(String),
    /// Apply these entries as the last ones of a timeline, and begin another one.
    BeginTimeline {
        /// What was in the log.
        entries: Vec<Committed>,
        /// What the new timeline is to be.
        promotion: Box<Promotion>,
    },
    /// Compare a vote with what is applied, beside the machine, then say what came of it.
    Examine { storage: String, vote: Examination },

    /// Answer a client's call.
    Answer(Caller, Result<Value, ClientError>),
    /// Answer a client's call that is answered once more later. Only a mutation does this.
    AnswerTooEarly(Caller, Value),
    /// Tell a client that the storage which it names does not exist.
    RefuseStorage(Caller, ClientError),
    /// Tell a session what became of its vote.
    Voted(SessionId, VoteOutcome),
    /// A vote has ended in a conflict: count it.
    CountConflict(String),
    /// End a session at once.
    Cut(SessionId, &'static str),
    /// End sessions at once.
    CutAll(Which, &'static str),
    /// Send clients away: those that have registered lose their connection, others wait on.
    SendAway(Which, &'static str),
    /// The same for one session.
    SendOneAway(SessionId, &'static str),
    /// End all sessions that may write, each as soon as nothing of it is under way.
    LetWritersLeave,
    /// A session is gone: forget it.
    Forget(SessionId),
    /// A pack was taken: say that it runs, and that this session waits for it.
    PackBegins(String, Option<SessionId>),
    /// A pack that was asked for may never be committed: say of no storage that it is packed.
    PacksEnd,

    /// Tell the other nodes of an upload that all need.
    Announce { storage: String, upload: Upload },
    /// Tell the node that announced an upload that it is durable here too.
    Arrived(NodeId, Transfer),
    /// Fetch a blob, then say what came of it.
    Obtain {
        /// Who announced it, or sent an entry that names it.
        from: NodeId,
        /// Where that node listens.
        address: String,
        wanted: Wanted,
    },
    /// Remove an upload.
    Discard { storage: String, transfer: Transfer },

    /// End all links: this node has begun a timeline.
    EndLinks,
    /// Dial the members at these addresses, and no others that were learned before.
    Learn(Vec<String>),
    /// Tell a node from now on why it is not let in.
    Refuse { id: NodeId, node: String, reason: String },
    /// A node is not refused any more.
    LetIn(NodeId),
    /// Nodes have acknowledged what is committed up to here: note it.
    Acknowledged(Vec<(NodeId, LogIndex)>),
    /// Only these are members: what others have acknowledged does not matter any more.
    RetainAcknowledged(BTreeSet<NodeId>),

    /// Publish whether this node serves.
    Serve(ServingState),
    /// Publish until when this node may serve without hearing from a majority, as a monotonic time;
    /// `None` if it does not serve.
    Lease(Option<Duration>),
    /// Publish what this node is ([`crate::Machine::own_state`]), and tell the other nodes.
    Report,
    /// Note durably that this node does not serve, and why.
    NoteSuperseded(String),
    /// Answer an administrator.
    Reply(Asker, Answer),
    /// An administrator's question is not answered: the primary has changed.
    Drop(Asker),
    /// The node is to end.
    End(Ended),
}

/// What tasks that serve clients must know of the node's role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServingState {
    /// This node is primary and may serve.
    pub serves: bool,
    /// Another node is primary; its peer address.
    pub other_primary: Option<String>,
    /// Read-only clients can be served.
    pub ready: bool,
}

/// What the applier answers.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Reading {
    /// `register`: from then on the session gets invalidations.
    Register {
        /// The storage, which exists.
        storage: String,
        caller: Caller,
    },
    /// `ping`: answered by `None`.
    Sync(Caller),
    /// `getInvalidations`
    Invalidations {
        storage: String,
        caller: Caller,
        /// The last transaction that the client knows.
        since: Tid,
    },
    /// `transaction_outcome`: nothing of that transaction is under way.
    Outcome(OutcomeQuestion),
}

/// Some of the sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Those that only read, whatever this node is.
    Readers,
    /// Those that may write, but those that are departing.
    Writers,
    /// Those that wanted to write and took read-only.
    Settled,
}

/// A blob that a node is to have.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Wanted {
    pub storage: String,
    pub blob: WantedBlob,
}

/// See [`Wanted`].
#[derive(Debug, Clone, Copy)]
pub enum WantedBlob {
    /// An upload, and the revision that it belongs to, if its transaction is in the log.
    Upload(Upload, Option<(Oid, Tid)>),
    /// That of a revision which this node does not have, for it lies in a hole: an undo brings it
    /// back.
    Copy {
        /// The object.
        oid: Oid,
        /// The revision in the hole.
        of: Tid,
        /// The undo.
        by: Tid,
    },
}

impl WantedBlob {
    /// What it is called while it is on its way.
    pub fn transfer(&self) -> Transfer {
        match self {
            WantedBlob::Upload(upload, _) => upload.transfer,
            WantedBlob::Copy { oid, by, .. } => Transfer::of_revision(*oid, *by),
        }
    }
}

/// Why the machine has ended.
#[derive(Debug)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// This node's timeline is over; to be started again, for another one.
    Rejoins(Lineage),
    /// To be started again, to bootstrap the cluster.
    Bootstraps,
    /// This node's disk was put back to an earlier state, and how that is known; to be started
    /// again, as a new one.
    RolledBack(String),
}
