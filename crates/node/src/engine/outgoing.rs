//! Finished transactions on their way into the log: short ones at once, of long ones a part each in turn.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_consensus::{Command, Ending, PART_LEN};
use standby_filestorage::{Record, TransactionMeta, put_meta, put_record};
use standby_types::time::{new_tid, tid_at, time_of, utc};
use standby_types::{LogIndex, Mutation, Tid, mutation};
use standby_zeo::{Buffer, ClientError, Value};
use tracing::error;

use super::Engine;
use crate::applier::Origin;
use crate::look::record_data;
use crate::sessions::SessionHandle;

/// Bytes of entries of ours without a majority, beyond which long transactions wait.
const WINDOW: usize = 16 << 20;

/// A transaction on its way into the log.
pub(super) struct Outgoing {
    pub(super) session: Arc<SessionHandle>,
    id: Value,
    pub(super) storage: String,
    pub(super) buffer: Box<Buffer>,
    next_write: usize,
    records: BytesMut,
    parts: Vec<LogIndex>,
}

impl Engine {
    pub(super) fn finish(
        &mut self,
        session: Arc<SessionHandle>,
        storage: String,
        id: Value,
        buffer: Box<Buffer>,
    ) {
        let Some(committing) = self.storages.get_mut(&storage) else { return };
        if committing.transactions.finish(session.id).is_err() {
            let text = Value::str("finished called wo lock");
            let error = ClientError::Other("builtins.AssertionError", vec![text]);
            session.answer(session.encoding().error(&id, &error));
            return;
        }
        self.outgoing.push_back(Outgoing {
            session,
            id,
            storage,
            buffer,
            next_write: 0,
            records: BytesMut::new(),
            parts: Vec::new(),
        });
    }

    /// Moves finished transactions into the log: short ones at once, of long ones a part each
    /// in turn, as fast as they are committed.
    pub(super) fn pump(&mut self) -> anyhow::Result<()> {
        while self.in_flight < WINDOW {
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
            if let Err(error) = outgoing.fill() {
                error!(%error, "cannot read a large transaction back");
                outgoing.session.cut("its transaction cannot be read back");
                let now = self.shared.now();
                self.unlocked(&outgoing.storage, |t| t.applied(now, outgoing.session.id));
                continue;
            }
            let taken = if outgoing.records.len() > PART_LEN {
                let part = outgoing.records.split_to(PART_LEN).freeze();
                let proposed = self.propose(Command::Part(part.clone()), None)?;
                match proposed {
                    Some(index) => outgoing.parts.push(index),
                    None => {
                        let mut records = BytesMut::from(part);
                        records.extend_from_slice(&outgoing.records);
                        outgoing.records = records;
                    }
                }
                if outgoing.buffer.meta.tid.is_some() {
                    // Nothing may get a tid while it is on its way.
                    self.outgoing.push_front(outgoing);
                } else {
                    self.outgoing.push_back(outgoing);
                }
                proposed.is_some()
            } else {
                self.close(outgoing)?
            };
            if !taken {
                break;
            }
        }
        Ok(())
    }

    /// Why a transaction with this tid, or with one that it will get, cannot be stored. What is in the log must be
    /// applied by every node: a tid that no data file takes may not get there.
    pub(super) fn refuse_tid(&self, storage: &str, tid: Option<Tid>) -> Option<ClientError> {
        let last = self.storages.get(storage).map_or(Tid::NONE, |s| s.last_tid);
        let Some(tid) = tid else {
            return (last >= Tid::MAX).then(|| {
                ClientError::storage(format!(
                    "nothing more can be stored: the last transaction, {last}, has the highest tid that there can be"
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
                "a transaction with tid {tid} cannot be stored: it is in the future ({}), and every later transaction \
                 would be as well. At most {} s ahead of the primary's clock are allowed: \"future-tids\" in <standby>",
                utc(tid),
                ahead.as_secs()
            ))
        })
    }

    /// True if a transaction cannot have its tid any more; the client is told.
    fn overtaken(&mut self, outgoing: &Outgoing) -> bool {
        let Some(error) = self.refuse_tid(&outgoing.storage, outgoing.buffer.meta.tid) else {
            return false;
        };
        let session = &outgoing.session;
        session.answer(session.encoding().error(&outgoing.id, &error));
        let (now, id) = (self.shared.now(), session.id);
        self.unlocked(&outgoing.storage, |t| t.applied(now, id));
        true
    }

    /// Proposes the closing entry of a transaction; false if it has to be tried again.
    fn close(&mut self, mut outgoing: Outgoing) -> anyhow::Result<bool> {
        let wall_clock = self.time_of_commits();
        let Some(committing) = self.storages.get_mut(&outgoing.storage) else { return Ok(true) };
        let meta = &outgoing.buffer.meta;
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
            blobs: outgoing.buffer.blobs(),
            rest: Bytes::copy_from_slice(&outgoing.records),
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
        outgoing.buffer.keep_blobs();
        if let Some(committing) = self.storages.get_mut(&outgoing.storage) {
            committing.last_tid = tid;
        }
        Ok(true)
    }
}

impl Outgoing {
    /// Encodes records until there is more than a part, or no more.
    fn fill(&mut self) -> std::io::Result<()> {
        while self.records.len() <= PART_LEN
            && let Some(write) = self.buffer.writes().get(self.next_write)
        {
            let data = record_data(self.buffer.content(write)?);
            put_record(&Record { oid: write.oid, data }, &mut self.records);
            self.next_write += 1;
        }
        Ok(())
    }
}

fn does_not_follow(tid: Tid, last: Tid) -> ClientError {
    ClientError::storage(format!(
        "a transaction with tid {tid} cannot be stored: the storage's last one is {last}"
    ))
}
