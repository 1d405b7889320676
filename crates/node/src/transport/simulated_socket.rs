//! A simulated client's connection in two halves.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::transport::stream::Stream;

/// What is read.
pub(crate) type Reading = Box<dyn AsyncRead + Send + Unpin>;
/// What is written.
pub(crate) type Writing = Box<dyn AsyncWrite + Send + Unpin>;

/// There is one thread: who closes the outbox has cut the connection off.
pub(crate) struct Cutter;

impl Cutter {
    /// Nothing is left to do.
    pub(crate) fn cut(&self) {}

    /// The simulator ends the connection of a client that is silent.
    pub(crate) fn gone(&self, _patience: Duration) -> Option<&'static str> {
        None
    }
}

/// The two halves of a connection, and what cuts it off.
pub(crate) fn split(stream: Stream) -> (Reading, Writing, Option<Arc<Cutter>>) {
    let (read, write) = tokio::io::split(stream);
    (Box::new(read), Box::new(write), None)
}
