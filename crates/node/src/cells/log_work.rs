//! What the log's thread is asked to do, and since when it has been busy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use standby_consensus::Batch;
use standby_types::LogIndex;

/// What the thread is asked to do.
pub(crate) enum LogWork {
    Persist(Batch),
    /// Remove what is not needed any more.
    Purge(LogIndex),
}

/// Since when the disk has been busy with one write of the log; a monotonic time in nanoseconds, 0
/// if it is not.
#[derive(Default)]
pub(crate) struct Busy(AtomicU64);

impl Busy {
    /// A write begins, or has ended.
    pub(crate) fn set(&self, since: Option<Duration>) {
        let nanos = since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0).max(1));
        self.0.store(nanos, Ordering::Relaxed);
    }

    /// How long the write takes already.
    pub(crate) fn for_how_long(&self, now: Duration) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => now.saturating_sub(Duration::from_nanos(since)),
        }
    }
}
