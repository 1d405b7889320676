//! A network in memory: TCP as applications see it.
//!
//! Bytes arrive in order, after a delay, or not at all while the way is blocked: then they arrive
//! when it is open again, as TCP sends again what was lost. A process that ends closes its
//! connections; a machine that loses power says nothing, and answers with a reset when it is back.
//! A connection that falls into a black hole delivers nothing any more, in neither direction, while
//! new ones work.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};

use crate::platform::simulated::{Random, current};

/// Bytes that are under way, or have not been read, before a writer waits.
const WINDOW: usize = 256 << 10;
/// Time between two attempts of TCP to get something through, at most.
const RETRANSMISSION: Duration = Duration::from_millis(200);
const FIRST_PORT: u16 = 40_000;

/// How long the network takes.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// At least.
    pub least: Duration,
    /// At most, usually.
    pub most: Duration,
    /// One packet in so many is lost, and sent again later; 0 for none.
    pub lost_one_in: u64,
}

/// See the module. Clones are the same network.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Inner>>);

struct Inner {
    now: Duration,
    random: Random,
    latency: Latency,
    blocked: BTreeSet<(IpAddr, IpAddr)>,
    off: BTreeSet<IpAddr>,
    listeners: BTreeMap<SocketAddr, Backlog>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

#[derive(Default)]
struct Backlog {
    waiting: VecDeque<u64>,
    waker: Option<Waker>,
}

struct Connection {
    /// The dialling side, the accepting side.
    ends: [SocketAddr; 2],
    /// What each side has sent.
    pipes: [Pipe; 2],
    /// The program of that side has no use for it any more, or its machine has lost power.
    gone: [bool; 2],
    /// The machine of that side does not know the connection.
    forgotten: [bool; 2],
    opening: Opening,
    /// Since when nothing gets through, if the connection fell into a black hole.
    swallowed: Option<Duration>,
    /// After how long without an acknowledgement each side gives it up; zero for never.
    patience: [Duration; 2],
    /// Which side has given it up.
    given_up: [bool; 2],
    waker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// When the request arrives.
    Asked(Duration),
    /// When the answer arrives.
    Accepted(Duration),
    Refused(Duration),
    Open,
}

enum Segment {
    Bytes(Bytes),
    End,
    Reset,
}

#[derive(Default)]
struct Pipe {
    under_way: VecDeque<(Duration, Segment)>,
    arrived: BytesMut,
    /// No more is sent.
    closed: bool,
    /// The end has arrived.
    ended: bool,
    /// The other side does not know this connection.
    reset: bool,
    unread: usize,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl Network {
    /// A network on which nothing is blocked.
    pub fn new(random: Random, latency: Latency) -> Network {
        Network(Arc::new(Mutex::new(Inner {
            now: Duration::ZERO,
            random,
            latency,
            blocked: BTreeSet::new(),
            off: BTreeSet::new(),
            listeners: BTreeMap::new(),
            connections: BTreeMap::new(),
            next: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time that has passed.
    pub fn now(&self) -> Duration {
        self.lock().now
    }

    /// How long the network takes from now on.
    pub fn set_latency(&self, latency: Latency) {
        self.lock().latency = latency;
    }

    /// Nothing gets from one machine to the other from now on.
    pub fn block(&self, from: IpAddr, to: IpAddr) {
        self.lock().blocked.insert((from, to));
    }

    /// All ways are open again.
    pub fn open_all(&self) {
        self.lock().blocked.clear();
    }

    /// Of the connections that are open between two of these machines, the ones that `chosen` says
    /// fall into a black hole.
    pub fn swallow(&self, machines: &[IpAddr], mut chosen: impl FnMut() -> bool) {
        let mut inner = self.lock();
        let now = inner.now;
        for connection in inner.connections.values_mut() {
            let between = connection.ends.iter().all(|end| machines.contains(&end.ip()));
            if between && connection.opening == Opening::Open && chosen() {
                connection.swallowed.get_or_insert(now);
            }
        }
    }

    /// The program of a machine ends: its connections are closed, in an order that does not depend
    /// on that of its tasks.
    pub fn close_all(&self, machine: IpAddr) {
        let mut inner = self.lock();
        let ids: Vec<u64> = inner.connections.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                if inner.connections.get(&id).is_some_and(|c| c.ends[side].ip() == machine) {
                    inner.leave(id, side);
                }
            }
        }
    }

    /// A machine loses power: nobody is told.
    pub fn power_off(&self, machine: IpAddr) {
        let mut inner = self.lock();
        inner.off.insert(machine);
        for connection in inner.connections.values_mut() {
            for side in 0..2 {
                if connection.ends[side].ip() == machine {
                    connection.forgotten[side] = true;
                    connection.pipes[side].under_way.clear();
                }
            }
        }
    }

    /// A machine has power again.
    pub fn power_on(&self, machine: IpAddr) {
        self.lock().off.remove(&machine);
    }

    /// Lets time pass: what is due arrives.
    pub fn advance(&self, now: Duration) {
        let mut inner = self.lock();
        inner.now = now;
        let ids: Vec<u64> = inner.connections.keys().copied().collect();
        for id in ids {
            inner.deliver(id);
        }
    }
}

impl Inner {
    fn arrival(&mut self) -> Duration {
        let Latency { least, most, lost_one_in } = self.latency;
        let mut delay = least + self.random.within(most.saturating_sub(least));
        if lost_one_in > 0 && self.random.below(lost_one_in) == 0 {
            delay += self.random.within(RETRANSMISSION);
        }
        self.now + delay
    }

    fn send(&mut self, id: u64, side: usize, segment: Segment) {
        let at = self.arrival();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.forgotten[side] {
            return;
        }
        let pipe = &mut connection.pipes[side];
        // In order.
        let at = pipe.under_way.back().map_or(at, |(last, _)| at.max(*last));
        pipe.under_way.push_back((at, segment));
    }

    /// Each side of a connection in a black hole finds out by itself, if it ever does.
    fn give_up(&mut self, id: u64) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(since) = connection.swallowed else { return };
        for side in 0..2 {
            connection.pipes[side].under_way.clear();
            let patience = connection.patience[side];
            if !patience.is_zero() && now >= since + patience {
                connection.given_up[side] = true;
                wake(&mut connection.pipes[1 - side].reader);
                wake(&mut connection.pipes[side].writer);
            }
        }
    }

    fn deliver(&mut self, id: u64) {
        self.open(id);
        self.give_up(id);
        for side in 0..2 {
            loop {
                let (now, again) = (self.now, self.random.clone());
                let Some(connection) = self.connections.get_mut(&id) else { return };
                let (from, to) = (connection.ends[side].ip(), connection.ends[1 - side].ip());
                let Some((at, _)) = connection.pipes[side].under_way.front_mut() else { break };
                if *at > now {
                    break;
                }
                if self.blocked.contains(&(from, to)) || self.off.contains(&to) {
                    let mut again = again;
                    *at = now + Duration::from_millis(1) + again.within(RETRANSMISSION);
                    self.random = again;
                    break;
                }
                let Some((_, segment)) = connection.pipes[side].under_way.pop_front() else {
                    break;
                };
                if connection.forgotten[1 - side] || connection.gone[1 - side] {
                    let is_data = matches!(segment, Segment::Bytes(_));
                    if (is_data || connection.forgotten[1 - side]) && !connection.forgotten[side] {
                        // The machine answers for its program.
                        let pipe = &mut connection.pipes[1 - side];
                        pipe.under_way.push_back((now, Segment::Reset));
                    }
                    continue;
                }
                let pipe = &mut connection.pipes[side];
                match segment {
                    Segment::Bytes(bytes) => pipe.arrived.extend_from_slice(&bytes),
                    Segment::End => pipe.ended = true,
                    Segment::Reset => {
                        for pipe in &mut connection.pipes {
                            pipe.reset = true;
                            wake(&mut pipe.reader);
                            wake(&mut pipe.writer);
                        }
                        break;
                    }
                }
                wake(&mut pipe.reader);
            }
        }
        let over = |connection: &Connection| {
            connection.gone == [true; 2] && connection.pipes.iter().all(|p| p.under_way.is_empty())
        };
        if self.connections.get(&id).is_some_and(over) {
            self.connections.remove(&id);
        }
    }

    fn open(&mut self, id: u64) {
        let arrival = self.arrival();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (from, to) = (connection.ends[0], connection.ends[1]);
        match connection.opening {
            Opening::Asked(at) if at <= self.now && !self.off.contains(&to.ip()) => {
                if self.blocked.contains(&(from.ip(), to.ip())) {
                    connection.opening = Opening::Asked(arrival + RETRANSMISSION);
                } else if let Some(backlog) = self.listeners.get_mut(&to) {
                    connection.opening = Opening::Accepted(arrival);
                    backlog.waiting.push_back(id);
                    wake(&mut backlog.waker);
                } else {
                    connection.opening = Opening::Refused(arrival);
                }
            }
            Opening::Accepted(at) | Opening::Refused(at) if at <= self.now => {
                if self.blocked.contains(&(to.ip(), from.ip())) {
                    return;
                }
                if matches!(connection.opening, Opening::Accepted(_)) {
                    connection.opening = Opening::Open;
                }
                wake(&mut connection.waker);
            }
            _ => {}
        }
    }
}

/// A port on which connections are accepted.
pub struct TcpListener {
    network: Network,
    address: SocketAddr,
}

fn parse(address: &str) -> io::Result<SocketAddr> {
    address.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

impl TcpListener {
    pub async fn bind(address: impl AsRef<str>) -> io::Result<TcpListener> {
        let address = parse(address.as_ref())?;
        let network = current().network.clone();
        let mut inner = network.lock();
        if inner.listeners.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        inner.listeners.insert(address, Backlog::default());
        drop(inner);
        Ok(TcpListener { network, address })
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        poll_fn(|cx| {
            let mut inner = self.network.lock();
            let Some(backlog) = inner.listeners.get_mut(&self.address) else {
                return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
            };
            let Some(id) = backlog.waiting.pop_front() else {
                backlog.waker = Some(cx.waker().clone());
                return Poll::Pending;
            };
            let peer = inner.connections.get(&id).map_or(self.address, |c| c.ends[0]);
            let stream = TcpStream { network: self.network.clone(), id, side: 1, peer };
            Poll::Ready(Ok((stream, peer)))
        })
        .await
    }
}

impl Drop for TcpListener {
    fn drop(&mut self) {
        let mut inner = self.network.lock();
        let Some(backlog) = inner.listeners.remove(&self.address) else { return };
        for id in backlog.waiting {
            if let Some(connection) = inner.connections.get_mut(&id) {
                connection.gone[1] = true;
                inner.send(id, 1, Segment::End);
            }
        }
    }
}

/// One side of a connection.
pub struct TcpStream {
    network: Network,
    id: u64,
    side: usize,
    peer: SocketAddr,
}

impl TcpStream {
    pub async fn connect(address: impl AsRef<str>) -> io::Result<TcpStream> {
        let peer = parse(address.as_ref())?;
        let host = current();
        let network = host.network.clone();
        let id = {
            let mut inner = network.lock();
            let at = inner.arrival();
            let id = inner.next;
            inner.next += 1;
            let own = SocketAddr::new(host.address, FIRST_PORT + (id % 20_000) as u16);
            let connection = Connection {
                ends: [own, peer],
                pipes: Default::default(),
                gone: [false; 2],
                forgotten: [false; 2],
                opening: Opening::Asked(at),
                swallowed: None,
                patience: [Duration::ZERO; 2],
                given_up: [false; 2],
                waker: None,
            };
            inner.connections.insert(id, connection);
            id
        };
        // Dropped, it closes.
        let stream = TcpStream { network, id, side: 0, peer };
        poll_fn(|cx| {
            let mut inner = stream.network.lock();
            let now = inner.now;
            let Some(connection) = inner.connections.get_mut(&id) else {
                let reset = io::Error::from(io::ErrorKind::ConnectionReset);
                return Poll::Ready(Err(reset));
            };
            match connection.opening {
                Opening::Open => Poll::Ready(Ok(())),
                Opening::Refused(at) if at <= now => {
                    Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
                }
                _ => {
                    connection.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await?;
        Ok(stream)
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }

    /// Everything is sent at once here.
    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    /// Gives the connection up when nothing has been acknowledged for so long.
    pub fn end_when_silent(&self, after: Duration) {
        if let Some(connection) = self.network.lock().connections.get_mut(&self.id) {
            connection.patience[self.side] = after;
        }
    }

    /// Its two directions.
    pub fn into_split(self) -> (ReadHalf<TcpStream>, WriteHalf<TcpStream>) {
        tokio::io::split(self)
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.network.lock();
        let Some(connection) = inner.connections.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let given_up = connection.given_up[self.side];
        let pipe = &mut connection.pipes[1 - self.side];
        if given_up || pipe.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if pipe.arrived.is_empty() {
            if pipe.ended {
                return Poll::Ready(Ok(()));
            }
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let len = pipe.arrived.len().min(buf.remaining());
        buf.put_slice(&pipe.arrived[..len]);
        pipe.arrived.advance(len);
        pipe.unread -= len;
        wake(&mut pipe.writer);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.network.lock();
        let Some(connection) = inner.connections.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let given_up = connection.given_up[self.side];
        let pipe = &mut connection.pipes[self.side];
        if given_up || pipe.reset || pipe.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let len = bytes.len().min(WINDOW.saturating_sub(pipe.unread));
        if len == 0 && !bytes.is_empty() {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        pipe.unread += len;
        inner.send(self.id, self.side, Segment::Bytes(Bytes::copy_from_slice(&bytes[..len])));
        Poll::Ready(Ok(len))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.network.lock();
        inner.close(self.id, self.side);
        Poll::Ready(Ok(()))
    }
}

impl Inner {
    /// The program of a side has no use for the connection any more.
    fn leave(&mut self, id: u64, side: usize) {
        self.close(id, side);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.gone[side] = true;
        if side == 0 && !matches!(connection.opening, Opening::Open | Opening::Accepted(_)) {
            // Nobody has accepted it, or ever will.
            connection.gone[1] = true;
        }
    }

    fn close(&mut self, id: u64, side: usize) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !std::mem::replace(&mut connection.pipes[side].closed, true) {
            self.send(id, side, Segment::End);
        }
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        self.network.lock().leave(self.id, self.side);
    }
}
