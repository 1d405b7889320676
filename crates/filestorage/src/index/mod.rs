//! oid → position of the newest record.
//!
//! Three layers, looked through from the newest: `overlay` (a tree in memory: what was committed
//! since the last merge), `frozen` (an overlay that is just being merged into a file), `sorted`
//! (an immutable file, mapped). Position 0 in a layer says that the object is not there, whatever
//! the layers below say.
//!
//! The index repeats what `Data.fs` says. It can be thrown away at any time.

mod python;
mod sorted;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use standby_types::{File, Oid, Position};

pub(crate) use python::{python_index_path, write_python_index};
pub(crate) use sorted::Sorted;

type Layer = BTreeMap<Oid, Position>;

#[derive(Default)]
pub(crate) struct Index {
    overlay: Layer,
    frozen: Option<Arc<Layer>>,
    sorted: Option<Arc<Sorted>>,
    /// Number of objects.
    count: u64,
}

impl Index {
    pub fn from_sorted(sorted: Sorted) -> Index {
        Index { count: sorted.len(), sorted: Some(Arc::new(sorted)), ..Index::default() }
    }

    pub fn get(&self, oid: Oid) -> Option<Position> {
        let found = (self.overlay.get(&oid).copied())
            .or_else(|| self.frozen.as_ref()?.get(&oid).copied())
            .or_else(|| self.sorted.as_ref()?.get(oid));
        found.filter(|position| *position != Position(0))
    }

    pub fn insert(&mut self, oid: Oid, position: Position) {
        if self.get(oid).is_none() {
            self.count += 1;
        }
        self.overlay.insert(oid, position);
    }

    pub fn remove(&mut self, oid: Oid) {
        if self.get(oid).is_some() {
            self.count -= 1;
        }
        self.overlay.insert(oid, Position(0));
    }

    pub fn len(&self) -> u64 {
        self.count
    }

    /// The first object at or above `oid`.
    pub fn at_or_above(&self, oid: Oid) -> Option<(Oid, Position)> {
        let mut from = oid;
        loop {
            let candidates = [
                self.overlay.range(from..).next().map(|(o, _)| *o),
                self.frozen.as_ref().and_then(|f| f.range(from..).next().map(|(o, _)| *o)),
                self.sorted.as_ref().and_then(|s| s.at_or_above(from)),
            ];
            let oid = candidates.into_iter().flatten().min()?;
            if let Some(position) = self.get(oid) {
                return Some((oid, position));
            }
            from = Oid(oid.0.checked_add(1)?);
        }
    }

    /// The highest oid that any layer names.
    pub fn highest(&self) -> Option<Oid> {
        [
            self.overlay.keys().next_back().copied(),
            self.frozen.as_ref().and_then(|f| f.keys().next_back().copied()),
            self.sorted.as_ref().and_then(|s| s.highest()),
        ]
        .into_iter()
        .flatten()
        .max()
    }

    /// Entries in memory that a merge would move to a file.
    pub fn overlay_len(&self) -> usize {
        self.overlay.len()
    }

    /// The file's entries, if they are all there are: a merge was the last thing that happened.
    pub fn merged(&self) -> Option<Arc<Sorted>> {
        self.sorted.clone().filter(|_| self.overlay.is_empty() && self.frozen.is_none())
    }

    /// Starts a merge; `None` while another one runs.
    pub fn freeze(&mut self) -> Option<Merge> {
        if self.frozen.is_some() {
            return None;
        }
        let frozen = Arc::new(std::mem::take(&mut self.overlay));
        self.frozen = Some(frozen.clone());
        Some(Merge { frozen, sorted: self.sorted.clone() })
    }

    /// Ends a merge: `merged` holds what `frozen` and `sorted` held.
    pub fn thaw(&mut self, merged: Sorted) {
        self.sorted = Some(Arc::new(merged));
        self.frozen = None;
    }

    /// Ends a merge that failed: its entries return to the overlay.
    pub fn thaw_failed(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            for (oid, position) in frozen.iter() {
                self.overlay.entry(*oid).or_insert(*position);
            }
        }
    }
}

/// What a merge reads; needs no lock.
pub(crate) struct Merge {
    frozen: Arc<Layer>,
    sorted: Option<Arc<Sorted>>,
}

impl Merge {
    /// All entries in order of oid.
    pub fn entries(&self) -> impl Iterator<Item = (Oid, Position)> + '_ {
        let mut newer = self.frozen.iter().map(|(o, p)| (*o, *p)).peekable();
        let mut older = self.sorted.iter().flat_map(|s| s.iter()).peekable();
        std::iter::from_fn(move || {
            let take_newer = match (newer.peek(), older.peek()) {
                (Some((n, _)), Some((o, _))) => {
                    if n == o {
                        older.next();
                        true
                    } else {
                        n < o
                    }
                }
                (newer, _) => newer.is_some(),
            };
            if take_newer { newer.next() } else { older.next() }
        })
        .filter(|(_, position)| *position != Position(0))
    }
}

/// A file that is written from one position on, a megabyte at a time.
struct Growing {
    file: Arc<dyn File>,
    at: u64,
    buffer: Vec<u8>,
}

impl Growing {
    const PIECE: usize = 1 << 20;

    fn new(file: Arc<dyn File>, at: u64) -> Growing {
        Growing { file, at, buffer: Vec::with_capacity(Growing::PIECE) }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < Growing::PIECE {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_at(&self.buffer, self.at)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left; the file.
    fn finish(mut self) -> io::Result<Arc<dyn File>> {
        self.flush()?;
        Ok(self.file)
    }
}
