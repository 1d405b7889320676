//! Timelines: which history of the cluster a node has.
//!
//! ```text
//! timeline 1 ── a ── b ── c ── d ── e          what nobody of the promoted group had is lost
//!                    │
//!                  fork ── f ── g ── h         timeline 2; f is empty, with a tid above e's
//! ```
//!
//! A forced promotion begins a timeline. Raft orders everything within one timeline and nothing
//! across two: nodes of different timelines exchange no messages of consensus. Who meets a node
//! whose lineage goes on where its own ends rejoins on it: see `change_timeline.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_consensus::Membership;
use standby_filestorage::{Reader, StorageError};
use standby_types::Tid;
use standby_types::time::{tid_at, time_of};

/// The beginning of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// Drawn at random; the timeline's name.
    pub id: String,
    /// The node that was promoted.
    pub node: String,
    /// When, in seconds since 1970.
    pub at: u64,
    storages: BTreeMap<String, Departure>,
}

/// Where a storage's history leaves the former timeline.
///
/// The promoted node counts all that its log has. What it did not know to be committed may have
/// been replaced by other transactions, of which it never heard: with later tids or, if clocks
/// differ, with earlier ones or the same. So it is not the tid alone that tells what both timelines
/// have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    /// The last transaction of the former timeline that the new one has.
    after: u64,
    /// The first one of the new timeline.
    first: u64,
    /// The last transaction that was known to be committed; `after` where that was not noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certain: Option<u64>,
    /// Those that follow it, up to `after`: tids and checksums.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tail: Vec<(u64, u32)>,
}

/// So many transactions of a departure's tail are noted. Whoever has more of them keeps those as
/// lost.
const TAIL: usize = 1000;

impl Departure {
    /// The history of `reader` is left at its end, and goes on with `first`; it is known to be
    /// committed up to `certain`.
    pub fn new(reader: &Reader, certain: Tid, first: Tid) -> Result<Departure, StorageError> {
        let (after, mut tail) = (reader.last_tid(), Vec::new());
        let mut transactions = reader.transactions(certain.next(), after)?;
        while tail.len() < TAIL
            && let Some(stored) = transactions.advance()?
        {
            tail.push((stored.meta.tid.0, transactions.checksum(&stored)?));
        }
        Ok(Departure { after: after.0, first: first.0, certain: Some(certain.0), tail })
    }

    fn certain(&self) -> u64 {
        self.certain.unwrap_or(self.after)
    }
}

/// What two histories have in common in a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Common {
    /// All up to this one.
    pub certain: Tid,
    tail: Vec<(u64, u32)>,
}

impl Common {
    /// The last transaction of a file that both histories have, or one after which the file has
    /// none that they have.
    pub fn last(&self, reader: &Reader) -> Result<Tid, StorageError> {
        let mut last = self.certain;
        if last >= reader.last_tid() {
            return Ok(last);
        }
        let mut transactions = reader.transactions(last.next(), Tid::MAX)?;
        while let Some(stored) = transactions.advance()? {
            let tid = stored.meta.tid;
            if !self.tail.contains(&(tid.0, transactions.checksum(&stored)?)) {
                break;
            }
            last = tid;
        }
        Ok(last)
    }
}

impl Fork {
    /// A fork, with the departure of each storage.
    pub fn new(
        id: String,
        node: String,
        at: u64,
        storages: impl IntoIterator<Item = (String, Departure)>,
    ) -> Fork {
        Fork { id, node, at, storages: storages.into_iter().collect() }
    }

    /// The last transaction of the former timeline that the new one has, by storage.
    pub fn ends(&self) -> impl Iterator<Item = (&str, Tid)> {
        self.storages.iter().map(|(name, departure)| (name.as_str(), Tid(departure.after)))
    }
}

/// The forks that lie behind a node. Empty on the first timeline.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lineage(Vec<Fork>);

/// What a forced promotion is to make of a node's state.
pub struct Promotion {
    /// The new timeline's name.
    pub id: String,
    /// The node that is promoted.
    pub node: String,
    /// The time of day, since 1970.
    pub now: Duration,
    /// The groups that vote from now on; `None` for those that do already.
    pub failover: Option<BTreeSet<String>>,
    /// The last transactions that any node has ever spoken of, by storage.
    pub heard_of: BTreeMap<String, Tid>,
    /// The members from now on.
    pub membership: Membership,
}

/// The longest time by which the clock of a former primary may be ahead of this node's.
const AHEAD: Duration = Duration::from_secs(10);

impl Promotion {
    /// The first tid of the new timeline, in a storage whose last one is `last`: above all that the
    /// former primary can have given out.
    pub fn first(&self, storage: &str, last: Tid) -> Tid {
        let heard_of = self.heard_of.get(storage).copied().unwrap_or(Tid::NONE);
        let latest = self.now.max(time_of(last.max(heard_of)));
        tid_at(latest + AHEAD)
    }
}

/// How the histories of two nodes relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// They are of one timeline.
    Same,
    /// The other's timeline goes on where this one was left.
    Older,
    /// This timeline goes on where the other's was left.
    Newer,
    /// Each has gone on by itself: there were two forced promotions.
    Diverged,
}

impl Lineage {
    /// The number of the timeline, from 1 on.
    pub fn timeline(&self) -> u64 {
        self.0.len() as u64 + 1
    }

