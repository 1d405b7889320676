//! Walking over a file from transaction to transaction, with bounded memory.
//!
//! A scan ends in one of three ways: at the end of the file; at a *torn tail*, which is what an
//! interrupted write leaves and may be cut off; or at *damage*, which is everything else and must
//! not be touched. Python's FileStorage calls both a torn tail and cuts.

use std::path::Path;
use std::sync::Arc;

use standby_types::disk::read_full;
use standby_types::{File, Position, Tid};

use crate::StorageError;
use crate::file::format::{DATA_HEADER, DataHeader, TXN_HEADER, TxnHeader, UNDONE, number};
use crate::file::mark::Mark;

const WINDOW_MIN: usize = 4 << 10;
const WINDOW_MAX: usize = 1 << 20;

/// A window over a file. It widens while reading is sequential, and is small after a jump.
pub(crate) struct Window<'a> {
    pub path: &'a Path,
    pub file: Arc<dyn File>,
    start: u64,
    bytes: Vec<u8>,
    width: usize,
}

impl<'a> Window<'a> {
    pub fn new(path: &'a Path, file: Arc<dyn File>) -> Self {
        Window { path, file, start: 0, bytes: Vec::new(), width: WINDOW_MIN }
    }

    /// The bytes at `position`, `None` if the file ends before `len` of them.
    pub fn get(&mut self, position: u64, len: usize) -> Result<Option<&[u8]>, StorageError> {
        let window_end = self.start + self.bytes.len() as u64;
        let inside = position >= self.start && position + len as u64 <= window_end;
        if !inside {
            if len > WINDOW_MAX {
                // A length that a damaged file claims must not be taken at its word.
                let end =
                    self.file.len().map_err(StorageError::io(self.path, "read the length of"))?;
                if position.checked_add(len as u64).is_none_or(|wanted| wanted > end) {
                    return Ok(None);
                }
            }
            let sequential = position >= self.start && position <= window_end;
            self.width = if sequential { WINDOW_MAX.min(self.width * 2) } else { WINDOW_MIN };
            self.bytes.resize(self.width.max(len), 0);
            let n = read_full(&*self.file, &mut self.bytes, position)
                .map_err(StorageError::io(self.path, "read"))?;
            self.bytes.truncate(n);
            self.start = position;
            if n < len {
                return Ok(None);
            }
        }
        let at = (position - self.start) as usize;
        Ok(Some(&self.bytes[at..at + len]))
    }

    fn array<const N: usize>(&mut self, position: u64) -> Result<Option<[u8; N]>, StorageError> {
        Ok(self.get(position, N)?.and_then(|bytes| bytes.try_into().ok()))
    }

    pub fn number(&mut self, position: u64) -> Result<Option<u64>, StorageError> {
        Ok(self.get(position, 8)?.map(|bytes| number(bytes, 0)))
    }

    pub fn txn_header(&mut self, position: u64) -> Result<Option<TxnHeader>, StorageError> {
        Ok(self.array(position)?.as_ref().map(TxnHeader::parse))
    }

    pub fn data_header(&mut self, position: u64) -> Result<Option<DataHeader>, StorageError> {
        Ok(self.array(position)?.as_ref().map(DataHeader::parse))
    }

    pub fn damaged<T>(&self, position: u64, reason: impl Into<String>) -> Result<T, StorageError> {
        Err(StorageError::Damaged {
            path: self.path.to_owned(),
            position: Position(position),
            reason: reason.into(),
        })
    }
}

/// What the next step of a scan found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Transaction { header: TxnHeader, position: Position, end: Position },
    End,
    TornTail,
}

pub(crate) struct Scanner<'a> {
    window: Window<'a>,
    /// Where the next transaction begins.
    pub position: Position,
    pub last_tid: Tid,
    /// The scan does not look beyond this.
    limit: u64,
    /// Tids need not grow.
    any_order: bool,
}

impl<'a> Scanner<'a> {
    /// Scans from `position`, the end of the transaction `last_tid`, up to `limit`.
    pub fn new(
        path: &'a Path,
        file: Arc<dyn File>,
        position: Position,
        last_tid: Tid,
        limit: u64,
    ) -> Self {
        Scanner { window: Window::new(path, file), position, last_tid, limit, any_order: false }
    }

    /// Scans a whole file; its tids need not grow.
    pub fn in_any_order(path: &'a Path, file: Arc<dyn File>, limit: u64) -> Self {
        let mut scanner = Scanner::new(path, file, Mark::START.position, Tid::NONE, limit);
        scanner.any_order = true;
        scanner
    }

