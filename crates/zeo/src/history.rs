//! Which objects the recent transactions changed: the answer to `getInvalidations`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use standby_types::time::{tid_at, time_of};
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
    retention: Retention,
}

/// What is remembered at least, and no more than that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// So many transactions; `None`: as many as fit.
    pub transactions: Option<usize>,
    /// And all that are not older than this.
    pub age: Duration,
}

impl History {
    /// A history that begins after the transaction `base`.
    pub fn new(base: Tid, retention: Retention) -> History {
        History { base, transactions: VecDeque::new(), objects: 0, retention }
    }

    /// Forgets what need not be remembered. `now` is the tid of this moment.
    pub fn forget(&mut self, now: Tid) {
        let Some(least) = self.retention.transactions else { return };
        let oldest = tid_at(time_of(now).saturating_sub(self.retention.age));
        while self.transactions.len() > least
            && self.transactions.front().is_some_and(|(tid, _)| *tid < oldest)
        {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some((tid, oids)) = self.transactions.pop_front() {
            self.objects -= oids.len();
            self.base = tid;
        }
    }

    /// Adds the next transaction.
    pub fn push(&mut self, tid: Tid, oids: Arc<[Oid]>) {
        assert!(tid > self.last(), "transactions come in order");
        self.objects += oids.len();
        self.transactions.push_back((tid, oids));
        while self.objects > MAX_OBJECTS || self.transactions.len() > MAX_TRANSACTIONS {
            self.pop();
        }
    }

    /// The newest transaction.
    pub fn last(&self) -> Tid {
        self.transactions.back().map_or(self.base, |(tid, _)| *tid)
    }

    /// What was changed after the transaction `tid`; `None` if that is not known for certain.
    pub fn since(&self, tid: Tid) -> Option<Changes> {
        let first = if tid == self.base {
            0
        } else {
            self.transactions.binary_search_by_key(&tid, |(tid, _)| *tid).ok()? + 1
        };
        let transactions = self.transactions.range(first..).map(|(_, oids)| oids.clone());
        Some(Changes { last: self.last(), transactions: transactions.collect() })
    }
}

/// What some transactions changed. Cheap to have; to go through millions of objects takes seconds.
#[derive(Clone, Debug)]
pub struct Changes {
    /// The newest transaction.
    pub last: Tid,
    transactions: Vec<Arc<[Oid]>>,
}

impl Changes {
    /// The objects, each once.
    pub fn oids(&self) -> Vec<Oid> {
        let mut oids: Vec<Oid> =
            self.transactions.iter().flat_map(|oids| oids.iter().copied()).collect();
        oids.sort_unstable();
        oids.dedup();
        oids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_exact_or_none() {
        let mut history = History::new(Tid(5), Retention::default());
        for tid in [10, 20, 30] {
            history.push(Tid(tid), Arc::from([Oid(tid), Oid(1)]));
        }
        let since = |tid| history.since(Tid(tid)).map(|changes| (changes.last, changes.oids()));
        assert_eq!(since(5), Some((Tid(30), vec![Oid(1), Oid(10), Oid(20), Oid(30)])));
        assert_eq!(since(20), Some((Tid(30), vec![Oid(1), Oid(30)])));
        assert_eq!(since(30), Some((Tid(30), vec![])));
        for unknown in [4, 6, 15, 31] {
            assert_eq!(since(unknown), None);
        }
    }

    #[test]
    fn a_limit_keeps_what_is_young() {
        let at = |seconds| tid_at(Duration::from_secs(seconds));
        let retention = Retention { transactions: Some(2), age: Duration::from_secs(60) };
        let mut history = History::new(Tid(0), retention);
        for seconds in [1000, 1050, 1100, 1110, 1120] {
            history.push(at(seconds), Arc::from([Oid(seconds)]));
            history.forget(at(seconds));
        }
        // 1050 is 70 seconds old, and there are more than two after it.
        assert!(history.since(at(1000)).is_none());
        assert!(history.since(at(1050)).is_some());
        history.forget(at(5000));
        assert_eq!(history.since(at(1100)).map(|changes| changes.oids().len()), Some(2));
        assert!(history.since(at(1050)).is_none());
    }

    #[test]
    fn old_transactions_are_forgotten_first() {
        let mut history = History::new(Tid(0), Retention::default());
        let many: Arc<[Oid]> = (0..MAX_OBJECTS as u64 / 2).map(Oid).collect();
        for tid in 1..=3 {
            history.push(Tid(tid), many.clone());
        }
        assert!(history.since(Tid(0)).is_none());
        assert!(history.since(Tid(1)).is_some());
    }
}
