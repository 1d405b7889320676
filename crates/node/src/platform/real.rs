//! The machine that the process runs on.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
pub(crate) use standby_disk::temporary_file;
use tokio::net::TcpSocket;
pub(crate) use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::platform::free_room::FreeRoom;
pub use crate::platform::silence::ask_for_signs;
pub(crate) use crate::platform::silence::drain;

/// The time of day, since 1970.
pub(crate) fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Fills with randomness that nobody can guess.
pub(crate) fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| io::Error::other(format!("no randomness: {error}")))
}

/// Connections that may wait to be accepted; the system has a limit of its own
/// (`net.core.somaxconn`). One more takes itself for connected, and waits for a word for ever, as
/// ZEO clients do that lost their server all at once.
const BACKLOG: u32 = 4096;

/// Listens on an address: that of a host, or of all that it has.
pub(crate) async fn listen(address: &str) -> io::Result<TcpListener> {
    let mut failed = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for address in tokio::net::lookup_host(address).await? {
        match listen_at(address, false) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Listens on a port of all addresses of this machine, of both kinds if it has both.
pub(crate) async fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    match listen_at((Ipv6Addr::UNSPECIFIED, port).into(), true) {
        // This machine may be without IPv6.
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            listen_at((Ipv4Addr::UNSPECIFIED, port).into(), false)
        }
        listening => listening,
    }
}

fn listen_at(address: SocketAddr, both: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if both {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Holds a data file for this process.
pub(crate) type Lock = standby_disk::LockFile;

/// Takes FileStorage's lock on a data file.
pub(crate) fn lock_file(data_file: &Path) -> io::Result<Lock> {
    Lock::take(data_file)
}

/// What this process may still write to the disk of a directory.
pub fn free_room(dir: &Path) -> io::Result<FreeRoom> {
    let found = rustix::fs::statvfs(dir)?;
    // Some file systems do not count their files.
    let files = if found.f_files == 0 { u64::MAX } else { found.f_favail };
    Ok(FreeRoom { bytes: found.f_bavail * found.f_frsize, files })
}

/// Bytes of memory that this process may use: the machine's, or what the system grants the
/// process's control group.
pub(crate) fn memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let machine = total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let granted = |root: &str, group: &str, name: &str| {
        // Those around it bound it, too.
        let around = Path::new(group.trim_start_matches('/')).ancestors();
        let limits = around.filter_map(|group| {
            let limit = std::fs::read_to_string(Path::new(root).join(group).join(name)).ok()?;
            limit.trim().parse::<u64>().ok()
        });
        limits.min()
    };
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = (parts.next()?, parts.next()?);
        match controllers {
            "" => granted("/sys/fs/cgroup", group, "memory.max"),
            "memory" => granted("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes"),
            _ => None,
        }
    };
    Some(groups.lines().filter_map(of_line).fold(machine, u64::min))
}

/// True if what the other side has to say begins as TLS does. Waits for its first byte.
pub(crate) async fn begins_tls(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    let come = stream.peek(&mut first).await?;
    // The record of a handshake: RFC 8446, section 5.1.
    Ok(come == 1 && first == [0x16])
}

/// From now on the connection fails when the other machine has acknowledged nothing for so long:
/// neither what was sent, nor the kernel's own questions while nothing is sent. A machine that
/// loses its power says nothing else.
pub fn end_when_silent(stream: &TcpStream, after: Duration) -> io::Result<()> {
    ask_for_signs(stream, after)?;
    Ok(sockopt::set_tcp_user_timeout(stream, after.as_millis() as u32)?)
}

/// How many descriptors this process may have open: the soft limit, raised to the hard one, and
/// what it was before.
pub(crate) fn descriptors() -> io::Result<(u64, u64)> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let before = current.unwrap_or(u64::MAX);
    let most = maximum.unwrap_or(u64::MAX);
    if before < most {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    }
    Ok((most, before))
}

/// A simulated disk takes its time here; a real one takes it when it is written to.
pub(crate) async fn device() {}

/// Does what may wait for a disk where no task waits for it.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(work)
}

/// Runs a task that may wait for a disk.
pub(crate) fn apart<F>(task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(task))
}

/// Runs a task that may wait for a disk on a thread of its own, whose end nobody waits for.
pub(crate) fn thread(
    name: &str,
    task: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let runtime = Handle::current();
    std::thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(task))?;
    Ok(())
}

/// Does something again and again, whatever the runtime's threads are doing.
pub(crate) fn every(
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
pub(crate) fn queue<T>(capacity: usize) -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
    mpsc::channel(capacity)
}

/// Gives a message to a link; it may be lost.
pub(crate) fn deliver(link: &mpsc::Sender<bytes::Bytes>, message: bytes::Bytes) {
    // A link whose queue is full loses it.
    let _ = link.try_send(message);
}

/// Puts something into a queue from a place that may wait; gives it back if nobody takes from it
/// any more.
pub(crate) fn send_blocking<T>(queue: &mpsc::Sender<T>, item: T) -> Result<(), T> {
    queue.blocking_send(item).map_err(|error| error.0)
}
