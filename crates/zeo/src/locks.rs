//! Locks per object, handed out in order of arrival.
//!
//! A transaction asks once, for all its objects. It waits in the queue of each; it is granted
//! when nothing incompatible is before it in any of them. All queues hold transactions in the same
//! order, that of arrival, so nobody ever waits in a circle.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use standby_types::Oid;

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
/// all shared; an owner stands in a queue at most once; `blocked[owner]` counts the queues in
/// which it is not granted.
pub(crate) struct Locks<T> {
    queues: HashMap<Oid, VecDeque<Waiter<T>>>,
    owners: HashMap<T, Held>,
}

struct Held {
    oids: Vec<(Oid, Mode)>,
    blocked: usize,
}

impl<T> Default for Locks<T> {
    fn default() -> Self {
        Locks { queues: HashMap::new(), owners: HashMap::new() }
    }
}

impl<T: Copy + Eq + Hash> Locks<T> {
    /// Queues `owner` for `oids`, each named once; true if it holds them all at once.
    pub fn acquire(&mut self, owner: T, oids: Vec<(Oid, Mode)>) -> bool {
        assert!(!self.owners.contains_key(&owner), "a transaction asks for its locks once");
        let mut blocked = 0;
        for (oid, mode) in &oids {
            let queue = self.queues.entry(*oid).or_default();
            let granted = match mode {
                Mode::Exclusive => queue.is_empty(),
                Mode::Shared => queue.iter().all(|w| w.granted && w.mode == Mode::Shared),
            };
            blocked += usize::from(!granted);
            queue.push_back(Waiter { owner, mode: *mode, granted });
        }
        self.owners.insert(owner, Held { oids, blocked });
        blocked == 0
    }

    /// True if `owner` holds all of `oids` in these modes or stronger ones.
    pub fn holds(&self, owner: T, oids: &[(Oid, Mode)]) -> bool {
        let Some(held) = self.owners.get(&owner) else {
            return false;
        };
        held.blocked == 0
            && oids.iter().all(|(oid, mode)| {
                self.queues.get(oid).is_some_and(|queue| {
                    queue.iter().any(|w| w.owner == owner && w.granted && w.mode >= *mode)
                })
            })
    }

    /// An object that `owner` waits for, and who is first in its queue.
    pub fn blocker(&self, owner: T) -> Option<(Oid, T)> {
        self.owners.get(&owner)?.oids.iter().find_map(|(oid, _)| {
            let queue = self.queues.get(oid)?;
            let waits = queue.iter().any(|waiter| waiter.owner == owner && !waiter.granted);
            waits.then_some((*oid, queue.front()?.owner))
        })
    }

    /// Takes `owner` out of all queues; returns those who now hold all their locks, in order of
    /// arrival as far as they met.
    pub fn release(&mut self, owner: T) -> Vec<T> {
        let Some(held) = self.owners.remove(&owner) else {
            return Vec::new();
        };
        let mut complete = Vec::new();
        for (oid, _) in held.oids {
            let Some(queue) = self.queues.get_mut(&oid) else {
                continue;
            };
            queue.retain(|w| w.owner != owner);
            if queue.is_empty() {
                self.queues.remove(&oid);
                continue;
            }
            let shared_head = queue.front().is_some_and(|w| w.mode == Mode::Shared);
            for (place, waiter) in queue.iter_mut().enumerate() {
                let may = place == 0 || (shared_head && waiter.mode == Mode::Shared);
                if !may {
                    break;
                }
                if waiter.granted {
                    continue;
                }
                waiter.granted = true;
                if let Some(held) = self.owners.get_mut(&waiter.owner) {
                    held.blocked -= 1;
                    if held.blocked == 0 {
                        complete.push(waiter.owner);
                    }
                }
            }
        }
        complete
    }

    #[cfg(test)]
    fn check(&self) {
        for queue in self.queues.values() {
            assert!(!queue.is_empty());
            let granted = queue.iter().take_while(|w| w.granted).count();
            assert!(queue.iter().skip(granted).all(|w| !w.granted));
            assert!(granted >= 1);
            let exclusive =
                queue.iter().take(granted).filter(|w| w.mode == Mode::Exclusive).count();
            assert!(exclusive == 0 || granted == 1);
        }
        for (owner, held) in &self.owners {
            let blocked = held.oids.iter().filter(|(oid, _)| {
                self.queues[oid].iter().any(|w| w.owner == *owner && !w.granted)
            });
            assert_eq!(blocked.count(), held.blocked);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::Mode::{Exclusive, Shared};
    use super::*;

    fn ask(locks: &mut Locks<u32>, owner: u32, oids: &[(u64, Mode)]) -> bool {
        let granted = locks.acquire(owner, oids.iter().map(|(o, m)| (Oid(*o), *m)).collect());
        locks.check();
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

    proptest! {
        /// Whoever asks is granted in the end, if those who are granted release.
        #[test]
        fn nobody_waits_for_ever(wishes in proptest::collection::vec(
            proptest::collection::btree_map(0u64..6, prop_oneof![Just(Shared), Just(Exclusive)], 1..4),
            1..30), order in proptest::collection::vec(any::<usize>(), 30))
        {
            let mut locks = Locks::default();
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
                locks.check();
                done += 1;
            }
            prop_assert_eq!(done, wishes.len());
            prop_assert!(locks.queues.is_empty());
        }
    }
}
