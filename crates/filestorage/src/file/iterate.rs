//! Iterating over transactions: `iterator(start, stop)` of ZODB's storages.

use std::path::PathBuf;

use bytes::Bytes;
use standby_types::{Oid, Position, Tid};

use crate::StorageError;
use crate::file::format::{DATA_HEADER, REFERENCE_LIMIT};
use crate::file::mark::Mark;
use crate::file::open::transaction_before;
use crate::file::read::Reader;
use crate::file::scan::Window;
use crate::file::transaction::{Record, RecordData, TransactionMeta};

/// Transactions in order. What is committed after the iterator was made is not seen.
pub struct Transactions {
    path: PathBuf,
    reader: Reader,
    position: u64,
    end: u64,
    last: Tid,
    stop: Tid,
}

/// A transaction in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct StoredTransaction {
    pub meta: TransactionMeta,
    pub position: Position,
    pub(crate) records: u64,
    end: u64,
}

impl StoredTransaction {
    /// Its length in the file, without the repetition of it at the end.
    pub fn length(&self) -> u64 {
        self.end - 8 - self.position.0
    }

    /// Bytes that it takes beside its records.
    pub(crate) fn overhead(&self) -> u64 {
        self.records - self.position.0 + 8
    }

    /// The byte after it.
    pub fn end(&self) -> Position {
        Position(self.end)
    }
}

impl Reader {
    /// The transactions with `start <= tid <= stop`.
    pub fn transactions(&self, start: Tid, stop: Tid) -> Result<Transactions, StorageError> {
        let mark = self.mark();
        let path = self.shared.path.clone();
        let position = self.first_from(start, mark)?;
        let (end, last) = (mark.position.0, mark.tid);
        Ok(Transactions { path, reader: self.clone(), position, end, last, stop })
    }

    /// Where the first transaction at or above `tid` begins. Walks from the end: what is asked
    /// for is nearly always near it, and a file has no index by tid.
    fn first_from(&self, tid: Tid, mark: Mark) -> Result<u64, StorageError> {
        if tid == Tid::NONE {
            return Ok(Mark::START.position.0);
        }
        let mut window = Window::new(&self.shared.path, self.shared.file.clone());
        let mut position = mark.position;
        while position != Mark::START.position {
            let (start, found) = transaction_before(&mut window, position)?;
            if found < tid {
                break;
            }
            position = start;
        }
        Ok(position.0)
    }

    pub(crate) fn stored_at(
        &self,
        window: &mut Window<'_>,
        position: u64,
    ) -> Result<StoredTransaction, StorageError> {
        let header = window.txn_header(position)?;
        let end = header.and_then(|h| position.checked_add(h.length)?.checked_add(8));
        let (Some(header), Some(end)) = (header, end) else {
            return window.damaged(position, "a transaction is cut off");
        };
        let texts = header.full_len();
        let Some(bytes) = window.get(position, texts as usize)? else {
            return window.damaged(position, "a transaction is cut off");
        };
        let bytes = Bytes::copy_from_slice(&bytes[crate::file::format::TXN_HEADER as usize..]);
        let user = usize::from(header.user_len);
        let description = user + usize::from(header.description_len);
        let meta = TransactionMeta {
            tid: header.tid,
            status: header.status,
            user: bytes.slice(..user),
            description: bytes.slice(user..description),
            extension: bytes.slice(description..),
        };
        Ok(StoredTransaction { meta, position: Position(position), records: position + texts, end })
    }
}

impl Transactions {
    /// The last transaction of the file when the iteration began.
    pub fn last_tid(&self) -> Tid {
        self.last
    }

    /// Bytes of the file that are not iterated over yet.
    pub fn bytes_left(&self) -> u64 {
        self.end - self.position
    }

    /// The next transaction that counts.
    pub fn advance_past_undone(&mut self) -> Result<Option<StoredTransaction>, StorageError> {
        loop {
            match self.advance()? {
                Some(stored) if stored.meta.is_undone() => {}
                other => return Ok(other),
            }
        }
    }

    /// The next transaction.
    pub fn advance(&mut self) -> Result<Option<StoredTransaction>, StorageError> {
        if self.position >= self.end {
            return Ok(None);
        }
        let mut window = Window::new(&self.path, self.reader.shared.file.clone());
        let transaction = self.reader.stored_at(&mut window, self.position)?;
        if transaction.end > self.end
            || transaction.records > transaction.end - 8
            || window.number(transaction.end - 8)? != Some(transaction.end - 8 - self.position)
        {
            return window.damaged(self.position, "a transaction's length is wrong");
        }
        if transaction.meta.tid > self.stop {
            self.position = self.end;
            return Ok(None);
        }
        self.position = transaction.end;
        Ok(Some(transaction))
    }

