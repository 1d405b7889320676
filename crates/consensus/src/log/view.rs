//! The log as Raft reads it: terms of all entries, and the recent entries themselves.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use standby_types::{Disk, LogIndex, Term};

use crate::committed::AppliedPoint;
use crate::log::fetch::{Fetch, Fetches, For};
use crate::log::recover::{Recovered, read_entry};
use crate::log::segment::{LogError, Place, PlacedEntry};

/// Bytes of entries that are kept in memory; older ones are read from disk for slow followers.
const CACHE_LEN: usize = if cfg!(any(test, feature = "simulated")) { 8 << 10 } else { 64 << 20 };
/// What an entry takes in a message beside its data, at most.
pub(crate) const ENTRY_OVERHEAD: u64 = 64;

/// An entry's index and term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Point {
    pub index: LogIndex,
    pub term: Term,
}

struct Slot {
    term: Term,
    /// `None` once the entry has been dropped from memory; it is on disk then.
    entry: Option<Entry>,
    place: Option<Place>,
}

/// Invariants: `slots[i]` is the entry `start.index + 1 + i`; a slot without an entry has a place;
/// slots before `evicted` have no entry.
pub(crate) struct LogView {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    start: Point,
    slots: VecDeque<Slot>,
    cached: usize,
    /// Number of slots whose entries have been dropped.
    evicted: usize,
    hard_state: HardState,
    conf_state: ConfState,
    /// What a follower that is behind `start` gets instead of entries.
    applied: Option<AppliedPoint>,
    /// Raft reads through a shared reference.
    fetches: RefCell<Fetches>,
}

impl LogView {
    pub fn new(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        recovered: &Recovered,
        conf_state: ConfState,
    ) -> LogView {
        let slot = |e: &PlacedEntry| Slot { term: e.term, entry: None, place: Some(e.place) };
        LogView {
            disk,
            dir,
            start: recovered.start,
            slots: recovered.entries.iter().map(slot).collect(),
            cached: 0,
            evicted: recovered.entries.len(),
            hard_state: recovered.hard_state.clone(),
            conf_state,
            applied: None,
            fetches: RefCell::default(),
        }
    }

    pub fn set_commit(&mut self, commit: LogIndex) {
        self.hard_state.commit = self.hard_state.commit.max(commit.0);
    }

    pub fn set_applied(&mut self, applied: AppliedPoint) {
        self.applied = Some(applied);
    }

