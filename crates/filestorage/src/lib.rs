//! ZODB's `Data.fs`, the format of `ZODB.FileStorage`: read, append, recover, index.
//!
//! A [`FileStorage`] is the one writer of a file; any number of [`Reader`]s look into it at the
//! same time. What a reader sees is always a whole number of transactions. Everything blocks,
//! and goes through [`standby_types::Disk`].
//!
//! Reading order: `format.rs` (the bytes), `scan.rs` (walking over a file, telling a torn tail
//! from damage), `index/` (oid → newest position), `storage.rs` (opening), `read.rs`,
//! `append.rs`, `iterate.rs`, `history.rs`, `holes.rs`, `undo.rs`, `pack.rs`, `blobs.rs`, `blob_sums.rs`,
//! `transaction.rs` (a transaction as it travels between nodes), `renumber.rs` (files whose tids do not grow).
//!
//! What this crate does not do: it decides nothing about commits. Whoever appends has made sure
//! that the transaction is committed and that its tid is above the last one.

mod append;
mod blob_sums;
mod blobs;
mod error;
mod format;
mod history;
mod holes;
mod index;
mod iterate;
mod pack;
mod read;
mod renumber;
mod scan;
mod storage;
mod sums;
mod transaction;
mod undo;

pub use append::Appender;
pub use blob_sums::{BlobDamage, BlobId};
pub use blobs::{BlobDir, Checking, Found, Staged, Staging, may_be_blob};
pub use error::{StorageError, Unreadable};
pub use format::{Magic, REFERENCE_LIMIT};
pub use history::{Backwards, PastRevision};
pub use holes::{Hole, Holes};
pub use iterate::{Records, StoredTransaction, Transactions};
pub use pack::{
    Job, Need, Outcome, Packed, References, Removed, Room, copy, copy_most, copy_rest, pack,
};
pub use read::{Access, Reader, Revision};
pub use renumber::{NewSerial, NewTids, Renumbered, new_tids, write_renumbered};
pub use storage::{Extent, FileStorage, Mark, Opened, Source, Tail};
pub use sums::{BLOCK, Damage, DamagedBlock, LostBlock, Mend, blocks_in};
pub use transaction::{
    DecodeError, Record, RecordData, Transaction, TransactionMeta, put_meta, put_record,
    record_len, take_meta, take_record,
};

pub use undo::{UndoError, Undone};

#[cfg(test)]
mod tests;
