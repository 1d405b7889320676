//! The router's own connection to a node: it asks for signs of life, and hears of the cluster and
//! of each commit.

use std::io;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use standby_node::sockets::{self, Stream};
use standby_types::Tid;
use standby_zeo::{Encoding, FrameReader, Incoming, Value, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::Router;
use crate::machine::Stranger;
use crate::topology::{KEY, value_of};

/// Between an answer and the next question.
const EVERY: Duration = Duration::from_millis(400);
/// Before a lost connection is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// The same if the node belongs to another cluster.
const STRANGER_AGAIN: Duration = Duration::from_secs(10);
/// How long a node may take to let the router in: it may be verifying all its clients.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// This process itself was held up if a clock rings so late: the answer may be there, unread.
const OVERSLEPT: Duration = Duration::from_millis(300);
/// The longest frame: the oids of a transaction.
const MAX_FRAME: usize = 64 << 20;

/// Why a connection has ended.
enum Ended {
    /// Nobody is there.
    Dead(String),
    /// Somebody is, who does not serve the router.
    Lost(String),
    Stranger(Stranger),
}

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Ended {
        Ended::Lost(format!("{error:#}"))
    }
}

/// Watches an address. It ends by being aborted, when the address is not wanted any more.
pub(crate) async fn watch(router: &Router, address: &str) {
    loop {
        let Err(ended) = follow(router, address).await;
        let pause = match &ended {
            Ended::Stranger(_) => STRANGER_AGAIN,
            _ => AGAIN,
        };
        router.step(|machine, _| match ended {
            Ended::Dead(why) => machine.lost(address, true, why),
            Ended::Lost(why) => machine.lost(address, false, why),
            Ended::Stranger(stranger) => machine.foreign(address, &stranger),
        });
        sleep(pause).await;
    }
}

async fn follow(router: &Router, address: &str) -> Result<std::convert::Infallible, Ended> {
    let mut node = match timeout(router.dead_after, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => Connection::begin(router, stream).await?,
        Ok(Err(error)) => return Err(Ended::Dead(format!("cannot connect: {error}"))),
        Err(_) => {
            let seconds = router.dead_after.as_secs_f64();
            return Err(Ended::Dead(format!("no answer to a connection within {seconds} s")));
        }
    };
    let (info, last) =
        timeout(HANDSHAKE, node.introduce(&router.storage)).await.map_err(|_| {
            let tls = if router.tls.is_none() { ", or for TLS (--tls-certificate)" } else { "" };
            Ended::Lost(format!("it says nothing: it waits for a primary{tls}"))
        })??;
    let told = value_of(&info, KEY);
    router
        .step(|machine, now| machine.connected(now, address, told, last))
        .map_err(Ended::Stranger)?;
    node.ask(router, address).await
}

/// A connection to a ZEO server.
struct Connection {
    stream: Stream,
    frames: FrameReader,
    asked: i64,
}

const ENCODING: Encoding = Encoding::Msgpack;

impl Connection {
    async fn begin(router: &Router, tcp: TcpStream) -> anyhow::Result<Connection> {
        sockets::ask_for_signs(&tcp, HANDSHAKE)?;
        let stream = match &router.tls {
            None => Stream::Tcp(tcp),
            Some(tls) => {
                let tls = timeout(HANDSHAKE, tls.connect(tcp)).await;
                let tls = tls.context("it does not answer TLS")?;
                Stream::from_tls(tls.context("TLS fails; has the node an <ssl> section?")?)
            }
        };
        stream.set_nodelay();
        Ok(Connection { stream, frames: FrameReader::default(), asked: 0 })
    }

    /// Registers as a reader. Returns what the server tells of itself, and its last transaction.
    async fn introduce(&mut self, storage: &str) -> anyhow::Result<(Value, Tid)> {
        let greeting = self.frame().await.context(match self.stream {
            Stream::Tls(_) => "it does not greet",
            _ => "it does not greet; does it want TLS (--tls-certificate)?",
        })?;
        if Encoding::of_version(&greeting).is_none() {
            bail!("it speaks {:?}, not ZEO 5", greeting.escape_ascii().to_string());
        }
        self.stream.write_all(&frame(ENCODING.version())).await?;
        let last = self.call("register", vec![Value::str(storage), true.into()]).await?;
        let last = match last {
            Value::Bytes(bytes) => Tid::from_slice(&bytes).context("a tid of another length")?,
            _ => Tid::NONE,
        };
        Ok((self.call("get_info", vec![]).await?, last))
    }

