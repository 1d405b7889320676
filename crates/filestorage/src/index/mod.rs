//! oid → position of the newest record.
//!
//! Layers, looked through from the newest: `overlay` (a tree in memory: what was committed lately),
//! `layers` (former overlays, and transactions of very many objects), `frozen` (layers that are
//! just being merged into a file), `sorted` (an immutable file, mapped). Position 0 in a layer says
//! that the object is not there, whatever the layers below say.
//!
//! The index repeats what `Data.fs` says. It can be thrown away at any time.

mod layer;
mod python;
mod sorted;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use standby_types::disk::{Open, parent};
use standby_types::{Disk, File, Oid, Position};

pub(crate) use layer::Entry;
use layer::{Layer, merged};
pub(crate) use python::{python_index_path, write_python_index};
pub(crate) use sorted::Sorted;

#[derive(Default)]
pub(crate) struct Index {
    overlay: BTreeMap<Oid, Position>,
    /// The newest one comes last.
    layers: Vec<Arc<Layer>>,
    /// `None` unless a merge runs.
    frozen: Option<Vec<Arc<Layer>>>,
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
            .or_else(|| self.below().find_map(|layer| layer.get(oid)))
            .or_else(|| self.sorted.as_ref()?.get(oid));
        found.filter(|position| *position != Position(0))
    }

    /// The layers below the overlay, the newest one first.
    fn below(&self) -> impl Iterator<Item = &Layer> {
        self.frozen.iter().flatten().chain(&self.layers).rev().map(|layer| &**layer)
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

    /// Inserts very many entries in no time: they ascend, each oid once, and `new` of them are not
    /// there yet.
    pub fn insert_many(&mut self, entries: Vec<Entry>, new: u64) {
        debug_assert!(entries.is_sorted_by(|(one, _), (next, _)| one < next), "oids ascend");
        self.push_overlay();
        self.layers.push(Arc::new(Layer::Many(entries)));
        self.count += new;
    }

    fn push_overlay(&mut self) {
        if !self.overlay.is_empty() {
            self.layers.push(Arc::new(Layer::Tree(std::mem::take(&mut self.overlay))));
        }
    }

    pub fn len(&self) -> u64 {
        self.count
    }

    /// The first object at or above `oid`.
    pub fn at_or_above(&self, oid: Oid) -> Option<(Oid, Position)> {
        let mut from = oid;
        loop {
            let overlay = self.overlay.range(from..).next().map(|(oid, _)| *oid);
            let below = self.below().filter_map(|layer| layer.at_or_above(from));
            let sorted = self.sorted.as_ref().and_then(|sorted| sorted.at_or_above(from));
            let oid = below.chain(overlay).chain(sorted).min()?;
            if let Some(position) = self.get(oid) {
                return Some((oid, position));
            }
            from = Oid(oid.0.checked_add(1)?);
        }
    }

    /// The highest oid that any layer names.
    pub fn highest(&self) -> Option<Oid> {
        let overlay = self.overlay.keys().next_back().copied();
        let sorted = self.sorted.as_ref().and_then(|sorted| sorted.highest());
        self.below().filter_map(Layer::highest).chain(overlay).chain(sorted).max()
    }

    /// Entries in memory that a merge would move to a file.
    pub fn overlay_len(&self) -> usize {
        self.overlay.len() + self.layers.iter().map(|layer| layer.len()).sum::<usize>()
    }

    /// The file's entries, if they are all there are: a merge was the last thing that happened.
    pub fn merged(&self) -> Option<Arc<Sorted>> {
        let all = self.overlay.is_empty() && self.layers.is_empty() && self.frozen.is_none();
        self.sorted.clone().filter(|_| all)
    }

    /// Starts a merge; `None` while another one runs.
    pub fn freeze(&mut self) -> Option<Merge> {
        if self.frozen.is_some() {
            return None;
        }
        self.push_overlay();
        let frozen = std::mem::take(&mut self.layers);
        self.frozen = Some(frozen.clone());
        Some(Merge { frozen, sorted: self.sorted.clone() })
    }

    /// Ends a merge: `merged` holds what `frozen` and `sorted` held.
    pub fn thaw(&mut self, merged: Sorted) {
        self.sorted = Some(Arc::new(merged));
        self.frozen = None;
    }

    /// Ends a merge that failed: its entries stay in memory, as one layer ([`Merge::one_layer`]),
    /// however often that happens.
    pub fn thaw_failed(&mut self, frozen: Layer) {
        self.frozen = None;
        self.layers.insert(0, Arc::new(frozen));
    }
}

/// What a merge reads; needs no lock.
pub(crate) struct Merge {
    frozen: Vec<Arc<Layer>>,
    sorted: Option<Arc<Sorted>>,
}

impl Merge {
    /// All entries in order of oid.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let sorted = self.sorted.iter().flat_map(|sorted| sorted.iter());
        self.above(sorted).filter(|(_, position)| *position != Position(0))
    }

    /// What was in memory.
    pub fn one_layer(&self) -> Layer {
        Layer::Many(self.above(std::iter::empty()).collect())
    }

    /// The entries in memory on top of others.
    fn above<'a>(
        &'a self,
        below: impl Iterator<Item = Entry> + 'a,
    ) -> impl Iterator<Item = Entry> + 'a {
        let below: Box<dyn Iterator<Item = Entry> + 'a> = Box::new(below);
        let layers = self.frozen.iter();
        layers.fold(below, |older, layer| Box::new(merged(layer.iter(), older)))
    }
}

/// Writes a file, durably, in the place of another one that may be there. Nothing is left of one
/// that cannot be written.
fn write_in_place(
    disk: &dyn Disk,
    temporary: &Path,
    path: &Path,
    write: impl FnOnce(Arc<dyn File>) -> io::Result<()>,
) -> io::Result<()> {
    let written = disk.open(temporary, Open::Create).and_then(|file| {
        file.set_len(0)?;
        write(file.clone())?;
        file.sync()
    });
    if let Err(error) = written {
        let _ = disk.remove(temporary);
        return Err(error);
    }
    disk.rename(temporary, path)?;
    disk.sync_dir(parent(path))
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
}

#[cfg(test)]
mod tests;