    /// Steps over one transaction; `visit` sees its records, and nothing of a torn tail or of one
    /// that was undone.
    pub fn next(
        &mut self,
        visit: &mut dyn FnMut(&DataHeader, Position),
    ) -> Result<Found, StorageError> {
        let start = self.position.0;
        if start == self.limit {
            return Ok(Found::End);
        }
        if self.limit - start < TXN_HEADER {
            return Ok(Found::TornTail);
        }
        let Some(header) = self.window.txn_header(start)? else {
            return Ok(Found::TornTail);
        };
        let end = start.checked_add(header.length).and_then(|e| e.checked_add(8));
        let Some(end) = end.filter(|end| *end <= self.limit) else {
            return self.torn_or_damaged(start, &header);
        };
        if header.status == b'c' && end == self.limit {
            return Ok(Found::TornTail);
        }
        let grows = header.tid > self.last_tid;
        if !grows && self.only_zeros(start)? {
            return Ok(Found::TornTail);
        }
        if !grows && !self.any_order {
            return match self.own_records(start, &header, end) {
                Ok(()) => Err(StorageError::TimeWentBack {
                    path: self.window.path.to_owned(),
                    position: Position(start),
                    last: self.last_tid,
                    tid: header.tid,
                }),
                Err(StorageError::Damaged { .. }) => self.does_not_follow(start, &header),
                Err(error) => Err(error),
            };
        }
        if self.any_order {
            self.own_records(start, &header, end)?;
        }
        self.records(start, &header, end, visit)?;
        self.position = Position(end);
        self.last_tid = header.tid;
        Ok(Found::Transaction { header, position: Position(start), end: Position(end) })
    }

    fn does_not_follow<T>(&self, start: u64, header: &TxnHeader) -> Result<T, StorageError> {
        let reason = format!("transaction {} does not follow {}", header.tid, self.last_tid);
        self.window.damaged(start, reason)
    }

    /// Checks a transaction whose tid nothing else confirms: its records must have it too.
    fn own_records(
        &mut self,
        start: u64,
        header: &TxnHeader,
        end: u64,
    ) -> Result<(), StorageError> {
        let mut other = None;
        self.records(start, header, end, &mut |record, position| {
            if record.serial != header.tid {
                other.get_or_insert(position);
            }
        })?;
        match other {
            Some(record) => self.window.damaged(record.0 + 8, "the record of another transaction"),
            None => Ok(()),
        }
    }

    /// Checks the transaction from `start` to `end`, except for its tid; `visit` sees its records
    /// if it was not undone.
    fn records(
        &mut self,
        start: u64,
        header: &TxnHeader,
        end: u64,
        visit: &mut dyn FnMut(&DataHeader, Position),
    ) -> Result<(), StorageError> {
        if !matches!(header.status, b' ' | b'p' | b'u') {
            let status = char::from(header.status);
            return self
                .window
                .damaged(start + 16, format!("unknown transaction status {status:?}"));
        }
        if header.length < header.full_len() {
            return self.window.damaged(start + 8, "transaction shorter than its own header");
        }
        // ChecksummedFile first, so that `visit` never sees records of a transaction that is then
        // refused.
        if self.window.number(end - 8)? != Some(header.length) {
            return self.window.damaged(
                end - 8,
                "the length after the transaction differs from the one before it",
            );
        }
        let mut at = start + header.full_len();
        while at < end - 8 {
            let record = match self.window.data_header(at)? {
                Some(record) if at.saturating_add(record.full_len()) <= end - 8 => record,
                _ => {
                    return self.window.damaged(at, "data record longer than its transaction");
                }
            };
            if let Err(reason) = plausible(&record, start) {
                return self.window.damaged(at, reason);
            }
            if header.status != UNDONE {
                visit(&record, Position(at));
            }
            at += record.full_len();
        }
        Ok(())
    }

    /// The transaction at `start` claims to reach beyond the file. An interrupted write leaves a
    /// tid that follows and records that are right as far as they go; anything else is damage.
    fn torn_or_damaged(&mut self, start: u64, header: &TxnHeader) -> Result<Found, StorageError> {
        if self.only_zeros(start)? {
            return Ok(Found::TornTail);
        }
        if header.tid <= self.last_tid && !self.any_order || header.tid > Tid::MAX {
            return self.does_not_follow(start, header);
        }
        if !matches!(header.status, b' ' | b'p' | b'u' | b'c') {
            return self.window.damaged(start + 16, "unknown transaction status");
        }
        let mut at = start + header.full_len();
        while at.saturating_add(DATA_HEADER) <= self.limit {
            let Some(record) = self.window.data_header(at)? else {
                break;
            };
            if let Err(reason) = plausible(&record, start) {
                if self.only_zeros(at)? {
                    break;
                }
                let reason =
                    format!("transaction reaches beyond the end of the file, and {reason}");
                return self.window.damaged(at, reason);
            }
            at = at.saturating_add(record.full_len());
        }
        Ok(Found::TornTail)
    }

    /// True if there is nothing but zeros from `from` on, as a file system may leave a write that
    /// was cut off by a power failure.
    fn only_zeros(&mut self, from: u64) -> Result<bool, StorageError> {
        let mut at = from;
        while at < self.limit {
            let n = (self.limit - at).min(WINDOW_MAX as u64) as usize;
            match self.window.get(at, n)? {
                Some(bytes) if bytes.iter().all(|b| *b == 0) => at += n as u64,
                Some(_) => return Ok(false),
                None => break,
            }
        }
        Ok(true)
    }
}

fn plausible(record: &DataHeader, transaction: u64) -> Result<(), String> {
    if record.transaction.0 != transaction {
        return Err(format!(
            "a data record says that its transaction is at {} instead of {transaction}",
            record.transaction
        ));
    }
    if record.version_len != 0 {
        return Err("a data record belongs to a version; pack the file with ZODB 3.8 first".into());
    }
    if record.previous.0 >= transaction {
        return Err(format!("a data record's predecessor is at {}, after it", record.previous));
    }
    Ok(())
}
