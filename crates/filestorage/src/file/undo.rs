//! Undoing a transaction: what an undo would write, without writing it. Source of the rules:
//! `FileStorage._txn_undo_write` and `_transactionalUndoRecord`.
//!
//! An object is given back its revision from before the transaction, by a back pointer, if its
//! current data are those that the transaction wrote. Otherwise the conflict would have to be
//! resolved, which needs the application's classes; here it fails.

use std::collections::HashMap;

use standby_types::{Oid, Position, Tid};

use crate::StorageError;
use crate::file::read::{Access, Reader};
use crate::file::transaction::RecordData;

/// What earlier undos of the same, still open transaction do: the revision that each object gets
/// back; position 0 if it will be gone.
pub type Undone = HashMap<Oid, Position>;

/// Why a transaction cannot be undone.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// There is no such transaction.
    #[error("there is no transaction {0}")]
    Unknown(Tid),
    /// It was packed, or is no ordinary transaction.
    #[error("transaction {0} cannot be undone: it is packed")]
    Packed(Tid),
    /// These objects have changed since; for each, the reason in ZODB's words.
    #[error("{} objects of the transaction have changed since", .0.len())]
    Changed(Vec<(Oid, &'static str)>),
    /// The file cannot be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

const MODIFIED: &str = "Some data were modified by a later transaction";
const ADDED: &str = "Can't undo an add transaction followed by conflicting transactions.";
const GONE: &str = "_loadBack() failed";

impl Reader {
    /// The objects of the transaction `tid`: those that undoing it changes.
    pub fn undo_objects(&self, tid: Tid) -> Result<Vec<Oid>, UndoError> {
        Ok(self.undoable(tid)?.into_iter().map(|(oid, _)| oid).collect())
    }

    /// Gives to `each` what undoing `tid` writes, object by object; adds it to `undone`. The
    /// objects must not change meanwhile: their locks are held.
    pub fn undo<E: From<UndoError>>(
        &self,
        tid: Tid,
        undone: &mut Undone,
        mut each: impl FnMut(Oid, RecordData) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut order = Vec::new();
        let mut results = HashMap::new();
        for (oid, position) in self.undoable(tid)? {
            let result = match self.undo_record(oid, position, undone) {
                Ok(back) => Ok(back),
                Err(UndoRecordError::Changed(reason)) => Err(reason),
                Err(UndoRecordError::Storage(error)) => return Err(UndoError::from(error).into()),
            };
            // Of two records of one object the last one counts.
            if results.insert(oid, result).is_none() {
                order.push(oid);
            }
        }
        let failed = |oid: &Oid| match results.get(oid) {
            Some(Err(reason)) => Some((*oid, *reason)),
            _ => None,
        };
        let failures: Vec<_> = order.iter().filter_map(failed).collect();
        if !failures.is_empty() {
            return Err(UndoError::Changed(failures).into());
        }
        for oid in order {
            let Some(Ok(back)) = results.get(&oid) else { continue };
            each(oid, self.revision_at(oid, *back).map_err(UndoError::from)?)?;
            undone.insert(oid, *back);
        }
        Ok(())
    }

    fn undoable(&self, tid: Tid) -> Result<Vec<(Oid, Position)>, UndoError> {
        if let Some(hole) = self.hole_of(tid) {
            return Err(StorageError::Hole(hole).into());
        }
        let transaction = self.transactions(tid, tid)?.advance()?;
        let transaction = transaction.ok_or(UndoError::Unknown(tid))?;
        if transaction.meta.status != b' ' {
            return Err(UndoError::Packed(tid));
        }
        Ok(self.records_of(&transaction)?)
    }

    /// The position of the revision that an object gets back.
    fn undo_record(
        &self,
        oid: Oid,
        position: Position,
        undone: &Undone,
    ) -> Result<Position, UndoRecordError> {
        let (record, _) = self.record(oid, position, Access::Blocking)?;
        let current = self.find(oid)?;
        let earlier = undone.get(&oid).copied();
        let mut same = true;
        if earlier.is_some() || current != position {
            // What the current revision's data are: those of the record at this position.
            let owner = match earlier {
                Some(back) => back,
                None => {
                    let (header, head) = self.record(oid, current, Access::Blocking)?;
                    match header.data_len {
                        0 => self.back_pointer(current, &head, Access::Blocking)?,
                        _ => current,
                    }
                }
            };
            if owner != position {
                let undoing = self.data_at(oid, position)?;
                same = self.data_at(oid, owner)? == undoing;
                if !same && record.previous == Position(0) {
                    return Err(UndoRecordError::Changed(ADDED));
                }
            }
        }
        if same { Ok(record.previous) } else { Err(UndoRecordError::Changed(MODIFIED)) }
    }

    fn data_at(&self, oid: Oid, position: Position) -> Result<bytes::Bytes, UndoRecordError> {
        if position == Position(0) {
            return Err(UndoRecordError::Changed(GONE));
        }
        let (header, head) = self.record(oid, position, Access::Blocking)?;
        match self.data(oid, position, &header, head, Access::Blocking) {
            Err(StorageError::NoKey(_)) => Err(UndoRecordError::Changed(GONE)),
            other => Ok(other?),
        }
    }

    /// The record at `position` as one that shares its data.
    fn revision_at(&self, oid: Oid, position: Position) -> Result<RecordData, StorageError> {
        if position == Position(0) {
            return Ok(RecordData::Gone);
        }
        let (header, head) = self.record(oid, position, Access::Blocking)?;
        match self.data(oid, position, &header, head, Access::Blocking) {
            Ok(data) => Ok(RecordData::Back(header.serial, Some(data))),
            Err(StorageError::NoKey(_)) => Ok(RecordData::Back(header.serial, None)),
            Err(error) => Err(error),
        }
    }

    /// What `restore` writes: a back pointer if the object's revision `hint` has the same data.
    pub fn restored(
        &self,
        oid: Oid,
        data: Option<bytes::Bytes>,
        hint: Option<Tid>,
    ) -> Result<RecordData, StorageError> {
        let hinted = match hint {
            Some(tid) => self.position_of(oid, tid)?.map(|at| self.revision_at(oid, at)),
            None => None,
        };
        Ok(match (hinted.transpose()?, data) {
            (Some(RecordData::Back(tid, there)), data) if there == data => {
                RecordData::Back(tid, data)
            }
            (_, Some(data)) => RecordData::Data(data),
            (_, None) => RecordData::Gone,
        })
    }
}

enum UndoRecordError {
    Changed(&'static str),
    Storage(StorageError),
}

impl From<StorageError> for UndoRecordError {
    fn from(error: StorageError) -> Self {
        UndoRecordError::Storage(error)
    }
}
