//! A transaction as it travels: in the replicated log and from node to node.
//!
//! It names revisions by tid, never by position, so it means the same in every node's file.
//!
//! ```text
//! meta     tid 8 · status 1 · user, description, extension: length 2, bytes
//! record   oid 8 · kind 1 · for kind 'd': length 8, data
//!                           for kind 'b': tid 8 of the revision whose data it shares
//!                           for kind 'g': nothing; the object is gone
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use standby_types::{Oid, Tid};

/// What a transaction says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionMeta {
    /// Its tid.
    pub tid: Tid,
    /// `b' '`, or `b'p'` for one that was packed.
    pub status: u8,
    /// At most 65 535 bytes, as the next two.
    pub user: Bytes,
    /// What was done.
    pub description: Bytes,
    /// A pickled dict, or nothing.
    pub extension: Bytes,
}

/// An object's new revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The object.
    pub oid: Oid,
    /// Its data.
    pub data: RecordData,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordData {
    /// Data of its own.
    Data(Bytes),
    /// The data of an earlier revision of the object (after an undo).
    Back(Tid),
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
        RecordData::Back(tid) => {
            out.put_u8(b'b');
            out.put_u64(tid.0);
        }
        RecordData::Gone => out.put_u8(b'g'),
    }
}

/// Takes what [`put_record`] wrote from the front of `bytes`; shares their memory.
pub fn take_record(bytes: &mut Bytes) -> Result<Record, DecodeError> {
    let oid = Oid(bytes.try_get_u64().map_err(|_| DecodeError)?);
    let data = match bytes.try_get_u8().map_err(|_| DecodeError)? {
        b'd' => {
            let len = bytes.try_get_u64().map_err(|_| DecodeError)?;
            RecordData::Data(take(bytes, usize::try_from(len).map_err(|_| DecodeError)?)?)
        }
        b'b' => RecordData::Back(Tid(bytes.try_get_u64().map_err(|_| DecodeError)?)),
        b'g' => RecordData::Gone,
        _ => return Err(DecodeError),
    };
    Ok(Record { oid, data })
}

/// The length of the record that `bytes` begin with; `None` if its head is not all there yet.
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, DecodeError> {
    let Some(kind) = bytes.get(8) else { return Ok(None) };
    match kind {
        b'd' => {
            let Some(len) = bytes.get(9..17) else { return Ok(None) };
            let len = len.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
            let len = usize::try_from(len).ok().and_then(|len| len.checked_add(17));
            len.map(Some).ok_or(DecodeError)
        }
        b'b' => Ok(Some(17)),
        b'g' => Ok(Some(9)),
        _ => Err(DecodeError),
    }
}

fn take(bytes: &mut Bytes, len: usize) -> Result<Bytes, DecodeError> {
    if len > bytes.len() { Err(DecodeError) } else { Ok(bytes.split_to(len)) }
}
