//! What is to be sent to one client, in order.
//!
//! *Evaluating a read and queueing its reply is one step with respect to the invalidations queued
//! here*: [`Outbox::evaluate`] holds the lock meanwhile. The applier makes a transaction visible
//! before it queues its invalidations. So no reply says that a revision is current after the
//! invalidation of it has been queued.
//!
//! *The reply to a commit is written after its invalidations*: whoever hears of a commit from the
//! client that made it, and then asks over another connection, has been told of it there. Each
//! invalidation carries a [`Told`], which is dropped when it has been written, and the reply waits
//! until all of them are. A connection that takes no bytes is not waited for. The invalidations of
//! a transaction are queued before the replies of later ones, in every queue: replies never wait
//! for each other in a circle.

use std::collections::VecDeque;
use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use standby_types::Tid;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Notify, oneshot};
use tokio::task::coop::{consume_budget, unconstrained};

use crate::cells::memory::{Memory, Share};

/// Bytes in a queue above which no further requests of that client are read.
const FULL: usize = 16 << 20;
/// The same while memory is scarce.
const FULL_IF_SCARCE: usize = 256 << 10;
/// Bytes in a queue above which a client that does not read is closed.
const OVERFLOW: usize = 256 << 20;
/// Shorter pieces are copied together before they are written.
const SMALL: usize = 16 << 10;

/// See the module.
#[derive(Default)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    /// What is queued. It changes under the queue's lock only.
    held: Share,
    wake: Notify,
    drained: Notify,
    closing: Notify,
}

/// Exists as long as an invalidation waits to be written.
pub(crate) type Told = Arc<oneshot::Sender<()>>;

enum Piece {
    Bytes(Bytes),
    /// It is made meanwhile.
    Later(oneshot::Receiver<Bytes>),
    /// What stands before it is the invalidation.
    Told(Told),
    /// What stands after it waits until others have been told.
    AllTold(oneshot::Receiver<()>),
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Piece>,
    len: usize,
    last_tid: Tid,
    /// Why the connection is to be closed.
    closed: Option<String>,
    /// What is queued is still sent before closing.
    flush: bool,
    /// The connection takes no bytes now.
    blocked: bool,
    /// Nothing is sent any more.
    over: bool,
}

/// The queue, for as long as nobody else has it. What it holds is counted at the end.
struct Locked<'a> {
    queue: MutexGuard<'a, Queue>,
    held: &'a Share,
}

impl Deref for Locked<'_> {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        &self.queue
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.held.set(self.queue.len);
    }
}

impl Outbox {
    /// A queue that takes its part of the clients' memory.
    pub(crate) fn within(memory: &Arc<Memory>) -> Outbox {
        Outbox { held: Share::of(memory), ..Outbox::default() }
    }

    /// What is queued takes so much of the clients' memory.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }

