//! Locks per object, handed out in order of arrival.
//!
//! A transaction asks once, for all its objects. It is granted when no transaction that came before
//! it, and is still there, has an object that the two cannot share. So nobody ever waits in a
//! circle.
//!
//! Most transactions have few objects: they wait in a queue for each. One of many thousands would
//! take long to get into as many queues, and out of them, while everybody waits: it stands beside
//! them, and its sorted list is compared with the lists of the others.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

use standby_types::Oid;

/// A transaction of more objects is in no queue.
const MANY: usize = 4096;

/// Whether others may hold the object at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// The object is only checked.
    Shared,
    /// The object is written.
    Exclusive,
}

struct Waiter<T> {
    owner: T,
    mode: Mode,
    granted: bool,
}

/// Invariants: in each queue the granted entries come first, and they are either one exclusive or
/// all shared; an owner stands in a queue at most once; `blocked[owner]` counts the queues in which
/// it is not granted, and the owners before it that it meets if it, or the other one, has many
/// objects.
pub(crate) struct Locks<T> {
    queues: HashMap<Oid, VecDeque<Waiter<T>>>,
    owners: HashMap<T, Held>,
    /// Owners of many objects.
    large: Vec<T>,
    many: usize,
    arrivals: u64,
}

struct Held {
    /// Ascending, each object once.
    oids: Vec<(Oid, Mode)>,
    arrived: u64,
    blocked: usize,
}

impl<T> Default for Locks<T> {
    fn default() -> Self {
        Locks::with_many(MANY)
    }
}

impl<T> Locks<T> {
    fn with_many(many: usize) -> Locks<T> {
        let (queues, owners) = (HashMap::new(), HashMap::new());
        Locks { queues, owners, large: Vec::new(), many, arrivals: 0 }
    }
}

impl<T: Copy + Eq + Hash> Locks<T> {
    /// Queues `owner` for `oids`, which ascend, each named once; true if it holds them all at once.
    pub fn acquire(&mut self, owner: T, oids: Vec<(Oid, Mode)>) -> bool {
        assert!(!self.owners.contains_key(&owner), "a transaction asks for its locks once");
        debug_assert!(oids.is_sorted_by(|(one, _), (next, _)| one < next), "oids ascend");
        let mut blocked = 0;
        if oids.len() > self.many {
            let met = self.owners.values().filter(|held| meet(&held.oids, &oids).is_some());
            blocked += met.count();
            self.large.push(owner);
        } else {
            for (oid, mode) in &oids {
                let queue = self.queues.entry(*oid).or_default();
                let granted = match mode {
                    Mode::Exclusive => queue.is_empty(),
                    Mode::Shared => queue.iter().all(|w| w.granted && w.mode == Mode::Shared),
                };
                blocked += usize::from(!granted);
                queue.push_back(Waiter { owner, mode: *mode, granted });
            }
            let large = self.large.iter().filter_map(|large| self.owners.get(large));
            blocked += large.filter(|held| meet(&held.oids, &oids).is_some()).count();
        }
        let arrived = self.arrivals;
        self.arrivals += 1;
        self.owners.insert(owner, Held { oids, arrived, blocked });
        blocked == 0
    }

    /// True if `owner` holds all of `oids`, which ascend, in these modes or stronger ones.
    pub fn holds(&self, owner: T, oids: &[(Oid, Mode)]) -> bool {
        let Some(held) = self.owners.get(&owner).filter(|held| held.blocked == 0) else {
            return false;
        };
        let mut rest = held.oids.iter();
        oids.iter().all(|(oid, mode)| {
            let found = rest.find(|(held, _)| held >= oid);
            found.is_some_and(|(held, held_mode)| held == oid && held_mode >= mode)
        })
    }

    /// Those who have asked for locks.
    pub fn owners(&self) -> impl Iterator<Item = T> {
        self.owners.keys().copied()
    }

    /// An object that `owner` waits for, and who has come first of those whom it waits for.
    pub fn blocker(&self, owner: T) -> Option<(Oid, T)> {
        let held = self.owners.get(&owner).filter(|held| held.blocked > 0)?;
        let before = self.owners.iter().filter(|(_, other)| other.arrived < held.arrived);
        let met = before
            .filter_map(|(id, other)| Some((other.arrived, meet(&other.oids, &held.oids)?, *id)));
        met.min_by_key(|(arrived, ..)| *arrived).map(|(_, oid, owner)| (oid, owner))
    }

