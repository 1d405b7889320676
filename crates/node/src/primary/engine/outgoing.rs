//! Finished transactions on their way into the log: short ones at once, of long ones a part each in
//! turn.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_consensus::{Command, Ending, PART_LEN};
use standby_filestorage::{Record, RecordData, TransactionMeta, put_meta, put_record};
use standby_types::time::{new_tid, tid_at, time_of, utc};
use standby_types::{LogIndex, Mutation, Tid, mutation};
use standby_zeo::{Blobs, Buffer, ClientError, Content, Meta, Value};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tracing::error;

use crate::cells::apply_task::Origin;
use crate::cells::events::{MANY, TaskReport};
use crate::cells::sessions::SessionHandle;
use crate::platform;
use crate::primary::engine::Engine;

/// Bytes of entries of ours without a majority, beyond which nothing more is proposed.
const WINDOW: usize = 16 << 20;
/// Parts of long transactions without a majority, each a megabyte. What others commit, and answers
/// to heartbeats, come behind them on every link.
const PARTS_IN_FLIGHT: usize = 4;
/// Parts of a long transaction that are at hand.
const AT_HAND: usize = 2;

/// A transaction on its way into the log.
pub(super) struct Outgoing {
    pub(super) session: Arc<SessionHandle>,
    id: Value,
    pub(super) storage: String,
    meta: Meta,
    pub(super) blobs: Blobs,
    records: Records,
    parts: Vec<LogIndex>,
}

/// The records of a transaction, as they go into the log.
enum Records {
    /// All that are not in the log yet.
    Rest(Bytes),
    /// They are encoded beside the engine's task, and come piece by piece.
    Coming(mpsc::Receiver<io::Result<Piece>>),
    /// This part comes next.
    Part(Bytes, mpsc::Receiver<io::Result<Piece>>),
}

enum Piece {
    Part(Bytes),
    /// The last one, no longer than a part.
    Rest(Bytes),
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

impl Engine {
    pub(super) fn finish(
        &mut self,
        session: Arc<SessionHandle>,
        storage: String,
        id: Value,
        mut buffer: Box<Buffer>,
    ) {
        let Some(committing) = self.storages.get_mut(&storage) else { return };
        if committing.transactions.finish(session.id).is_err() {
            let text = Value::str("finished called wo lock");
            let error = ClientError::Other("builtins.AssertionError", vec![text]);
            session.answer(session.encoding().error(&id, &error));
            return;
        }
        let (meta, blobs) = (buffer.meta.clone(), buffer.take_blobs());
        // Of one with few objects all fits the closing entry, as a rule.
        let rest = match buffer.writes().len() <= MANY {
            true => encode(&buffer, &mut |_| false),
            false => Ok(None),
        };
        let records = match rest {
            Ok(Some(rest)) => Records::Rest(rest),
            Ok(None) => Records::Coming(self.encode_beside(buffer)),
            Err(error) => return self.unreadable(&session, &storage, &error),
        };
        let parts = Vec::new();
        self.outgoing.push_back(Outgoing { session, id, storage, meta, blobs, records, parts });
    }

    /// Encodes a long transaction, a few parts ahead of what is proposed.
    fn encode_beside(&self, buffer: Box<Buffer>) -> mpsc::Receiver<io::Result<Piece>> {
        let (pieces, coming) = platform::queue(AT_HAND);
        let shared = self.shared.clone();
        // It ends at the latest when nobody takes its pieces any more.
        drop(platform::spawn_blocking(move || {
            let send = |piece| {
                let taken = platform::send_blocking(&pieces, piece).is_ok();
                shared.report(TaskReport::Encoded);
                taken
            };
            match encode(&buffer, &mut |part| send(Ok(Piece::Part(part)))) {
                Ok(Some(rest)) => drop(send(Ok(Piece::Rest(rest)))),
                // Nobody takes them.
                Ok(None) => {}
                Err(error) => drop(send(Err(error))),
            }
        }));
        coming
    }

    /// What a client has stored is not there any more.
    fn unreadable(&mut self, session: &SessionHandle, storage: &str, error: &io::Error) {
        error!(%error, "cannot read a large transaction back");
        session.cut("its transaction cannot be read back");
        let (now, id) = (self.shared.now(), session.id);
        self.unlocked(storage, |t| t.applied(now, id));
    }