    fn lock(&self) -> Locked<'_> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { queue, held: &self.held }
    }

    pub(crate) fn push(&self, bytes: Bytes) {
        self.lock().push(bytes);
        self.wake.notify_one();
    }

    /// Queues bytes that are made meanwhile (see [`Outbox::made`]); what is queued after them
    /// waits.
    pub(crate) fn push_later(&self) -> oneshot::Sender<Bytes> {
        let (making, coming) = oneshot::channel();
        self.lock().push_piece(Piece::Later(coming));
        self.wake.notify_one();
        making
    }

    /// The bytes are there. Only now is it known how much room they take.
    pub(crate) fn made(&self, making: oneshot::Sender<Bytes>, bytes: Bytes) {
        let mut queue = self.lock();
        let len = bytes.len();
        if making.send(bytes).is_ok() && queue.closed.is_none() {
            queue.len += len;
        }
    }

    /// Queues what tells of the transaction `tid`.
    pub(crate) fn push_transaction(&self, tid: Tid, bytes: Bytes) {
        self.push_told(tid, |queue| queue.push(bytes));
    }

    /// Queues the invalidation of the transaction `tid`.
    pub(crate) fn push_invalidation(&self, tid: Tid, bytes: Bytes, told: &Told) {
        self.push_told(tid, |queue| {
            queue.push(bytes);
            if !queue.blocked {
                queue.push_piece(Piece::Told(told.clone()));
            }
        });
    }

    /// Queues the reply to the commit of the transaction `tid`, which is sent when `all_told` has
    /// lost its sender.
    pub(crate) fn push_committed(&self, tid: Tid, bytes: Bytes, all_told: oneshot::Receiver<()>) {
        self.push_told(tid, |queue| {
            queue.push_piece(Piece::AllTold(all_told));
            queue.push(bytes);
        });
    }

    fn push_told(&self, tid: Tid, push: impl FnOnce(&mut Queue)) {
        let mut queue = self.lock();
        queue.last_tid = tid;
        push(&mut queue);
        let overflow = queue.len > OVERFLOW && queue.closed.is_none();
        drop(queue);
        self.wake.notify_one();
        if overflow {
            self.close("the client does not read what is sent to it");
        }
    }

    /// Evaluates a read and queues its reply in one step. `evaluate` gets the last transaction that
    /// the client was told of.
    pub(crate) fn evaluate<E>(
        &self,
        evaluate: impl FnOnce(Tid) -> Result<Bytes, E>,
    ) -> Result<(), E> {
        let mut queue = self.lock();
        let reply = evaluate(queue.last_tid)?;
        queue.push(reply);
        drop(queue);
        self.wake.notify_one();
        Ok(())
    }

    /// Closes the connection; what is queued is dropped.
    pub(crate) fn close(&self, reason: impl Into<String>) {
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
    pub(crate) fn finish(&self) {
        let mut queue = self.lock();
        queue.flush = true;
        drop(queue);
        self.wake.notify_one();
    }

    /// Why the connection was closed from this side.
    pub(crate) fn close_reason(&self) -> Option<String> {
        self.lock().closed.clone()
    }

    /// Returns when the connection is to be closed.
    pub(crate) async fn closed(&self) {
        while self.lock().closed.is_none() {
            self.closing.notified().await;
        }
    }

    /// True if the connection has been closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed.is_some()
    }

    /// Returns when there is room for more replies.
    pub(crate) async fn room(&self) {
        self.room_below(if self.held.is_scarce() { FULL_IF_SCARCE } else { FULL }).await;
    }

    /// Returns when there are no more than `limit` bytes in the queue.
    pub(crate) async fn room_below(&self, limit: usize) {
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

    /// Nothing is written for a while: nobody waits for what is queued, nor for what its sender has
    /// taken.
    fn excuse(&self, taken: &mut VecDeque<Piece>) {
        let mut queue = self.lock();
        queue.blocked = true;
        for pieces in [&mut queue.pieces, taken] {
            pieces.retain(|piece| !matches!(piece, Piece::Told(_)));
        }
    }

    /// Sends what is queued until the connection is closed.
    pub(crate) async fn send_to<W: AsyncWrite + Unpin>(&self, socket: W) -> io::Result<W> {
        let _over = Over(self);
        let mut sending = Sending {
            outbox: self,
            socket,
            pieces: VecDeque::new(),
            together: BytesMut::new(),
            tolds: Vec::new(),
        };
        loop {
            consume_budget().await;
            let done = {
                let mut queue = self.lock();
                if queue.closed.is_some() {
                    break;
                }
                sending.pieces = std::mem::take(&mut queue.pieces);
                queue.flush
            };
            if sending.pieces.is_empty() {
                if done {
                    break;
                }
                self.wake.notified().await;
                continue;
            }
            sending.send_pieces().await?;
            self.drained.notify_waiters();
        }
        Ok(sending.socket)
    }
}

/// What a connection's sender is at.
struct Sending<'a, S> {
    outbox: &'a Outbox,
    socket: S,
    /// Taken from the queue.
    pieces: VecDeque<Piece>,
    /// Small pieces that are to be written.
    together: BytesMut,
    /// Of the invalidations in `together`.
    tolds: Vec<Told>,
}

