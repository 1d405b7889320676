//! What clients were told, in the order in which they were told it.

use std::sync::{Arc, Mutex, PoisonError};

use standby_types::{Oid, Tid};

/// Something that a client has done or was told.
#[derive(Debug, Clone)]
pub enum Event {
    /// A session has begun; the server's last transaction, and the client's own.
    Connected {
        /// Who.
        client: u32,
        /// It may write.
        writes: bool,
        /// What `register` has answered.
        tid: Tid,
        /// What the client had heard of before.
        known: Tid,
    },
    /// A client cannot connect, for two seconds more.
    StillWaits {
        /// Who.
        client: u32,
    },
    /// A node was started, or has ended.
    NodesChanged,
    /// A revision was read.
    Read {
        /// Who.
        client: u32,
        /// Everything up to this transaction is to be seen.
        snapshot: Tid,
        /// Of what.
        oid: Oid,
        /// Which; `None` if there was none.
        serial: Option<Tid>,
    },
    /// All accounts were read: what is in them.
    Audited {
        /// Who.
        client: u32,
        /// At this transaction.
        snapshot: Tid,
        /// How much there is.
        sum: i64,
    },
    /// The current revision of an object was asked for and answered.
    Current {
        /// Who.
        client: u32,
        /// What the client had heard of when the answer came.
        told: Tid,
        /// Of what.
        oid: Oid,
        /// Which one it is.
        serial: Tid,
    },
    /// An invalidation has come.
    Invalidated {
        /// Who.
        client: u32,
        /// The transaction.
        tid: Tid,
        /// What the client had heard of before.
        before: Tid,
    },
    /// Fresh oids were given.
    Oids {
        /// To whom.
        client: u32,
        /// Which.
        oids: Vec<Oid>,
    },
    /// A commit begins: from now on its outcome may be unknown.
    Finishing {
        /// Who.
        client: u32,
        /// Its number among those of the client.
        number: u64,
        /// What it writes, and the revisions that this is based on.
        writes: Vec<(Oid, Tid)>,
    },
    /// It was acknowledged.
    Committed {
        /// Who.
        client: u32,
        /// Its number.
        number: u64,
        /// Its tid.
        tid: Tid,
        /// The client had lost the connection, and has asked.
        asked: bool,
    },
    /// Its client had lost the connection, has asked what became of it, and was told that it is not
    /// committed.
    NotCommitted {
        /// Who.
        client: u32,
        /// Its number.
        number: u64,
    },
    /// It was told that it is, and what it had heard of by then.
    Outcome {
        /// Who.
        client: u32,
        /// The last transaction that it had heard of.
        told: Tid,
        /// That of which it was told.
        tid: Tid,
    },
    /// The same, but the answer was that nobody knows.
    OutcomeUnknown {
        /// Who.
        client: u32,
        /// Its number.
        number: u64,
    },
    /// A `ping` was sent.
    Asked {
        /// Who.
        client: u32,
        /// It may write: then it speaks with the primary.
        writes: bool,
    },
    /// It was answered; what the client has heard of by then.
    Synced {
        /// Who.
        client: u32,
        /// The last transaction.
        tid: Tid,
    },
    /// A blob was asked for.
    Blob {
        /// Who.
        client: u32,
        /// Of what.
        oid: Oid,
        /// The revision.
        serial: Tid,
        /// Whether it is what was written; `None` if there is none.
        found: Option<bool>,
    },
    /// A pack was asked for.
    Packing,
    /// The cluster was told to begin a timeline.
    Promoted,
    /// From now on, or not any more, nothing has gone wrong for some time.
    Calm(bool),
    /// A node began to serve as primary: its name and term.
    Serves(String, u64),
}

/// See the module. Clones are the same history.
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<Vec<Event>>>);

impl History {
    /// Adds an event.
    pub fn add(&self, event: Event) {
        tracing::debug!("{event:?}");
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }

    /// All events.
    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many commits were acknowledged.
    pub fn commits(&self) -> usize {
        self.count(|event| matches!(event, Event::Committed { .. }))
    }

    /// How many of them only when their client asked for the outcome.
    pub fn asked(&self) -> usize {
        self.count(|event| matches!(event, Event::Committed { asked: true, .. }))
    }

    /// How often a client was told that its transaction is not committed.
    pub fn refusals(&self) -> usize {
        self.count(|event| matches!(event, Event::NotCommitted { .. }))
    }

    fn count(&self, which: impl Fn(&Event) -> bool) -> usize {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| which(event)).count()
    }
}
