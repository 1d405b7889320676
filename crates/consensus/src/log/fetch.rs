//! Reading entries that are on disk only, beside the machine: it does no disk I/O itself.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use raft::GetEntriesContext;
use raft::eraftpb::Entry;
use standby_types::{Disk, LogIndex};

use crate::log::recover::read_entry;
use crate::log::segment::{LogError, Place};

/// Entries that are to be read from the log, one after the other. [`Fetch::read`] blocks.
pub struct Fetch {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) first: LogIndex,
    pub(super) places: Vec<Place>,
    pub(super) reader: For,
}

/// What [`Fetch::read`] has found; goes back to the machine as [`crate::Event::Fetched`].
#[derive(Debug)]
pub struct Fetched {
    pub(crate) first: LogIndex,
    pub(crate) entries: Result<Vec<Entry>, LogError>,
    pub(crate) reader: For,
}

/// Who waits for the entries.
#[derive(Debug)]
pub(crate) enum For {
    /// A follower that is far behind; Raft knows which.
    Follower(GetEntriesContext),
    /// The storage of this node.
    Storage,
}

impl Fetch {
    /// Reads the entries.
    pub fn read(self) -> Fetched {
        let read = |place: Place| read_entry(&*self.disk, &self.dir, place);
        let entries = self.places.into_iter().map(read).collect();
        Fetched { first: self.first, entries, reader: self.reader }
    }
}

impl std::fmt::Debug for Fetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fetch({} entries from {})", self.places.len(), self.first)
    }
}

/// What is being fetched for followers. Raft asks for the same again and again until it comes: once
/// is enough, so that there are hardly more fetches than followers.
#[derive(Default)]
pub(super) struct Fetches {
    /// Not handed out yet.
    pub wanted: Vec<Fetch>,
    /// The first entry of each fetch that has not come back.
    pub running: BTreeSet<LogIndex>,
    /// What has come back, while Raft looks at it.
    pub here: Option<(LogIndex, Vec<Entry>)>,
    /// What cannot be read, while Raft looks for it: that follower is fed from the data file
    /// instead.
    pub unreadable: Option<LogIndex>,
}