    /// Adds entries; those from the first one's index on are replaced.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.start.index.0, "entries before the log's start never change");
        let keep = (first.index - self.start.index.0 - 1) as usize;
        assert!(keep <= self.slots.len(), "entries follow each other");
        for slot in self.slots.drain(keep..) {
            self.cached -= slot.entry.map_or(0, |entry| entry.data.len());
        }
        self.evicted = self.evicted.min(keep);
        for entry in entries {
            self.cached += entry.data.len();
            self.slots.push_back(Slot {
                term: Term(entry.term),
                entry: Some(entry.clone()),
                place: None,
            });
        }
    }

    /// These entries are on disk.
    pub fn placed(&mut self, entries: &[PlacedEntry]) {
        for placed in entries {
            let at = placed.index.0.checked_sub(self.start.index.0 + 1);
            if let Some(slot) = at.and_then(|at| self.slots.get_mut(at as usize))
                && slot.term == placed.term
            {
                slot.place = Some(placed.place);
            }
        }
        while self.cached > CACHE_LEN && self.evicted < self.slots.len() {
            let slot = &mut self.slots[self.evicted];
            if slot.place.is_none() {
                break;
            }
            self.cached -= slot.entry.take().map_or(0, |entry| entry.data.len());
            self.evicted += 1;
        }
    }

    /// Forgets entries up to `index`.
    pub fn compact(&mut self, index: LogIndex) {
        let count = index.0.saturating_sub(self.start.index.0) as usize;
        let count = count.min(self.slots.len());
        if count == 0 {
            return;
        }
        let term = self.slots[count - 1].term;
        for slot in self.slots.drain(..count) {
            self.cached -= slot.entry.map_or(0, |entry| entry.data.len());
        }
        self.evicted = self.evicted.saturating_sub(count);
        self.start = Point { index: LogIndex(self.start.index.0 + count as u64), term };
    }

    /// The log begins anew after `point`.
    pub fn reset(&mut self, point: Point) {
        self.slots.clear();
        self.cached = 0;
        self.evicted = 0;
        self.start = point;
    }

    /// The entry at `index`. May read from the disk.
    pub fn entry(&self, index: LogIndex) -> Result<Option<Entry>, LogError> {
        let Some(slot) = self.slot(index) else { return Ok(None) };
        match (&slot.entry, slot.place) {
            (Some(entry), _) => Ok(Some(entry.clone())),
            (None, Some(place)) => read_entry(&*self.disk, &self.dir, place).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn slot(&self, index: LogIndex) -> Option<&Slot> {
        let at = index.0.checked_sub(self.start.index.0 + 1)?;
        self.slots.get(usize::try_from(at).ok()?)
    }

    /// The entry at `index`, if it is in memory.
    pub fn in_memory(&self, index: LogIndex) -> Option<&Entry> {
        self.slot(index)?.entry.as_ref()
    }

    /// Entries from `first` up to `last` at most that are on disk only, about `max_size` bytes, and
    /// one at least; none if the first one is not among them.
    fn places(&self, first: LogIndex, last: u64, max_size: u64) -> Vec<Place> {
        let mut size = 0;
        let places = (first.0..=last).map_while(|index| {
            let slot = self.slot(LogIndex(index)).filter(|slot| slot.entry.is_none())?;
            let place = slot.place?;
            size += u64::from(place.len);
            (index == first.0 || size <= max_size).then_some(place)
        });
        places.collect()
    }

    /// How to read entries for the storage, which are committed and not applied, and so never
    /// forgotten.
    pub fn fetch_for_storage(
        &self,
        (first, last): (LogIndex, LogIndex),
        max_size: u64,
    ) -> Result<Fetch, LogError> {
        match self.places(first, last.0, max_size) {
            places if places.is_empty() => Err(LogError::Damaged {
                path: self.dir.clone(),
                offset: 0,
                reason: format!("entry {first} is committed, and not there"),
            }),
            places => Ok(self.fetch(first, places, For::Storage)),
        }
    }

    fn fetch(&self, first: LogIndex, places: Vec<Place>, reader: For) -> Fetch {
        Fetch { disk: self.disk.clone(), dir: self.dir.clone(), first, places, reader }
    }

    /// What is to be read for followers, once each.
    pub fn take_fetches(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.fetches.get_mut().wanted)
    }

    /// What was read for a follower is here, until [`LogView::forget_fetched`].
    pub fn fetched(&mut self, first: LogIndex, entries: Result<Vec<Entry>, LogError>) {
        let fetches = self.fetches.get_mut();
        fetches.running.remove(&first);
        match entries {
            Ok(entries) => fetches.here = Some((first, entries)),
            Err(_) => fetches.unreadable = Some(first),
        }
    }

    /// Raft has looked at it.
    pub fn forget_fetched(&mut self) {
        let fetches = self.fetches.get_mut();
        (fetches.here, fetches.unreadable) = (None, None);
    }

    /// Entries that are on disk only, for a follower: those that have been read, or word that they
    /// will be.
    fn entries_from_disk(
        &self,
        (low, high): (u64, u64),
        max_size: u64,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let first = LogIndex(low);
        let mut fetches = self.fetches.borrow_mut();
        if fetches.unreadable == Some(first) {
            // It is fed from the data file instead.
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if let Some((_, entries)) = fetches.here.as_ref().filter(|(from, _)| *from == first) {
            // The log may have become another one meanwhile.
            let is_ours = |entry: &&Entry| {
                entry.index < high && self.term(entry.index).is_ok_and(|term| term == entry.term)
            };
            let entries: Vec<_> = entries.iter().take_while(is_ours).cloned().collect();
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
        if fetches.running.insert(first) {
            let places = self.places(first, high - 1, max_size);
            fetches.wanted.push(self.fetch(first, places, For::Follower(context)));
        }
        Err(raft::Error::Store(StorageError::LogTemporarilyUnavailable))
    }

    fn last(&self) -> u64 {
        self.start.index.0 + self.slots.len() as u64
    }

    /// Fails if an invariant does not hold. Of a long log only some slots are looked at.
    pub fn invariants(&self) {
        const SOME: usize = 64;
        assert!(self.evicted <= self.slots.len(), "more is dropped than is there");
        let around = self.evicted.saturating_sub(SOME)..self.slots.len().min(self.evicted + SOME);
        let last = self.slots.len().saturating_sub(SOME)..self.slots.len();
        for (at, slot) in around.chain(last).map(|at| (at, &self.slots[at])) {
            assert!(slot.entry.is_some() || slot.place.is_some(), "slot {at} is nowhere");
            assert!(at >= self.evicted || slot.entry.is_none(), "slot {at} is not dropped");
            let before = at.checked_sub(1).map_or(self.start.term, |at| self.slots[at].term);
            assert!(before <= slot.term, "the term goes back at slot {at}");
        }
        if self.slots.len() <= SOME {
            let lens = self.slots.iter().filter_map(|slot| Some(slot.entry.as_ref()?.data.len()));
            assert_eq!(self.cached, lens.sum::<usize>(), "bytes in memory");
        }
    }
}

impl Storage for LogView {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.start.index.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let on_disk = |slot: &Slot| slot.entry.is_none() && slot.place.is_some();
        if context.can_async() && low < high && self.slot(LogIndex(low)).is_some_and(on_disk) {
            return self.entries_from_disk((low, high), max_size, context);
        }
        let (mut entries, mut size) = (Vec::new(), 0);
        for index in low..high {
            let entry = match self.entry(LogIndex(index)) {
                Ok(entry) => entry.ok_or(raft::Error::Store(StorageError::Unavailable))?,
                Err(error) => {
                    return Err(raft::Error::Store(StorageError::Other(Box::new(error))));
                }
            };
            size += entry.data.len() as u64 + ENTRY_OVERHEAD;
            if size > max_size && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.start.index.0 {
            return Ok(self.start.term.0);
        }
        let Some(at) = index.checked_sub(self.start.index.0 + 1) else {
            return Err(raft::Error::Store(StorageError::Compacted));
        };
        let slot = self.slots.get(at as usize);
        slot.map(|slot| slot.term.0).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.start.index.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let unavailable = raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable);
        match &self.applied {
            // A follower that begins after `applied` would lack the parts of a transaction that
            // is open there; it waits until it is closed.
            Some(point) if point.index.0 >= request_index && !point.open_parts => {
                let mut snapshot = Snapshot::default();
                snapshot.mut_metadata().index = point.index.0;
                snapshot.mut_metadata().term = point.term.0;
                snapshot.mut_metadata().set_conf_state(point.membership.to_conf_state());
                snapshot.data = point.encode();
                Ok(snapshot)
            }
            _ => Err(unavailable),
        }
    }
}
