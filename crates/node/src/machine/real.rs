//! The machine that the process runs on.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use crate::disk::temporary_file;
pub use tokio::net::{TcpListener, TcpStream};

/// The time of day, since 1970.
pub fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Fills with randomness that nobody can guess.
pub fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| io::Error::other(format!("no randomness: {error}")))
}

/// Holds a data file for this process.
pub type Lock = crate::disk::LockFile;

/// Takes FileStorage's lock on a data file.
pub fn lock_file(data_file: &Path) -> io::Result<Lock> {
    Lock::take(data_file)
}

/// How many bytes this process may still write to the disk of a directory.
pub fn free_bytes(dir: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail * found.f_frsize)
}

/// A simulated disk takes its time here; a real one takes it when it is written to.
pub async fn device() {}

/// Does what may wait for a disk where no task waits for it.
pub fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(work)
}

/// Runs a task that may wait for a disk.
pub fn apart<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(task))
}

/// Runs a task that may wait for a disk on a thread of its own, whose end nobody waits for.
pub fn thread(name: &str, task: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let runtime = Handle::current();
    std::thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(task))?;
    Ok(())
}

/// Does something again and again, whatever the runtime's threads are doing.
pub fn every(
    name: &str,
    period: Duration,
    mut work: impl FnMut() + Send + 'static,
) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(move || {
        loop {
            std::thread::sleep(period);
            work();
        }
    })?;
    Ok(())
}

pub(super) fn background(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work)?;
    Ok(())
}

/// A queue between a place that may wait and a task.
pub fn queue<T>(capacity: usize) -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
    mpsc::channel(capacity)
}

/// Gives a message to a link; it may be lost.
pub fn deliver(link: &mpsc::Sender<bytes::Bytes>, message: bytes::Bytes) {
    // A link whose queue is full loses it.
    let _ = link.try_send(message);
}

/// Puts something into a queue from a place that may wait; gives it back if nobody takes from it any more.
pub fn send_blocking<T>(queue: &mpsc::Sender<T>, item: T) -> Result<(), T> {
    queue.blocking_send(item).map_err(|error| error.0)
}
