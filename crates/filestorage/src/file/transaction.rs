//! A transaction as it travels: in the replicated log and from node to node.
//!
//! It names revisions by tid, never by position, so it means the same in every node's file.
//!
//! ```text
//! meta     tid 8 · status 1 · user, description, extension: length 2, bytes
//! record   oid 8 · kind 1 · for kind 'd': length 8, data
//!                           for kind 'b': tid 8 of the revision whose data it shares, length 8, data
//!                           for kind 'B': tid 8 of the revision that it is equal to, which is gone
//!                           for kind 'g': nothing; the object is gone
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use standby_types::{Oid, Tid};

use crate::file::format::UNDONE;

/// What a transaction says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionMeta {
    /// Its tid.
    pub tid: Tid,
    /// `b' '`; `b'p'` for one that was packed; `b'u'` for one that was undone in place, see
    /// [`TransactionMeta::is_undone`].
    pub status: u8,
    /// At most 65 535 bytes, as the next two.
    pub user: Bytes,
    /// What was done.
    pub description: Bytes,
    /// A pickled dict, or nothing.
    pub extension: Bytes,
}

impl TransactionMeta {
    /// An ordinary transaction that says nothing of itself.
    pub fn new(tid: Tid) -> TransactionMeta {
        let (user, description, extension) = Default::default();
        TransactionMeta { tid, status: b' ', user, description, extension }
    }

    /// True if FileStorage, before ZODB 3.3, undid it in place: it counts as if it had never been.
    pub fn is_undone(&self) -> bool {
        self.status == UNDONE
    }
}

/// An object's new revision.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Record {
    pub oid: Oid,
    pub data: RecordData,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordData {
    /// Data of its own.
    Data(Bytes),
    /// The same as an earlier revision of the object (after an undo): its tid, and its data, or
    /// `None` if the object was gone then. The data travel along for a node that has packed
    /// that revision away; all others write a back pointer.
    Back(Tid, Option<Bytes>),
    /// None: the object was deleted, or its creation undone.
    Gone,
}

/// A whole transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Its head.
    pub meta: TransactionMeta,
    /// Its records, in order.
    pub records: Vec<Record>,
}

/// The bytes do not follow the layout above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed transaction")]
pub struct DecodeError;

/// Appends `meta` to `out`; fields longer than 65 535 bytes must have been refused before.
pub fn put_meta(meta: &TransactionMeta, out: &mut BytesMut) {
    out.put_u64(meta.tid.0);
    out.put_u8(meta.status);
    for field in [&meta.user, &meta.description, &meta.extension] {
        let len = u16::try_from(field.len()).unwrap_or(u16::MAX);
        out.put_u16(len);
        out.put_slice(&field[..usize::from(len)]);
    }
}

/// Takes what [`put_meta`] wrote from the front of `bytes`.
pub fn take_meta(bytes: &mut Bytes) -> Result<TransactionMeta, DecodeError> {
    let tid = Tid(bytes.try_get_u64().map_err(|_| DecodeError)?);
    let status = bytes.try_get_u8().map_err(|_| DecodeError)?;
    let mut field = || {
        let len = usize::from(bytes.try_get_u16().map_err(|_| DecodeError)?);
        take(bytes, len)
    };
    Ok(TransactionMeta { tid, status, user: field()?, description: field()?, extension: field()? })
}

/// Appends `record` to `out`.
pub fn put_record(record: &Record, out: &mut BytesMut) {
    out.put_u64(record.oid.0);
    match &record.data {
        RecordData::Data(data) => {
            out.put_u8(b'd');
            out.put_u64(data.len() as u64);
            out.put_slice(data);
        }
        RecordData::Back(tid, Some(data)) => {
            out.put_u8(b'b');
            out.put_u64(tid.0);
            out.put_u64(data.len() as u64);
            out.put_slice(data);
        }
        RecordData::Back(tid, None) => {
            out.put_u8(b'B');
            out.put_u64(tid.0);
        }
        RecordData::Gone => out.put_u8(b'g'),
    }
}

/// Takes what [`put_record`] wrote from the front of `bytes`; shares their memory.
pub fn take_record(bytes: &mut Bytes) -> Result<Record, DecodeError> {
    let oid = Oid(bytes.try_get_u64().map_err(|_| DecodeError)?);
    let kind = bytes.try_get_u8().map_err(|_| DecodeError)?;
    let mut number = || bytes.try_get_u64().map_err(|_| DecodeError);
    let data = match kind {
        b'd' => {
            let len = number()?;
            RecordData::Data(take(bytes, usize::try_from(len).map_err(|_| DecodeError)?)?)
        }
        b'b' => {
            let (tid, len) = (Tid(number()?), number()?);
            let data = take(bytes, usize::try_from(len).map_err(|_| DecodeError)?)?;
            RecordData::Back(tid, Some(data))
        }
        b'B' => RecordData::Back(Tid(number()?), None),
        b'g' => RecordData::Gone,
        _ => return Err(DecodeError),
    };
    Ok(Record { oid, data })
}

/// The length of the record that `bytes` begin with; `None` if its head is not all there yet.
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, DecodeError> {
    let Some(kind) = bytes.get(8) else { return Ok(None) };
    let length_at = match kind {
        b'd' => 9,
        b'b' => 17,
        b'B' => return Ok(Some(17)),
        b'g' => return Ok(Some(9)),
        _ => return Err(DecodeError),
    };
    let Some(len) = bytes.get(length_at..length_at + 8) else { return Ok(None) };
    let len = len.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    let len = usize::try_from(len).ok().and_then(|len| len.checked_add(length_at + 8));
    len.map(Some).ok_or(DecodeError)
}

fn take(bytes: &mut Bytes, len: usize) -> Result<Bytes, DecodeError> {
    if len > bytes.len() { Err(DecodeError) } else { Ok(bytes.split_to(len)) }
}
