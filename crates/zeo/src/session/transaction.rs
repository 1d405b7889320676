//! The calls that make a transaction: `tpc_begin` to `tpc_finish`.

use std::collections::BTreeSet;

use base64::Engine as _;
use bytes::Bytes;
use standby_pickle::Value;
use standby_types::{Oid, Tid};

use super::args::Args;
use super::{Effect, Session};
use crate::buffer::{Content, DeferredWrite, Meta, PendingTransaction};
use crate::error::{ClientError, serial_pair};
use crate::message::Call;
use crate::vote::Expected;

pub(super) enum Phase {
    Open,
    Voting { id: Value },
    Voted,
}

/// A transaction of a session, from `tpc_begin` on.
pub(super) struct Transaction {
    /// The client's name for it.
    pub name: Value,
    pub phase: Phase,
    pub buffer: Box<PendingTransaction>,
    /// Why the vote will fail, if that is known already.
    pub doomed: Option<ClientError>,
    /// Objects that become something else than what the client has: what an undo changes.
    pub changed: BTreeSet<Oid>,
}

impl Session {
    pub(super) fn begin(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
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
        let tid = rest.first().map_or(Ok(None), |tid| args.tid_or_none(tid))?;
        let status = match rest.get(1).map(Value::as_bytes) {
            None => b' ',
            Some(Some(status)) if matches!(status[..], [b' ' | b'p' | b'u']) => status[0],
            Some(_) => return Err(args.wrong()),
        };
        let user = user.as_bytes().ok_or_else(|| args.wrong())?;
        let description = description.as_bytes().ok_or_else(|| args.wrong())?;
        let extension = match dict_of(extension) {
            Some(items) if items.is_empty() => Bytes::new(),
            Some(items) => {
                let mut out = bytes::BytesMut::new();
                standby_pickle::encode(&Value::Dict(items), &mut out);
                out.freeze()
            }
            None if *extension == Value::None => Bytes::new(),
            None => extension.as_bytes().ok_or_else(|| args.wrong())?,
        };
        let too_long = [("user", &user), ("description", &description), ("extension", &extension)]
            .into_iter()
            .find(|(_, text)| text.len() > usize::from(u16::MAX));
        let doomed = too_long
            .map(|(name, _)| ClientError::file_storage(format!("{name} of more than 65535 bytes")));
        let meta = Meta { tid, status, user, description, extension, token: None };
        self.transaction = Some(Transaction {
            name: name.clone(),
            phase: Phase::Open,
            buffer: Box::new(PendingTransaction::new(meta, self.options.make_spill.clone())),
            doomed,
            changed: BTreeSet::new(),
        });
        Ok(())
    }

    /// `transaction_token(transaction, token)`: how the client names its transaction when it asks
    /// what became of it. Stock clients do not call it.
    pub(super) fn token(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [name, token] = args.args else {
            return Err(args.wrong());
        };
        let token = args.token(token);
        let transaction = self.open(name)?;
        match token {
            Ok(token) => transaction.buffer.meta.token = Some(token),
            // The client hears of it when it votes.
            Err(error) => transaction.doomed = Some(error),
        }
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

    pub(super) fn store(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, serial, data, name] = args.args else {
            return Err(args.wrong());
        };
        let (oid, expected) = (args.oid(oid)?, Expected::Serial(args.serial(serial)?));
        let Value::Bytes(data) = data else {
            // As from the Python server, the client hears of it when it votes.
            self.open(name)?.doomed = Some(args.wrong());
            return Ok(());
        };
        self.change(name, oid, expected, Content::Data(data.clone()))
    }

