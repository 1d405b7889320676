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

mod args;
mod transaction;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use standby_pickle::Value;
use standby_types::{BlobSource, Oid, Tid, TransactionToken, Upload};

use self::args::Args;
use self::transaction::{Phase, Transaction, conflict_list};
use crate::buffer::{Content, DeferredWrite, Limits, PendingTransaction, StagedFile};
use crate::error::ClientError;
use crate::frame::frame;
use crate::message::{Call, Encoding, Incoming};
use crate::spill::MakeSpill;
use crate::transactions::VoteAnswer;
use crate::vote::{Expected, VoteRequest};
use crate::{MAX_FRAME, MAX_FRAME_BEFORE_REGISTER};

/// What a session needs to know about its listener.
#[derive(Clone)]
pub struct Options {
    /// Announce `M5` instead of `Z5`; clients may choose either.
    pub msgpack: bool,
    /// The listener refuses write access.
    pub read_only: bool,
    /// Storages that nobody may write to.
    pub read_only_storages: Arc<[String]>,
    /// Where large transactions spill to.
    pub make_spill: MakeSpill,
    /// How large they may be.
    pub limits: Limits,
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

/// A call that reads the history, which may take long. Except for the undo log, these calls are
/// answered in the order in which they came.
#[derive(Clone, Debug, PartialEq)]
pub enum HistoryCall {
    /// `history(oid, size)`
    History(Oid, usize),
    /// `record_iternext(next)`
    RecordIternext(Option<Oid>),
    /// `undoLog(first, last)` and `undoInfo(first, last, specification)`: the transactions with
    /// these indexes, counted from the newest, among those that have all items of the
    /// specification.
    UndoLog(Range<usize>, Vec<(Value, Value)>),
    /// `iterator_start(start, stop)`
    IteratorStart(Option<Tid>, Option<Tid>),
    /// `iterator_next(iterator)`
    IteratorNext(Value),
    /// `iterator_record_start(iterator, tid)`
    IteratorRecordStart(Value, Tid),
    /// `iterator_record_next(record iterator)`
    IteratorRecordNext(Value),
    /// `iterator_gc(iterators)`
    IteratorGc(Vec<Value>),
}

/// Something for the node to do.
#[derive(Debug)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Effect {
    /// Send these bytes, after all that were to be sent before.
    Send(Bytes),
    /// Close the connection.
    Close(CloseReason),
    /// A monitoring program asks how the server is: send JSON as a frame, then close.
    Ruok,
    /// Register for a storage; answer with the last tid and tell [`Session::registered`].
    Register {
        id: Value,
        storage: String,
        /// No write access is asked for.
        read_only: bool,
    },
    /// Evaluate a read.
    Read { id: Value, read: Read },
    /// Read the history; without an `id` nothing is to be answered.
    HistoryCall { id: Option<Value>, asked: HistoryCall },
    /// A transaction begins: answer `None` when all that is acknowledged by now is visible.
    Ping { id: Value },
    /// What has changed since the tid? Answer with a tuple or `None`.
    Invalidations {
        id: Value,
        /// The last transaction that the client knows.
        since: Tid,
    },
    /// Reserve oids; answer with a list.
    NewOids { id: Value, count: usize },
    /// Ask for the transaction's locks and compare serials; answer with [`Session::voted`].
    Vote(VoteRequest),
    /// Commit. The reply is the tid, sent when the transaction is applied.
    Finish {
        id: Value,
        /// What to commit.
        transaction: Box<PendingTransaction>,
    },
    /// What has become of the transaction with this token? Answer when it is certain: with its
    /// tid; with `None` if it was not committed, and never will be; with a text if nobody knows.
    Outcome {
        id: Value,
        token: TransactionToken,
        /// The client knew this transaction before it finished the one that it asks for.
        since: Tid,
    },
    /// Free the locks of the session's transaction.
    Abort,
    /// The client has given itself a name, for people who read logs.
    Labelled,
    /// An upload begins. Only one is under way at a time.
    BlobStart,
    /// The next bytes of the upload.
    BlobChunk(Bytes),
    /// The upload is complete: it is the blob of this object. Make it durable and tell
    /// [`Session::staged`] before anything else is received.
    BlobEnd(Oid),
    /// As `BlobEnd`, for a file that the client has put into the object's directory.
    BlobShared {
        oid: Oid,
        /// The file's name; it has no `/`.
        name: String,
    },
    /// Send a blob, then answer with `None`.
    SendBlob { id: Value, oid: Oid, serial: Tid },
    /// Pack; answer with `None`.
    Pack {
        /// The call; `None` if nothing is to be answered.
        id: Option<Value>,
        /// To this time, in seconds since 1970.
        time: f64,
        /// Answer when it is done, not at once.
        wait: bool,
    },
}

/// Why a session ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
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
    OneWay { method: String, error: String },
    /// Writing the temporary file of a large transaction failed.
    #[error("cannot keep a large transaction: {0}")]
    Spill(String),
}

