//! The machine of one client connection.
//!
//! ```text
//!   greeting sent        version frame       register            calls
//!   AwaitingVersion ───▶ Unregistered ───▶ Registering ───▶ Registered ──▶ …
//!         │ "ruok"            ▲                │ refused
//!         ▼                   └────────────────┘
//!   status, close
//! ```
//!
//! Frames go in by [`Session::receive`]; what is to be done comes out as [`Effect`]s, in order.
//! Whoever performs an effect that carries an `id` answers it.

use bytes::Bytes;
use standby_pickle::Value;
use standby_types::{Oid, Tid};

use crate::buffer::{Buffer, Meta};
use crate::error::{ClientError, serial_pair};
use crate::frame::frame;
use crate::message::{Call, Encoding, Incoming};
use crate::spill::MakeSpill;
use crate::transactions::{VoteAnswer, VoteRequest};
use crate::{MAX_FRAME, MAX_FRAME_BEFORE_REGISTER};

/// What a session needs to know about its listener.
#[derive(Clone)]
pub struct Options {
    /// Announce `M5` instead of `Z5`; clients may choose either.
    pub msgpack: bool,
    /// The listener refuses write access.
    pub read_only: bool,
    /// Where large transactions spill to.
    pub make_spill: MakeSpill,
}

/// A read. Reads are evaluated in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// `loadBefore(oid, tid)`; answer with [`Session::loaded`].
    LoadBefore(Oid, Tid),
    /// `loadSerial(oid, serial)`
    LoadSerial(Oid, Tid),
    /// `getTid(oid)`
    GetTid(Oid),
    /// `lastTransaction()`
    LastTransaction,
    /// `get_info()`
    Info,
    /// `server_status()`
    Status,
}

/// Something for the node to do.
#[derive(Debug)]
pub enum Effect {
    /// Send these bytes, after all that were to be sent before.
    Send(Bytes),
    /// Close the connection.
    Close(CloseReason),
    /// A monitoring program asks how the server is: send JSON as a frame, then close.
    Ruok,
    /// Register for a storage; answer with the last tid and tell [`Session::registered`].
    Register {
        /// The call.
        id: Value,
        /// The storage's name.
        storage: String,
        /// No write access is asked for.
        read_only: bool,
    },
    /// Evaluate a read.
    Read {
        /// The call.
        id: Value,
        /// What is asked.
        read: Read,
    },
    /// What has changed since the tid? Answer with a tuple or `None`.
    Invalidations {
        /// The call.
        id: Value,
        /// The last transaction that the client knows.
        since: Tid,
    },
    /// Reserve oids; answer with a list.
    NewOids {
        /// The call.
        id: Value,
        /// How many.
        count: usize,
    },
    /// Ask for the transaction's locks and compare serials; answer with [`Session::voted`].
    Vote(VoteRequest),
    /// Commit. The reply is the tid, sent when the transaction is applied.
    Finish {
        /// The call.
        id: Value,
        /// What to commit.
        transaction: Box<Buffer>,
    },
    /// Free the locks of the session's transaction.
    Abort,
}

/// Why a session ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The first frame names no version that is spoken here.
    #[error("the client asks for protocol {0:?}; only Z5 and M5 are spoken here")]
    Version(String),
    /// A frame is no message.
    #[error("{0}")]
    Message(#[from] crate::WireError),
    /// Another call before `register` had succeeded.
    #[error("the client calls {0:?} before it has registered")]
    NotRegistered(String),
    /// `register` again.
    #[error("the client registers twice")]
    RegisteredTwice,
    /// No such method.
    #[error("the client calls {0:?}, which is not a method of the protocol")]
    UnknownMethod(String),
    /// A one-way call failed; the client can be told in no other way.
    #[error("one-way call {method:?} failed: {error}")]
    OneWay {
        /// The method.
        method: String,
        /// Why it failed.
        error: String,
    },
    /// Writing the temporary file of a large transaction failed.
    #[error("cannot keep a large transaction: {0}")]
    Spill(String),
}

/// What became of a vote.
#[derive(Debug)]
pub enum VoteOutcome {
    /// The serials were compared.
    Answer(VoteAnswer),
    /// The vote failed; the transaction is forgotten.
    Failed(ClientError),
}

enum State {
    AwaitingVersion,
    Unregistered,
    Registering { read_only: bool },
    Registered { read_only: bool },
}

