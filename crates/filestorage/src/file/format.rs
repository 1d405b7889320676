//! The bytes of `Data.fs`. Source: the description in `ZODB/FileStorage/format.py`.
//!
//! ```text
//! file         "FS30" or "FS21", then transactions, back to back
//!
//! transaction   0  tid                      8
//!               8  length of all this - 8   8
//!              16  status                   1   ' ' or 'p' (packed); 'c' while being written; 'u': see [`UNDONE`]
//!              17  lengths of user,
//!                  description, extension   2 2 2
//!              23  user, description, extension
//!                  data records, back to back
//!                  the length again         8
//!
//! data record   0  oid                      8
//!               8  serial (the tid)         8
//!              16  previous record          8   of the same object; 0: none
//!              24  the transaction          8   its position
//!              32  zero                     2   (a version's name, in files of the last century)
//!              34  length of the data       8
//!              42  data; if the length is 0: the position (8) of the record whose data this one
//!                  shares, or 0: the object is gone
//! ```

use standby_types::{Oid, Position, Tid};

pub(crate) const TXN_HEADER: u64 = 23;
pub(crate) const DATA_HEADER: u64 = 42;

/// The status of a transaction that FileStorage undid in place before ZODB 3.3: it is in the file,
/// and what it wrote is no revision of any object. Source: `read_index` in
/// `ZODB/FileStorage/FileStorage.py`.
pub(crate) const UNDONE: u8 = b'u';

/// How many back pointers are followed before the file is called damaged.
pub const REFERENCE_LIMIT: usize = 100_000;

/// The first four bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Magic {
    /// Written by ZODB on Python 3, and by Standby.
    Fs30,
    /// Written by ZODB on Python 2.
    Fs21,
}

impl Magic {
    /// The bytes.
    pub fn bytes(self) -> &'static [u8; 4] {
        match self {
            Magic::Fs30 => b"FS30",
            Magic::Fs21 => b"FS21",
        }
    }

    /// The magic that `bytes` are.
    pub fn parse(bytes: &[u8]) -> Option<Magic> {
        [Magic::Fs30, Magic::Fs21].into_iter().find(|m| m.bytes() == bytes)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TxnHeader {
    pub tid: Tid,
    /// Length of the transaction without the trailing repetition of it.
    pub length: u64,
    pub status: u8,
    pub user_len: u16,
    pub description_len: u16,
    pub extension_len: u16,
}

impl TxnHeader {
    /// Bytes before the first data record.
    pub fn full_len(&self) -> u64 {
        TXN_HEADER
            + u64::from(self.user_len)
            + u64::from(self.description_len)
            + u64::from(self.extension_len)
    }

    pub fn parse(bytes: &[u8; TXN_HEADER as usize]) -> TxnHeader {
        TxnHeader {
            tid: Tid(number(bytes, 0)),
            length: number(bytes, 8),
            status: bytes[16],
            user_len: short(bytes, 17),
            description_len: short(bytes, 19),
            extension_len: short(bytes, 21),
        }
    }

    pub fn to_bytes(self) -> [u8; TXN_HEADER as usize] {
        let mut out = [0; TXN_HEADER as usize];
        out[0..8].copy_from_slice(&self.tid.to_bytes());
        out[8..16].copy_from_slice(&self.length.to_be_bytes());
        out[16] = self.status;
        out[17..19].copy_from_slice(&self.user_len.to_be_bytes());
        out[19..21].copy_from_slice(&self.description_len.to_be_bytes());
        out[21..23].copy_from_slice(&self.extension_len.to_be_bytes());
        out
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataHeader {
    pub oid: Oid,
    pub serial: Tid,
    pub previous: Position,
    pub transaction: Position,
    pub version_len: u16,
    pub data_len: u64,
}

impl DataHeader {
    /// Bytes of the whole record: header and data, or header and back pointer.
    pub fn full_len(&self) -> u64 {
        DATA_HEADER.saturating_add(if self.data_len == 0 { 8 } else { self.data_len })
    }

    pub fn parse(bytes: &[u8; DATA_HEADER as usize]) -> DataHeader {
        DataHeader {
            oid: Oid(number(bytes, 0)),
            serial: Tid(number(bytes, 8)),
            previous: Position(number(bytes, 16)),
            transaction: Position(number(bytes, 24)),
            version_len: short(bytes, 32),
            data_len: number(bytes, 34),
        }
    }

    pub fn to_bytes(self) -> [u8; DATA_HEADER as usize] {
        let mut out = [0; DATA_HEADER as usize];
        out[0..8].copy_from_slice(&self.oid.to_bytes());
        out[8..16].copy_from_slice(&self.serial.to_bytes());
        out[16..24].copy_from_slice(&self.previous.to_bytes());
        out[24..32].copy_from_slice(&self.transaction.to_bytes());
        out[32..34].copy_from_slice(&self.version_len.to_be_bytes());
        out[34..42].copy_from_slice(&self.data_len.to_be_bytes());
        out
    }
}

/// The big-endian number of eight bytes at `at`; callers pass arrays or checked slices.
pub(crate) fn number(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(eight)
}

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        let txn = TxnHeader {
            tid: Tid(7),
            length: 123,
            status: b'p',
            user_len: 1,
            description_len: 2,
            extension_len: 3,
        };
        assert_eq!(TxnHeader::parse(&txn.to_bytes()), txn);
        assert_eq!(txn.full_len(), 29);
        let data = DataHeader {
            oid: Oid(1),
            serial: Tid(2),
            previous: Position(3),
            transaction: Position(4),
            version_len: 0,
            data_len: 0,
        };
        assert_eq!(DataHeader::parse(&data.to_bytes()), data);
        assert_eq!(data.full_len(), 50);
    }
}
