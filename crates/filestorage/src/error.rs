use std::io;
use std::path::{Path, PathBuf};

use standby_types::disk::is_full;
use standby_types::time::utc;
use standby_types::{Oid, Position, Tid};

use crate::file::holes::Hole;

/// Why the storage could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum StorageError {
    /// The object, or that revision of it, does not exist (`POSKeyError` for ZODB).
    #[error("no object {0}")]
    NoKey(Oid),
    /// The bytes are not in memory and [`crate::Access::Cached`] was asked for: ask again with
    /// [`crate::Access::Blocking`] on a thread that may wait for the device.
    #[error("not in the page cache")]
    NotCached,
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        /// The reason it gave.
        source: io::Error,
    },
    /// The file contradicts its format. It is never written to after this.
    #[error("{}: damaged at byte {position}: {reason}", path.display())]
    Damaged {
        path: PathBuf,
        /// Offset of the structure that is wrong.
        position: Position,
        /// What is wrong with it.
        reason: String,
    },
    /// A sound transaction whose tid is not above the one before it: FileStorage wrote it after a
    /// clock had been set back. Replicas, clients' caches and packs go by the order of tids.
    #[error("{}: the transaction at byte {position} has the tid {tid} ({}), which is not above \
        that of the transaction before it, {last} ({}): a clock was set back when it was written. \
        Nothing is damaged, but a file whose tids do not grow cannot be replicated, nor packed. \
        standby renumber {} gives new tids where that is needed, and keeps every \
        transaction", path.display(), utc(*tid), utc(*last), path.display())]
    TimeWentBack {
        path: PathBuf,
        /// Where the transaction begins.
        position: Position,
        /// The transaction before it.
        last: Tid,
        tid: Tid,
    },
    /// What a record refers to cannot be told, so nothing may be removed.
    #[error("{}: not packed: {record}. What it refers to would be removed. Let the application \
        store the object again, or delete what refers to it, and pack to a later time; or pack \
        without garbage collection (\"pack-gc false\" in <filestorage>)", path.display())]
    References { path: PathBuf, record: Unreadable },
    /// A pack would have removed an object that is referred to.
    #[error("{}: not packed: object {from}, written by transaction {tid}, refers to object {to}, \
        which was garbage at the pack time and would be gone. If {from} was written while the pack \
        was under way, pack again; if this comes again, pack without garbage collection (\"pack-gc \
        false\" in <filestorage>), and report it", path.display())]
    StillReferred {
        path: PathBuf,
        /// The object that refers to it.
        from: Oid,
        /// Who wrote that.
        tid: Tid,
        /// The object that would be gone.
        to: Oid,
    },
    /// The file does not begin with `FS30` or `FS21`.
    #[error("{}: not a FileStorage file: it begins with {found:?} instead of \"FS30\" or \
        \"FS21\"", path.display())]
    NotFileStorage {
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// A transaction whose tid is not above the last one.
    #[error("{}: transaction {tid} does not follow {last}", path.display())]
    OutOfOrder { path: PathBuf, last: Tid, tid: Tid },
    /// The answer lies in a part of the history that this file does not have.
    #[error(
        "the history from {} to {} is not on this node: a fast recovery left it out. standby node \
         backfill fills it in", utc(.0.after), utc(.0.through)
    )]
    Hole(Hole),
    /// User, description or extension of more than 65 535 bytes.
    #[error("the {0} of a transaction may have at most 65535 bytes")]
    MetaTooLong(&'static str),
}

/// A record whose references cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "what object {oid} refers to cannot be told (written by transaction {tid}, record at byte \
    {position}): {reason}"
)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Unreadable {
    pub oid: Oid,
    /// The transaction that wrote it.
    pub tid: Tid,
    /// Where the record begins.
    pub position: Position,
    pub reason: String,
}

impl StorageError {
    /// True if there was no room to write. The same can be written again, unless it was a sync that
    /// failed.
    pub fn is_full(&self) -> bool {
        matches!(self, StorageError::Io { action, source, .. } if !action.starts_with("sync") && is_full(source))
    }

    pub(crate) fn io(path: &Path, action: &'static str) -> impl Fn(io::Error) -> StorageError {
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock => StorageError::NotCached,
            _ => StorageError::Io { path: path.to_owned(), action, source },
        }
    }
}
