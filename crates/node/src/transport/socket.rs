//! A client's socket in two halves, which another thread can shut down. One descriptor serves all
//! three.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use standby_types::lock::lock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{tcp, unix};

use crate::platform::Instant;
use crate::platform::silence::{Watch, acknowledged};
use crate::transport::stream::Stream;

/// What is read.
pub(crate) type Reading = Box<dyn AsyncRead + Send + Unpin>;
/// What is written.
pub(crate) type Writing = Box<dyn AsyncWrite + Send + Unpin>;

/// The half that writes. The socket is closed when this half and the other one are dropped.
enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            WriteHalf::Tcp(half) => half.as_ref().as_fd(),
            WriteHalf::Unix(half) => half.as_ref().as_fd(),
        }
    }

    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            WriteHalf::Tcp(half) => half.as_ref().poll_write_ready(cx),
            WriteHalf::Unix(half) => half.as_ref().poll_write_ready(cx),
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(half) => half.try_write(bytes),
            WriteHalf::Unix(half) => half.try_write(bytes),
        }
    }
}

struct Writer(Arc<WriteHalf>);

impl AsyncWrite for Writer {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(self.0.fd(), rustix::net::Shutdown::Write)?))
    }
}

/// Looks after a connection, and cuts it off, from any thread. It does not keep the socket open.
pub(crate) struct Cutter {
    by: By,
    watch: Mutex<Watch>,
}

enum By {
    Half(Weak<WriteHalf>),
    /// The socket itself is inside of a TLS session, out of reach.
    Descriptor(OwnedFd),
}

impl Cutter {
    fn new(by: By) -> Cutter {
        Cutter { by, watch: Mutex::default() }
    }

    /// Nothing is sent or received any more.
    pub(crate) fn cut(&self) {
        self.with(|fd| {
            // The other side may be gone already.
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        });
    }

    /// Why the client counts as gone, if it does: see [`Watch::gone`].
    pub(crate) fn gone(&self, patience: Duration) -> Option<&'static str> {
        let seen = self.with(acknowledged)??;
        lock(&self.watch).gone(Instant::now(), seen, patience)
    }

    fn with<T>(&self, work: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        match &self.by {
            By::Half(half) => half.upgrade().map(|half| work(half.fd())),
            By::Descriptor(fd) => Some(work(fd.as_fd())),
        }
    }
}

/// The two halves of a connection, and what cuts it off.
pub(crate) fn split(stream: Stream) -> (Reading, Writing, Option<Arc<Cutter>>) {
    let (read, half): (Reading, WriteHalf) = match stream {
        Stream::Tcp(tcp) => {
            let (read, write) = tcp.into_split();
            (Box::new(read), WriteHalf::Tcp(write))
        }
        Stream::Unix(unix) => {
            let (read, write) = unix.into_split();
            (Box::new(read), WriteHalf::Unix(write))
        }
        Stream::Tls(tls) => {
            let fd = rustix::io::fcntl_dupfd_cloexec(tls.get_ref().0.as_fd(), 3).ok();
            let (read, write) = tokio::io::split(tls);
            let cutter = fd.map(|fd| Arc::new(Cutter::new(By::Descriptor(fd))));
            return (Box::new(read), Box::new(write), cutter);
        }
    };
    let half = Arc::new(half);
    let cutter = Cutter::new(By::Half(Arc::downgrade(&half)));
    (read, Box::new(Writer(half)), Some(Arc::new(cutter)))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_connection_is_cut_off_from_another_thread() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (mut read, mut write, cutter) = split(Stream::Unix(server));
        write.write_all(b"hello").await.unwrap();
        let mut bytes = [0; 5];
        client.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"hello");
        let cutter = cutter.unwrap();
        let cutter = std::thread::spawn(move || {
            cutter.cut();
            cutter
        });
        assert_eq!(read.read(&mut bytes).await.unwrap(), 0);
        assert_eq!(client.read(&mut bytes).await.unwrap(), 0);
        assert!(write.write_all(b"more").await.is_err());
        drop((read, write));
        // The socket is closed: there is nothing left to cut.
        cutter.join().unwrap().cut();
    }

    #[tokio::test]
    async fn a_writer_waits_for_a_slow_reader() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (_read, mut write, _) = split(Stream::Unix(server));
        let sent = vec![7; 4 << 20];
        let sending = sent.clone();
        tokio::spawn(async move {
            write.write_all(&sending).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received.len(), sent.len());
    }
}
