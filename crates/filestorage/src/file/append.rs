//! Appending a transaction.

use bytes::{BufMut, BytesMut};
use standby_types::{File, Oid, Position, Tid};

use crate::StorageError;
use crate::file::format::{DataHeader, TXN_HEADER, TxnHeader, UNDONE};
use crate::file::mark::Mark;
use crate::file::open::FileStorage;
use crate::file::transaction::{Record, RecordData, Transaction, TransactionMeta};
use crate::index::Entry;

/// Up to here the objects of a transaction are put into the index one by one.
const MANY: usize = if cfg!(test) { 3 } else { 10_000 };
/// Up to here a transaction is written by one call.
const BUFFER: usize = 4 << 20;

/// A transaction while it is being written. Nobody sees it before [`Appender::finish`]; dropped
/// instead, it leaves bytes behind the file's end that the next one overwrites.
///
/// A transaction that does not fit the buffer is written with status `c` first, so that a reader
/// of the file after a crash takes it for what it is: a torn tail. One that stands in the file
/// already ([`crate::Extent::UpTo`]) is overwritten by what is there.
pub struct Appender<'a> {
    storage: &'a mut FileStorage,
    header: TxnHeader,
    start: Mark,
    /// Offset of the first byte of `buffer` in the file.
    flushed_to: u64,
    buffer: BytesMut,
    records: Vec<(Oid, Position)>,
    /// The records have no predecessors.
    packed: bool,
}

impl FileStorage {
    /// Appends a transaction; it is visible on return, and durable after [`FileStorage::sync`].
    pub fn append(&mut self, transaction: &Transaction) -> Result<Mark, StorageError> {
        let mut appender = self.begin(&transaction.meta)?;
        for record in &transaction.records {
            appender.record(record)?;
        }
        appender.finish()
    }

    /// Begins a transaction of which only current revisions are left: they have no predecessors.
    pub(crate) fn begin_packed(
        &mut self,
        meta: &TransactionMeta,
    ) -> Result<Appender<'_>, StorageError> {
        let mut appender = self.begin(meta)?;
        appender.packed = true;
        Ok(appender)
    }

    /// Begins a transaction, to which records are given one by one.
    pub fn begin(&mut self, meta: &TransactionMeta) -> Result<Appender<'_>, StorageError> {
        let start = self.mark();
        if meta.tid <= start.tid || meta.tid > Tid::MAX {
            return Err(StorageError::OutOfOrder {
                path: self.shared.path.clone(),
                last: start.tid,
                tid: meta.tid,
            });
        }
        let len = |name, bytes: &[u8]| {
            u16::try_from(bytes.len()).map_err(|_| StorageError::MetaTooLong(name))
        };
        if self.again.front().is_some_and(|again| again.tid != meta.tid) {
            self.forget_what_follows()?;
        }
        let header = TxnHeader {
            tid: meta.tid,
            length: 0,
            status: meta.status,
            user_len: len("user", &meta.user)?,
            description_len: len("description", &meta.description)?,
            extension_len: len("extension", &meta.extension)?,
        };
        let mut buffer = BytesMut::with_capacity(1024);
        buffer.put_slice(&header.to_bytes());
        buffer.put_slice(&meta.user);
        buffer.put_slice(&meta.description);
        buffer.put_slice(&meta.extension);
        let flushed_to = start.position.0;
        let records = Vec::new();
        Ok(Appender { storage: self, header, start, flushed_to, buffer, records, packed: false })
    }

    /// The file ends with the last transaction from now on.
    fn forget_what_follows(&mut self) -> Result<(), StorageError> {
        self.again.clear();
        let end = self.mark().position.0;
        self.shared.file.set_len(end).map_err(StorageError::io(&self.shared.path, "cut"))
    }
}