enum Phase {
    Open,
    Voting { id: Value },
    Voted,
}

/// A transaction of this session, from `tpc_begin` on.
struct Transaction {
    /// The client's name for it.
    name: Value,
    phase: Phase,
    buffer: Box<Buffer>,
    /// Why the vote will fail, if that is known already.
    doomed: Option<ClientError>,
}

/// See the module.
pub struct Session {
    options: Options,
    state: State,
    encoding: Encoding,
    label: Option<String>,
    transaction: Option<Transaction>,
    wanted_write: bool,
}

impl Session {
    /// A session of a connection that was just accepted.
    pub fn new(options: Options) -> Session {
        Session {
            options,
            state: State::AwaitingVersion,
            encoding: Encoding::Pickle,
            label: None,
            transaction: None,
            wanted_write: false,
        }
    }

    /// The server's first frame. A client waits for it; that is how a session is *held*.
    pub fn greeting(&self) -> Bytes {
        let encoding = if self.options.msgpack { Encoding::Msgpack } else { Encoding::Pickle };
        frame(encoding.version())
    }

    /// How long a frame may be now.
    pub fn frame_limit(&self) -> usize {
        match self.state {
            State::Registered { .. } => MAX_FRAME,
            _ => MAX_FRAME_BEFORE_REGISTER,
        }
    }

    /// The encoding that the client chose.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The name that the client gave itself.
    pub fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// True once `register` has succeeded, with write access.
    pub fn is_read_write(&self) -> bool {
        matches!(self.state, State::Registered { read_only: false })
    }

    /// True if the client asked for write access, was refused, and took read-only instead: it is
    /// to be closed when a primary appears, for it does not look for one by itself.
    pub fn settled_for_read_only(&self) -> bool {
        self.wanted_write && matches!(self.state, State::Registered { read_only: true })
    }

    /// A frame has come.
    pub fn receive(&mut self, frame: Bytes, effects: &mut Vec<Effect>) {
        if let Err(reason) = self.step(frame, effects) {
            effects.push(Effect::Close(reason));
        }
    }

    /// Answers a call.
    pub fn answer(&self, id: &Value, result: Result<Value, ClientError>) -> Bytes {
        match result {
            Ok(value) => self.encoding.reply(id, value),
            Err(error) => self.encoding.error(id, &error),
        }
    }

    /// The node has accepted or refused a `register`, and answered it.
    pub fn registered(&mut self, accepted: bool) {
        self.state = match self.state {
            State::Registering { read_only } if accepted => State::Registered { read_only },
            _ => State::Unregistered,
        };
    }

    /// Answers `loadBefore`.
    pub fn loaded(&self, id: &Value, found: Option<(Bytes, Tid, Option<Tid>)>) -> Bytes {
        let value = match found {
            None => Value::None,
            Some((data, serial, end)) => Value::Tuple(vec![
                data.into(),
                serial.to_bytes().into(),
                end.map_or(Value::None, |end| end.to_bytes().into()),
            ]),
        };
        self.encoding.reply(id, value)
    }

    /// Answers `vote`; nothing if the session has no vote pending any more.
    pub fn voted(&mut self, outcome: VoteOutcome) -> Option<Bytes> {
        let mut transaction = self.transaction.take()?;
        let Phase::Voting { id } = &transaction.phase else {
            self.transaction = Some(transaction);
            return None;
        };
        let id = id.clone();
        let result = match outcome {
            VoteOutcome::Answer(VoteAnswer::Voted) => {
                transaction.phase = Phase::Voted;
                self.transaction = Some(transaction);
                Ok(Value::List(vec![]))
            }
            VoteOutcome::Answer(VoteAnswer::Conflicts(conflicts)) => {
                let list = conflict_list(&transaction.buffer, &conflicts);
                if list.is_ok() {
                    transaction.phase = Phase::Open;
                    self.transaction = Some(transaction);
                }
                list
            }
            VoteOutcome::Answer(VoteAnswer::ReadConflict(oid, committed, read)) => {
                Err(ClientError::ReadConflict { oid, serials: (committed, read) })
            }
            VoteOutcome::Failed(error) => Err(error),
        };
        Some(self.answer(&id, result))
    }

