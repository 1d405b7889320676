//! What is to be sent to one client, in order.
//!
//! *Evaluating a read and queueing its reply is one step with respect to the invalidations queued
//! here*: [`Outbox::evaluate`] holds the lock meanwhile. The applier makes a transaction visible
//! before it queues its invalidations. So no reply says that a revision is current after the
//! invalidation of it has been queued.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use standby_types::Tid;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// Bytes in a queue above which no further requests of that client are read.
const FULL: usize = 16 << 20;
/// Bytes in a queue above which a client that does not read is closed.
const OVERFLOW: usize = 256 << 20;
/// Shorter pieces are copied together before they are written.
const SMALL: usize = 16 << 10;

/// See the module.
#[derive(Default)]
pub struct Outbox {
    queue: Mutex<Queue>,
    wake: Notify,
    drained: Notify,
    closing: Notify,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    len: usize,
    last_tid: Tid,
    /// Why the connection is to be closed.
    closed: Option<String>,
    /// What is queued is still sent before closing.
    flush: bool,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues bytes.
    pub fn push(&self, bytes: Bytes) {
        self.lock().push(bytes);
        self.wake.notify_one();
    }

    /// Queues what tells of the transaction `tid`.
    pub fn push_transaction(&self, tid: Tid, pieces: impl IntoIterator<Item = Bytes>) {
        let mut queue = self.lock();
        queue.last_tid = tid;
        pieces.into_iter().for_each(|piece| queue.push(piece));
        let overflow = queue.len > OVERFLOW && queue.closed.is_none();
        drop(queue);
        self.wake.notify_one();
        if overflow {
            self.close("the client does not read what is sent to it");
        }
    }

    /// Evaluates a read and queues its reply in one step. `evaluate` gets the last transaction that
    /// the client was told of.
    pub fn evaluate<E>(&self, evaluate: impl FnOnce(Tid) -> Result<Bytes, E>) -> Result<(), E> {
        let mut queue = self.lock();
        let reply = evaluate(queue.last_tid)?;
        queue.push(reply);
        drop(queue);
        self.wake.notify_one();
        Ok(())
    }

    /// Closes the connection; what is queued is dropped.
    pub fn close(&self, reason: impl Into<String>) {
        let mut queue = self.lock();
        if queue.closed.is_none() {
            queue.closed = Some(reason.into());
            queue.pieces.clear();
            queue.len = 0;
        }
        drop(queue);
        self.wake.notify_one();
        self.closing.notify_one();
        self.drained.notify_waiters();
    }

    /// Closes the connection once all that is queued has been sent.
    pub fn finish(&self) {
        let mut queue = self.lock();
        queue.flush = true;
        drop(queue);
        self.wake.notify_one();
    }

    /// Why the connection was closed from this side.
    pub fn close_reason(&self) -> Option<String> {
        self.lock().closed.clone()
    }

    /// Returns when the connection is to be closed.
    pub async fn closed(&self) {
        while self.lock().closed.is_none() {
            self.closing.notified().await;
        }
    }

    /// Returns when there is room for more replies.
    pub async fn room(&self) {
        self.room_below(FULL).await;
    }

    /// Returns when there are no more than `limit` bytes in the queue.
    pub async fn room_below(&self, limit: usize) {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            // Before looking, so that nothing is missed.
            drained.as_mut().enable();
            {
                let queue = self.lock();
                if queue.len <= limit || queue.closed.is_some() {
                    return;
                }
            }
            drained.await;
        }
    }

    /// Sends what is queued until the connection is closed.
    pub async fn send_to(&self, mut socket: impl AsyncWrite + Unpin) -> std::io::Result<()> {
        loop {
            let (pieces, done) = {
                let mut queue = self.lock();
                if queue.closed.is_some() {
                    break;
                }
                (std::mem::take(&mut queue.pieces), queue.flush)
            };
            if pieces.is_empty() {
                if done {
                    break;
                }
                self.wake.notified().await;
                continue;
            }
            let mut together = BytesMut::new();
            for piece in pieces {
                {
                    let mut queue = self.lock();
                    queue.len = queue.len.saturating_sub(piece.len());
                }
                if piece.len() < SMALL {
                    together.extend_from_slice(&piece);
                    if together.len() < 4 * SMALL {
                        continue;
                    }
                    socket.write_all(&together).await?;
                } else {
                    socket.write_all(&together).await?;
                    socket.write_all(&piece).await?;
                }
                together.clear();
            }
            socket.write_all(&together).await?;
            // TLS may keep a part of what does not fit the socket.
            socket.flush().await?;
            self.drained.notify_waiters();
        }
        socket.shutdown().await
    }
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        if self.closed.is_none() {
            self.len += bytes.len();
            self.pieces.push_back(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_arrive_in_order() {
        let outbox = Outbox::default();
        let mut expected = Vec::new();
        for n in [1, 100_000, 3, 20_000, 5] {
            let piece = vec![n as u8; n];
            expected.extend_from_slice(&piece);
            outbox.push(piece.into());
        }
        outbox.finish();
        let mut sent = Vec::new();
        outbox.send_to(&mut sent).await.unwrap();
        assert_eq!(sent, expected);
    }

    #[tokio::test]
    async fn closing_drops_what_is_queued() {
        let outbox = Outbox::default();
        outbox.push(Bytes::from_static(b"stale"));
        outbox.close("demoted");
        let mut sent = Vec::new();
        outbox.send_to(&mut sent).await.unwrap();
        assert!(sent.is_empty());
        outbox.closed().await;
        outbox.room().await;
        assert_eq!(outbox.close_reason().as_deref(), Some("demoted"));
    }
}
