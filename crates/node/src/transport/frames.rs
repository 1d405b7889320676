//! Frames between nodes, and what can go wrong with them.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use standby_replica::lineage::Lineage;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Sleep;

use crate::platform;
use crate::transport::stream::Stream;

/// The longest frame between nodes.
pub(crate) const MAX_FRAME: usize = 64 << 20;

/// How a TLS handshake begins; as a length it would be beyond any limit.
const TLS_HANDSHAKE: usize = 0x1603;

/// A peer's connection that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The connection broke.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A blob cannot be kept.
    #[error("{0}")]
    Storage(#[from] standby_filestorage::StorageError),
    /// What should be JSON is none.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// The other side refuses us, and says why.
    #[error("refused: {0}")]
    Refused(String),
    /// The other side had the blob, until a pack removed its revision.
    #[error("it was packed away")]
    PackedAway,
    /// A blob is not what it should be.
    #[error("the blob is damaged")]
    Damaged,
    /// The other side has a history that goes on where this node's was left.
    #[error("the other node is of timeline {}, this one of an older one", .0.timeline())]
    Outdated(Lineage),
    /// The other side belongs to another cluster of the same name.
    #[error(
        "node {node} belongs to a cluster {cluster:?} that was bootstrapped separately: its database is \
         another one. To let it join, move its data file and state directory away"
    )]
    OtherCluster {
        node: String,
        /// The cluster's.
        cluster: String,
        /// When that was bootstrapped, in seconds since 1970, if the node can tell.
        bootstrapped: Option<u64>,
    },
    /// The other side has another history than this node.
    #[error(
        "node {node} has gone on by itself, on timeline {} ({}): there were two forced promotions. \
         standby lineage show tells where they parted; standby lineage accept ends it",
        .lineage.timeline(), .lineage.name()
    )]
    Diverged {
        node: String,
        /// Its history.
        lineage: Lineage,
    },
    /// The other side does not follow the protocol, or does not know the secret.
    #[error("{0}")]
    Protocol(String),
}

/// Reads; fails when nothing has come for so long, if that is said.
pub(crate) struct Progressing<R> {
    inner: R,
    patience: Option<Duration>,
    waits: Option<Pin<Box<Sleep>>>,
}

impl<R> Progressing<R> {
    /// Reads from `inner`.
    pub(crate) fn new(inner: R, patience: Option<Duration>) -> Progressing<R> {
        Progressing { inner, patience, waits: None }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Progressing<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(read) = Pin::new(&mut this.inner).poll_read(cx, buf) {
            this.waits = None;
            return Poll::Ready(read);
        }
        let Some(patience) = this.patience else { return Poll::Pending };
        let waits = this.waits.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        waits.as_mut().poll(cx).map(|()| Err(std::io::ErrorKind::TimedOut.into()))
    }
}

/// Waits for something for so long at most.
pub(crate) async fn within<T, E: From<std::io::Error>>(
    patience: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let late = |_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
    tokio::time::timeout(patience, work).await.unwrap_or_else(late)
}

/// Does what may wait for a disk where others do not wait for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PeerError> + Send + 'static,
) -> Result<T, PeerError> {
    platform::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(PeerError::Protocol(error.to_string())))
}

/// Frames between nodes: length 4, kind 1, content.
pub(crate) async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<(u8, Bytes), PeerError> {
    let len = stream.read_u32().await? as usize;
    if len > limit && len >> 16 == TLS_HANDSHAKE {
        return Err(PeerError::Protocol(
            "the other node begins TLS, but this node has neither <peer-ssl> nor a secret-file in \
            its configuration"
                .into(),
        ));
    }
    if len == 0 || len > limit {
        return Err(PeerError::Protocol(format!("a frame of {len} bytes was announced")));
    }
    let kind = stream.read_u8().await?;
    // Memory grows with what comes, not with what is announced.
    let mut content = BytesMut::with_capacity((len - 1).min(1 << 16));
    while content.len() < len - 1 {
        let missing = len - 1 - content.len();
        let n = stream.take(missing as u64).read_buf(&mut content).await?;
        if n == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok((kind, content.freeze()))
}

/// One frame, to be sent.
pub(crate) fn frame(kind: u8, content: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(5 + content.len());
    out.put_u32(content.len() as u32 + 1);
    out.put_u8(kind);
    out.put_slice(content);
    out.freeze()
}

pub(crate) async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    kind: u8,
    content: &[u8],
) -> Result<(), PeerError> {
    stream.write_all(&frame(kind, content)).await?;
    Ok(stream.flush().await?)
}

/// The two directions of a connection.
pub(crate) fn halves(
    stream: Stream,
) -> (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>) {
    match stream {
        Stream::Tcp(tcp) => {
            let (read, write) = tcp.into_split();
            (Box::new(read), Box::new(write))
        }
        other => {
            let (read, write) = tokio::io::split(other);
            (Box::new(read), Box::new(write))
        }
    }
}

/// Nothing has come, or was taken, for too long.
pub(crate) fn silent() -> PeerError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, "nothing has come for too long").into()
}

/// Writes bytes, of which some must be taken within each `patience`.
pub(crate) async fn write_within(
    write: &mut (impl AsyncWrite + Unpin),
    mut bytes: Bytes,
    patience: Duration,
) -> Result<(), PeerError> {
    while bytes.has_remaining() {
        let written = tokio::time::timeout(patience, write.write(&bytes)).await;
        match written.map_err(|_| silent())?? {
            0 => return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into()),
            written => bytes.advance(written),
        }
    }
    Ok(tokio::time::timeout(patience, write.flush()).await.map_err(|_| silent())??)
}
