//! A machine that a simulator makes.
//!
//! Each machine has a runtime of its own whose clock stands still until the simulator moves it on;
//! they all run on one thread, one after the other, so that a seed decides everything. While a
//! machine runs, it is the thread's current one ([`Host::enter`]): the time, randomness and sockets
//! that its tasks take are those of it.
//!
//! Work that would wait for a disk on another thread is done at once here; a job beside others
//! ([`super::background`]) is done somewhat later.

mod net;
mod random;

use std::cell::RefCell;
use std::future::{Future, Ready, ready};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use net::{Latency, Network, TcpListener, TcpStream};
pub use random::Random;
use standby_filestorage::Repair;
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, File};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};

use crate::platform::free_room::FreeRoom;

/// Nobody else uses a machine's files.
pub type Lock = ();

/// Bytes that are free on a disk on which nothing is wrong.
pub const PLENTY: u64 = u64::MAX / 4;
/// When simulations begin, since 1970: noon, on some day in 2026.
const BEGINNING: Duration = Duration::from_secs(1_790_000_000);

pub struct Host {
    pub address: IpAddr,
    /// The network that it is connected to.
    pub network: Network,
    /// Nanoseconds by which its clock is wrong.
    pub skew: AtomicI64,
    /// Bytes that are free on its disk.
    pub free: AtomicU64,
    /// Microseconds that a write of the log takes, at most.
    pub device: AtomicU64,
    /// One message of consensus in so many is lost, comes twice or late; 0 for none.
    pub unreliable: AtomicU64,
    /// Who repairs damaged blocks. A node waits for the answer of others, which no other can give
    /// while it waits: here it is looked up on their disks.
    pub repair: Mutex<Option<Repair>>,
    random: Mutex<Random>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Host>>> = const { RefCell::new(None) };
}

impl Host {
    /// A machine at this address.
    pub fn new(address: IpAddr, network: Network, random: Random) -> Host {
        Host {
            address,
            network,
            skew: AtomicI64::new(0),
            free: AtomicU64::new(PLENTY),
            device: AtomicU64::new(0),
            unreliable: AtomicU64::new(0),
            repair: Mutex::default(),
            random: Mutex::new(random),
        }
    }

    /// Does something on this machine.
    pub fn enter<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        let before = CURRENT.with(|current| current.borrow_mut().replace(self.clone()));
        let result = work();
        CURRENT.with(|current| *current.borrow_mut() = before);
        result
    }

    fn draw<T>(&self, from: impl FnOnce(&mut Random) -> T) -> T {
        from(&mut self.random.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The machine that the thread is running.
fn current() -> Arc<Host> {
    CURRENT.with(|current| current.borrow().clone()).expect("outside of a simulated machine")
}

/// Who repairs damaged blocks of this machine.
pub fn repairer() -> Option<Repair> {
    current().repair.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The time of day, since 1970.
pub fn wall_clock() -> Duration {
    let host = current();
    let now = BEGINNING + host.network.now();
    let skew = host.skew.load(Ordering::Relaxed);
    let by = Duration::from_nanos(skew.unsigned_abs());
    if skew < 0 { now.saturating_sub(by) } else { now + by }
}

/// Fills with what the seed gives.
pub fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    current().draw(|random| random.fill(bytes));
    Ok(())
}

/// A file that no name leads to.
pub fn temporary_file(_dir: &Path) -> io::Result<Arc<dyn File>> {
    MemoryDisk::new().open(Path::new("temporary"), Open::Create)
}

/// Listens on an address.
pub async fn listen(address: &str) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Listens on a port of all addresses of this machine.
pub async fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(format!("0.0.0.0:{port}")).await
}

/// Files are a machine's own.
pub fn lock_file(_data_file: &Path) -> io::Result<Lock> {
    Ok(())
}

/// What is free on the disk.
pub fn free_room(_dir: &Path) -> io::Result<FreeRoom> {
    Ok(FreeRoom { bytes: current().free.load(Ordering::Relaxed), files: u64::MAX })
}

/// Simulated nodes have no secret, and encrypt nothing.
pub async fn begins_tls(_stream: &TcpStream) -> io::Result<bool> {
    Ok(false)
}

/// Memory of the machine.
pub fn memory() -> Option<u64> {
    Some(1 << 30)
}

/// From now on the connection fails when the other side has acknowledged nothing for so long.
pub fn end_when_silent(stream: &TcpStream, after: Duration) -> io::Result<()> {
    stream.end_when_silent(after);
    Ok(())
}

/// As [`end_when_silent`]: the simulator's clients do not wait for ever.
pub fn ask_for_signs(stream: &TcpStream, after: Duration) -> io::Result<()> {
    end_when_silent(stream, after)
}

/// Nothing is lost with what was not read.
pub async fn drain(_read: impl tokio::io::AsyncRead + Unpin) {}

/// How many descriptors a machine has.
pub fn descriptors() -> io::Result<(u64, u64)> {
    Ok((1 << 20, 1 << 20))
}

/// Returns when the disk has time for a write of the log.
pub async fn device() {
    let host = current();
    let most = Duration::from_micros(host.device.load(Ordering::Relaxed));
    if !most.is_zero() {
        let time = host.draw(|random| random.within(most));
        tokio::time::sleep(time).await;
    }
}

/// Does it at once.
pub fn spawn_blocking<T>(work: impl FnOnce() -> T) -> Ready<Result<T, JoinError>> {
    ready(Ok(work()))
}

pub fn apart<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(task)
}

pub fn thread(_name: &str, task: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    tokio::spawn(task);
    Ok(())
}

/// Does something again and again.
pub fn every(
    _name: &str,
    period: Duration,
    mut work: impl FnMut() + Send + 'static,
) -> io::Result<()> {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(period).await;
            work();
        }
    });
    Ok(())
}

pub(super) fn background(_name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let later = current().draw(|random| random.within(Duration::from_millis(30)));
    tokio::spawn(async move {
        tokio::time::sleep(later).await;
        work();
    });
    Ok(())
}

/// A queue that never makes its sender wait: the sender and the receiver are one thread.
pub fn queue<T>(_capacity: usize) -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
    mpsc::channel(1 << 30)
}

/// A message may be lost, come twice, or late.
pub fn deliver(link: &mpsc::Sender<bytes::Bytes>, message: bytes::Bytes) {
    let host = current();
    let one_in = host.unreliable.load(Ordering::Relaxed);
    let fate = match one_in {
        0 => 3,
        one_in => host.draw(|random| if random.one_in(one_in) { random.below(3) } else { 3 }),
    };
    match fate {
        0 => {}
        1 => {
            let (link, late) = (link.clone(), message);
            let time = host.draw(|random| random.within(Duration::from_millis(200)));
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                let _ = link.try_send(late);
            });
        }
        2 => {
            let _ = link.try_send(message.clone());
            let _ = link.try_send(message);
        }
        _ => drop(link.try_send(message)),
    }
}

/// Puts something into such a queue; gives it back if nobody takes from it any more.
pub fn send_blocking<T>(queue: &mpsc::Sender<T>, item: T) -> Result<(), T> {
    queue.try_send(item).map_err(|error| match error {
        mpsc::error::TrySendError::Full(item) | mpsc::error::TrySendError::Closed(item) => item,
    })
}
