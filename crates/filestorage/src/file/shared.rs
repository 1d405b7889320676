//! What the writer of a file and its readers share.

use std::path::PathBuf;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use standby_types::Disk;

use crate::checksums::blocks::ChecksummedFile;
use crate::file::format::Magic;
use crate::file::holes::Holes;
use crate::file::mark::Mark;
use crate::index::Index;

pub(crate) struct Shared {
    pub path: PathBuf,
    pub file: Arc<ChecksummedFile>,
    pub disk: Arc<dyn Disk>,
    pub index_path: PathBuf,
    pub magic: Magic,
    pub state: RwLock<State>,
}

/// What a reader sees. Changed as a whole, under the lock, once per transaction.
///
/// Invariants: every position in `index` is below `mark.position`; the file has no transaction
/// after `mark` that is not also being written right now.
pub(crate) struct State {
    pub index: Index,
    pub mark: Mark,
    pub holes: Holes,
}

impl Shared {
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
