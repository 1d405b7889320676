//! What a transaction wants to change, and on what it relies.

use standby_types::{Oid, Tid, TransactionToken};

use crate::locks::Mode;

/// What must hold of an object's current revision when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It has this serial, or there is none: a store.
    Serial(Tid),
    /// There is one, and it has this serial: a deletion.
    Existing(Tid),
    /// Nothing: a restore, or an undo, which has rules of its own.
    Any,
}

/// What a transaction wants to change, and on what it relies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VoteRequest {
    /// The tid that the transaction must get.
    pub tid: Option<Tid>,
    /// By which the client may ask what became of it.
    pub token: Option<TransactionToken>,
    /// Objects to write, with what the change relies on.
    pub writes: Vec<(Oid, Expected)>,
    /// Objects that must still have this serial.
    pub checks: Vec<(Oid, Tid)>,
    /// Transactions to undo: before the vote, whoever can read them adds their objects to `writes`.
    pub undos: Vec<Tid>,
    /// Bytes that the transaction takes in the data file before its last record begins.
    pub len_before_last: u64,
}

impl VoteRequest {
    /// Objects that it names, each as often as it does.
    pub fn objects(&self) -> usize {
        self.writes.len() + self.checks.len()
    }
}

/// A request with the locks that it needs. Making it takes a while if the objects are many.
#[derive(Clone, Debug, Default)]
pub struct Vote {
    /// The request.
    pub request: VoteRequest,
    pub(crate) locks: Vec<(Oid, Mode)>,
}

impl From<VoteRequest> for Vote {
    fn from(request: VoteRequest) -> Vote {
        let checks = request.checks.iter().map(|(oid, _)| (*oid, Mode::Shared));
        let writes = request.writes.iter().map(|(oid, _)| (*oid, Mode::Exclusive));
        let mut locks: Vec<_> = checks.chain(writes).collect();
        // Of two modes the stronger one counts.
        locks.sort_unstable_by(|(one, a), (other, b)| one.cmp(other).then(b.cmp(a)));
        locks.dedup_by_key(|(oid, _)| *oid);
        Vote { request, locks }
    }
}
