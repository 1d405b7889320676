//! A client that has not been told that it is registered.
//!
//! It is never closed because a node is not primary, or not any more: a stock client tries a node
//! that has closed its connection again only when *all* its addresses have, and an address that
//! refuses connections, or takes them without a word, never does (`ClientIO.disconnected` in
//! `ZEO/asyncio/client.py`). So it waits on, at this node or through it, and what it has said so
//! far is said again to whoever serves it.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use crate::transport::socket::{Cutter, Reading, Writing, split};
use crate::transport::stream::Stream;

/// Bytes that it may say before it is registered; who says more is no ZEO client.
pub(crate) const MOST_SAID: usize = 8 << 10;

/// See the module.
pub(crate) struct Newcomer {
    pub read: Reading,
    /// What it is told.
    pub write: Writing,
    /// Cuts it off.
    pub cutter: Option<Arc<Cutter>>,
    pub peer: String,
    /// It has been greeted, and must not be again.
    pub greeted: bool,
    /// What it has said so far.
    pub said: BytesMut,
}

impl Newcomer {
    /// A client that has just come.
    pub(crate) fn new(stream: Stream) -> Newcomer {
        stream.set_nodelay();
        let peer = stream.peer();
        let (read, write, cutter) = split(stream);
        Newcomer { read, write, cutter, peer, greeted: false, said: BytesMut::new() }
    }

    /// Hears what it says; an error when it has closed.
    pub(crate) async fn hear(&mut self) -> io::Result<usize> {
        if self.said.len() >= MOST_SAID {
            // Nothing more is taken from it.
            std::future::pending::<()>().await;
        }
        match self.read.read_buf(&mut self.said).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            heard => Ok(heard),
        }
    }

    /// Returns when it has closed.
    pub(crate) async fn gone(&mut self) {
        while self.hear().await.is_ok() {}
    }
}
