//! A ZEO client with a cache, as the stock one behaves: it tries all addresses at the same time,
//! keeps the first that speaks, verifies its cache, reads at the last transaction that it has heard
//! of, and says what it was told.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use standby_node::simulated::{Random, TcpStream};
use standby_types::{Oid, Tid, TransactionToken};
use standby_zeo::{Encoding, FrameReader, Incoming, MAX_FRAME, Value, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::history::{Event, History};
use crate::record::Content;

/// Accounts, from which amounts are moved to others.
pub const ACCOUNTS: u64 = 6;
/// What is in each of them at first.
pub const BALANCE: i64 = 100;
/// Each client has a counter at this oid plus its number.
const COUNTERS: u64 = 50;
/// Each client that writes has a blob at this oid plus its number.
pub const BLOBS: u64 = 70;
/// The first oid that is asked for.
pub const FIRST_FREE: u64 = 100;
/// How long a server may take to let a client in.
const PATIENCE: Duration = Duration::from_secs(6);
/// After so long a client that cannot connect is restarted by somebody.
const LEFT_WAITING: Duration = Duration::from_secs(30);
/// It says so often that it waits.
const WINDOW: Duration = Duration::from_secs(2);

/// Why something was not done.
#[derive(Debug)]
enum Trouble {
    /// The connection is lost.
    Lost,
    /// The server says no.
    Refused(String),
}

type Result<T> = std::result::Result<T, Trouble>;

impl From<std::io::Error> for Trouble {
    fn from(_: std::io::Error) -> Self {
        Trouble::Lost
    }
}

/// What a client is to do.
#[derive(Debug, Clone)]
pub struct Script {
    /// Its number.
    pub client: u32,
    /// Where servers are.
    pub addresses: Vec<String>,
    /// It commits; otherwise it reads at one address after the other.
    pub writes: bool,
    /// At most so long between two transactions.
    pub pause: Duration,
    /// How long an answer is waited for. A stock client waits for ever; somebody restarts it.
    pub patience: Duration,
    /// Packs are asked for.
    pub packs: bool,
    /// Each transaction begins with a `ping`.
    pub syncs: bool,
    /// So many clients have blobs.
    pub blobs: u64,
    /// Each transaction has a token, as those of the package `standby-zodb`.
    pub tokens: bool,
}

/// A transaction whose outcome the client does not know.
struct InDoubt {
    number: u64,
    /// What the client had heard of when it finished it.
    since: Tid,
}

struct Connection {
    stream: TcpStream,
    frames: FrameReader,
    encoding: Encoding,
    next_id: i64,
}

impl Connection {
    /// The next frame.
    async fn frame(&mut self) -> Result<Bytes> {
        loop {
            let next = self.frames.next_frame(MAX_FRAME).map_err(|_| Trouble::Lost)?;
            if let Some(frame) = next {
                return Ok(frame);
            }
            if self.stream.read_buf(self.frames.buffer()).await? == 0 {
                return Err(Trouble::Lost);
            }
        }
    }
}

/// See the module.
pub struct Client {
    script: Script,
    random: Random,
    history: History,
    connection: Option<Connection>,
    /// The last transaction that it has heard of.
    told: Tid,
    cache: BTreeMap<Oid, (Bytes, Tid)>,
    number: u64,
    created: Vec<Oid>,
    next_address: usize,
    /// What has come of a blob.
    received: Vec<u8>,
    in_doubt: Option<InDoubt>,
}

impl Client {
    /// A client that has not connected yet.
    pub fn new(script: Script, random: Random, history: History) -> Client {
        Client {
            script,
            random,
            history,
            connection: None,
            told: Tid::NONE,
            cache: BTreeMap::new(),
            number: 0,
            created: Vec::new(),
            next_address: 0,
            received: Vec::new(),
            in_doubt: None,
        }
    }

    /// Works for ever.
    pub async fn run(mut self) {
        loop {
            if self.connection.is_none() && self.connect().await.is_err() {
                self.connection = None;
                sleep(Duration::from_millis(50)).await;
                continue;
            }
            match self.transaction().await {
                Ok(()) | Err(Trouble::Refused(_)) => {}
                Err(Trouble::Lost) => {
                    self.connection = None;
                    continue;
                }
            }
            let pause = self.random.within(self.script.pause);
            sleep(pause).await;
        }
    }

    async fn connect(&mut self) -> Result<()> {
        let addresses = match self.script.writes {
            true => self.script.addresses.clone(),
            false => {
                // Any of them: reads must be the same everywhere.
                self.next_address += self.random.below(3) as usize;
                let at = self.next_address % self.script.addresses.len();
                vec![self.script.addresses[at].clone()]
            }
        };
        let encoding = if self.random.one_in(2) { Encoding::Msgpack } else { Encoding::Pickle };
        let read_only = !self.script.writes;
        let patience = if self.script.writes { LEFT_WAITING } else { PATIENCE };
        let found = {
            let mut connecting = pin!(first_registered(addresses, encoding, read_only));
            let mut waited = Duration::ZERO;
            loop {
                match timeout(WINDOW, &mut connecting).await {
                    Ok(found) => break Some(found),
                    Err(_) if waited + WINDOW >= patience => break None,
                    Err(_) => waited += WINDOW,
                }
                if self.script.writes {
                    self.history.add(Event::StillWaits { client: self.script.client });
                }
            }
        };
        let known = self.told;
        let Some((connection, tid)) = found else { return Err(Trouble::Lost) };
        self.connection = Some(connection);
        // Invalidations of this session follow what `register` answers.
        self.told = Tid::NONE;
        let (client, writes) = (self.script.client, self.script.writes);
        self.history.add(Event::Connected { client, writes, tid, known });
        self.told = self.told.max(tid);
        if known > Tid::NONE && known != tid {
            let since = vec![known.to_bytes().into()];
            let missed = match self.call("getInvalidations", since).await {
                Ok(missed) => missed,
                Err(trouble) => {
                    // The cache is as it was.
                    self.told = known;
                    return Err(trouble);
                }
            };
            match missed.items() {
                Some([_, oids]) if known <= tid => {
                    for oid in oids.items().unwrap_or_default() {
                        self.cache.remove(&oid_of(oid)?);
                    }
                }
                _ => self.cache.clear(),
            }
        }
        Ok(())
    }

    async fn transaction(&mut self) -> Result<()> {
        self.settle().await?;
        if self.script.syncs {
            self.sync().await?;
        }
        if self.script.blobs > 0 && self.random.one_in(6) {
            return self.blob().await;
        }
        if !self.script.writes {
            return self.audit().await;
        }
        match self.random.below(20) {
            0 => {
                self.sync().await?;
                self.audit().await
            }
            1 => self.audit().await,
            2 | 3 => self.create().await,
            4 => self.look().await,
            5 if self.script.packs => self.pack().await,
            6..=9 => self.count().await,
            _ => self.transfer().await,
        }
    }

    /// Asks what became of the transaction that was under way when the connection broke.
    async fn settle(&mut self) -> Result<()> {
        let Some(InDoubt { number, since }) = self.in_doubt else { return Ok(()) };
        let client = self.script.client;
        let token = Value::bytes(&self.token(number).to_bytes());
        let args = vec![token, since.to_bytes().into()];
        let answer = match self.call("transaction_outcome", args).await {
            Ok(answer) => answer,
            // It asks again, elsewhere.
            Err(_) => return Err(Trouble::Lost),
        };
        self.in_doubt = None;
        match &answer {
            Value::None => self.history.add(Event::NotCommitted { client, number }),
            Value::Bytes(_) => {
                let tid = tid_of(&answer)?;
                self.history.add(Event::Committed { client, number, tid, asked: true });
                let told = self.told;
                self.history.add(Event::Outcome { client, told, tid });
            }
            _ => self.history.add(Event::OutcomeUnknown { client, number }),
        }
        Ok(())
    }

    fn token(&self, number: u64) -> TransactionToken {
        let mut client = [0; 16];
        client[..4].copy_from_slice(&self.script.client.to_be_bytes());
        TransactionToken { client, number }
    }

    /// Begins with all that was acknowledged before, as a client with `server_sync`.
    async fn sync(&mut self) -> Result<()> {
        let (client, writes) = (self.script.client, self.script.writes);
        self.history.add(Event::Asked { client, writes });
        self.call("ping", vec![]).await?;
        self.history.add(Event::Synced { client, tid: self.told });
        Ok(())
    }

    /// Moves an amount from one account to another.
    async fn transfer(&mut self) -> Result<()> {
        self.hear().await?;
        let snapshot = self.told;
        let from = self.random.below(ACCOUNTS);
        let to = (from + 1 + self.random.below(ACCOUNTS - 1)) % ACCOUNTS;
        let amount = self.random.range(1..20) as i64;
        let mut writes = Vec::new();
        for (oid, change) in [(Oid(from + 1), -amount), (Oid(to + 1), amount)] {
            let found = self.read(oid, snapshot).await?;
            // What is missing is made: everything begins so.
            let (old, serial) = found.unwrap_or((BALANCE, Tid::NONE));
            writes.push((oid, serial, old + change));
        }
        self.commit(writes).await
    }

    /// Adds one to a counter of its own.
    async fn count(&mut self) -> Result<()> {
        self.hear().await?;
        let snapshot = self.told;
        let oid = Oid(COUNTERS + u64::from(self.script.client));
        let (old, serial) = self.read(oid, snapshot).await?.unwrap_or((0, Tid::NONE));
        self.commit(vec![(oid, serial, old + 1)]).await
    }

    /// Writes its blob anew, or reads that of any client.
    async fn blob(&mut self) -> Result<()> {
        self.hear().await?;
        let (client, snapshot) = (self.script.client, self.told);
        if self.script.writes && self.random.one_in(2) {
            let oid = Oid(BLOBS + u64::from(client));
            let serial = self.read(oid, snapshot).await?.map_or(Tid::NONE, |(_, serial)| serial);
            let amount = self.random.below(1 << 50) as i64;
            return self.commit_with(vec![(oid, serial, amount)], true).await;
        }
        let oid = Oid(BLOBS + self.random.below(self.script.blobs));
        let Some((amount, serial)) = self.read(oid, snapshot).await? else { return Ok(()) };
        self.received.clear();
        let args = vec![oid.to_bytes().into(), serial.to_bytes().into()];
        let found = match self.call("sendBlob", args).await {
            Ok(_) => Some(self.received == blob_of(amount)),
            Err(Trouble::Refused(class)) if class.ends_with("POSKeyError") => None,
            // It is damaged, and who has it does not run at the moment.
            Err(Trouble::Refused(_)) => return Ok(()),
            Err(lost) => return Err(lost),
        };
        self.history.add(Event::Blob { client, oid, serial, found });
        Ok(())
    }

    /// Makes new objects.
    async fn create(&mut self) -> Result<()> {
        let count = self.random.range(1..4) as i64;
        let oids = self.call("new_oids", vec![count.into()]).await?;
        let oids: Vec<Oid> =
            oids.items().unwrap_or_default().iter().map(oid_of).collect::<Result<_>>()?;
        self.history.add(Event::Oids { client: self.script.client, oids: oids.clone() });
        let writes = oids.iter().map(|oid| (*oid, Tid::NONE, 1)).collect();
        self.created.extend(oids);
        self.commit(writes).await
    }

    /// Reads all accounts at one moment.
    async fn audit(&mut self) -> Result<()> {
        self.hear().await?;
        let snapshot = self.told;
        let mut sum = 0;
        for account in 1..=ACCOUNTS {
            sum += self.read(Oid(account), snapshot).await?.map_or(BALANCE, |(amount, _)| amount);
        }
        self.history.add(Event::Audited { client: self.script.client, snapshot, sum });
        Ok(())
    }

    /// Asks for what is current, which is not to be newer than what the client has heard of.
    async fn look(&mut self) -> Result<()> {
        let oid = Oid(1 + self.random.below(ACCOUNTS));
        let args = vec![oid.to_bytes().into(), Tid::MAX.to_bytes().into()];
        match self.call("loadBefore", args).await {
            Ok(found) => {
                if let Some([_, serial, Value::None]) = found.items() {
                    let (client, told) = (self.script.client, self.told);
                    let serial = tid_of(serial)?;
                    self.history.add(Event::Current { client, told, oid, serial });
                }
                Ok(())
            }
            Err(Trouble::Refused(_)) => Ok(()),
            Err(lost) => Err(lost),
        }
    }

    async fn pack(&mut self) -> Result<()> {
        if !self.random.one_in(10) {
            return Ok(());
        }
        self.history.add(Event::Packing);
        let now = standby_node::simulated::wall_clock().as_secs_f64();
        self.call("pack", vec![Value::Float(now), Value::Bool(false)]).await.map(drop)
    }

    /// What an object held at a moment; `None` if it did not exist.
    async fn read(&mut self, oid: Oid, snapshot: Tid) -> Result<Option<(i64, Tid)>> {
        let client = self.script.client;
        let (data, serial) = match self.cache.get(&oid) {
            Some((data, serial)) if *serial <= snapshot => (data.clone(), *serial),
            _ => {
                let args = vec![oid.to_bytes().into(), snapshot.next().to_bytes().into()];
                let found = match self.call("loadBefore", args).await {
                    Err(Trouble::Refused(class)) if class.ends_with("POSKeyError") => {
                        self.history.add(Event::Read { client, snapshot, oid, serial: None });
                        return Ok(None);
                    }
                    other => other?,
                };
                let Some([Value::Bytes(data), serial, end]) = found.items() else {
                    // It did not exist then, or that is packed away: a stock client begins anew.
                    return Err(Trouble::Refused("not at that time".into()));
                };
                let serial = tid_of(serial)?;
                if *end == Value::None && self.told == snapshot {
                    self.cache.insert(oid, (data.clone(), serial));
                }
                (data.clone(), serial)
            }
        };
        self.history.add(Event::Read { client, snapshot, oid, serial: Some(serial) });
        let Some(content) = Content::decode(&data) else {
            return Err(Trouble::Refused("nothing that was written".into()));
        };
        Ok(Some((content.amount, serial)))
    }

    async fn commit(&mut self, writes: Vec<(Oid, Tid, i64)>) -> Result<()> {
        self.commit_with(writes, false).await
    }

    async fn commit_with(&mut self, writes: Vec<(Oid, Tid, i64)>, blobs: bool) -> Result<()> {
        self.number += 1;
        let (client, number) = (self.script.client, self.number);
        let name = Value::Int(number as i64);
        let description = format!("{client} {number}");
        let begin = vec![
            name.clone(),
            Value::bytes(b"sim"),
            Value::bytes(description.as_bytes()),
            Value::Dict(vec![]),
            Value::None,
            Value::str(" "),
        ];
        // Most are small; some travel in parts.
        let padding = match self.random.below(60) {
            0 => 1_200_000,
            1..=4 => 30_000,
            _ => self.random.below(300) as usize,
        };
        let mut out = Vec::new();
        let token = self.token(number);
        let Some(connection) = &mut self.connection else { return Err(Trouble::Lost) };
        let encoding = connection.encoding;
        out.extend_from_slice(&encoding.notify("tpc_begin", begin));
        if self.script.tokens {
            let token = Value::bytes(&token.to_bytes());
            out.extend_from_slice(&encoding.notify("transaction_token", vec![name.clone(), token]));
        }
        let mut stored = Vec::new();
        for (oid, serial, amount) in &writes {
            let content = Content { client, number, base: *serial, amount: *amount };
            let data = Bytes::from(content.encode(padding, blobs));
            let args = vec![
                oid.to_bytes().into(),
                serial.to_bytes().into(),
                data.clone().into(),
                name.clone(),
            ];
            if blobs {
                out.extend_from_slice(&encoding.notify("storeBlobStart", vec![]));
                for chunk in blob_of(*amount).chunks(64_000) {
                    let chunk = vec![Value::bytes(chunk)];
                    out.extend_from_slice(&encoding.notify("storeBlobChunk", chunk));
                }
            }
            let method = if blobs { "storeBlobEnd" } else { "storea" };
            out.extend_from_slice(&encoding.notify(method, args));
            stored.push((*oid, data));
        }
        timeout(self.script.patience, connection.stream.write_all(&out))
            .await
            .map_err(|_| Trouble::Lost)??;
        let voted = self.call("vote", vec![name.clone()]).await;
        let conflicts = match voted {
            Ok(conflicts) => conflicts.items().is_some_and(|list| !list.is_empty()),
            Err(Trouble::Refused(_)) => true,
            Err(lost) => return Err(lost),
        };
        if conflicts {
            self.call("tpc_abort", vec![name]).await?;
            return Ok(());
        }
        let based = writes.iter().map(|(oid, serial, _)| (*oid, *serial)).collect();
        self.history.add(Event::Finishing { client, number, writes: based });
        let since = self.told;
        let finished = self.call("tpc_finish", vec![name]).await;
        if let Err(Trouble::Lost) = finished
            && self.script.tokens
        {
            self.in_doubt = Some(InDoubt { number, since });
        }
        let tid = tid_of(&finished?)?;
        self.history.add(Event::Committed { client, number, tid, asked: false });
        self.told = self.told.max(tid);
        for (oid, data) in stored {
            self.cache.insert(oid, (data, tid));
        }
        Ok(())
    }

    /// Takes what has come meanwhile.
    async fn hear(&mut self) -> Result<()> {
        loop {
            match timeout(Duration::ZERO, self.incoming()).await {
                Err(_) => return Ok(()),
                Ok(incoming) => drop(incoming?),
            }
        }
    }

    async fn call(&mut self, method: &str, args: Vec<Value>) -> Result<Value> {
        let Some(connection) = &mut self.connection else { return Err(Trouble::Lost) };
        connection.next_id += 1;
        let id = Value::Int(connection.next_id);
        let frame = connection.encoding.call(&id, method, args);
        let patience = self.script.patience;
        let answer = async {
            if let Some(connection) = &mut self.connection {
                connection.stream.write_all(&frame).await?;
            }
            loop {
                match self.incoming().await? {
                    Incoming::Reply(reply) if reply.id == id => {
                        return reply.result.map_err(|(class, _)| Trouble::Refused(class));
                    }
                    _ => {}
                }
            }
        };
        timeout(patience, answer).await.unwrap_or(Err(Trouble::Lost))
    }

    /// The next message, after what it says of other transactions was noted.
    async fn incoming(&mut self) -> Result<Incoming> {
        let Some(connection) = &mut self.connection else { return Err(Trouble::Lost) };
        let frame = connection.frame().await?;
        let incoming = connection.encoding.decode(&frame).map_err(|_| Trouble::Lost)?;
        if let Incoming::Call(call) = &incoming
            && call.method == "receiveBlobChunk"
            && let Some([_, _, Value::Bytes(chunk)]) = call.args.items()
        {
            self.received.extend_from_slice(chunk);
        }
        if let Incoming::Call(call) = &incoming
            && call.method == "invalidateTransaction"
            && let Some([tid, oids]) = call.args.items()
        {
            let tid = tid_of(tid)?;
            let (client, before) = (self.script.client, self.told);
            self.history.add(Event::Invalidated { client, tid, before });
            for oid in oids.items().unwrap_or_default() {
                self.cache.remove(&oid_of(oid)?);
            }
            self.told = tid;
        }
        Ok(incoming)
    }
}

/// The blob of an object with this amount.
pub fn blob_of(amount: i64) -> Vec<u8> {
    let mut random = Random::new(amount as u64);
    let words = if random.one_in(10) { 30_000 } else { random.below(500) };
    (0..words).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect()
}

/// Connects as a stock client does (`ClientIO` in `ZEO/asyncio/client.py`): to all addresses at the
/// same time, and to each that refuses again and again. An address whose connection was closed is
/// tried again only when all of them were. The first one that registers it is taken.
async fn first_registered(
    addresses: Vec<String>,
    encoding: Encoding,
    read_only: bool,
) -> (Connection, Tid) {
    loop {
        let mut attempts = JoinSet::new();
        for address in addresses.clone() {
            attempts.spawn(async move { registered(&address, encoding, read_only).await });
        }
        while let Some(ended) = attempts.join_next().await {
            if let Ok(Ok(found)) = ended {
                return found;
            }
        }
        sleep(Duration::from_millis(40)).await;
    }
}

async fn registered(
    address: &str,
    encoding: Encoding,
    read_only: bool,
) -> Result<(Connection, Tid)> {
    let stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(_) => sleep(Duration::from_millis(40)).await,
        }
    };
    let frames = FrameReader::default();
    let mut connection = Connection { stream, frames, encoding, next_id: 1 };
    // It may be held for long.
    connection.frame().await?;
    connection.stream.write_all(&frame(encoding.version())).await?;
    let id = Value::Int(connection.next_id);
    let call = encoding.call(&id, "register", vec![Value::str("1"), read_only.into()]);
    connection.stream.write_all(&call).await?;
    loop {
        let frame = connection.frame().await?;
        match encoding.decode(&frame).map_err(|_| Trouble::Lost)? {
            Incoming::Reply(reply) if reply.id == id => {
                let tid = reply.result.map_err(|(class, _)| Trouble::Refused(class))?;
                return Ok((connection, tid_of(&tid)?));
            }
            _ => {}
        }
    }
}

fn tid_of(value: &Value) -> Result<Tid> {
    match value {
        Value::Bytes(bytes) => Tid::from_slice(bytes).ok_or(Trouble::Lost),
        _ => Err(Trouble::Lost),
    }
}

fn oid_of(value: &Value) -> Result<Oid> {
    match value {
        Value::Bytes(bytes) => Oid::from_slice(bytes).ok_or(Trouble::Lost),
        _ => Err(Trouble::Lost),
    }
}
