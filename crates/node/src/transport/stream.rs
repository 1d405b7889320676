//! A connection, over TCP or a Unix socket, perhaps with TLS.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use standby_config::{Address, ZeoAddress};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_rustls::TlsStream;

use crate::platform::{self, TcpListener, TcpStream, ask_for_signs, listen_everywhere};

/// See the module.
pub enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP, encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Where clients connect.
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
    /// A file.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on the address of `<zeo>`.
    pub async fn bind(address: &ZeoAddress) -> anyhow::Result<Listener> {
        let listener = match address {
            ZeoAddress::Tcp(tcp) => listen(tcp).await.map(Listener::Tcp),
            ZeoAddress::Unix(path) => bind_unix(path).await.map(Listener::Unix),
        };
        listener.with_context(|| format!("cannot listen on address {address}"))
    }

    /// The next client. One whose machine is silent for `silence` can be told from others.
    pub async fn accept(&self, silence: Duration) -> io::Result<Stream> {
        match self {
            Listener::Tcp(tcp) => {
                let (stream, _) = tcp.accept().await?;
                ask_for_signs(&stream, silence)?;
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix(unix) => unix.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// Listens on an address of the configuration.
pub async fn listen(address: &Address) -> io::Result<TcpListener> {
    match address.host.as_str() {
        "" => listen_everywhere(address.port).await,
        _ => platform::listen(&address.to_string()).await,
    }
}

/// A socket file that a former process has left is removed; one on which a server answers is not.
async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    let left = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if left {
        match UnixStream::connect(path).await {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(_) => std::fs::remove_file(path)?,
        }
    }
    UnixListener::bind(path)
}

impl Stream {
    /// A connection that is encrypted now.
    pub fn from_tls(tls: impl Into<TlsStream<TcpStream>>) -> Stream {
        Stream::Tls(Box::new(tls.into()))
    }

    /// Who is on the other side, for people.
    pub fn peer(&self) -> String {
        match self {
            Stream::Tcp(tcp) => tcp.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string()),
            Stream::Unix(_) => "a Unix socket".into(),
            Stream::Tls(tls) => {
                tls.get_ref().0.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string())
            }
        }
    }

    /// Small messages are to be sent at once.
    pub fn set_nodelay(&self) {
        let _ = match self {
            Stream::Tcp(tcp) => tcp.set_nodelay(true),
            Stream::Tls(tls) => tls.get_ref().0.set_nodelay(true),
            Stream::Unix(_) => Ok(()),
        };
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Stream::Unix(unix) => Pin::new(unix).poll_read(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Stream::Unix(unix) => Pin::new(unix).poll_write(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Unix(unix) => Pin::new(unix).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Unix(unix) => Pin::new(unix).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