    /// Takes `owner` out of all queues; returns those who now hold all their locks, in order of
    /// arrival.
    pub fn release(&mut self, owner: T) -> Vec<T> {
        let Some(gone) = self.owners.remove(&owner) else {
            return Vec::new();
        };
        let mut freed = Vec::new();
        let is_large = gone.oids.len() > self.many;
        if is_large {
            self.large.retain(|large| *large != owner);
        } else {
            freed.extend(self.leave_queues(owner, &gone.oids));
        }
        let later = |id: &&T| {
            let held = self.owners.get(id).filter(|held| held.arrived > gone.arrived);
            held.is_some_and(|held| meet(&gone.oids, &held.oids).is_some())
        };
        match is_large {
            true => freed.extend(self.owners.keys().filter(later)),
            false => freed.extend(self.large.iter().filter(later)),
        }
        let mut complete = Vec::new();
        for id in freed {
            if let Some(held) = self.owners.get_mut(&id) {
                held.blocked -= 1;
                if held.blocked == 0 {
                    complete.push((held.arrived, id));
                }
            }
        }
        complete.sort_by_key(|(arrived, _)| *arrived);
        complete.into_iter().map(|(_, id)| id).collect()
    }

    /// Takes `owner` out of the queues of these objects; returns who has been granted one, once for
    /// each.
    fn leave_queues(&mut self, owner: T, oids: &[(Oid, Mode)]) -> Vec<T> {
        let mut freed = Vec::new();
        for (oid, _) in oids {
            let Some(queue) = self.queues.get_mut(oid) else {
                continue;
            };
            queue.retain(|w| w.owner != owner);
            if queue.is_empty() {
                self.queues.remove(oid);
                continue;
            }
            let shared_head = queue.front().is_some_and(|w| w.mode == Mode::Shared);
            for (place, waiter) in queue.iter_mut().enumerate() {
                let may = place == 0 || (shared_head && waiter.mode == Mode::Shared);
                if !may {
                    break;
                }
                if !std::mem::replace(&mut waiter.granted, true) {
                    freed.push(waiter.owner);
                }
            }
        }
        freed
    }

    /// Fails if an invariant does not hold. It takes long if there are many owners.
    pub fn invariants(&self) {
        for queue in self.queues.values() {
            assert!(!queue.is_empty());
            let granted = queue.iter().take_while(|w| w.granted).count();
            assert!(queue.iter().skip(granted).all(|w| !w.granted));
            assert!(granted >= 1);
            let exclusive =
                queue.iter().take(granted).filter(|w| w.mode == Mode::Exclusive).count();
            assert!(exclusive == 0 || granted == 1);
            let owners: HashSet<T> = queue.iter().map(|w| w.owner).collect();
            assert_eq!(owners.len(), queue.len(), "an owner stands in a queue once");
        }
        for (owner, held) in &self.owners {
            let before = self.owners.values().filter(|other| other.arrived < held.arrived);
            let waits = before.into_iter().any(|other| meet(&other.oids, &held.oids).is_some());
            assert_eq!(held.blocked > 0, waits);
            let queued = held.oids.len() <= self.many;
            assert_eq!(self.large.contains(owner), !queued);
        }
    }
}