/// What was worked out for an object once its lock was held.
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct ResolvedWrite {
    pub oid: Oid,
    /// What it becomes.
    pub content: Content,
    /// The client does not know it: it comes from an undo.
    pub undone: bool,
    pub blob: Option<BlobSource>,
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

/// See the module.
pub struct Session {
    options: Options,
    state: State,
    encoding: Encoding,
    label: Option<String>,
    transaction: Option<Transaction>,
    /// An upload has begun and not ended.
    uploading: bool,
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
            uploading: false,
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

    /// True between `tpc_begin` and the call of `tpc_finish`, `tpc_abort`, or a vote that fails.
    pub fn in_transaction(&self) -> bool {
        self.transaction.is_some() || self.uploading
    }

    /// Bytes of memory that the transaction takes, about.
    pub fn held(&self) -> usize {
        self.transaction.as_ref().map_or(0, |transaction| transaction.buffer.held())
    }

    /// True until `register` is called.
    pub fn is_stranger(&self) -> bool {
        matches!(self.state, State::AwaitingVersion | State::Unregistered)
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
                let changed = transaction.changed.iter().map(|oid| oid.to_bytes().into()).collect();
                self.transaction = Some(transaction);
                Ok(Value::List(changed))
            }
            VoteOutcome::Answer(VoteAnswer::Conflicts(conflicts)) => {
                let list = conflict_list(&transaction.buffer, &conflicts);
                if list.is_ok() {
                    transaction.phase = Phase::Open;
                    self.transaction = Some(transaction);
                }
                list
            }
            VoteOutcome::Answer(VoteAnswer::Refused(error)) | VoteOutcome::Failed(error) => {
                Err(error)
            }
        };
        Some(self.answer(&id, result))
    }

    /// The transaction holds its locks: takes what is to be worked out before [`Session::voted`]
    /// may be told, some of it at a time. Each result goes to [`Session::resolved`].
    pub fn take_deferred(&mut self) -> std::io::Result<Vec<DeferredWrite>> {
        match &mut self.transaction {
            Some(Transaction { phase: Phase::Voting { .. }, buffer, .. }) => buffer.take_deferred(),
            _ => Ok(Vec::new()),
        }
    }

    /// Adds what was worked out.
    pub fn resolved(&mut self, out: ResolvedWrite) -> std::io::Result<()> {
        let ResolvedWrite { oid, content, undone, blob } = out;
        let Some(transaction) = &mut self.transaction else { return Ok(()) };
        if undone {
            transaction.changed.insert(oid);
        }
        transaction.buffer.put(oid, Expected::Any, content)?;
        if let Some(source) = blob {
            transaction.buffer.put_blob(oid, source, None);
        }
        Ok(())
    }

    /// An upload is durable, or failed: then the vote will fail.
    pub fn staged(&mut self, oid: Oid, staged: Result<(Upload, Box<dyn StagedFile>), ClientError>) {
        let Some(transaction) = &mut self.transaction else { return };
        match staged {
            Ok((upload, staged)) => {
                transaction.buffer.put_blob(oid, BlobSource::Upload(upload), Some(staged));
            }
            Err(error) => transaction.doomed = Some(error),
        }
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
                let refused =
                    self.options.read_only || self.options.read_only_storages.contains(storage);
                if read_only || !refused {
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
    #[expect(clippy::too_many_lines, reason = "a table of methods")]
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
        let step = is_step(&call.method);
        let writing =
            step || matches!(call.method.as_str(), "new_oids" | "vote" | "transaction_outcome");
        if writing && read_only {
            return Some(Err(ClientError::ReadOnly));
        }
        let id = || call.id.clone();
        // What is only asked for, and not to be answered, is not done.
        let wanted = |effect: Effect| (!call.one_way).then_some(effect);
        let read = |read: Result<Read, ClientError>| {
            read.map(|read| wanted(Effect::Read { id: id(), read }))
        };
        let result = match call.method.as_str() {
            "loadBefore" => read(args.oid_and_tid().map(|(oid, tid)| Read::LoadBefore(oid, tid))),
            "loadSerial" => read(args.oid_and_tid().map(|(oid, tid)| Read::LoadSerial(oid, tid))),
            "getTid" => read(args.one().and_then(|oid| args.oid(oid)).map(Read::GetTid)),
            "lastTransaction" => read(args.none().map(|()| Read::LastTransaction)),
            "get_info" => read(args.none().map(|()| Read::Info)),
            "server_status" => read(args.none().map(|()| Read::Status)),
            "ping" => args.none().map(|()| wanted(Effect::Ping { id: id() })),
            "set_client_label" => args.one().map(|label| {
                self.label = match label {
                    Value::Str(label) => Some(label.clone()),
                    other => other.as_bytes().map(|b| String::from_utf8_lossy(&b).into_owned()),
                };
                effects.push(Effect::Labelled);
                wanted(Effect::Send(self.answer(&call.id, Ok(Value::None))))
            }),
            "getInvalidations" => args
                .one()
                .and_then(|tid| args.tid(tid))
                .map(|since| wanted(Effect::Invalidations { id: id(), since })),
            "new_oids" => args.count().map(|count| wanted(Effect::NewOids { id: id(), count })),
            "transaction_outcome" => args
                .outcome()
                .map(|(token, since)| wanted(Effect::Outcome { id: id(), token, since })),
            "tpc_begin" => self.begin(&args).map(|()| None),
            "transaction_token" => self.token(&args).map(|()| None),
            "storea" => self.store(&args).map(|()| None),
            "restorea" => self.restore(&args).map(|()| None),
            "deleteObject" => self.delete(&args).map(|()| None),
            "undoa" => self.undo(&args).map(|()| None),
            "checkCurrentSerialInTransaction" => self.check(&args).map(|()| None),
            "vote" => self.vote(call, &args),
            "tpc_finish" => self.finish(call, &args),
            "tpc_abort" => args.one().map(|name| {
                let ours = self.transaction.as_ref().is_some_and(|t| t.name == *name);
                if ours {
                    self.transaction = None;
                    effects.push(Effect::Abort);
                }
                wanted(Effect::Send(self.answer(&call.id, Ok(Value::None))))
            }),
            "history"
            | "record_iternext"
            | "undoLog"
            | "undoInfo"
            | "iterator_start"
            | "iterator_next"
            | "iterator_record_start"
            | "iterator_record_next"
            | "iterator_gc" => history_call(args).map(|asked| {
                let id = (!call.one_way).then(id);
                Some(Effect::HistoryCall { id, asked })
            }),
            "new_oid" => {
                let text = "'ZEOStorage' object has no attribute 'new_oid'";
                Err(ClientError::Other("builtins.AttributeError", vec![Value::str(text)]))
            }
            "pack" => args.pack().map(|(time, wait)| {
                let id = (!call.one_way).then(id);
                Some(Effect::Pack { id, time, wait })
            }),
            "storeBlobStart" => self.blob_start(&args).map(Some),
            "storeBlobChunk" => self.blob_chunk(&args).map(Some),
            "storeBlobEnd" => self.blob_end(&args).map(Some),
            "storeBlobShared" => self.blob_shared(&args).map(Some),
            "sendBlob" => args
                .oid_and_tid()
                .map(|(oid, serial)| Some(Effect::SendBlob { id: id(), oid, serial })),
            _ => return None,
        };
        // Who asks for an answer to a step gets one.
        let answer = (step && !call.one_way).then(|| self.answer(&call.id, Ok(Value::None)));
        Some(result.map(|effect| {
            effects.extend(effect);
            effects.extend(answer.map(Effect::Send));
        }))
    }
}

