//! What a node takes from its machine: the time, randomness, threads, sockets. Files are [`standby_types::Disk`]'s.
//!
//! Built with the feature `simulated`, a node takes all of it from a simulator: one thread runs several nodes, and a
//! seed decides what happens, and when.

#[cfg(not(feature = "simulated"))]
mod real;
#[cfg(feature = "simulated")]
pub mod simulated;

#[cfg(not(feature = "simulated"))]
use real as chosen;
#[cfg(feature = "simulated")]
use simulated as chosen;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot};

pub use chosen::{
    Apart, Blocking, Lock, TcpListener, TcpStream, apart, device, every, fill_random, free_bytes,
    lock_file, queue, spawn_blocking, temporary_file, thread, wall_clock,
};
/// A moment of the monotonic clock.
pub use tokio::time::Instant;

/// Work that is done beside its caller's.
pub struct Job {
    finished: Arc<AtomicBool>,
    done: oneshot::Receiver<()>,
}

impl Job {
    /// True if it is done, or has panicked.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Waits until it is done, or has panicked.
    pub async fn join(self) {
        let _ = self.done.await;
    }
}

/// Says, when it is dropped, that a job has ended, in whatever way.
struct Ending(Arc<AtomicBool>, #[allow(dead_code)] oneshot::Sender<()>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Does work on a thread of its own.
pub fn background(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<Job> {
    let (sender, done) = oneshot::channel();
    let finished = Arc::<AtomicBool>::default();
    let job = Job { finished: finished.clone(), done };
    let ending = Ending(finished, sender);
    chosen::background(name, move || {
        let _ending = ending;
        work();
    })?;
    Ok(job)
}

/// Gives a message to a link; it may be lost.
pub fn deliver(link: &mpsc::Sender<bytes::Bytes>, message: bytes::Bytes) {
    chosen::deliver(link, message);
}

/// Puts something into a queue from a place that may wait; gives it back if nobody takes from it any more.
pub fn send_blocking<T>(queue: &mpsc::Sender<T>, item: T) -> Result<(), T> {
    chosen::send_blocking(queue, item)
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
