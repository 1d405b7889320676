//! What clients ask about the past: history, undo log, iteration. It may read the whole file, so it
//! runs on the blocking pool.

use std::collections::HashMap;
use std::ops::Range;

use base64::Engine as _;
use standby_filestorage::{
    Access, BlobDir, Reader, RecordData, Records, StorageError, StoredTransaction, TransactionMeta,
    Transactions, UndoError, Undone, may_be_blob,
};
use standby_types::time::seconds_of;
use standby_types::{BlobSource, Oid, Tid};
use standby_zeo::{ClientError, Content, DeferredWrite, HistoryCall, ResolvedWrite, Value};

use crate::cells::client_errors::read_failed;

/// Bytes that one answer about the undo log may take; an entry takes its texts and about so many.
const UNDO_LOG_MOST: usize = 256 << 20;
const UNDO_ENTRY: usize = 512;
/// Iterators that a client may have open at the same time.
const ITERATORS_MAX: usize = 10_000;

/// A client's iterators. Both kinds have their numbers from one counter.
#[derive(Default)]
pub(crate) struct Iterators {
    next: i64,
    open: HashMap<i64, Iterator>,
}

enum Iterator {
    Transactions(Box<Transactions>, Option<StoredTransaction>),
    Records(Records),
}

impl Iterators {
    fn add(&mut self, iterator: Iterator) -> Result<Value, ClientError> {
        if self.open.len() >= ITERATORS_MAX {
            return Err(ClientError::storage(format!(
                "a client may have {ITERATORS_MAX} iterators open at the same time"
            )));
        }
        let id = self.next;
        self.next += 1;
        self.open.insert(id, iterator);
        Ok(Value::Int(id))
    }

    fn find(&mut self, id: &Value) -> Result<(i64, &mut Iterator), ClientError> {
        let Value::Int(key) = id else { return Err(unknown(id.clone())) };
        self.open.get_mut(key).map(|found| (*key, found)).ok_or_else(|| unknown(id.clone()))
    }

    fn next_transaction(&mut self, id: Value) -> Result<Value, ClientError> {
        let (key, Iterator::Transactions(transactions, last)) = self.find(&id)? else {
            return Err(unknown(id));
        };
        let Some(next) = transactions.advance_past_undone().map_err(failed)? else {
            self.open.remove(&key);
            return Ok(Value::None);
        };
        let meta = next.meta.clone();
        *last = Some(next);
        Ok(Value::Tuple(vec![
            meta.tid.to_bytes().into(),
            Value::Str(char::from(meta.status).into()),
            meta.user.clone().into(),
            meta.description.clone().into(),
            Value::Dict(extension(&meta)),
        ]))
    }

    /// Begins to iterate over the records of the transaction that the iterator `id` gave last.
    fn start_records(
        &mut self,
        reader: &Reader,
        id: Value,
        tid: Tid,
    ) -> Result<Value, ClientError> {
        let records = match self.find(&id)? {
            (_, Iterator::Transactions(_, Some(last))) if last.meta.tid == tid => {
                reader.records(last)
            }
            (_, Iterator::Transactions(_, Some(_))) => {
                let text =
                    format!("Out-of-order request for record iterator for transaction {tid}");
                return Err(ClientError::Other("builtins.Exception", vec![Value::Str(text)]));
            }
            _ => return Err(unknown(id)),
        };
        self.add(Iterator::Records(records))
    }

    fn next_record(&mut self, id: Value) -> Result<Value, ClientError> {
        let (key, Iterator::Records(records)) = self.find(&id)? else {
            return Err(unknown(id));
        };
        let Some(record) = records.advance().map_err(failed)? else {
            self.open.remove(&key);
            return Ok(Value::None);
        };
        let (data, data_txn) = match record.data {
            RecordData::Data(data) => (Some(data), None),
            RecordData::Back(tid, data) => (data, Some(tid)),
            RecordData::Gone => (None, None),
        };
        Ok(Value::Tuple(vec![
            record.oid.to_bytes().into(),
            records.tid().to_bytes().into(),
            data.map_or(Value::None, Value::from),
            data_txn.map_or(Value::None, |tid| tid.to_bytes().into()),
        ]))
    }
}

/// There is no iterator with this id, or it is one of another kind.
fn unknown(id: Value) -> ClientError {
    ClientError::Other("builtins.KeyError", vec![id])
}

/// Answers a call that reads the history.
pub(crate) fn answer(
    reader: &Reader,
    iterators: &mut Iterators,
    call: HistoryCall,
) -> Result<Value, ClientError> {
    match call {
        HistoryCall::History(oid, size) => history(reader, oid, size),
        HistoryCall::RecordIternext(from) => record_iternext(reader, from),
        HistoryCall::UndoLog(range, specification) => {
            undo_log(reader, range, &specification, &|| true)
        }
        HistoryCall::IteratorStart(start, stop) => {
            let (start, stop) = (start.unwrap_or(Tid::NONE), stop.unwrap_or(Tid::MAX));
            if let Some(hole) = reader.holes().between(start, stop) {
                return Err(ClientError::storage(StorageError::Hole(hole).to_string()));
            }
            let transactions = reader.transactions(start, stop).map_err(failed)?;
            iterators.add(Iterator::Transactions(Box::new(transactions), None))
        }
        HistoryCall::IteratorNext(id) => iterators.next_transaction(id),
        HistoryCall::IteratorRecordStart(id, tid) => iterators.start_records(reader, id, tid),
        HistoryCall::IteratorRecordNext(id) => iterators.next_record(id),
        HistoryCall::IteratorGc(ids) => {
            for id in ids {
                if let Value::Int(id) = id {
                    iterators.open.remove(&id);
                }
            }
            Ok(Value::None)
        }
    }
}

