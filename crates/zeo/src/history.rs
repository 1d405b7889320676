//! Which objects the recent transactions changed: the answer to `getInvalidations`.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use standby_types::{Oid, Tid};

/// Objects that are remembered at most, over all transactions: 32 MB.
const MAX_OBJECTS: usize = 4 << 20;
/// Transactions that are remembered at most.
const MAX_TRANSACTIONS: usize = 1 << 18;

/// Transactions in order, without a gap.
///
/// Answers are exact or `None`, never a guess: a tid that is not in the history may belong to a
/// transaction that was lost, and a client that has seen it must drop its cache.
pub struct History {
    /// The last transaction before the ones remembered.
    base: Tid,
    transactions: VecDeque<(Tid, Arc<[Oid]>)>,
    objects: usize,
}

impl History {
    /// A history that begins after the transaction `base`.
    pub fn new(base: Tid) -> History {
        History { base, transactions: VecDeque::new(), objects: 0 }
    }

    /// Adds the next transaction.
    pub fn push(&mut self, tid: Tid, oids: Arc<[Oid]>) {
        assert!(tid > self.last(), "transactions come in order");
        self.objects += oids.len();
        self.transactions.push_back((tid, oids));
        while self.objects > MAX_OBJECTS || self.transactions.len() > MAX_TRANSACTIONS {
            let Some((tid, oids)) = self.transactions.pop_front() else {
                break;
            };
            self.objects -= oids.len();
            self.base = tid;
        }
    }

    /// The newest transaction.
    pub fn last(&self) -> Tid {
        self.transactions.back().map_or(self.base, |(tid, _)| *tid)
    }

    /// The objects changed after the transaction `tid`, each once; `None` if that is not known
    /// for certain.
    pub fn since(&self, tid: Tid) -> Option<(Tid, Vec<Oid>)> {
        let first = if tid == self.base {
            0
        } else {
            self.transactions.binary_search_by_key(&tid, |(tid, _)| *tid).ok()? + 1
        };
        let oids: BTreeSet<Oid> =
            self.transactions.range(first..).flat_map(|(_, oids)| oids.iter().copied()).collect();
        Some((self.last(), oids.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_exact_or_none() {
        let mut history = History::new(Tid(5));
        for tid in [10, 20, 30] {
            history.push(Tid(tid), Arc::from([Oid(tid), Oid(1)]));
        }
        assert_eq!(history.since(Tid(5)), Some((Tid(30), vec![Oid(1), Oid(10), Oid(20), Oid(30)])));
        assert_eq!(history.since(Tid(20)), Some((Tid(30), vec![Oid(1), Oid(30)])));
        assert_eq!(history.since(Tid(30)), Some((Tid(30), vec![])));
        for unknown in [4, 6, 15, 31] {
            assert_eq!(history.since(Tid(unknown)), None);
        }
    }

    #[test]
    fn old_transactions_are_forgotten_first() {
        let mut history = History::new(Tid(0));
        let many: Arc<[Oid]> = (0..MAX_OBJECTS as u64 / 2).map(Oid).collect();
        for tid in 1..=3 {
            history.push(Tid(tid), many.clone());
        }
        assert_eq!(history.since(Tid(0)), None);
        assert!(history.since(Tid(1)).is_some());
    }
}
