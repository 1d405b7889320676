//! The memory that clients can fill: messages that are being received, transactions, replies that
//! are queued. Each session's part is counted, to 64 KB. When all sessions together hold more than
//! half of what they may, each has to wait for its replies earlier; when they hold more than all of
//! it, the session that holds most ends, and the others go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, Semaphore};

use crate::platform;

/// Of the machine's memory, that much is for clients.
const PART: u64 = 4;
/// If the system does not say how much memory there is.
const UNKNOWN: u64 = 1 << 30;
/// Less is not counted: most sessions hold nothing for longer than a moment, and pay nothing for
/// the count.
const UNIT: usize = 64 << 10;
/// Long answers of a kind that are made at a time, for all clients together.
const TURNS: usize = 4;

/// See the module.
pub struct Memory {
    limit: usize,
    used: AtomicUsize,
    over: Notify,
    /// Turns to make a long answer, which is counted only when it is made: one for each kind, so
    /// that the slow kind does not hold up the other.
    invalidations: Semaphore,
    undo_logs: Semaphore,
}

impl Memory {
    /// All sessions may hold `limit` bytes, or a quarter of the machine's memory.
    pub fn new(limit: Option<u64>) -> Arc<Memory> {
        let limit = limit.unwrap_or_else(|| platform::memory().unwrap_or(UNKNOWN) / PART);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let [invalidations, undo_logs] = [TURNS; 2].map(Semaphore::new);
        let (used, over) = (AtomicUsize::new(0), Notify::new());
        Arc::new(Memory { limit, used, over, invalidations, undo_logs })
    }

    /// The turn of an answer to `getInvalidations`, for as long as it is held.
    pub async fn invalidations_turn(&self) -> impl Sized + '_ {
        self.invalidations.acquire().await
    }

    /// The turn of an answer about the undo log.
    pub async fn undo_log_turn(&self) -> impl Sized + '_ {
        self.undo_logs.acquire().await
    }

    /// What all sessions may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns when all sessions together have come to hold too much.
    pub async fn exceeds(&self) {
        self.over.notified().await;
    }

    /// True if whoever can wait should.
    fn is_scarce(&self) -> bool {
        self.used() > self.limit / 2
    }

    /// True if a session has to end.
    pub fn is_over(&self) -> bool {
        self.used() > self.limit
    }
}

/// What one owner holds of it. Given back when it is dropped.
#[derive(Default)]
pub(crate) struct Share {
    /// Without it nothing is counted.
    of: Option<Arc<Memory>>,
    held: AtomicUsize,
}

impl Share {
    /// Nothing yet.
    pub(crate) fn of(memory: &Arc<Memory>) -> Share {
        Share { of: Some(memory.clone()), held: AtomicUsize::new(0) }
    }

    /// Its owner holds so much now. Not by several threads at the same time.
    pub(crate) fn set(&self, bytes: usize) {
        let Some(memory) = &self.of else { return };
        let now = bytes - bytes % UNIT;
        let before = self.held.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        self.held.store(now, Ordering::Relaxed);
        if now < before {
            memory.used.fetch_sub(before - now, Ordering::Relaxed);
        } else {
            memory.used.fetch_add(now - before, Ordering::Relaxed);
            if memory.is_over() {
                memory.over.notify_one();
            }
        }
    }

    pub(crate) fn get(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn is_scarce(&self) -> bool {
        self.of.as_ref().is_some_and(|memory| memory.is_scarce())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_counted_and_given_back() {
        let memory = Memory::new(Some(10 * UNIT as u64));
        let (one, other) = (Share::of(&memory), Share::of(&memory));
        one.set(UNIT - 1);
        assert_eq!(memory.used(), 0);
        one.set(3 * UNIT + 7);
        other.set(2 * UNIT);
        assert_eq!((memory.used(), one.get(), one.is_scarce()), (5 * UNIT, 3 * UNIT, false));
        other.set(4 * UNIT);
        assert!(one.is_scarce() && !memory.is_over());
        other.set(8 * UNIT);
        assert!(memory.is_over());
        drop(other);
        assert_eq!(memory.used(), 3 * UNIT);
        one.set(0);
        assert_eq!(memory.used(), 0);
        assert!(!Share::default().is_scarce());
    }

    #[test]
    fn the_machine_says_how_much_memory_it_has() {
        assert!(Memory::new(None).limit() > 1 << 20);
    }
}