    /// Gives each record of a transaction to `each`, one at a time in memory.
    pub fn records<E: From<StorageError>>(
        &self,
        transaction: &StoredTransaction,
        mut each: impl FnMut(Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut window = Window::new(&self.path, self.reader.shared.file.clone());
        let mut records = self.reader.records(transaction);
        while let Some(record) = records.advance_in(&mut window)? {
            each(record)?;
        }
        Ok(())
    }

    /// A CRC-32C of all that a transaction says: its tid, texts, oids and data. Whether data are
    /// stored or pointed to makes no difference.
    pub fn checksum(&self, transaction: &StoredTransaction) -> Result<u32, StorageError> {
        let meta = &transaction.meta;
        let mut sum = crc32c::crc32c(&meta.tid.to_bytes());
        let mut add = |bytes: &[u8]| {
            sum = crc32c::crc32c_append(sum, &(bytes.len() as u64).to_be_bytes());
            sum = crc32c::crc32c_append(sum, bytes);
        };
        [&meta.user, &meta.description, &meta.extension].into_iter().for_each(|text| add(text));
        self.records(transaction, |record| {
            add(&record.oid.to_bytes());
            match &record.data {
                RecordData::Data(data) | RecordData::Back(_, Some(data)) => add(data),
                RecordData::Back(_, None) | RecordData::Gone => add(b""),
            }
            Ok::<_, StorageError>(())
        })?;
        Ok(sum)
    }

    /// The records of a transaction that no other one, up to [`Transactions::last_tid`], replaces.
    pub fn newest_of(
        &self,
        transaction: &StoredTransaction,
    ) -> Result<Vec<Position>, StorageError> {
        let mut newest = Vec::new();
        if transaction.meta.is_undone() {
            return Ok(newest);
        }
        for (oid, position) in self.reader.records_of(transaction)? {
            if self.reader.is_newest(oid, position, Position(self.end))? {
                newest.push(position);
            }
        }
        Ok(newest)
    }

    /// The record at `position`, one of the transaction's.
    pub fn record_at(
        &self,
        transaction: &StoredTransaction,
        position: Position,
    ) -> Result<Record, StorageError> {
        let mut window = Window::new(&self.path, self.reader.shared.file.clone());
        Ok(next_record(&mut window, position.0, transaction.end - 8)?.0)
    }
}

/// The records of a transaction, in order.
pub struct Records {
    reader: Reader,
    tid: Tid,
    at: u64,
    end: u64,
}

impl Reader {
    /// The records of a transaction of this file.
    pub fn records(&self, transaction: &StoredTransaction) -> Records {
        let (at, end) = (transaction.records, transaction.end - 8);
        Records { reader: self.clone(), tid: transaction.meta.tid, at, end }
    }
}

impl Records {
    /// The transaction.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// The next record.
    pub fn advance(&mut self) -> Result<Option<Record>, StorageError> {
        let shared = self.reader.shared.clone();
        self.advance_in(&mut Window::new(&shared.path, shared.file.clone()))
    }

    fn advance_in(&mut self, window: &mut Window<'_>) -> Result<Option<Record>, StorageError> {
        if self.at >= self.end {
            return Ok(None);
        }
        let (record, len) = next_record(window, self.at, self.end)?;
        self.at += len;
        Ok(Some(record))
    }
}

/// The record at `at`, which must end by `end`, and its length in the file.
fn next_record(window: &mut Window<'_>, at: u64, end: u64) -> Result<(Record, u64), StorageError> {
    let header = match window.data_header(at)? {
        Some(header) if at.saturating_add(header.full_len()) <= end => header,
        _ => return window.damaged(at, "a data record is longer than its transaction"),
    };
    let data = if header.data_len > 0 {
        match window.get(at + DATA_HEADER, header.data_len as usize)? {
            Some(bytes) => RecordData::Data(Bytes::copy_from_slice(bytes)),
            None => return window.damaged(at, "a data record is longer than the file"),
        }
    } else {
        shared_data(window, at, header.oid)?
    };
    Ok((Record { oid: header.oid, data }, header.full_len()))
}

/// What the back pointer of the record at `at` means: the revision that it leads to, and the data
/// of the one that owns them.
pub(crate) fn shared_data(
    window: &mut Window<'_>,
    at: u64,
    oid: Oid,
) -> Result<RecordData, StorageError> {
    let (mut from, mut first) = (at, None);
    for _ in 0..REFERENCE_LIMIT {
        let back = match window.number(from + DATA_HEADER)? {
            Some(0) => {
                return Ok(first.map_or(RecordData::Gone, |tid| RecordData::Back(tid, None)));
            }
            Some(back) if back < from => back,
            _ => return window.damaged(from, "a back pointer leads nowhere"),
        };
        let Some(header) = window.data_header(back)? else {
            return window.damaged(from, "a back pointer leads nowhere");
        };
        if header.oid != oid {
            return window.damaged(from, "a back pointer leads to another object");
        }
        let tid = *first.get_or_insert(header.serial);
        if header.data_len > 0 {
            return match window.get(back + DATA_HEADER, header.data_len as usize)? {
                Some(bytes) => Ok(RecordData::Back(tid, Some(Bytes::copy_from_slice(bytes)))),
                None => window.damaged(back, "a data record is longer than the file"),
            };
        }
        from = back;
    }
    window.damaged(at, "too many back pointers")
}
