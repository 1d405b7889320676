//! Looking back: the revisions of an object, and the transactions from the newest on. Source of
//! the rules: `FileStorage.history` and `UndoSearch` in `ZODB/FileStorage/FileStorage.py`.
//!
//! Everything here may wait for the device.

use standby_types::{Oid, Position, Tid};

use crate::StorageError;
use crate::file::format::DATA_HEADER;
use crate::file::iterate::StoredTransaction;
use crate::file::mark::Mark;
use crate::file::open::transaction_before;
use crate::file::read::{Access, Reader};
use crate::file::scan::Window;
use crate::file::transaction::TransactionMeta;

/// A revision in an object's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastRevision {
    /// The transaction that wrote it.
    pub meta: TransactionMeta,
    /// Bytes of the record's own data: 0 if it shares another's.
    pub size: u64,
}

/// Transactions, newest first. What is committed after it was made is not seen.
pub struct Backwards {
    reader: Reader,
    position: Position,
}

impl Reader {
    /// The newest `size` revisions of `oid`, newest first; [`StorageError::NoKey`] if it never was,
    /// [`StorageError::Hole`] if some of them may be missing.
    pub fn history(&self, oid: Oid, size: usize) -> Result<Vec<PastRevision>, StorageError> {
        let mut window = Window::new(&self.shared.path, self.shared.file.clone());
        let mut position = self.find(oid)?;
        let mut found = Vec::new();
        while found.len() < size {
            let (header, _) = self.record(oid, position, Access::Blocking)?;
            let transaction = self.stored_at(&mut window, header.transaction.0)?;
            found.push(PastRevision { meta: transaction.meta, size: header.data_len });
            if found.len() < size
                && let Some(hole) = self.hole_of(header.serial)
            {
                return Err(StorageError::Hole(hole));
            }
            match header.previous {
                Position(0) => break,
                previous if previous >= position => {
                    return self.damaged(position, "a record's predecessor comes after it");
                }
                previous => position = previous,
            }
        }
        Ok(found)
    }

    /// The transactions, newest first.
    pub fn backwards(&self) -> Backwards {
        Backwards { reader: self.clone(), position: self.mark().position }
    }

    /// The newest transactions, newest first, with the oids of each, until `enough` says so: it
    /// gets the tid of the next one and the number of objects so far. Packed ones are not among
    /// them, for what they changed is not all in the file any more.
    pub fn newest_oids(
        &self,
        mut enough: impl FnMut(Tid, usize) -> bool,
    ) -> Result<Vec<(Tid, Vec<Oid>)>, StorageError> {
        let mut backwards = self.backwards();
        let (mut found, mut objects) = (Vec::new(), 0);
        while let Some(transaction) = backwards.step()? {
            let tid = transaction.meta.tid;
            if transaction.meta.status == b'p' || enough(tid, objects) {
                break;
            }
            let records = self.records_of(&transaction)?;
            objects += records.len();
            found.push((tid, records.into_iter().map(|(oid, _)| oid).collect()));
        }
        Ok(found)
    }

    /// The objects of a transaction, and where their records are, in order.
    pub fn records_of(
        &self,
        transaction: &StoredTransaction,
    ) -> Result<Vec<(Oid, Position)>, StorageError> {
        let mut window = Window::new(&self.shared.path, self.shared.file.clone());
        let mut records = Vec::new();
        let (mut at, end) = (transaction.records, transaction.end().0 - 8);
        while at < end {
            match window.data_header(at)? {
                Some(header) if at.saturating_add(DATA_HEADER) <= end => {
                    records.push((header.oid, Position(at)));
                    at = at.saturating_add(header.full_len());
                }
                _ => return window.damaged(at, "a data record is cut off"),
            }
        }
        Ok(records)
    }
}

impl Backwards {
    /// The next older transaction; `None` after the oldest.
    pub fn step(&mut self) -> Result<Option<StoredTransaction>, StorageError> {
        if self.position == Mark::START.position {
            return Ok(None);
        }
        let shared = &self.reader.shared;
        let mut window = Window::new(&shared.path, shared.file.clone());
        let (start, _) = transaction_before(&mut window, self.position)?;
        self.position = start;
        self.reader.stored_at(&mut window, start.0).map(Some)
    }
}
