//! A storage, for those who read it.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use standby_filestorage::{BlobDir, Reader, Source};
use standby_replica::outcomes::SharedOutcomes;
use standby_types::Tid;

use crate::cells::progress::Progress;

/// Counters of a storage, as `server_status` shows them.
#[derive(Default)]
pub(crate) struct Stats {
    /// `loadBefore` calls.
    pub loads: AtomicU64,
    /// Objects stored.
    pub stores: AtomicU64,
    /// Transactions applied.
    pub commits: AtomicU64,
    /// Transactions aborted.
    pub aborts: AtomicU64,
    /// Votes that ended in a conflict.
    pub conflicts: AtomicU64,
    /// Clients that asked what became of a transaction: it was committed.
    pub outcomes_committed: AtomicU64,
    /// It was not.
    pub outcomes_not_committed: AtomicU64,
    /// Nobody knows.
    pub outcomes_unknown: AtomicU64,
    /// Votes that wait for locks.
    pub waiting: AtomicUsize,
    /// Transactions between vote and the end.
    pub active: AtomicUsize,
}

/// A storage, for those who read.
pub(crate) struct StorageShared {
    /// The data file as it is now.
    pub source: Source,
    pub path: PathBuf,
    pub blobs: Option<BlobDir>,
    /// From this transaction on, the data file was not the primary's when they were compared.
    pub differs: Mutex<Option<Tid>>,
    /// How far a pack is.
    pub packing: Progress,
    /// How far the filling of its holes is.
    pub backfilling: Progress,
    pub stats: Stats,
    /// What has become of transactions with a token.
    pub outcomes: SharedOutcomes,
}

impl StorageShared {
    /// A storage that was just opened.
    pub(crate) fn new(source: Source, path: &Path, blobs: Option<BlobDir>) -> StorageShared {
        let (packing, backfilling) = (Progress::default(), Progress::default());
        let (differs, stats) = (Mutex::default(), Stats::default());
        let (path, outcomes) = (path.to_owned(), SharedOutcomes::default());
        StorageShared { source, path, blobs, differs, packing, backfilling, stats, outcomes }
    }

    /// Reads the data file as it is now; not to be kept for long, for a pack replaces the file.
    pub(crate) fn reader(&self) -> Reader {
        self.source.reader()
    }
}
