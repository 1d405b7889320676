//! What an entry of the log means.
//!
//! ```text
//! transaction   't' storage, head (length 4, bytes) · part count 4, indexes 8 each · last part
//!               'b' the same, but before the last part: blob count 4; each: oid 8, kind 1,
//!                   for kind 'u': transfer 16, length 8, SHA-256 32; for kind 'c': tid 8
//!               'T' and 'B' the same as 't' and 'b', but after the letter: transaction token 24
//! part          'p' bytes
//! ceiling       'c' storage · oid 8
//! pack          'k' storage · time (a tid) 8 · garbage collection 1
//! setting       's' bytes
//! ```
//!
//! A transaction's head and records (which this crate does not look into) stand in its closing
//! entry. A long row of records is cut into *parts* of at most [`PART_LEN`], entries of their own
//! that come before; the closing entry lists their indexes and holds the rest. Parts without a
//! closing entry mean nothing. They belong to the leader of their term: when an entry of a later
//! term has come, no closing entry can follow.

use bytes::{BufMut, Bytes, BytesMut};
use standby_types::{Blob, BlobSource, LogIndex, Oid, Tid, TransactionToken, Transfer, Upload};

use crate::codec::{Malformed, Reader, put_bytes, put_list};

/// The longest part, so that heartbeats flow between them and memory is bounded.
pub const PART_LEN: usize = 1 << 20;

/// An entry's meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Command {
    /// A part of a transaction that is closed later.
    Part(Bytes),
    /// A transaction is committed.
    Transaction(ClosingEntry),
    /// Oids up to this one may be handed out by whoever proposed this; nobody else may.
    OidCeiling {
        storage: String,
        /// The highest oid reserved.
        ceiling: Oid,
    },
    /// Every node packs its data file.
    Pack {
        storage: String,
        /// Revisions that were not current at this time go.
        time: Tid,
        /// Objects that cannot be reached from the root go.
        gc: bool,
    },
    /// An administrator has decided something; this crate does not look into it.
    Setting(Bytes),
}

/// The end of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosingEntry {
    /// The storage.
    pub storage: String,
    /// By which its client may ask whether it was committed. Only from feature level 4 on.
    pub token: Option<TransactionToken>,
    /// What it says about itself.
    pub head: Bytes,
    /// The entries that hold the beginning of its records, in order.
    pub parts: Vec<LogIndex>,
    /// The blobs of its records.
    pub blobs: Vec<Blob>,
    /// What comes after the parts.
    pub rest: Bytes,
}

impl ClosingEntry {
    /// The uploads among its blobs.
    pub fn uploads(&self) -> impl Iterator<Item = Upload> {
        self.blobs.iter().filter_map(|blob| match blob.source {
            BlobSource::Upload(upload) => Some(upload),
            BlobSource::Copy(_) => None,
        })
    }
}

/// Reads an entry's data if it is a transaction with blobs.
pub fn closing_with_blobs(data: &Bytes) -> Option<ClosingEntry> {
    match data.first() {
        Some(b'b' | b'B') => match Command::decode(data.clone()) {
            Ok(Command::Transaction(closing)) => Some(closing),
            _ => None,
        },
        _ => None,
    }
}

fn put_blob(out: &mut BytesMut, blob: &Blob) {
    out.put_u64(blob.oid.0);
    match blob.source {
        BlobSource::Upload(upload) => {
            out.put_u8(b'u');
            out.put_slice(&upload.transfer.0);
            out.put_u64(upload.len);
            out.put_slice(&upload.sha256);
        }
        BlobSource::Copy(tid) => {
            out.put_u8(b'c');
            out.put_u64(tid.0);
        }
    }
}

fn take_blob(reader: &mut Reader) -> Result<Blob, Malformed> {
    let oid = Oid(reader.u64()?);
    let source = match reader.u8()? {
        b'u' => BlobSource::Upload(Upload {
            transfer: Transfer(reader.array()?),
            len: reader.u64()?,
            sha256: reader.array()?,
        }),
        b'c' => BlobSource::Copy(Tid(reader.u64()?)),
        _ => return Err(reader.malformed()),
    };
    Ok(Blob { oid, source })
}