impl<S: AsyncWrite + Unpin> Sending<'_, S> {
    async fn send_pieces(&mut self) -> io::Result<()> {
        while let Some(piece) = self.pieces.pop_front() {
            let bytes = match piece {
                Piece::Bytes(bytes) => bytes,
                Piece::Later(coming) => {
                    self.write_together().await?;
                    self.made(coming).await?
                }
                Piece::Told(told) => {
                    self.tolds.push(told);
                    continue;
                }
                Piece::AllTold(mut all_told) => {
                    if all_told.try_recv() != Err(TryRecvError::Closed) {
                        self.write_together().await?;
                        // Its end: whoever holds a sender writes it, is blocked, or goes.
                        let _ = all_told.await;
                    }
                    continue;
                }
            };
            {
                let mut queue = self.outbox.lock();
                queue.len = queue.len.saturating_sub(bytes.len());
            }
            if bytes.len() < SMALL {
                self.together.extend_from_slice(&bytes);
                if self.together.len() >= 4 * SMALL {
                    self.write_together().await?;
                }
            } else {
                self.write_together().await?;
                self.write(&bytes).await?;
            }
        }
        self.write_together().await
    }

    /// Waits for bytes that are being made. Nobody else waits for what this connection is to be
    /// told after them.
    async fn made(&mut self, mut coming: oneshot::Receiver<Bytes>) -> io::Result<Bytes> {
        if let Ok(bytes) = coming.try_recv() {
            return Ok(bytes);
        }
        self.outbox.excuse(&mut self.pieces);
        let made = coming.await;
        self.outbox.lock().blocked = false;
        made.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn write_together(&mut self) -> io::Result<()> {
        let together = std::mem::take(&mut self.together);
        self.write(&together).await?;
        self.tolds.clear();
        Ok(())
    }

    /// Writes bytes. If that takes time, nobody waits any more for what this connection is to be
    /// told.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Sending { outbox, socket, pieces, tolds, .. } = self;
        let writing = async {
            socket.write_all(bytes).await?;
            // TLS may keep a part of what does not fit the socket.
            socket.flush().await
        };
        // Pending is to mean that the socket takes nothing, not that it is another task's turn.
        let mut writing = pin!(unconstrained(writing));
        let at_once = std::future::poll_fn(|cx| Poll::Ready(writing.as_mut().poll(cx))).await;
        if let Poll::Ready(written) = at_once {
            return written;
        }
        outbox.excuse(pieces);
        tolds.clear();
        let written = writing.await;
        outbox.lock().blocked = false;
        written
    }
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        self.push_piece(Piece::Bytes(bytes));
    }

    fn push_piece(&mut self, piece: Piece) {
        if self.closed.is_none() && !self.over {
            if let Piece::Bytes(bytes) = &piece {
                self.len += bytes.len();
            }
            self.pieces.push_back(piece);
        }
    }
}