/// The first object that two transactions cannot share.
fn meet(one: &[(Oid, Mode)], other: &[(Oid, Mode)]) -> Option<Oid> {
    let (few, mut many) = if one.len() < other.len() { (one, other) } else { (other, one) };
    for (oid, mode) in few {
        let before = |(other, _): &(Oid, Mode)| other < oid;
        let skipped = match many.len() / 16 > few.len() {
            true => many.partition_point(before),
            false => many.iter().take_while(|entry| before(entry)).count(),
        };
        many = &many[skipped..];
        match many.first() {
            None => break,
            Some((other, other_mode)) => {
                if other == oid && (*mode, *other_mode) != (Mode::Shared, Mode::Shared) {
                    return Some(*oid);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::Mode::{Exclusive, Shared};
    use super::*;

    fn ask(locks: &mut Locks<u32>, owner: u32, oids: &[(u64, Mode)]) -> bool {
        let granted = locks.acquire(owner, oids.iter().map(|(o, m)| (Oid(*o), *m)).collect());
        locks.invariants();
        granted
    }

    #[test]
    fn transactions_without_common_objects_do_not_meet() {
        let mut locks = Locks::default();
        assert!(ask(&mut locks, 1, &[(1, Exclusive), (2, Exclusive)]));
        assert!(ask(&mut locks, 2, &[(3, Exclusive)]));
        assert!(!ask(&mut locks, 3, &[(2, Exclusive), (3, Exclusive)]));
        assert_eq!(locks.release(1), []);
        assert_eq!(locks.release(2), [3]);
    }

    #[test]
    fn readers_share_but_do_not_overtake_a_writer() {
        let mut locks = Locks::default();
        assert!(ask(&mut locks, 1, &[(1, Shared)]));
        assert!(ask(&mut locks, 2, &[(1, Shared)]));
        assert!(!ask(&mut locks, 3, &[(1, Exclusive)]));
        assert!(!ask(&mut locks, 4, &[(1, Shared)]));
        assert_eq!(locks.release(1), []);
        assert_eq!(locks.release(2), [3]);
        assert_eq!(locks.release(3), [4]);
    }

    #[test]
    fn leaving_the_queue_lets_the_next_one_in() {
        let mut locks = Locks::default();
        assert!(ask(&mut locks, 1, &[(1, Shared)]));
        assert!(!ask(&mut locks, 2, &[(1, Exclusive)]));
        assert!(!ask(&mut locks, 3, &[(1, Shared)]));
        assert_eq!(locks.release(2), [3]);
        assert!(locks.holds(3, &[(Oid(1), Shared)]));
        assert!(!locks.holds(3, &[(Oid(1), Exclusive)]));
    }

    #[test]
    fn one_of_many_objects_waits_and_is_waited_for() {
        let mut locks = Locks::with_many(3);
        let all: Vec<_> = (0..100).map(|oid| (oid, Exclusive)).collect();
        assert!(ask(&mut locks, 1, &[(50, Exclusive)]));
        assert!(!ask(&mut locks, 2, &all));
        assert!(!ask(&mut locks, 3, &[(7, Shared), (200, Exclusive)]));
        assert!(ask(&mut locks, 4, &[(201, Exclusive)]));
        assert!(!ask(&mut locks, 5, &all[90..]));
        assert_eq!(locks.blocker(2), Some((Oid(50), 1)));
        assert_eq!(locks.blocker(3), Some((Oid(7), 2)));
        assert_eq!(locks.release(1), [2]);
        let asked: Vec<_> = all.iter().map(|(oid, mode)| (Oid(*oid), *mode)).collect();
        assert!(locks.holds(2, &asked) && !locks.holds(5, &asked[90..]));
        assert_eq!(locks.release(2), [3, 5]);
        assert_eq!(locks.blocker(3), None);
    }

    proptest! {
        /// Whoever asks is granted in the end, if those who are granted release.
        #[test]
        fn nobody_waits_for_ever(wishes in proptest::collection::vec(
            proptest::collection::btree_map(0u64..6, prop_oneof![Just(Shared), Just(Exclusive)], 1..4),
            1..30), order in proptest::collection::vec(any::<usize>(), 30), many in 0usize..5)
        {
            let mut locks = Locks::with_many(many);
            let mut granted = Vec::new();
            for (owner, oids) in wishes.iter().enumerate() {
                let oids: &BTreeMap<u64, Mode> = oids;
                let oids: Vec<_> = oids.iter().map(|(o, m)| (*o, *m)).collect();
                if ask(&mut locks, owner as u32, &oids) {
                    granted.push(owner as u32);
                }
            }
            let mut done = 0;
            while !granted.is_empty() {
                let owner = granted.remove(order[done % order.len()] % granted.len());
                granted.extend(locks.release(owner));
                locks.invariants();
                done += 1;
            }
            prop_assert_eq!(done, wishes.len());
            prop_assert!(locks.queues.is_empty() && locks.large.is_empty());
        }
    }
}
