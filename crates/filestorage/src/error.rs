use std::io;
use std::path::{Path, PathBuf};

use standby_types::time::utc;
use standby_types::{Oid, Position, Tid};

use crate::holes::Hole;

/// Why the storage could not do what was asked.
#[derive(Debug, thiserror::Error)]
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
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The reason it gave.
        source: io::Error,
    },
    /// The file contradicts its format. It is never written to after this.
    #[error("{}: damaged at byte {position}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Offset of the structure that is wrong.
        position: Position,
        /// What is wrong with it.
        reason: String,
    },
    /// The file does not begin with `FS30` or `FS21`.
    #[error("{}: not a FileStorage file: it begins with {found:?} instead of \"FS30\" or \"FS21\"", path.display())]
    NotFileStorage {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// A transaction whose tid is not above the last one.
    #[error("{}: transaction {tid} does not follow {last}", path.display())]
    OutOfOrder {
        /// The file.
        path: PathBuf,
        /// The last transaction.
        last: Tid,
        /// The refused one.
        tid: Tid,
    },
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

impl StorageError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl Fn(io::Error) -> StorageError {
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock => StorageError::NotCached,
            _ => StorageError::Io { path: path.to_owned(), action, source },
        }
    }
}
