//! What is committed, and how far it is applied.

use bytes::{Bytes, BytesMut};
use raft::eraftpb::{Entry, EntryType};
use standby_types::{LogIndex, Term};

use crate::membership::Membership;

/// The state after some entry, as far as others need it to start from there.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct AppliedPoint {
    pub index: LogIndex,
    pub term: Term,
    /// The members as of that entry.
    pub membership: Membership,
    /// What the node adds: this crate does not look into it.
    pub state: Bytes,
    /// A transaction has parts at or before `index` and is not closed there.
    pub open_parts: bool,
}

impl AppliedPoint {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.membership.encode(&mut out);
        out.extend_from_slice(&self.state);
        out.freeze()
    }
}

/// A committed entry.
#[derive(Clone, Debug)]
pub enum Committed {
    /// What was proposed; see [`crate::Command`].
    Command(LogIndex, Term, Bytes),
    /// The membership is another from here on.
    Membership(LogIndex, Term, Membership),
    /// A new leader's first entry, which says nothing.
    Empty(LogIndex, Term),
}

impl Committed {
    /// The entry's index and term.
    pub fn point(&self) -> (LogIndex, Term) {
        match self {
            Committed::Command(index, term, _)
            | Committed::Membership(index, term, _)
            | Committed::Empty(index, term) => (*index, *term),
        }
    }
}

/// What an entry says, if it is no change of membership; otherwise nothing.
pub(crate) fn said(entry: Entry) -> Committed {
    let (index, term) = (LogIndex(entry.index), Term(entry.term));
    match entry.get_entry_type() {
        EntryType::EntryNormal if !entry.data.is_empty() => {
            Committed::Command(index, term, entry.data)
        }
        _ => Committed::Empty(index, term),
    }
}
