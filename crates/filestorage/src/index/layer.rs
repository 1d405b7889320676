//! Entries in memory that nobody changes any more.

use std::collections::BTreeMap;

use standby_types::{Oid, Position};

/// An object and its newest record.
pub(crate) type Entry = (Oid, Position);

pub(crate) enum Layer {
    /// What was an overlay.
    Tree(BTreeMap<Oid, Position>),
    /// Very many entries that came together, ascending.
    Many(Vec<Entry>),
}

impl Layer {
    pub fn get(&self, oid: Oid) -> Option<Position> {
        match self {
            Layer::Tree(tree) => tree.get(&oid).copied(),
            Layer::Many(entries) => {
                let at = entries.binary_search_by_key(&oid, |(oid, _)| *oid).ok()?;
                Some(entries[at].1)
            }
        }
    }

    pub fn at_or_above(&self, from: Oid) -> Option<Oid> {
        match self {
            Layer::Tree(tree) => tree.range(from..).next().map(|(oid, _)| *oid),
            Layer::Many(entries) => {
                let at = entries.partition_point(|(oid, _)| *oid < from);
                entries.get(at).map(|(oid, _)| *oid)
            }
        }
    }

    pub fn highest(&self) -> Option<Oid> {
        match self {
            Layer::Tree(tree) => tree.keys().next_back().copied(),
            Layer::Many(entries) => entries.last().map(|(oid, _)| *oid),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Layer::Tree(tree) => tree.len(),
            Layer::Many(entries) => entries.len(),
        }
    }

    pub fn iter(&self) -> Box<dyn Iterator<Item = Entry> + '_> {
        match self {
            Layer::Tree(tree) => Box::new(tree.iter().map(|(oid, position)| (*oid, *position))),
            Layer::Many(entries) => Box::new(entries.iter().copied()),
        }
    }
}

/// Two ascending sequences as one; of two entries for one object the newer counts.
pub(super) fn merged(
    newer: impl Iterator<Item = Entry>,
    older: impl Iterator<Item = Entry>,
) -> impl Iterator<Item = Entry> {
    let (mut newer, mut older) = (newer.peekable(), older.peekable());
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
}