    fn step(&mut self, frame: Bytes, effects: &mut Vec<Effect>) -> Result<(), CloseReason> {
        if let State::AwaitingVersion = self.state {
            if &frame[..] == b"ruok" {
                effects.push(Effect::Ruok);
                return Ok(());
            }
            let unknown = || CloseReason::Version(frame.escape_ascii().to_string());
            self.encoding = Encoding::of_version(&frame).ok_or_else(unknown)?;
            self.state = State::Unregistered;
            return Ok(());
        }
        let call = match self.encoding.decode(&frame)? {
            Incoming::Call(call) => call,
            // Clients answer nothing; what looks like it is as meaningless as an unknown method.
            Incoming::Reply(_) => return Err(CloseReason::UnknownMethod(".reply".into())),
            Incoming::Heartbeat => return Ok(()),
        };
        let read_only = match self.state {
            State::Registered { read_only } => read_only,
            _ if call.method == "register" => return self.register(call, effects),
            _ => return Err(CloseReason::NotRegistered(call.method)),
        };
        if call.method == "register" {
            return Err(CloseReason::RegisteredTwice);
        }
        let known = self.dispatch(&call, read_only, effects);
        match known {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) if call.one_way => {
                let error = format!("{error:?}");
                Err(CloseReason::OneWay { method: call.method, error })
            }
            Some(Err(error)) => {
                effects.push(Effect::Send(self.answer(&call.id, Err(error))));
                Ok(())
            }
            None => Err(CloseReason::UnknownMethod(call.method)),
        }
    }

    fn register(&mut self, call: Call, effects: &mut Vec<Effect>) -> Result<(), CloseReason> {
        if let State::Registering { .. } = self.state {
            return Err(CloseReason::RegisteredTwice);
        }
        let error = match call.args.items() {
            Some([Value::Str(storage), read_only]) => {
                let read_only = read_only.truth();
                if read_only || !self.options.read_only {
                    self.state = State::Registering { read_only };
                    let storage = storage.clone();
                    effects.push(Effect::Register { id: call.id, storage, read_only });
                    return Ok(());
                }
                self.wanted_write = true;
                ClientError::ReadOnly
            }
            _ => ClientError::arguments("register"),
        };
        effects.push(Effect::Send(self.answer(&call.id, Err(error))));
        Ok(())
    }

    /// `None` if there is no such method.
    fn dispatch(
        &mut self,
        call: &Call,
        read_only: bool,
        effects: &mut Vec<Effect>,
    ) -> Option<Result<(), ClientError>> {
        let args = match call.args.items() {
            Some(args) => Args { method: &call.method, args },
            None => return Some(Err(ClientError::arguments(&call.method))),
        };
        let writing = matches!(
            call.method.as_str(),
            "new_oids" | "tpc_begin" | "storea" | "checkCurrentSerialInTransaction" | "vote"
        );
        if writing && read_only {
            return Some(Err(ClientError::ReadOnly));
        }
        let id = || call.id.clone();
        let read = |read: Result<Read, ClientError>| {
            read.map(|read| Some(Effect::Read { id: call.id.clone(), read }))
        };
        let result = match call.method.as_str() {
            "loadBefore" => read(args.oid_and_tid().map(|(oid, tid)| Read::LoadBefore(oid, tid))),
            "loadSerial" => read(args.oid_and_tid().map(|(oid, tid)| Read::LoadSerial(oid, tid))),
            "getTid" => read(args.one().and_then(|oid| args.oid(oid)).map(Read::GetTid)),
            "lastTransaction" => read(args.none().map(|()| Read::LastTransaction)),
            "get_info" => read(args.none().map(|()| Read::Info)),
            "server_status" => read(args.none().map(|()| Read::Status)),
            "ping" => {
                args.none().map(|()| Some(Effect::Send(self.answer(&call.id, Ok(Value::None)))))
            }
            "set_client_label" => args.one().map(|label| {
                self.label = match label {
                    Value::Str(label) => Some(label.clone()),
                    other => other.as_bytes().map(|b| String::from_utf8_lossy(&b).into_owned()),
                };
                (!call.one_way).then(|| Effect::Send(self.answer(&call.id, Ok(Value::None))))
            }),
            "getInvalidations" => args
                .one()
                .and_then(|tid| args.tid(tid))
                .map(|since| Some(Effect::Invalidations { id: id(), since })),
            "new_oids" => args.count().map(|count| Some(Effect::NewOids { id: id(), count })),
            "tpc_begin" => self.begin(&args).map(|()| None),
            "storea" => self.store(&args).map(|()| None),
            "checkCurrentSerialInTransaction" => self.check(&args).map(|()| None),
            "vote" => self.vote(call, &args),
            "tpc_finish" => self.finish(call, &args),
            "tpc_abort" => args.one().map(|name| {
                let ours = self.transaction.as_ref().is_some_and(|t| t.name == *name);
                if ours {
                    self.transaction = None;
                    effects.push(Effect::Abort);
                }
                Some(Effect::Send(self.answer(&call.id, Ok(Value::None))))
            }),
            "pack"
            | "restorea"
            | "storeBlobStart"
            | "storeBlobChunk"
            | "storeBlobEnd"
            | "storeBlobShared"
            | "deleteObject"
            | "history"
            | "record_iternext"
            | "sendBlob"
            | "new_oid"
            | "undoa"
            | "undoLog"
            | "undoInfo"
            | "iterator_start"
            | "iterator_next"
            | "iterator_record_start"
            | "iterator_record_next"
            | "iterator_gc" => Err(ClientError::Other(
                "builtins.NotImplementedError",
                vec![Value::Str(format!(
                    "this version of Standby does not support {}",
                    call.method
                ))],
            )),
            _ => return None,
        };
        Some(result.map(|effect| effects.extend(effect)))
    }

    fn begin(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [name, user, description, extension, rest @ ..] = args.args else {
            return Err(args.wrong());
        };
        if rest.len() > 2 {
            return Err(args.wrong());
        }
        if let Some(transaction) = &self.transaction {
            if transaction.name == *name {
                return Ok(());
            }
            let text = "Multiple simultaneous tpc_begin requests from one client.";
            return Err(ClientError::StorageTransaction(vec![Value::str(text)]));
        }
        if rest.first().is_some_and(|tid| *tid != Value::None) {
            let text = "this version of Standby does not support copying transactions into it";
            return Err(ClientError::storage(text));
        }
        let user = user.as_bytes().ok_or_else(|| args.wrong())?;
        let description = description.as_bytes().ok_or_else(|| args.wrong())?;
        let extension = match extension {
            Value::None => Bytes::new(),
            Value::Dict(pairs) if pairs.is_empty() => Bytes::new(),
            Value::Dict(_) => {
                let mut out = bytes::BytesMut::new();
                standby_pickle::encode(extension, &mut out);
                out.freeze()
            }
            other => other.as_bytes().ok_or_else(|| args.wrong())?,
        };
        let too_long = [("user", &user), ("description", &description), ("extension", &extension)]
            .into_iter()
            .find(|(_, text)| text.len() > usize::from(u16::MAX));
        let doomed = too_long.map(|(name, _)| {
            ClientError::Other(
                "ZODB.FileStorage.FileStorage.FileStorageError",
                vec![Value::Str(format!("{name} of more than 65535 bytes"))],
            )
        });
        let meta = Meta { user, description, extension };
        self.transaction = Some(Transaction {
            name: name.clone(),
            phase: Phase::Open,
            buffer: Box::new(Buffer::new(meta, self.options.make_spill.clone())),
            doomed,
        });
        Ok(())
    }

    /// The transaction that a call names.
    fn current(&mut self, name: &Value) -> Result<&mut Transaction, ClientError> {
        let current = self.transaction.as_ref().map_or(Value::None, |t| t.name.clone());
        match &mut self.transaction {
            Some(transaction) if current == *name => Ok(transaction),
            _ => Err(ClientError::StorageTransaction(vec![current, name.clone()])),
        }
    }

    fn store(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, serial, Value::Bytes(data), name] = args.args else {
            return Err(args.wrong());
        };
        let (oid, serial, data) = (args.oid(oid)?, args.serial(serial)?, data.clone());
        let transaction = self.current(name)?;
        if matches!(transaction.phase, Phase::Voting { .. }) {
            return Err(ClientError::StorageTransaction(vec![Value::str("store during the vote")]));
        }
        // A store after a vote without conflict needs another vote.
        transaction.phase = Phase::Open;
        if let Err(error) = transaction.buffer.store(oid, serial, data) {
            transaction.doomed =
                Some(ClientError::storage(format!("cannot keep a large transaction: {error}")));
        }
        Ok(())
    }

    fn check(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, serial, name] = args.args else {
            return Err(args.wrong());
        };
        let (oid, serial) = (args.oid(oid)?, args.serial(serial)?);
        self.current(name)?.buffer.check(oid, serial);
        Ok(())
    }

    fn vote(&mut self, call: &Call, args: &Args<'_>) -> Result<Option<Effect>, ClientError> {
        let name = args.one()?;
        let transaction = self.current(name)?;
        if let Phase::Voting { .. } | Phase::Voted = transaction.phase {
            let text = match transaction.phase {
                Phase::Voted => "Already voting (locked)",
                _ => "Already voting (waiting)",
            };
            return Err(ClientError::StorageTransaction(vec![Value::str(text)]));
        }
        if let Some(error) = transaction.doomed.take() {
            self.transaction = None;
            return Err(error);
        }
        transaction.phase = Phase::Voting { id: call.id.clone() };
        let buffer = &transaction.buffer;
        Ok(Some(Effect::Vote(VoteRequest {
            writes: buffer.writes().iter().map(|w| (w.oid, w.serial)).collect(),
            checks: buffer.checks().to_vec(),
        })))
    }

    fn finish(&mut self, call: &Call, args: &Args<'_>) -> Result<Option<Effect>, ClientError> {
        let name = args.one()?;
        match self.transaction.take() {
            Some(Transaction { name: ours, phase: Phase::Voted, buffer, .. }) if ours == *name => {
                Ok(Some(Effect::Finish { id: call.id.clone(), transaction: buffer }))
            }
            Some(transaction) if transaction.name == *name => {
                self.transaction = Some(transaction);
                let text = Value::str("finished called wo lock");
                Err(ClientError::Other("builtins.AssertionError", vec![text]))
            }
            other => {
                self.transaction = other;
                Ok(Some(Effect::Send(self.answer(&call.id, Ok(Value::None)))))
            }
        }
    }
}

