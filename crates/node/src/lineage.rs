//! Timelines: which history of the cluster a node has.
//!
//! ```text
//! timeline 1 ── a ── b ── c ── d ── e          what nobody of the promoted group had is lost
//!                    │
//!                  fork ── f ── g ── h         timeline 2; f is empty, with a tid above e's
//! ```
//!
//! A forced promotion begins a timeline. Raft orders everything within one timeline and nothing across two: nodes
//! of different timelines exchange no messages of consensus. Who meets a node whose lineage goes on where its own
//! ends comes over to it: see `rewind.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_consensus::Membership;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Departure {
    /// The last transaction of the former timeline that the new one has.
    after: u64,
    /// The first one of the new timeline.
    first: u64,
}

impl Fork {
    /// A fork; `storages` gives the last transaction of the former timeline and the first of the new one.
    pub fn new(
        id: String,
        node: String,
        at: u64,
        storages: impl IntoIterator<Item = (String, (Tid, Tid))>,
    ) -> Fork {
        let departure = |(after, first): (Tid, Tid)| Departure { after: after.0, first: first.0 };
        let storages = storages.into_iter().map(|(name, tids)| (name, departure(tids))).collect();
        Fork { id, node, at, storages }
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
    /// The first tid of the new timeline, in a storage whose last one is `last`: above all that the former primary can
    /// have given out.
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

    /// The last transaction of a storage that may be in both histories; those up to it are the same.
    pub fn last_in_common(&self, other: &Lineage, storage: &str) -> Tid {
        let common = self.forks_in_common(other);
        let departs = |lineage: &Lineage| {
            let departure = lineage.0.get(common)?.storages.get(storage)?;
            Some(Tid(departure.after))
        };
        let departures = departs(self).into_iter().chain(departs(other));
        departures.min().unwrap_or(Tid::MAX)
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
            let tids = (Tid(*after), Tid(after + 50));
            Fork::new(id.to_string(), "n4".into(), 0, [("1".to_owned(), tids)])
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
        assert_eq!(first.last_in_common(&third, "1"), Tid(100));
        assert_eq!(second.last_in_common(&third, "1"), Tid(300));
        assert_eq!(second.last_in_common(&other, "1"), Tid(100));
        assert_eq!(third.last_in_common(&third, "1"), Tid::MAX);
        assert_eq!(first.last_in_common(&third, "another"), Tid::MAX);
        assert_eq!((first.first("1"), third.first("1")), (Tid::NONE, Tid(350)));
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
