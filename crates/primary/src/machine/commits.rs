//! Finished transactions on their way into the log: short ones at once, of long ones a part each in
//! turn.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use bytes::{Bytes, BytesMut};
use standby_consensus::{ClosingEntry, Command};
use standby_filestorage::{TransactionMeta, put_meta};
use standby_replica::settings::TOKENS_LEVEL;
use standby_types::time::{new_tid, tid_at, time_of, utc};
use standby_types::{LogIndex, Mutation, Term, Tid, mutation};
use standby_zeo::{Blobs, ClientError, Meta, Value};
use tracing::error;

use crate::Result;
use crate::action::Action;
use crate::caller::Caller;
use crate::input::{Finished, Piece, Records};
use crate::machine::Machine;

/// Bytes of entries of ours without a majority, beyond which nothing more is proposed.
const WINDOW: usize = 16 << 20;
/// Parts of long transactions without a majority, each a megabyte. What others commit, and answers
/// to heartbeats, come behind them on every link.
const PARTS_IN_FLIGHT: usize = 4;
/// What is on its way into the log, and through it.
#[derive(Default)]
pub(crate) struct Commits {
    /// Transactions whose closing entry is not proposed.
    outgoing: VecDeque<FinishedTransaction>,
    /// Entries of this primary that are not committed.
    pending: BTreeMap<LogIndex, Pending>,
    /// Their bytes.
    in_flight: usize,
}

/// An entry of this primary that is not committed yet.
pub(crate) struct Pending {
    pub term: Term,
    pub len: usize,
    pub caller: Option<Caller>,
}

impl Commits {
    /// An entry is in the log.
    pub(crate) fn proposed(&mut self, index: LogIndex, pending: Pending) {
        self.in_flight += pending.len;
        self.pending.insert(index, pending);
    }

    /// An entry is committed. Returns who waits for it, if it is this primary's.
    pub(crate) fn committed(&mut self, (index, term): (LogIndex, Term)) -> Option<Caller> {
        let pending = self.pending.remove(&index)?;
        self.in_flight = self.in_flight.saturating_sub(pending.len);
        pending.caller.filter(|_| pending.term == term)
    }

    /// A transaction may go into the log.
    pub(crate) fn push(&mut self, outgoing: FinishedTransaction) {
        self.outgoing.push_back(outgoing);
    }

    /// This node is not primary any more.
    pub(crate) fn clear(&mut self) {
        *self = Commits::default();
    }

    /// True if nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.outgoing.is_empty()
    }

    /// Fails if an invariant does not hold.
    pub(crate) fn invariants(&self, last_index: LogIndex) {
        let in_flight: usize = self.pending.values().map(|pending| pending.len).sum();
        assert_eq!(self.in_flight, in_flight, "bytes of entries that are not committed");
        assert!(self.pending.keys().all(|index| *index <= last_index), "an entry beyond the log");
    }
}

/// A transaction on its way into the log.
pub(crate) struct FinishedTransaction {
    caller: Caller,
    pub(crate) storage: String,
    meta: Meta,
    pub(crate) blobs: Blobs,
    records: Records,
    parts: Vec<LogIndex>,
}

/// What the pump can do for a transaction.
enum Next {
    /// Its next piece is not there yet.
    Waits,
    /// A part is to be proposed.
    Part(Bytes),
    /// This is all that is left, and fits its closing entry.
    Closes(Bytes),
}

impl Machine {
    pub(crate) fn finish(&mut self, caller: Caller, storage: String, transaction: Finished) {
        let Some(committing) = self.storages.get_mut(&storage) else { return };
        if committing.transactions.finish(caller.session).is_err() {
            let text = Value::str("finished called wo lock");
            let error = ClientError::Other("builtins.AssertionError", vec![text]);
            return self.act(Action::Answer(caller, Err(error)));
        }
        let Finished { meta, blobs, records } = transaction;
        let parts = Vec::new();
        self.commits.push(FinishedTransaction { caller, storage, meta, blobs, records, parts });
    }