    async fn send(&mut self, method: &str, args: Vec<Value>) -> io::Result<Value> {
        self.asked += 1;
        let id = Value::Int(self.asked);
        self.stream.write_all(&ENCODING.call(&id, method, args)).await?;
        Ok(id)
    }

    async fn call(&mut self, method: &str, args: Vec<Value>) -> anyhow::Result<Value> {
        let id = self.send(method, args).await?;
        loop {
            let frame = self.frame().await?;
            match ENCODING.decode(&frame)? {
                Incoming::Reply(reply) if reply.id == id => match reply.result {
                    Ok(value) => return Ok(value),
                    Err((class, args)) => bail!("it answers {method} with {class}: {args:?}"),
                },
                _ => {}
            }
        }
    }

    /// The next frame. Nothing is lost if the caller does not wait for it.
    async fn frame(&mut self) -> anyhow::Result<Bytes> {
        loop {
            if let Some(frame) = self.frames.next_frame(MAX_FRAME)? {
                return Ok(frame);
            }
            if self.stream.read_buf(self.frames.buffer()).await? == 0 {
                bail!("it has closed the connection");
            }
        }
    }

    /// Asks for signs of life, and takes what the node tells, until it is silent for too long.
    async fn ask(
        &mut self,
        router: &Router,
        address: &str,
    ) -> Result<std::convert::Infallible, Ended> {
        let patience = router.dead_after;
        // What was asked, and when.
        let mut asked: Option<(Value, Instant)> = None;
        let mut next = Instant::now();
        loop {
            let due = asked.as_ref().map_or(next, |(_, at)| *at + patience);
            tokio::select! {
                // What has come counts before the time that has gone.
                biased;
                frame = self.frame() => {
                    if let Some(at) = self.take(router, address, &frame?, &asked)? {
                        router.note(|machine, _| machine.answered(address, at.elapsed()));
                        (asked, next) = (None, Instant::now() + EVERY);
                    }
                }
                () = sleep_until(due) => match &mut asked {
                    Some((_, at)) if due.elapsed() > OVERSLEPT => *at = Instant::now(),
                    Some(_) => {
                        let seconds = patience.as_secs_f64();
                        return Err(Ended::Dead(format!("no sign of life for {seconds} s")));
                    }
                    None => {
                        let sent = timeout(patience, self.send("ping", vec![])).await;
                        let sent = sent.map_err(|_| Ended::Dead("it takes no bytes".into()))?;
                        asked = Some((sent.map_err(anyhow::Error::from)?, Instant::now()));
                    }
                }
            }
        }
    }

    /// Takes what a node says. Returns when it was asked, if this is the answer.
    fn take(
        &self,
        router: &Router,
        address: &str,
        frame: &Bytes,
        asked: &Option<(Value, Instant)>,
    ) -> Result<Option<Instant>, Ended> {
        match ENCODING.decode(frame).map_err(anyhow::Error::from)? {
            Incoming::Reply(reply) => {
                Ok(asked.as_ref().filter(|(id, _)| *id == reply.id).map(|(_, at)| *at))
            }
            Incoming::Call(call) => {
                match (call.method.as_str(), call.args.items()) {
                    ("invalidateTransaction", Some([Value::Bytes(tid), ..])) => {
                        if let Some(tid) = Tid::from_slice(tid) {
                            router.note(|machine, now| machine.has(now, address, tid));
                        }
                    }
                    ("info", Some([info])) => {
                        if let Some(told) = value_of(info, KEY) {
                            router
                                .step(|machine, _| machine.told(address, told))
                                .map_err(Ended::Stranger)?;
                        }
                    }
                    _ => {}
                }
                Ok(None)
            }
            Incoming::Heartbeat => Ok(None),
        }
    }
}
