//! What a node takes from its machine: the time, randomness, threads, sockets. Files are
//! [`standby_types::Disk`]'s.
//!
//! Built with the feature `simulated`, a node takes all of it from a simulator: one thread runs
//! several nodes, and a seed decides what happens, and when.

pub(crate) mod crash_notes;
pub(crate) mod free_room;
pub(crate) mod random;
#[cfg(not(feature = "simulated"))]
mod real;
#[cfg(not(feature = "simulated"))]
pub(crate) mod silence;
#[cfg(feature = "simulated")]
pub mod simulated;
pub(crate) mod watchdog;

#[cfg(not(feature = "simulated"))]
use real as chosen;
#[cfg(feature = "simulated")]
use simulated as chosen;

use tokio::sync::watch;

pub(crate) use chosen::{
    Lock, TcpListener, TcpStream, apart, begins_tls, deliver, descriptors, device, drain, every,
    fill_random, listen, listen_everywhere, lock_file, memory, queue, send_blocking,
    spawn_blocking, temporary_file, thread, wall_clock,
};
pub use chosen::{ask_for_signs, end_when_silent, free_room};
/// A moment of the monotonic clock.
pub(crate) use tokio::time::Instant;

/// What a node's beginning takes from here.
pub(crate) fn for_start() -> standby_replica::start::Platform {
    standby_replica::start::Platform { wall_clock, fill_random, temporary_file }
}

/// Work that is done beside its caller's: it holds the sender, and drops it however it ends.
pub(crate) struct Job(watch::Receiver<()>);

impl Job {
    /// True if it is done, or has panicked.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.has_changed().is_err()
    }

    /// Waits until it is done, or has panicked.
    pub(crate) async fn join(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

/// Does work on a thread of its own.
pub(crate) fn background(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<Job> {
    let (running, ended) = watch::channel(());
    chosen::background(name, move || {
        let _running = running;
        work();
    })?;
    Ok(Job(ended))
}

#[cfg(all(test, not(feature = "simulated")))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_ends_also_if_it_panics() {
        for panics in [false, true] {
            let job = background("job", move || assert!(!panics, "as wanted by the test")).unwrap();
            while !job.is_finished() {
                tokio::task::yield_now().await;
            }
            job.join().await;
        }
    }
}
