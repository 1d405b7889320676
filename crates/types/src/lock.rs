//! Locks that outlive a panic: what they guard is replaced or changed in one step.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock, also if another thread has panicked while it held it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