/// True of what a transaction consists of: it writes, and clients send it without asking for an
/// answer.
fn is_step(method: &str) -> bool {
    matches!(
        method,
        "tpc_begin"
            | "storea"
            | "restorea"
            | "deleteObject"
            | "undoa"
            | "checkCurrentSerialInTransaction"
            | "transaction_token"
            | "storeBlobStart"
            | "storeBlobChunk"
            | "storeBlobEnd"
            | "storeBlobShared"
    )
}

fn history_call(args: Args<'_>) -> Result<HistoryCall, ClientError> {
    Ok(match (args.method, args.args) {
        ("history", [oid]) => HistoryCall::History(args.key(oid)?, 1),
        ("history", [oid, size]) => {
            HistoryCall::History(args.key(oid)?, args.int(size)?.max(0) as usize)
        }
        ("record_iternext", [] | [Value::None]) => HistoryCall::RecordIternext(None),
        ("record_iternext", [next]) => HistoryCall::RecordIternext(Some(args.oid(next)?)),
        ("undoLog", [first, last]) => HistoryCall::UndoLog(args.range(first, last)?, Vec::new()),
        ("undoInfo", [first, last, Value::None]) => {
            HistoryCall::UndoLog(args.range(first, last)?, Vec::new())
        }
        ("undoInfo", [first, last, Value::Dict(specification)]) => {
            HistoryCall::UndoLog(args.range(first, last)?, specification.clone())
        }
        ("iterator_start", [start, stop]) => {
            HistoryCall::IteratorStart(args.tid_or_none(start)?, args.tid_or_none(stop)?)
        }
        ("iterator_next", [iterator]) => HistoryCall::IteratorNext(iterator.clone()),
        ("iterator_record_start", [iterator, tid]) => {
            HistoryCall::IteratorRecordStart(iterator.clone(), args.tid(tid)?)
        }
        ("iterator_record_next", [iterator]) => HistoryCall::IteratorRecordNext(iterator.clone()),
        ("iterator_gc", [iterators]) => {
            let iterators = iterators.items().ok_or_else(|| args.wrong())?;
            HistoryCall::IteratorGc(iterators.to_vec())
        }
        _ => return Err(args.wrong()),
    })
}

#[cfg(test)]
mod tests;