impl Command {
    /// The entry's data.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64 + self.len());
        match self {
            Command::Part(bytes) => {
                out.put_u8(b'p');
                out.put_slice(bytes);
            }
            Command::Transaction(closing) => {
                let kind = if closing.blobs.is_empty() { b't' } else { b'b' };
                match closing.token {
                    None => out.put_u8(kind),
                    Some(token) => {
                        out.put_u8(kind.to_ascii_uppercase());
                        out.put_slice(&token.to_bytes());
                    }
                }
                put_bytes(&mut out, closing.storage.as_bytes());
                put_bytes(&mut out, &closing.head);
                put_list(&mut out, closing.parts.iter(), |out, index| out.put_u64(index.0));
                if !closing.blobs.is_empty() {
                    put_list(&mut out, closing.blobs.iter(), put_blob);
                }
                out.put_slice(&closing.rest);
            }
            Command::OidCeiling { storage, ceiling } => {
                out.put_u8(b'c');
                put_bytes(&mut out, storage.as_bytes());
                out.put_u64(ceiling.0);
            }
            Command::Pack { storage, time, gc } => {
                out.put_u8(b'k');
                put_bytes(&mut out, storage.as_bytes());
                out.put_u64(time.0);
                out.put_u8(u8::from(*gc));
            }
            Command::Setting(bytes) => {
                out.put_u8(b's');
                out.put_slice(bytes);
            }
        }
        out.freeze()
    }

    /// Reads an entry's data; shares its memory.
    pub fn decode(bytes: Bytes) -> Result<Command, Malformed> {
        let mut reader = Reader::new(bytes, "log entry");
        Ok(match reader.u8()? {
            b'p' => Command::Part(reader.rest()),
            kind @ (b't' | b'b' | b'T' | b'B') => Command::Transaction(ClosingEntry {
                token: match kind {
                    b'T' | b'B' => Some(TransactionToken::from_bytes(reader.array()?)),
                    _ => None,
                },
                storage: reader.string()?,
                head: reader.bytes()?,
                parts: reader.list(|r| r.u64().map(LogIndex))?,
                blobs: if matches!(kind, b'b' | b'B') {
                    reader.list(take_blob)?
                } else {
                    Vec::new()
                },
                rest: reader.rest(),
            }),
            b'c' => {
                let command =
                    Command::OidCeiling { storage: reader.string()?, ceiling: Oid(reader.u64()?) };
                reader.end()?;
                command
            }
            b's' => Command::Setting(reader.rest()),
            b'k' => {
                let storage = reader.string()?;
                let command =
                    Command::Pack { storage, time: Tid(reader.u64()?), gc: reader.bool()? };
                reader.end()?;
                command
            }
            _ => return Err(reader.malformed()),
        })
    }

    fn len(&self) -> usize {
        match self {
            Command::Part(bytes) | Command::Setting(bytes) => bytes.len(),
            Command::Transaction(closing) => {
                closing.head.len()
                    + closing.parts.len() * 8
                    + closing.blobs.len() * 65
                    + closing.rest.len()
            }
            Command::OidCeiling { .. } | Command::Pack { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_travel() {
        for command in [
            Command::Part(Bytes::from_static(b"part")),
            Command::Transaction(ClosingEntry {
                storage: "1".into(),
                token: None,
                head: Bytes::from_static(b"head"),
                parts: vec![LogIndex(4), LogIndex(6)],
                blobs: Vec::new(),
                rest: Bytes::from_static(b"rest"),
            }),
            Command::Transaction(ClosingEntry {
                storage: "1".into(),
                token: Some(TransactionToken { client: [5; 16], number: 77 }),
                head: Bytes::from_static(b"head"),
                parts: Vec::new(),
                blobs: vec![
                    Blob {
                        oid: Oid(3),
                        source: BlobSource::Upload(Upload {
                            transfer: Transfer([9; 16]),
                            len: 1 << 40,
                            sha256: [8; 32],
                        }),
                    },
                    Blob { oid: Oid(4), source: BlobSource::Copy(Tid(7)) },
                ],
                rest: Bytes::from_static(b"rest"),
            }),
            Command::OidCeiling { storage: "main".into(), ceiling: Oid(9) },
            Command::Pack { storage: "main".into(), time: Tid(7), gc: true },
            Command::Setting(Bytes::from_static(b"setting")),
        ] {
            assert_eq!(Command::decode(command.encode()), Ok(command));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = Command::decode(bytes.into());
        }
    }
}
