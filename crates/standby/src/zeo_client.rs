//! A small ZEO client, for the demo and the benchmark. It tries all its addresses at the same time
//! and takes the first that answers, as the Python client does.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use standby_types::{Oid, Tid};
use standby_zeo::{Encoding, FrameReader, Incoming, MAX_FRAME, Value, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// A connection to a ZEO server.
pub struct Client {
    stream: TcpStream,
    frames: FrameReader,
    encoding: Encoding,
    next_id: i64,
    /// The last transaction that was heard of.
    pub last_tid: Tid,
}

/// The server has answered by an exception.
#[derive(Debug, thiserror::Error)]
#[error("the server answers {class}: {args:?}")]
pub struct ServerError {
    /// Its dotted name.
    pub class: String,
    /// Its arguments.
    pub args: Value,
}

impl Client {
    /// Connects to the first of `addresses` that serves, within `patience`.
    pub async fn connect(addresses: &[String], patience: Duration) -> anyhow::Result<Client> {
        Client::connect_as(addresses, patience, false).await
    }

    /// As [`Client::connect`], without asking for write access.
    pub async fn connect_read_only(
        addresses: &[String],
        patience: Duration,
    ) -> anyhow::Result<Client> {
        Client::connect_as(addresses, patience, true).await
    }

    async fn connect_as(
        addresses: &[String],
        patience: Duration,
        read_only: bool,
    ) -> anyhow::Result<Client> {
        let mut attempts = JoinSet::new();
        for address in addresses {
            let address = address.clone();
            attempts.spawn(async move {
                loop {
                    match Client::open(&address, read_only).await {
                        Ok(client) => return client,
                        Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    }
                }
            });
        }
        let first = tokio::time::timeout(patience, attempts.join_next()).await;
        first
            .ok()
            .flatten()
            .with_context(|| format!("no server answers at {}", addresses.join(", ")))?
            .map_err(Into::into)
    }

    async fn open(address: &str, read_only: bool) -> anyhow::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut client = Client {
            stream,
            frames: FrameReader::default(),
            encoding: Encoding::Msgpack,
            next_id: 0,
            last_tid: Tid::NONE,
        };
        let greeting = client.frame().await?;
        if Encoding::of_version(&greeting).is_none() {
            bail!("{address} speaks {:?}, not ZEO 5", greeting.escape_ascii().to_string());
        }
        let version = frame(client.encoding.version());
        client.stream.write_all(&version).await?;
        let tid = client.call("register", vec![Value::str("1"), read_only.into()]).await?;
        client.last_tid = tid_of(&tid)?;
        Ok(client)
    }

    async fn frame(&mut self) -> anyhow::Result<Bytes> {
        loop {
            if let Some(frame) = self.frames.next_frame(MAX_FRAME)? {
                return Ok(frame);
            }
            if self.stream.read_buf(self.frames.buffer()).await? == 0 {
                bail!("the server has closed the connection");
            }
        }
    }

    /// Calls a method and waits for its result.
    pub async fn call(&mut self, method: &str, args: Vec<Value>) -> anyhow::Result<Value> {
        self.next_id += 1;
        let id = Value::Int(self.next_id);
        self.stream.write_all(&self.encoding.call(&id, method, args)).await?;
        self.reply(&id).await
    }

    async fn reply(&mut self, id: &Value) -> anyhow::Result<Value> {
        loop {
            let frame = self.frame().await?;
            match self.encoding.decode(&frame)? {
                Incoming::Reply(reply) if reply.id == *id => {
                    let failed = |(class, args)| ServerError { class, args };
                    return Ok(reply.result.map_err(failed)?);
                }
                Incoming::Call(call) if call.method == "invalidateTransaction" => {
                    if let Some([tid, _]) = call.args.items() {
                        self.last_tid = tid_of(tid)?;
                    }
                }
                _ => {}
            }
        }
    }

    /// Commits new revisions: (object, serial it is based on, data). Returns the tid.
    pub async fn commit(&mut self, records: &[(Oid, Tid, Bytes)]) -> anyhow::Result<Tid> {
        self.next_id += 1;
        let name = Value::Int(self.next_id);
        let text = || Value::bytes(b"");
        let mut out = Vec::new();
        let begin = vec![
            name.clone(),
            text(),
            Value::bytes(b"standby"),
            Value::Dict(vec![]),
            Value::None,
            Value::str(" "),
        ];
        out.extend_from_slice(&self.encoding.notify("tpc_begin", begin));
        for (oid, serial, data) in records {
            let store = vec![
                oid.to_bytes().into(),
                serial.to_bytes().into(),
                data.clone().into(),
                name.clone(),
            ];
            out.extend_from_slice(&self.encoding.notify("storea", store));
        }
        self.next_id += 1;
        let id = Value::Int(self.next_id);
        out.extend_from_slice(&self.encoding.call(&id, "vote", vec![name.clone()]));
        self.stream.write_all(&out).await?;
        let conflicts = self.reply(&id).await?;
        if conflicts.items().is_some_and(|list| !list.is_empty()) {
            self.call("tpc_abort", vec![name]).await?;
            bail!("the objects were changed by another transaction");
        }
        let tid = self.call("tpc_finish", vec![name]).await?;
        let tid = tid_of(&tid)?;
        self.last_tid = tid;
        Ok(tid)
    }

    /// Fresh oids.
    pub async fn new_oids(&mut self, count: i64) -> anyhow::Result<Vec<Oid>> {
        let oids = self.call("new_oids", vec![count.into()]).await?;
        let oid = |value: &Value| match value {
            Value::Bytes(bytes) => Oid::from_slice(bytes).context("an oid of another length"),
            _ => bail!("an oid that is no bytes"),
        };
        oids.items().context("new_oids gives no list")?.iter().map(oid).collect()
    }

    /// The current revision of an object; `None` if it does not exist.
    pub async fn load(&mut self, oid: Oid) -> anyhow::Result<Option<(Bytes, Tid)>> {
        self.load_before(oid, Tid::MAX).await
    }

    /// The newest revision of an object before `tid`; `None` if there is none.
    pub async fn load_before(
        &mut self,
        oid: Oid,
        tid: Tid,
    ) -> anyhow::Result<Option<(Bytes, Tid)>> {
        let args = vec![oid.to_bytes().into(), tid.to_bytes().into()];
        let found = match self.call("loadBefore", args).await {
            Ok(found) => found,
            Err(error) => match error.downcast_ref::<ServerError>() {
                Some(error) if error.class.ends_with("POSKeyError") => return Ok(None),
                _ => return Err(error),
            },
        };
        match found.items() {
            Some([Value::Bytes(data), serial, _]) => Ok(Some((data.clone(), tid_of(serial)?))),
            _ => Ok(None),
        }
    }
}

fn tid_of(value: &Value) -> anyhow::Result<Tid> {
    match value {
        Value::Bytes(bytes) => Tid::from_slice(bytes).context("a tid of another length"),
        _ => bail!("a tid that is no bytes"),
    }
}