    /// What a client has stored is not there any more.
    fn unreadable(&mut self, outgoing: &FinishedTransaction, error: &io::Error) {
        error!(%error, "cannot read a large transaction back");
        let session = outgoing.caller.session;
        self.act(Action::Cut(session, "its transaction cannot be read back"));
        let now = self.now;
        self.unlocked(&outgoing.storage, |t| t.applied(now, session));
    }

    /// Moves finished transactions into the log: short ones at once, of long ones a part each
    /// in turn, as fast as they are committed.
    pub(crate) fn pump(&mut self) -> Result<()> {
        // How many have had their turn since something was proposed.
        let mut passed = 0;
        while self.commits.in_flight < WINDOW && passed < self.commits.outgoing.len() {
            let Some(mut outgoing) = self.commits.outgoing.pop_front() else { break };
            if outgoing.parts.is_empty() {
                if self.overtaken(&outgoing) {
                    continue;
                }
                match self.with_blobs(outgoing) {
                    Some(ready) => outgoing = ready,
                    None => continue,
                }
            }
            // Nothing may get a tid while one that brings its own is on its way.
            let goes_first = outgoing.meta.tid.is_some();
            match outgoing.next() {
                Ok(Next::Part(part)) if self.parts_in_flight(&outgoing) < PARTS_IN_FLIGHT => {
                    match self.propose(Command::Part(part.clone()), None)? {
                        Some(index) => outgoing.parts.push(index),
                        None => {
                            outgoing.put_back(part);
                            self.commits.outgoing.push_front(outgoing);
                            break;
                        }
                    }
                    passed = 0;
                }
                Ok(Next::Part(part)) => {
                    outgoing.put_back(part);
                    passed += 1;
                }
                Ok(Next::Waits) => passed += 1,
                Ok(Next::Closes(rest)) => {
                    if !self.close(outgoing, rest)? {
                        break;
                    }
                    passed = 0;
                    continue;
                }
                Err(error) => {
                    self.unreadable(&outgoing, &error);
                    continue;
                }
            }
            if goes_first {
                self.commits.outgoing.push_front(outgoing);
                if passed > 0 {
                    break;
                }
            } else {
                self.commits.outgoing.push_back(outgoing);
            }
        }
        Ok(())
    }

    /// Parts of this transaction, and of the others that are on their way, that are not committed
    /// yet.
    fn parts_in_flight(&self, one: &FinishedTransaction) -> usize {
        // Entries are committed in order.
        let of = |outgoing: &FinishedTransaction| {
            let parts = outgoing.parts.iter().rev();
            parts.take_while(|index| self.commits.pending.contains_key(index)).count()
        };
        self.commits.outgoing.iter().chain([one]).map(of).sum()
    }

    /// Why a transaction with this tid, or with one that it will get, cannot be stored. What is in
    /// the log must be applied by every node: a tid that no data file takes may not get there.
    pub(crate) fn refuse_tid(&self, storage: &str, tid: Option<Tid>) -> Option<ClientError> {
        let last = self.storages.get(storage).map_or(Tid::NONE, |s| s.last_tid);
        let Some(tid) = tid else {
            return (last >= Tid::MAX).then(|| {
                ClientError::storage(format!(
                    "nothing more can be stored: the last transaction, {last}, has the highest tid \
                    that there can be"
                ))
            });
        };
        if tid <= last {
            return Some(does_not_follow(tid, last));
        }
        let ahead = self.config.future_tids();
        let bound = tid_at(self.facts.wall_clock().saturating_add(ahead)).min(Tid(Tid::MAX.0 - 1));
        (tid > bound).then(|| {
            ClientError::storage(format!(
                "a transaction with tid {tid} cannot be stored: it is in the future ({}), and \
                 every later transaction would be as well. At most {} s ahead of the primary's \
                 clock are allowed: \"future-tids\" in <standby>",
                utc(tid),
                ahead.as_secs()
            ))
        })
    }