    /// `deleteObject(oid, serial, transaction)`
    pub(super) fn delete(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, serial, name] = args.args else {
            return Err(args.wrong());
        };
        let expected = Expected::Existing(args.serial(serial)?);
        self.change(name, args.oid(oid)?, expected, Content::Gone)
    }

    /// `restorea(oid, serial, data, previous transaction, transaction)`. The serial is the
    /// transaction's own tid; it is not looked at.
    pub(super) fn restore(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, _serial, data, hint, name] = args.args else {
            return Err(args.wrong());
        };
        let (oid, data) = (args.oid(oid)?, args.data_or_none(data)?);
        let hint = args.tid_or_none(hint)?;
        self.add(name, |buffer| match hint.is_some() || buffer.has_deferred() {
            true => buffer.defer(DeferredWrite::Restore(oid, data, hint)),
            false => buffer.put(oid, Expected::Any, data.map_or(Content::Gone, Content::Data)),
        })
    }

    /// `undoa(transaction id, transaction)`: the id is the tid in base64.
    pub(super) fn undo(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [id, name] = args.args else {
            return Err(args.wrong());
        };
        let id = id.as_bytes().ok_or_else(|| args.wrong())?;
        let tid = base64::prelude::BASE64_STANDARD.decode(id.trim_ascii()).unwrap_or_default();
        let Some(tid) = Tid::from_slice(&tid) else {
            let error = ClientError::Undo("Invalid transaction id".into());
            self.open(name)?.doomed = Some(error);
            return Ok(());
        };
        self.add(name, |buffer| buffer.defer(DeferredWrite::Undo(tid)))
    }

    /// The transaction that a call names, for a change that needs another vote.
    fn open(&mut self, name: &Value) -> Result<&mut Transaction, ClientError> {
        let transaction = self.current(name)?;
        if matches!(transaction.phase, Phase::Voting { .. }) {
            return Err(ClientError::StorageTransaction(vec![Value::str("store during the vote")]));
        }
        transaction.phase = Phase::Open;
        Ok(transaction)
    }

    fn change(
        &mut self,
        name: &Value,
        oid: Oid,
        expected: Expected,
        content: Content,
    ) -> Result<(), ClientError> {
        self.add(name, |buffer| buffer.put(oid, expected, content))
    }

    /// Adds to the transaction. What cannot be added, or is too much, the client hears of when it
    /// votes; nothing more is kept then.
    fn add(
        &mut self,
        name: &Value,
        add: impl FnOnce(&mut PendingTransaction) -> std::io::Result<()>,
    ) -> Result<(), ClientError> {
        let limits = self.options.limits;
        let transaction = self.open(name)?;
        if transaction.doomed.is_some() {
            return Ok(());
        }
        let added = add(&mut transaction.buffer).map_err(|error| {
            ClientError::storage(format!("cannot keep a large transaction: {error}"))
        });
        let added = added.and_then(|()| transaction.buffer.check_limits(&limits));
        if let Err(error) = added {
            transaction.doomed = Some(error);
            transaction.buffer.forget();
        }
        Ok(())
    }

    /// `storeBlobStart()`
    pub(super) fn blob_start(&mut self, args: &Args<'_>) -> Result<Effect, ClientError> {
        args.none()?;
        if std::mem::replace(&mut self.uploading, true) {
            return Err(upload_out_of_order("a second upload begins before the first has ended"));
        }
        Ok(Effect::BlobStart)
    }

    /// `storeBlobChunk(bytes)`
    pub(super) fn blob_chunk(&mut self, args: &Args<'_>) -> Result<Effect, ClientError> {
        match args.one()? {
            Value::Bytes(bytes) if self.uploading => Ok(Effect::BlobChunk(bytes.clone())),
            Value::Bytes(_) => Err(upload_out_of_order("no upload has begun")),
            _ => Err(args.wrong()),
        }
    }

    /// `storeBlobEnd(oid, serial, data, transaction)`
    pub(super) fn blob_end(&mut self, args: &Args<'_>) -> Result<Effect, ClientError> {
        if !std::mem::take(&mut self.uploading) {
            return Err(upload_out_of_order("no upload has begun"));
        }
        self.store(args)?;
        Ok(Effect::BlobEnd(args.oid(&args.args[0])?))
    }

    /// `storeBlobShared(oid, serial, data, file name, transaction)`
    pub(super) fn blob_shared(&mut self, args: &Args<'_>) -> Result<Effect, ClientError> {
        let [oid, serial, data, Value::Str(name), transaction] = args.args else {
            return Err(args.wrong());
        };
        let base = name.strip_suffix(".tmp").or_else(|| {
            let mut characters = name.chars();
            characters.next_back()?;
            characters.as_str().strip_suffix(".tmp")
        });
        if base.is_none() || name.contains(['/', '\0']) {
            return Err(ClientError::Other("builtins.ValueError", vec![Value::str(name)]));
        }
        let stored = [oid.clone(), serial.clone(), data.clone(), transaction.clone()];
        self.store(&Args { method: args.method, args: &stored })?;
        Ok(Effect::BlobShared { oid: args.oid(oid)?, name: name.clone() })
    }

    pub(super) fn check(&mut self, args: &Args<'_>) -> Result<(), ClientError> {
        let [oid, serial, name] = args.args else {
            return Err(args.wrong());
        };
        let (oid, serial) = (args.oid(oid)?, args.serial(serial)?);
        // A check needs no other vote.
        let limits = self.options.limits;
        let transaction = self.current(name)?;
        if transaction.doomed.is_some() {
            return Ok(());
        }
        transaction.buffer.check(oid, serial);
        transaction.doomed = transaction.buffer.check_limits(&limits).err();
        Ok(())
    }

    pub(super) fn vote(
        &mut self,
        call: &Call,
        args: &Args<'_>,
    ) -> Result<Option<Effect>, ClientError> {
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
        Ok(Some(Effect::Vote(transaction.buffer.request())))
    }

    pub(super) fn finish(
        &mut self,
        call: &Call,
        args: &Args<'_>,
    ) -> Result<Option<Effect>, ClientError> {
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

fn upload_out_of_order(text: &str) -> ClientError {
    ClientError::Other("builtins.AssertionError", vec![Value::str(text)])
}

/// The items of a dict, also of one that is written as a call: `dict(((key, value), …))`.
fn dict_of(value: &Value) -> Option<Vec<(Value, Value)>> {
    let object = match value {
        Value::Dict(items) => return Some(items.clone()),
        Value::Object(object) => object,
        _ => return None,
    };
    let Value::Global { module, name } = &object.callable else { return None };
    if name != "dict" || !matches!(module.as_str(), "builtins" | "__builtin__") {
        return None;
    }
    let Some([items]) = object.args.items() else { return None };
    let pair = |item: &Value| match item.items() {
        Some([key, value]) => Some((key.clone(), value.clone())),
        _ => None,
    };
    items.items()?.iter().map(pair).collect()
}

/// Bytes of data that a client gets back to resolve conflicts.
const MOST_TO_RESOLVE: u64 = 64 << 20;

/// What the client needs to resolve conflicts by itself. If that is very much, the transaction has
/// a conflict that nobody resolves.
pub(super) fn conflict_list(
    buffer: &PendingTransaction,
    conflicts: &[(Oid, Tid)],
) -> Result<Value, ClientError> {
    let unreadable =
        |error| ClientError::storage(format!("cannot read a large transaction: {error}"));
    let len = |(oid, _): &(Oid, Tid)| buffer.write_of(*oid).map_or(0, |write| write.record_len());
    if let Some((oid, committed)) = conflicts.first()
        && conflicts.iter().map(len).sum::<u64>() > MOST_TO_RESOLVE
    {
        let read = buffer.write_of(*oid).map_or(Tid::NONE, |write| write.read());
        return Err(ClientError::Conflict {
            oid: *oid,
            serials: (*committed, read),
            class_name: None,
        });
    }
    conflicts
        .iter()
        .map(|(oid, committed)| {
            let Some(write) = buffer.write_of(*oid) else { return Ok(Value::None) };
            let read = write.read();
            let data = match buffer.content(write).map_err(unreadable)? {
                Content::Data(data) => data.into(),
                Content::Back(..) | Content::Gone => Value::None,
            };
            Ok(Value::Dict(vec![
                (Value::str("oid"), oid.to_bytes().into()),
                (Value::str("serials"), serial_pair((*committed, read))),
                (Value::str("data"), data),
            ]))
        })
        .collect::<Result<_, _>>()
        .map(Value::List)
}