/// What the client needs to resolve conflicts by itself.
fn conflict_list(buffer: &Buffer, conflicts: &[(Oid, Tid)]) -> Result<Value, ClientError> {
    let unreadable =
        |error| ClientError::storage(format!("cannot read a large transaction: {error}"));
    conflicts
        .iter()
        .map(|(oid, committed)| {
            let data = buffer.data_of(*oid).map_err(unreadable)?;
            let read = buffer.serial_of(*oid).unwrap_or(Tid::NONE);
            Ok(Value::Dict(vec![
                (Value::str("oid"), oid.to_bytes().into()),
                (Value::str("serials"), serial_pair((*committed, read))),
                (Value::str("data"), data.into()),
            ]))
        })
        .collect::<Result<_, _>>()
        .map(Value::List)
}

/// The arguments of a call, with the errors that wrong ones get.
struct Args<'a> {
    method: &'a str,
    args: &'a [Value],
}

impl<'a> Args<'a> {
    fn wrong(&self) -> ClientError {
        ClientError::arguments(self.method)
    }

    fn none(&self) -> Result<(), ClientError> {
        if self.args.is_empty() { Ok(()) } else { Err(self.wrong()) }
    }

    fn one(&self) -> Result<&'a Value, ClientError> {
        match self.args {
            [value] => Ok(value),
            _ => Err(self.wrong()),
        }
    }

    /// An oid of another length than eight bytes is simply one that does not exist.
    fn oid(&self, value: &Value) -> Result<Oid, ClientError> {
        match value {
            Value::Bytes(bytes) => {
                Oid::from_slice(bytes).ok_or_else(|| ClientError::PosKey(value.clone()))
            }
            _ => Err(ClientError::Other("builtins.AssertionError", vec![])),
        }
    }

    fn tid(&self, value: &Value) -> Result<Tid, ClientError> {
        match value {
            Value::Bytes(bytes) => Tid::from_slice(bytes).ok_or_else(|| self.wrong()),
            _ => Err(self.wrong()),
        }
    }

    fn serial(&self, value: &Value) -> Result<Tid, ClientError> {
        if *value == Value::None { Ok(Tid::NONE) } else { self.tid(value) }
    }

    fn oid_and_tid(&self) -> Result<(Oid, Tid), ClientError> {
        match self.args {
            [oid, tid] => Ok((self.oid(oid)?, self.tid(tid)?)),
            _ => Err(self.wrong()),
        }
    }

    /// How many oids: 1 to 100, 100 if nothing is said.
    fn count(&self) -> Result<usize, ClientError> {
        match self.args {
            [] => Ok(100),
            [Value::Int(n)] => Ok((*n).clamp(1, 100) as usize),
            _ => Err(self.wrong()),
        }
    }
}

#[cfg(test)]
mod tests;
