//! The role of this node, as those see it who serve clients.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use standby_types::{Mutation, mutation};

/// What tasks that serve clients must know of the node's role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServingState {
    /// This node is primary and may serve.
    pub serves: bool,
    /// Another node is primary; its peer address.
    pub other_primary: Option<String>,
    /// Read-only clients can be served.
    pub ready: bool,
}

/// Until when a primary may serve its clients without hearing from a majority.
///
/// Looked at by a thread that does nothing else, and before each request.
#[derive(Default)]
pub struct Lease {
    serves: AtomicBool,
    until: AtomicU64,
}

impl Lease {
    /// Sets it; `until` is a monotonic time.
    pub fn set(&self, serves: bool, until: Duration) {
        self.until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
        self.serves.store(serves, Ordering::Release);
    }

    /// True if this node serves and nobody else can be serving.
    pub fn holds(&self, now: Duration) -> bool {
        let stale = mutation::on(Mutation::StalePrimaryAnswers);
        self.serves.load(Ordering::Acquire)
            && (stale || u128::from(self.until.load(Ordering::Acquire)) > now.as_nanos())
    }

    /// True if it serves, but should not any more.
    pub fn overdue(&self, now: Duration) -> bool {
        self.serves.load(Ordering::Acquire) && !self.holds(now)
    }
}
