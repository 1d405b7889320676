//! Whether a client's machine still answers.
//!
//! A stock client has no timeouts: it waits for what it was promised as long as its own kernel
//! thinks that the connection is there, and while it waits it sends nothing. So nobody but this
//! side can tell it that the connection has ended, and a network that is cut while this is told
//! loses a reset, for it is sent once. Therefore the kernel does not end a client's connection (but
//! after [`FORGOTTEN`]); the node looks at what the client's machine has acknowledged, ends the
//! *session* when that is too old, and closes the connection in order: the kernel repeats that
//! until the client's machine has heard it.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::unconstrained;

use crate::platform::Instant;

/// The kernel gives a connection up when its other side has been silent for so long: what Linux
/// takes for a connection without settings.
const FORGOTTEN: Duration = Duration::from_secs(924);
/// Bytes for a client that the kernel holds and cannot send yet, above which it takes no more.
const UNSENT: libc::c_int = 256 << 10;
/// What a closed connection may have left unread is at most this.
const LEFT: usize = 64 << 20;

/// From now on the kernel asks the other machine for a sign of life when nothing else is sent,
/// often enough that one that is silent for `after` can be told from one that has nothing to say.
pub fn ask_for_signs(stream: &TcpStream, after: Duration) -> io::Result<()> {
    let seconds = Duration::from_secs(1);
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, (after * 2 / 5).max(seconds))?;
    sockopt::set_tcp_keepintvl(stream, (after / 5).max(seconds))?;
    keep_unsent_short(stream.as_fd())?;
    Ok(sockopt::set_tcp_user_timeout(stream, FORGOTTEN.as_millis() as u32)?)
}

/// From now on the kernel takes little more than it can send. It would keep megabytes for each
/// client that does not read, and what the kernel has for all connections of the machine
/// (`net.ipv4.tcp_mem`) would be gone with a thousand of them: other nodes could not be reached any
/// more. What waits in the node instead is counted and bounded.
fn keep_unsent_short(socket: BorrowedFd<'_>) -> io::Result<()> {
    let most: libc::c_int = UNSENT;
    // SAFETY: the option takes an integer, of which the kernel reads as many bytes as are named,
    // during the call only; the descriptor is open, for it is borrowed.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const most).cast(),
            size_of_val(&most) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the other side of a connection has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Acknowledged {
    /// How long ago it acknowledged anything, the kernel's questions included.
    ago: Duration,
    /// Bytes.
    bytes: u64,
    /// There are more.
    more: bool,
}

/// Asks the kernel about a TCP connection; `None` for another socket.
///
/// The layout is that of `struct tcp_info` in Linux's `include/uapi/linux/tcp.h`, which only grows
/// at its end: number of unacknowledged segments, 4 bytes at 24; milliseconds since the last
/// acknowledgement, 4 at 56; bytes acknowledged, 8 at 120; bytes not sent yet, 4 at 144.
pub(crate) fn acknowledged(socket: BorrowedFd<'_>) -> Option<Acknowledged> {
    let mut info = [0u8; 256];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: `info` is writable, as long as `len` says, and lives longer than the call, which
    // keeps no pointer; the descriptor is open, for it is borrowed.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    let info = info.get(..len as usize).filter(|_| result == 0)?;
    let four = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    Some(Acknowledged {
        ago: Duration::from_millis(four(56)?.into()),
        bytes: u64::from_ne_bytes(info.get(120..128)?.try_into().ok()?),
        more: four(24)? > 0 || four(144)? > 0,
    })
}

/// Decides whether a client counts as gone. It is to be asked every few seconds.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// So many bytes were acknowledged then.
    progress: Option<(u64, Instant)>,
}

impl Watch {
    /// Why the client counts as gone, if it does: its machine has said nothing for `patience`, or
    /// the client has taken nothing for so long although there is something for it.
    pub(crate) fn gone(
        &mut self,
        now: Instant,
        seen: Acknowledged,
        patience: Duration,
    ) -> Option<&'static str> {
        let since = match self.progress {
            Some((bytes, since)) if bytes == seen.bytes && seen.more => since,
            _ => now,
        };
        self.progress = Some((seen.bytes, since));
        if seen.ago >= patience {
            Some("its machine does not answer any more")
        } else if now.duration_since(since) >= patience {
            Some("it does not take what is sent to it")
        } else {
            None
        }
    }
}

