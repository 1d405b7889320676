//! Blobs: files that belong to a revision of an object.

use std::fmt;

use crate::{Oid, Tid};

/// Names an upload, everywhere in the cluster; drawn at random.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transfer(pub [u8; 16]);

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transfer({self})")
    }
}

impl Transfer {
    /// What the blob of a revision is called while it is on its way: its oid and its tid.
    pub fn of_revision(oid: Oid, tid: Tid) -> Transfer {
        Transfer((u128::from(oid.0) << 64 | u128::from(tid.0)).to_be_bytes())
    }

    /// Reads what its `Display` writes.
    pub fn parse(text: &str) -> Option<Transfer> {
        let digits =
            text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = u128::from_str_radix(text, 16).ok().filter(|_| digits)?;
        Some(Transfer(number.to_be_bytes()))
    }
}

/// A blob's bytes, as a transaction names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobSource {
    /// What was uploaded under this name.
    Upload(Upload),
    /// The same as the blob of the object's revision with this tid (after an undo).
    Copy(Tid),
}

/// A file that was uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upload {
    /// Its name until the transaction is applied.
    pub transfer: Transfer,
    /// Its length in bytes.
    pub len: u64,
    /// The SHA-256 of its bytes.
    pub sha256: [u8; 32],
}

/// The blob of an object's new revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// The object.
    pub oid: Oid,
    /// Its bytes.
    pub source: BlobSource,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_are_read_back() {
        let transfer = Transfer(*b"0123456789abcdef");
        assert_eq!(Transfer::parse(&transfer.to_string()), Some(transfer));
        for wrong in
            ["", "30", "+0313233343536373839616263646566", "../../../../../../../../../../etc"]
        {
            assert_eq!(Transfer::parse(wrong), None, "{wrong}");
        }
    }
}