    /// Moves finished transactions into the log: short ones at once, of long ones a part each
    /// in turn, as fast as they are committed.
    pub(super) fn pump(&mut self) -> anyhow::Result<()> {
        // How many have had their turn since something was proposed.
        let mut passed = 0;
        while self.in_flight < WINDOW && passed < self.outgoing.len() {
            let Some(mut outgoing) = self.outgoing.pop_front() else { break };
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
                            self.outgoing.push_front(outgoing);
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
                    self.unreadable(&outgoing.session, &outgoing.storage, &error);
                    continue;
                }
            }
            if goes_first {
                self.outgoing.push_front(outgoing);
                if passed > 0 {
                    break;
                }
            } else {
                self.outgoing.push_back(outgoing);
            }
        }
        Ok(())
    }

    /// Parts of this transaction, and of the others that are on their way, that are not committed
    /// yet.
    fn parts_in_flight(&self, one: &Outgoing) -> usize {
        // Entries are committed in order.
        let of = |outgoing: &Outgoing| {
            let parts = outgoing.parts.iter().rev();
            parts.take_while(|index| self.pending.contains_key(index)).count()
        };
        self.outgoing.iter().chain([one]).map(of).sum()
    }

    /// Why a transaction with this tid, or with one that it will get, cannot be stored. What is in
    /// the log must be applied by every node: a tid that no data file takes may not get there.
    pub(super) fn refuse_tid(&self, storage: &str, tid: Option<Tid>) -> Option<ClientError> {
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
        let ahead = self.shared.config.future_tids();
        let bound = tid_at(self.shared.wall_clock().saturating_add(ahead)).min(Tid(Tid::MAX.0 - 1));
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
    fn overtaken(&mut self, outgoing: &Outgoing) -> bool {
        let Some(error) = self.refuse_tid(&outgoing.storage, outgoing.meta.tid) else {
            return false;
        };
        let session = &outgoing.session;
        session.answer(session.encoding().error(&outgoing.id, &error));
        let (now, id) = (self.shared.now(), session.id);
        self.unlocked(&outgoing.storage, |t| t.applied(now, id));
        true
    }

    /// Proposes the closing entry of a transaction; false if it has to be tried again.
    fn close(&mut self, outgoing: Outgoing, rest: Bytes) -> anyhow::Result<bool> {
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
        let ending = Ending {
            storage: outgoing.storage.clone(),
            head: head.freeze(),
            parts: outgoing.parts.clone(),
            blobs: outgoing.blobs.all.clone(),
            rest,
        };
        let origin = Origin { session: outgoing.session.clone(), id: outgoing.id.clone() };
        if self.propose(Command::Transaction(ending), Some(origin))?.is_none() {
            self.outgoing.push_front(outgoing);
            return Ok(false);
        }
        if mutation::on(Mutation::AcknowledgeBeforeMajority) {
            let session = &outgoing.session;
            let tid = tid.to_bytes().into();
            session.outbox.push(session.encoding().reply(&outgoing.id, tid));
        }
        self.look_at_clock(behind);
        outgoing.blobs.keep();
        if let Some(committing) = self.storages.get_mut(&outgoing.storage) {
            committing.last_tid = tid;
        }
        Ok(true)
    }
}

impl Outgoing {
    /// What comes next. A part that is not proposed is put back.
    fn next(&mut self) -> io::Result<Next> {
        let records = std::mem::replace(&mut self.records, Records::Rest(Bytes::new()));
        let (next, records) = match records {
            Records::Rest(rest) => (Next::Closes(rest.clone()), Records::Rest(rest)),
            Records::Part(part, coming) => (Next::Part(part), Records::Coming(coming)),
            Records::Coming(mut coming) => match coming.try_recv() {
                Ok(Ok(Piece::Part(part))) => (Next::Part(part), Records::Coming(coming)),
                Ok(Ok(Piece::Rest(rest))) => (Next::Closes(rest.clone()), Records::Rest(rest)),
                Ok(Err(error)) => return Err(error),
                Err(TryRecvError::Empty) => (Next::Waits, Records::Coming(coming)),
                Err(TryRecvError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
            },
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

/// Encodes the changes of a transaction: gives parts to `each`, and returns what is left, which is
/// no longer than a part; `None` if `each` takes no more.
fn encode(buffer: &Buffer, each: &mut dyn FnMut(Bytes) -> bool) -> io::Result<Option<Bytes>> {
    let mut records = BytesMut::new();
    for write in buffer.writes() {
        let data = record_data(buffer.content(write)?);
        put_record(&Record { oid: write.oid, data }, &mut records);
        while records.len() > PART_LEN {
            if !each(records.split_to(PART_LEN).freeze()) {
                return Ok(None);
            }
        }
    }
    Ok(Some(records.freeze()))
}

fn does_not_follow(tid: Tid, last: Tid) -> ClientError {
    ClientError::storage(format!(
        "a transaction with tid {tid} cannot be stored: the storage's last one is {last}"
    ))
}

/// What the session kept, as it goes into the log.
fn record_data(content: Content) -> RecordData {
    match content {
        Content::Data(data) => RecordData::Data(data),
        Content::Back(tid, data) => RecordData::Back(tid, data),
        Content::Gone => RecordData::Gone,
    }
}