impl Appender<'_> {
    /// Adds a record. Records of one transaction that name the same object all follow the
    /// revision before the transaction; the last one is the current one.
    pub fn record(&mut self, record: &Record) -> Result<(), StorageError> {
        let shared = &self.storage.shared;
        let previous = shared.read().index.get(record.oid).filter(|_| !self.packed);
        let position = Position(self.flushed_to + self.buffer.len() as u64);
        let back = match &record.data {
            RecordData::Back(tid, _) => self.storage.reader().position_of(record.oid, *tid)?,
            RecordData::Data(_) | RecordData::Gone => None,
        };
        // The format cannot tell empty data from none; ZODB never stores empty data.
        let data = match &record.data {
            RecordData::Data(data) | RecordData::Back(_, Some(data)) if back.is_none() => &data[..],
            RecordData::Data(_) | RecordData::Back(..) | RecordData::Gone => &[],
        };
        let header = DataHeader {
            oid: record.oid,
            serial: self.header.tid,
            previous: previous.unwrap_or(Position(0)),
            transaction: self.start.position,
            version_len: 0,
            data_len: data.len() as u64,
        };
        self.buffer.put_slice(&header.to_bytes());
        if data.is_empty() {
            self.buffer.put_u64(back.unwrap_or(Position(0)).0);
        } else {
            self.buffer.put_slice(data);
        }
        self.records.push((record.oid, position));
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// Completes the transaction and makes it visible.
    pub fn finish(mut self) -> Result<Mark, StorageError> {
        let end_of_records = self.flushed_to + self.buffer.len() as u64;
        self.header.length = end_of_records - self.start.position.0;
        self.buffer.put_u64(self.header.length);
        let header = self.header.to_bytes();
        if self.flushed_to == self.start.position.0 {
            self.buffer[..TXN_HEADER as usize].copy_from_slice(&header);
            self.flush()?;
        } else {
            self.flush()?;
            self.write(&header, self.start.position.0)?;
        }
        let mark = Mark { position: Position(self.flushed_to), tid: self.header.tid };
        self.publish(mark);
        if self.storage.again.pop_front().is_some_and(|again| again != mark) {
            self.storage.forget_what_follows()?;
        }
        Ok(mark)
    }

    /// Readers see the transaction from now on. They wait for the lock, so it is held for a moment
    /// only, however many objects there are.
    fn publish(&mut self, mark: Mark) {
        let shared = &self.storage.shared;
        let mut records = std::mem::take(&mut self.records);
        if self.header.status == UNDONE {
            records.clear();
        }
        if records.len() <= MANY {
            let mut state = shared.write();
            for (oid, position) in records {
                state.index.insert(oid, position);
            }
            state.mark = mark;
            return;
        }
        // Of two records of one object the last one counts.
        records.sort_unstable();
        records.dedup_by(|next, kept| {
            next.0 == kept.0 && {
                *kept = *next;
                true
            }
        });
        // Only this writer changes what is there.
        let count = |some: &[Entry]| {
            let index = &shared.read().index;
            some.iter().filter(|(oid, _)| index.get(*oid).is_none()).count() as u64
        };
        let new = records.chunks(MANY).map(count).sum();
        let mut state = shared.write();
        state.index.insert_many(records, new);
        state.mark = mark;
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        if self.flushed_to == self.start.position.0 && self.header.length == 0 {
            // First part of a long transaction.
            let header = match self.storage.again.front() {
                Some(again) => {
                    let length = again.position.0.saturating_sub(self.start.position.0 + 8);
                    TxnHeader { length, ..self.header }
                }
                // A length beyond any file, and status 'c'.
                None => TxnHeader { status: b'c', length: u64::MAX >> 2, ..self.header },
            };
            self.buffer[..TXN_HEADER as usize].copy_from_slice(&header.to_bytes());
        }
        self.write(&self.buffer, self.flushed_to)?;
        self.flushed_to += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), StorageError> {
        let shared = &self.storage.shared;
        shared.file.write_at(bytes, at).map_err(StorageError::io(&shared.path, "write"))
    }
}
