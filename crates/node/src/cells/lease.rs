//! Until when this node may serve, as those see it who serve clients.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use standby_types::{Mutation, mutation};

/// Until when a primary may serve its clients without hearing from a majority.
///
/// Looked at by a thread that does nothing else, and before each request.
#[derive(Default)]
pub(crate) struct Lease {
    serves: AtomicBool,
    until: AtomicU64,
}

impl Lease {
    /// Sets it, as a monotonic time; `None` if this node does not serve.
    pub(crate) fn set(&self, until: Option<Duration>) {
        if let Some(until) = until {
            let nanos = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
            self.until.store(nanos, Ordering::Release);
        }
        self.serves.store(until.is_some(), Ordering::Release);
    }

    /// True if this node serves and nobody else can be serving.
    pub(crate) fn holds(&self, now: Duration) -> bool {
        let stale = mutation::on(Mutation::StalePrimaryAnswers);
        self.serves.load(Ordering::Acquire)
            && (stale || u128::from(self.until.load(Ordering::Acquire)) > now.as_nanos())
    }

    /// True if it serves, but should not any more.
    pub(crate) fn overdue(&self, now: Duration) -> bool {
        self.serves.load(Ordering::Acquire) && !self.holds(now)
    }
}