    /// True if a transaction cannot have its tid any more; the client is told.
    fn overtaken(&mut self, outgoing: &FinishedTransaction) -> bool {
        let Some(error) = self.refuse_tid(&outgoing.storage, outgoing.meta.tid) else {
            return false;
        };
        self.act(Action::Answer(outgoing.caller.clone(), Err(error)));
        let (now, session) = (self.now, outgoing.caller.session);
        self.unlocked(&outgoing.storage, |t| t.applied(now, session));
        true
    }

    /// Proposes the closing entry of a transaction; false if it has to be tried again.
    fn close(&mut self, outgoing: FinishedTransaction, rest: Bytes) -> Result<bool> {
        let wall_clock = self.time_of_commits();
        let Some(committing) = self.storages.get_mut(&outgoing.storage) else { return Ok(true) };
        let meta = &outgoing.meta;
        let tid = meta.tid;
        let behind = time_of(committing.last_tid).saturating_sub(wall_clock);
        let last = match mutation::on(Mutation::TidFromClock) {
            true => Tid::NONE,
            false => committing.last_tid,
        };
        let tid = tid.unwrap_or_else(|| new_tid(wall_clock, last));
        if tid > Tid::MAX && self.overtaken(&outgoing) {
            return Ok(true);
        }
        let meta = TransactionMeta {
            tid,
            status: meta.status,
            user: meta.user.clone(),
            description: meta.description.clone(),
            extension: meta.extension.clone(),
        };
        let mut head = BytesMut::new();
        put_meta(&meta, &mut head);
        let closing = ClosingEntry {
            storage: outgoing.storage.clone(),
            token: outgoing.meta.token.filter(|_| self.settings.level() >= TOKENS_LEVEL),
            head: head.freeze(),
            parts: outgoing.parts.clone(),
            blobs: outgoing.blobs.all.clone(),
            rest,
        };
        let caller = outgoing.caller.clone();
        if self.propose(Command::Transaction(closing), Some(caller))?.is_none() {
            self.commits.outgoing.push_front(outgoing);
            return Ok(false);
        }
        if mutation::on(Mutation::AcknowledgeBeforeMajority) {
            self.act(Action::AnswerTooEarly(outgoing.caller.clone(), tid.to_bytes().into()));
        }
        self.look_at_clock(behind);
        outgoing.blobs.keep();
        if let Some(committing) = self.storages.get_mut(&outgoing.storage) {
            committing.last_tid = tid;
        }
        Ok(true)
    }
}

impl FinishedTransaction {
    /// What comes next. A part that is not proposed is put back.
    fn next(&mut self) -> io::Result<Next> {
        let records = std::mem::replace(&mut self.records, Records::Rest(Bytes::new()));
        let (next, records) = match records {
            Records::Rest(rest) => (Next::Closes(rest.clone()), Records::Rest(rest)),
            Records::Part(part, coming) => (Next::Part(part), Records::Coming(coming)),
            Records::Coming(mut coming) => match coming.take()? {
                Some(Piece::Part(part)) => (Next::Part(part), Records::Coming(coming)),
                Some(Piece::Rest(rest)) => (Next::Closes(rest.clone()), Records::Rest(rest)),
                None => (Next::Waits, Records::Coming(coming)),
            },
            Records::Unreadable(error) => return Err(error),
        };
        self.records = records;
        Ok(next)
    }

    fn put_back(&mut self, part: Bytes) {
        self.records = match std::mem::replace(&mut self.records, Records::Rest(Bytes::new())) {
            Records::Coming(coming) => Records::Part(part, coming),
            other => other,
        };
    }
}

fn does_not_follow(tid: Tid, last: Tid) -> ClientError {
    ClientError::storage(format!(
        "a transaction with tid {tid} cannot be stored: the storage's last one is {last}"
    ))
}
