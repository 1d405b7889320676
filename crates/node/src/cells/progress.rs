//! How far long work is, for people.

use std::sync::atomic::{AtomicU32, Ordering};

/// How far a pack is, for people.
pub(crate) struct Progress(AtomicU32);

const IDLE: u32 = u32::MAX;

impl Default for Progress {
    fn default() -> Self {
        Progress(AtomicU32::new(IDLE))
    }
}

impl Progress {
    /// Percent; `None` if no pack is under way.
    pub(crate) fn percent(&self) -> Option<u32> {
        Some(self.0.load(Ordering::Relaxed)).filter(|percent| *percent != IDLE)
    }

    /// Notes how far it is.
    pub(crate) fn set(&self, percent: Option<u32>) {
        self.0.store(percent.unwrap_or(IDLE), Ordering::Relaxed);
    }
}