/// Nobody sends any more, whatever the reason: nobody waits for what is queued either.
struct Over<'a>(&'a Outbox);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.over = true;
        queue.pieces.clear();
        queue.len = 0;
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
    async fn what_is_made_later_keeps_its_place_and_holds_up_nobody_else() {
        let (asking, mut asked) = connected(100);
        let (other, mut others) = connected(100);
        asking.push(Bytes::from_static(&[1]));
        let making = asking.push_later();
        asking.push(Bytes::from_static(&[3]));
        assert_eq!(read(&mut asked).await, 1);
        // The reply to a commit of another connection does not wait for its invalidation behind the
        // answer.
        commit(4, &[&other, &asking]);
        assert_eq!(read(&mut others).await, 4);
        asking.made(making, Bytes::from_static(&[2]));
        for expected in 2..=4 {
            assert_eq!(read(&mut asked).await, expected);
        }
        // What is never made ends the connection.
        drop(asking.push_later());
        let mut rest = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut asked, &mut rest).await.unwrap();
        assert!(rest.is_empty());
    }

    /// A connection, and what the client reads of it.
    fn connected(room: usize) -> (Arc<Outbox>, tokio::io::DuplexStream) {
        let outbox = Arc::new(Outbox::default());
        let (client, server) = tokio::io::duplex(room);
        let sender = outbox.clone();
        tokio::spawn(async move { sender.send_to(server).await });
        (outbox, client)
    }

    async fn read(client: &mut tokio::io::DuplexStream) -> u8 {
        let mut byte = [0];
        tokio::io::AsyncReadExt::read_exact(client, &mut byte).await.unwrap();
        byte[0]
    }

    /// Commits over the first connection; the others are told by a byte.
    fn commit(number: u8, connections: &[&Arc<Outbox>]) {
        let (told, all_told) = oneshot::channel();
        let told = Arc::new(told);
        let bytes = || Bytes::copy_from_slice(&[number]);
        for other in &connections[1..] {
            other.push_invalidation(Tid(number.into()), bytes(), &told);
        }
        drop(told);
        connections[0].push_committed(Tid(number.into()), bytes(), all_told);
    }

    async fn is_quiet(client: &mut tokio::io::DuplexStream) -> bool {
        tokio::time::timeout(std::time::Duration::from_millis(50), read(client)).await.is_err()
    }

    #[tokio::test]
    async fn a_reply_is_sent_after_the_invalidations() {
        let (committing, mut client) = connected(100);
        let (told, mut other) = connected(100);
        // It has no sender yet.
        let late = Arc::new(Outbox::default());
        committing.push(Bytes::from_static(b"a"));
        commit(1, &[&committing, &told, &late]);
        committing.push(Bytes::from_static(b"b"));
        assert_eq!(read(&mut client).await, b'a');
        assert_eq!(read(&mut other).await, 1);
        assert!(is_quiet(&mut client).await);
        let (mut third, server) = tokio::io::duplex(100);
        let sender = late.clone();
        tokio::spawn(async move { sender.send_to(server).await });
        assert_eq!(read(&mut client).await, 1);
        assert_eq!(read(&mut client).await, b'b');
        assert_eq!(read(&mut third).await, 1);
    }

    #[tokio::test]
    async fn who_takes_no_bytes_or_goes_is_not_waited_for() {
        let (committing, mut client) = connected(100);
        let (blocked, mut other) = connected(1);
        commit(1, &[&committing, &blocked]);
        assert_eq!(read(&mut client).await, 1);
        for number in 2..5 {
            commit(number, &[&committing, &blocked]);
            assert_eq!(read(&mut client).await, number);
        }
        for number in 1..5 {
            assert_eq!(read(&mut other).await, number);
        }
        let (gone, third) = connected(100);
        drop(third);
        for number in 5..8 {
            commit(number, &[&committing, &gone]);
            assert_eq!(read(&mut client).await, number);
        }
        let closed = Arc::new(Outbox::default());
        commit(8, &[&committing, &closed]);
        closed.close("as wanted by the test");
        assert_eq!(read(&mut client).await, 8);
        commit(9, &[&committing, &closed]);
        assert_eq!(read(&mut client).await, 9);
    }

    #[tokio::test]
    async fn who_is_blocked_in_the_middle_of_its_queue_is_not_waited_for() {
        let (committing, mut client) = connected(100);
        let (blocked, mut other) = connected(1);
        // All of it is taken from the queue at once.
        blocked.push(vec![0; 2 * SMALL].into());
        commit(1, &[&committing, &blocked]);
        commit(2, &[&committing, &blocked]);
        assert_eq!(read(&mut client).await, 1);
        assert_eq!(read(&mut client).await, 2);
        assert_eq!(read(&mut other).await, 0);
    }

    #[tokio::test]
    async fn replies_do_not_wait_in_a_circle() {
        let (first, mut one) = connected(1000);
        let (second, mut two) = connected(1000);
        for number in 0..100 {
            commit(2 * number, &[&first, &second]);
            commit(2 * number + 1, &[&second, &first]);
        }
        for number in 0..200 {
            assert_eq!(read(&mut one).await, number);
            assert_eq!(read(&mut two).await, number);
        }
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