/// The newest revisions of an object, as many as `size`.
fn history(reader: &Reader, oid: Oid, size: usize) -> Result<Value, ClientError> {
    let history = reader.history(oid, size).map_err(failed)?;
    let entries = history.into_iter().map(|revision| {
        let tid = revision.meta.tid;
        let mut entry = extension(&revision.meta);
        for (key, value) in [
            ("time", seconds(tid)),
            ("user_name", revision.meta.user.into()),
            ("description", revision.meta.description.into()),
            ("tid", tid.to_bytes().into()),
            ("size", Value::Int(revision.size as i64)),
        ] {
            set(&mut entry, Value::str(key), value);
        }
        Value::Dict(entry)
    });
    Ok(Value::List(entries.collect()))
}

/// The first object at or above `from`, and the oid of the next one.
fn record_iternext(reader: &Reader, from: Option<Oid>) -> Result<Value, ClientError> {
    let empty = |text| ClientError::Other("builtins.ValueError", vec![Value::str(text)]);
    let oid = reader
        .object_at_or_above(from.unwrap_or(Oid(0)))
        .ok_or_else(|| empty(if from.is_none() { "empty tree" } else { "no key" }))?;
    let found = reader.load_before(oid, Tid::MAX, Access::Blocking).map_err(failed)?;
    let found = found.ok_or_else(|| ClientError::PosKey(oid.to_bytes().into()))?;
    let next = Oid(oid.0.saturating_add(1));
    let next = reader.object_at_or_above(next).filter(|next| *next > oid);
    Ok(Value::Tuple(vec![
        oid.to_bytes().into(),
        found.serial.to_bytes().into(),
        found.data.into(),
        next.map_or(Value::None, |oid| oid.to_bytes().into()),
    ]))
}

/// The transactions with these indexes, newest first. Those that are packed end the log, and so
/// does a hole in the history. Answers `undoLog` and `undoInfo`, as long as `go_on` says that
/// somebody wants the answer.
pub(crate) fn undo_log(
    reader: &Reader,
    range: Range<usize>,
    specification: &[(Value, Value)],
    go_on: &dyn Fn() -> bool,
) -> Result<Value, ClientError> {
    let (mut entries, mut bytes) = (Vec::new(), 0);
    let mut backwards = reader.backwards();
    let mut index = 0;
    while index < range.end {
        let Some(transaction) = backwards.step().map_err(failed)? else { break };
        if !go_on() {
            return Err(ClientError::storage("nobody waits for the undo log any more"));
        }
        let meta = &transaction.meta;
        if reader.hole_of(meta.tid).is_some() {
            break;
        }
        match meta.status {
            b' ' => {}
            b'p' => break,
            _ => continue,
        }
        let id = base64::prelude::BASE64_STANDARD.encode(meta.tid.to_bytes());
        let mut entry = vec![
            (Value::str("id"), Value::Bytes(id.into_bytes().into())),
            (Value::str("time"), seconds(meta.tid)),
            (Value::str("user_name"), meta.user.clone().into()),
            (Value::str("size"), Value::Int(transaction.length() as i64)),
            (Value::str("description"), meta.description.clone().into()),
        ];
        for (key, value) in extension(meta) {
            set(&mut entry, key, value);
        }
        let has = |(key, wanted): &(Value, Value)| {
            let found = entry.iter().find(|(k, _)| k == key).map_or(&Value::None, |(_, v)| v);
            found == wanted || prefix_matches(wanted, found)
        };
        if specification.iter().all(has) {
            if range.contains(&index) {
                bytes +=
                    UNDO_ENTRY + meta.user.len() + meta.description.len() + meta.extension.len();
                if bytes > UNDO_LOG_MOST {
                    return Err(ClientError::storage(format!(
                        "the undo log is too long for one answer after {} transactions: ask for \
                        fewer",
                        entries.len()
                    )));
                }
                entries.push(Value::Dict(entry));
            }
            index += 1;
        }
    }
    Ok(Value::List(entries))
}