    /// The forks, oldest first.
    pub fn forks(&self) -> &[Fork] {
        &self.0
    }

    /// True if the timeline with this name is this one, or lies behind it.
    pub fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|fork| fork.id == name)
    }

    /// The name of the timeline.
    pub fn name(&self) -> &str {
        self.0.last().map_or("the first", |fork| &fork.id)
    }

    /// Begins a timeline.
    pub fn begin(&mut self, fork: Fork) {
        self.0.push(fork);
    }

    /// How this history relates to another one.
    pub fn relation(&self, other: &Lineage) -> Relation {
        let common = self.forks_in_common(other);
        match (common == self.0.len(), common == other.0.len()) {
            (true, true) => Relation::Same,
            (true, false) => Relation::Older,
            (false, true) => Relation::Newer,
            (false, false) => Relation::Diverged,
        }
    }

    /// What this history of a storage and another one have in common.
    pub fn common(&self, other: &Lineage, storage: &str) -> Common {
        let forks = self.forks_in_common(other);
        let departure = |lineage: &Lineage| lineage.0.get(forks)?.storages.get(storage).cloned();
        match (departure(self), departure(other)) {
            (None, None) => Common { certain: Tid::MAX, tail: Vec::new() },
            (None, Some(left)) => Common { certain: Tid(left.certain()), tail: left.tail },
            // Two promotions: what only one of them was certain of may not be the same.
            (Some(left), other) => {
                let certain = other.map_or(u64::MAX, |other| other.certain());
                Common { certain: Tid(left.certain().min(certain)), tail: Vec::new() }
            }
        }
    }

    /// True if a transaction with this tid may not be the one that clients of a former timeline saw
    /// under it.
    pub fn is_doubtful(&self, storage: &str, tid: Tid) -> bool {
        let departures = self.0.iter().filter_map(|fork| fork.storages.get(storage));
        departures.into_iter().any(|left| left.certain() < tid.0 && tid.0 <= left.after)
    }

    /// The first transaction of a storage on this timeline; [`Tid::NONE`] on the first timeline.
    pub fn first(&self, storage: &str) -> Tid {
        let departure = self.0.last().and_then(|fork| fork.storages.get(storage));
        departure.map_or(Tid::NONE, |departure| Tid(departure.first))
    }

    fn forks_in_common(&self, other: &Lineage) -> usize {
        self.0.iter().zip(&other.0).take_while(|(a, b)| a.id == b.id).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lineage(forks: &[(&str, u64)]) -> Lineage {
        let fork = |(id, after): &(&str, u64)| {
            let (first, certain, tail) = (after + 50, None, Vec::new());
            let departure = Departure { after: *after, first, certain, tail };
            Fork::new(id.to_string(), "n4".into(), 0, [("1".to_owned(), departure)])
        };
        Lineage(forks.iter().map(fork).collect())
    }

    #[test]
    fn histories_are_compared_by_their_forks() {
        let (first, second) = (lineage(&[]), lineage(&[("a", 100)]));
        let (third, other) = (lineage(&[("a", 100), ("b", 300)]), lineage(&[("c", 200)]));
        assert_eq!(first.relation(&first), Relation::Same);
        assert_eq!(first.relation(&third), Relation::Older);
        assert_eq!(third.relation(&second), Relation::Newer);
        assert_eq!(second.relation(&other), Relation::Diverged);
        assert_eq!((first.timeline(), third.timeline()), (1, 3));
        // Who missed two promotions goes back to the first of them.
        assert_eq!(first.common(&third, "1").certain, Tid(100));
        assert_eq!(second.common(&third, "1").certain, Tid(300));
        assert_eq!(second.common(&other, "1").certain, Tid(100));
        assert_eq!(third.common(&third, "1").certain, Tid::MAX);
        assert_eq!(first.common(&third, "another").certain, Tid::MAX);
        assert_eq!((first.first("1"), third.first("1")), (Tid::NONE, Tid(350)));
    }

    #[test]
    fn nobody_vouches_for_what_the_promoted_node_was_not_certain_of() {
        let mut lineage = lineage(&[("a", 100)]);
        assert!(!lineage.is_doubtful("1", Tid(100)));
        lineage.0[0].storages.get_mut("1").unwrap().certain = Some(90);
        let doubtful = |tid| lineage.is_doubtful("1", Tid(tid));
        assert_eq!([90, 91, 100, 101].map(doubtful), [false, true, true, false]);
    }

    #[test]
    fn a_timeline_begins_above_all_that_the_former_one_can_have() {
        let at = |seconds| tid_at(Duration::from_secs(seconds));
        let promotion = Promotion {
            id: "a".into(),
            node: "n".into(),
            now: Duration::from_secs(2_000_000_000),
            failover: None,
            heard_of: BTreeMap::from([("1".to_owned(), at(2_000_000_100))]),
            membership: Membership::default(),
        };
        // The fraction of a minute goes through floating point.
        let is = |tid: Tid, seconds| tid.0.abs_diff(at(seconds).0) < 100;
        // Heard of, from a primary whose clock was ahead.
        assert!(is(promotion.first("1", at(5)), 2_000_000_110));
        // By the clock.
        assert!(is(promotion.first("2", at(5)), 2_000_000_010));
        // By what is in the file.
        assert!(is(promotion.first("2", at(2_000_000_200)), 2_000_000_210));
    }
}
