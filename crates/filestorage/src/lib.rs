//! ZODB's `Data.fs`, the format of `ZODB.FileStorage`: read, append, recover, index.
//!
//! A [`FileStorage`] is the one writer of a file, but for repairs of damaged blocks; any number of
//! [`Reader`]s look into it at the same time. What a reader sees is always a whole number of
//! transactions. Everything blocks, and goes through [`standby_types::Disk`].
//!
//! Reading order: `file/` (`format.rs`: the bytes; `scan.rs`: walking over a file, telling a torn
//! tail from damage; `open.rs`, `read.rs`, `append.rs`, `iterate.rs`, `history.rs`, `holes.rs`,
//! `undo.rs`; `transaction.rs`: a transaction as it travels between nodes), `index/` (oid → newest
//! position), `checksums/`, `pack.rs`, `blobs.rs`, `renumber.rs` (files whose tids do not grow).
//!
//! What this crate does not do: it decides nothing about commits. Whoever appends has made sure
//! that the transaction is committed and that its tid is above the last one.

mod blobs;
mod checksums;
mod error;
mod file;
mod index;
mod pack;
mod renumber;
mod room;

pub use blobs::{BlobDir, Checking, Found, Staged, Staging, may_be_blob};
pub use checksums::blobs::{BlobDamage, BlobId};
pub use checksums::blocks::{BLOCK, Damage, DamagedBlock, LostBlock, Repair, blocks_in};
pub use error::{StorageError, Unreadable};
pub use file::append::Appender;
pub use file::format::{Magic, REFERENCE_LIMIT};
pub use file::history::{Backwards, PastRevision};
pub use file::holes::{Hole, Holes};
pub use file::iterate::{Records, StoredTransaction, Transactions};
pub use file::mark::Mark;
pub use file::open::{Extent, FileStorage, Opened, Source, Tail};
pub use file::read::{Access, Reader, Revision};
pub use file::transaction::{
    DecodeError, Record, RecordData, Transaction, TransactionMeta, put_meta, put_record,
    record_len, take_meta, take_record,
};
pub use file::undo::{UndoError, Undone};
pub use pack::{Job, Outcome, Packed, References, Removed, copy, copy_most, copy_rest, pack};
pub use renumber::{NewSerial, NewTids, Renumbered, new_tids, write_renumbered};
pub use room::{Need, Room};

#[cfg(test)]
mod tests;