/// `ZopeUndo.Prefix.Prefix(path)` is equal to every text that begins with the path's elements; a
/// name after a blank in the last element does not count.
fn prefix_matches(wanted: &Value, found: &Value) -> bool {
    let Value::Object(object) = wanted else { return false };
    let is_prefix = |value: &Value| matches!(value, Value::Global { name, .. } if name == "Prefix");
    let named = is_prefix(&object.callable)
        || object.args.items().is_some_and(|args| args.first().is_some_and(is_prefix));
    let Some(Value::Dict(state)) = &object.state else { return false };
    let path = state.iter().find(|(key, _)| *key == Value::str("path"));
    let (true, Some((_, path)), Some(text)) = (named, path, found.as_bytes()) else { return false };
    let Some(path) = path.items() else { return false };
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut elements: Vec<&str> = text.split('/').collect();
    if let Some(last) = elements.last_mut()
        && let Some(blank) = last.rfind(' ')
    {
        *last = &last[..blank];
    }
    elements.len() >= path.len()
        && path.iter().zip(elements).all(|(wanted, element)| *wanted == Value::str(element))
}

/// The items that a transaction's extension adds.
fn extension(meta: &TransactionMeta) -> Vec<(Value, Value)> {
    // Data of the application: if it is no dict, there is nothing to add.
    match standby_zeo::decode_extension(&meta.extension) {
        Some(Value::Dict(items)) => items,
        _ => Vec::new(),
    }
}

fn set(entry: &mut Vec<(Value, Value)>, key: Value, value: Value) {
    match entry.iter_mut().find(|(k, _)| *k == key) {
        Some(item) => item.1 = value,
        None => entry.push((key, value)),
    }
}

fn seconds(tid: Tid) -> Value {
    Value::Float(seconds_of(tid))
}

fn failed(error: StorageError) -> ClientError {
    match error {
        StorageError::NoKey(oid) => ClientError::PosKey(oid.to_bytes().into()),
        error @ StorageError::Hole(_) => not_here(&error),
        error => read_failed(&error),
    }
}

/// A revision that may have been, but is not on this node.
pub(crate) fn not_here(error: &StorageError) -> ClientError {
    ClientError::Other("ZODB.POSException.POSKeyError", vec![Value::Str(error.to_string())])
}

/// The objects that undoing these transactions changes: their locks are needed. `check` refuses if
/// they are too many.
pub(crate) fn undo_objects(
    reader: &Reader,
    undos: &[Tid],
    check: impl Fn(usize) -> Result<(), ClientError>,
) -> Result<Vec<Oid>, ClientError> {
    let mut oids = Vec::new();
    for tid in undos {
        oids.extend(reader.undo_objects(*tid).map_err(undo_failed)?);
        check(oids.len())?;
    }
    Ok(oids)
}

/// Works out what can be known only when the locks are held; each result goes to `each`, which
/// returns false if nobody listens.
pub(crate) fn work_out(
    reader: &Reader,
    blobs: Option<&BlobDir>,
    later: Vec<DeferredWrite>,
    undone: &mut Undone,
    mut each: impl FnMut(ResolvedWrite) -> bool,
) -> Result<(), ClientError> {
    let gone = || ClientError::storage("the client has left");
    for task in later {
        match task {
            DeferredWrite::Undo(tid) => reader
                .undo(tid, undone, |oid, data| {
                    let blob = blob_brought_back(blobs, oid, &data).map_err(WorkError)?;
                    let out = ResolvedWrite { oid, content: content(data), undone: true, blob };
                    if each(out) { Ok(()) } else { Err(WorkError(gone())) }
                })
                .map_err(|WorkError(error)| error)?,
            DeferredWrite::Restore(oid, data, hint) => {
                let data = reader.restored(oid, data, hint).map_err(failed)?;
                let content = content(data);
                if !each(ResolvedWrite { oid, content, undone: false, blob: None }) {
                    return Err(gone());
                }
            }
        }
    }
    Ok(())
}

/// The blob that an undo gives back to an object, if the revision has one.
fn blob_brought_back(
    blobs: Option<&BlobDir>,
    oid: Oid,
    data: &RecordData,
) -> Result<Option<BlobSource>, ClientError> {
    match (blobs, data) {
        (Some(blobs), RecordData::Back(tid, Some(data))) if may_be_blob(data) => {
            let found = blobs.has(oid, *tid).map_err(failed)?;
            Ok(found.then_some(BlobSource::Copy(*tid)))
        }
        _ => Ok(None),
    }
}

struct WorkError(ClientError);

impl From<UndoError> for WorkError {
    fn from(error: UndoError) -> Self {
        WorkError(undo_failed(error))
    }
}

fn undo_failed(error: UndoError) -> ClientError {
    match error {
        UndoError::Unknown(_) => ClientError::Undo("Invalid transaction id".into()),
        UndoError::Packed(_) => ClientError::Undo("non-undoable transaction".into()),
        UndoError::Changed(objects) => ClientError::UndoConflicts(objects),
        UndoError::Storage(error @ StorageError::Hole(_)) => ClientError::Undo(error.to_string()),
        UndoError::Storage(error) => failed(error),
    }
}

/// A record's data as the session keeps them.
fn content(data: RecordData) -> Content {
    match data {
        RecordData::Data(data) => Content::Data(data),
        RecordData::Back(tid, data) => Content::Back(tid, data),
        RecordData::Gone => Content::Gone,
    }
}