/// Takes what has come and nobody wants. A socket that is closed with something unread says so by a
/// reset, once; without it the end is repeated until the other side has heard it.
pub(crate) async fn drain(mut read: impl AsyncRead + Unpin) {
    let mut space = vec![0; 64 << 10];
    let mut left = LEFT;
    while left > 0 {
        let mut bytes = ReadBuf::new(&mut space);
        let read_now = poll_fn(|cx| Poll::Ready(Pin::new(&mut read).poll_read(cx, &mut bytes)));
        match unconstrained(read_now).await {
            Poll::Ready(Ok(())) if !bytes.filled().is_empty() => {
                left = left.saturating_sub(bytes.filled().len());
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn the_kernel_tells_what_was_acknowledged() {
        let (mut client, mut server) = pair().await;
        ask_for_signs(&server, Duration::from_secs(10)).unwrap();
        server.write_all(&[7; 1000]).await.unwrap();
        client.read_exact(&mut [0; 1000]).await.unwrap();
        let mut seen = acknowledged(server.as_fd()).unwrap();
        for _ in 0..100 {
            if !seen.more {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            seen = acknowledged(server.as_fd()).unwrap();
        }
        // The handshake counts as a byte on some kernels.
        assert!((1000..=1001).contains(&seen.bytes) && !seen.more, "{seen:?}");
        assert!(seen.ago < Duration::from_secs(5), "{seen:?}");
        // More than fits: it waits for the client.
        while server.try_write(&[7; 1 << 20]).is_ok() {}
        assert!(acknowledged(server.as_fd()).unwrap().more);
        let (unix, _other) = tokio::net::UnixStream::pair().unwrap();
        assert_eq!(acknowledged(unix.as_fd()), None);
    }

    #[tokio::test]
    async fn the_kernel_takes_little_of_what_nobody_reads() {
        let (_client, server) = pair().await;
        ask_for_signs(&server, Duration::from_secs(10)).unwrap();
        let mut taken = 0;
        for _ in 0..20 {
            while let Ok(n) = server.try_write(&[7; 64 << 10]) {
                taken += n;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(taken < 2 << 20, "{taken}");
    }

    #[tokio::test]
    async fn a_connection_with_something_unread_is_closed_in_order() {
        let (mut client, mut server) = pair().await;
        // What comes after the end is answered by a reset: all of this has come.
        client.write_all(&[7; 2000]).await.unwrap();
        server.read_exact(&mut [0; 10]).await.unwrap();
        drain(&mut server).await;
        drop(server);
        // A reset would be an error.
        assert_eq!(client.read(&mut [0; 10]).await.unwrap(), 0);
    }

    #[test]
    fn a_client_is_gone_when_it_is_silent_or_takes_nothing() {
        let seconds = Duration::from_secs;
        let begun = Instant::now();
        let seen = |ago, bytes, more| Acknowledged { ago: Duration::from_secs(ago), bytes, more };
        let mut watch = Watch::default();
        let mut gone = |after, seen| watch.gone(begun + seconds(after), seen, seconds(10));
        assert_eq!(gone(0, seen(9, 5, false)), None);
        assert!(gone(1, seen(10, 5, false)).is_some());
        // Idle for long, and then something is sent.
        assert_eq!(gone(100, seen(1, 5, false)), None);
        assert_eq!(gone(102, seen(1, 5, true)), None);
        assert_eq!(gone(111, seen(1, 6, true)), None, "slowly, but it takes something");
        assert_eq!(gone(120, seen(1, 6, true)), None);
        assert!(gone(121, seen(1, 6, true)).is_some());
        assert_eq!(gone(122, seen(1, 6, false)), None, "it had taken the last of it");
    }
}
