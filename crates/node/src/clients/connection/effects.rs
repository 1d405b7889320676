//! What a session wants to be done.

use std::sync::atomic::{AtomicU64, Ordering};

use standby_filestorage::{Staged, StorageError};
use standby_primary::client_errors::undo_disabled;
use standby_primary::input::{OutcomeQuestion, PackRequest};
use standby_primary::{Caller, MANY, Request};
use standby_types::{Oid, Tid, Upload};
use standby_zeo::{
    ClientError, Effect, HistoryCall, StagedFile, Value, Vote, VoteOutcome, VoteRequest, frame,
};
use tracing::{error, info};

use crate::cells::storage::Stats;
use crate::clients::connection::{BLOB_CHUNK, BLOB_QUEUE, Connection, NO_BLOBS};
use crate::clients::encoding::finished;
use crate::clients::history_calls;
use crate::clients::staged_blob::StagedBlob;
use crate::peers::blob_repair::open_right;
use crate::platform;
use crate::transport::blob_files::{self, BlobWriter};

impl Connection {
    /// Answers a call that reads the history.
    async fn read_history(&mut self, id: Option<Value>, call: HistoryCall) {
        let Some(storage) = self.storage() else { return };
        let (reader, handle) = (storage.reader().clone(), self.handle.clone());
        let answer = move |found: Result<Value, ClientError>| {
            let Some(id) = id else { return };
            handle.outbox.push(match found {
                Ok(value) => handle.encoding().reply(&id, value),
                Err(error) => handle.encoding().error(&id, &error),
            });
        };
        if let HistoryCall::UndoLog(range, specification) = call {
            if storage.packing.percent().is_some() {
                return answer(Err(undo_disabled()));
            }
            // It may read the whole file: the client's other threads do not wait for it. But only
            // one is looked for at a time, when there is room for the answer, and as long as the
            // client is there.
            let (handle, turn) = (self.handle.clone(), self.undo_log.clone());
            let memory = self.shared.memory.clone();
            handle.unanswered.fetch_add(1, Ordering::AcqRel);
            // It ends when the client has, at the latest.
            tokio::spawn(async move {
                let _turn = turn.lock().await;
                handle.outbox.room().await;
                let _of_all = memory.undo_log_turn().await;
                let client = handle.clone();
                let go_on = move || !client.outbox.is_closed();
                let found = platform::spawn_blocking(move || {
                    history_calls::undo_log(&reader, range, &specification, &go_on)
                });
                answer(found.await.unwrap_or_else(|e| Err(ClientError::storage(e.to_string()))));
                handle.answered();
            });
            return;
        }
        let mut iterators = std::mem::take(&mut self.iterators);
        let reading = platform::spawn_blocking(move || {
            let found = history_calls::answer(&reader, &mut iterators, call);
            (found, iterators)
        });
        match reading.await {
            Ok((found, iterators)) => {
                self.iterators = iterators;
                answer(found);
            }
            Err(error) => answer(Err(ClientError::storage(error.to_string()))),
        }
    }

    /// `Some` ends the session, with a reason if the client is to blame.
    #[expect(clippy::too_many_lines, reason = "a table of effects")]
    pub(super) async fn perform(&mut self, effect: Effect) -> Option<Option<String>> {
        let session = self.handle.id;
        let caller = |call| Caller { session, call };
        let storage = self.storage.clone().unwrap_or_default();
        let request = match effect {
            Effect::Send(frame) => {
                self.handle.outbox.push(frame);
                return None;
            }
            Effect::Close(reason) => return Some(Some(reason.to_string())),
            Effect::Ruok => return self.say_how_it_is().await,
            Effect::Read { id, read } => return self.read(id, read).await.err().map(Some),
            Effect::Register { id, storage, read_only } => {
                self.storage = Some(storage.clone());
                self.handle.set_encoding(self.session.encoding());
                Request::Register { caller: caller(id), storage, read_only }
            }
            Effect::Invalidations { id, since } => {
                // Each answer may be long: one is made at a time, when there is room for it.
                self.handle.few_unanswered(0).await;
                self.handle.outbox.room().await;
                Request::Invalidations { caller: caller(id), storage, since }
            }
            Effect::Ping { id } if self.read_only => Request::Sync { caller: caller(id) },
            Effect::Ping { id } => {
                // This node is primary: what it has acknowledged is visible.
                self.handle.outbox.push(self.handle.encoding().reply(&id, Value::None));
                self.syncs = true;
                return self.may_leave().then_some(None);
            }
            Effect::NewOids { id, count } => {
                Request::NewOids { caller: caller(id), storage, count }
            }
            Effect::Labelled => {
                // In the words of the Python server: sites look for them in their logs.
                let label = self.session.label().unwrap_or_default();
                self.handle.set_label(label);
                info!("ZEO.StorageServer ({label} {}) connected", self.handle.peer);
                return None;
            }
            Effect::HistoryCall { id, asked } => {
                self.read_history(id, asked).await;
                return None;
            }
            Effect::Vote(mut request) => {
                if let Err(error) = self.undo_objects(&mut request).await {
                    self.voted(VoteOutcome::Failed(error));
                    return None;
                }
                match self.vote(request).await {
                    Ok(vote) => Request::Vote { session, storage, vote },
                    Err(reason) => return Some(Some(reason)),
                }
            }
            Effect::Finish { id, transaction } => {
                self.count(|stats| &stats.stores, transaction.writes().len());
                let transaction = finished(&self.shared, transaction);
                Request::Finish { caller: caller(id), storage, transaction }
            }
            Effect::BlobStart => {
                self.handle.set_uploads(true);
                return self.begin_upload().err().map(Some);
            }
            Effect::BlobChunk(bytes) => {
                self.upload_chunk(&bytes).await;
                return None;
            }
            Effect::BlobEnd(oid) => {
                self.end_upload(oid).await;
                return None;
            }
            Effect::BlobShared { oid, name } => {
                let Some(blobs) = self.storage().and_then(|s| s.blobs.clone()) else {
                    return Some(Some(NO_BLOBS.into()));
                };
                let staged = blob_files::adopt(&blobs, oid, name).await;
                self.staged(oid, staged);
                return None;
            }
            Effect::SendBlob { id, oid, serial } => {
                self.send_blob(id, oid, serial);
                return None;
            }
            // Python's server lets a read-only client pack. Who was given this address is not to
            // work on the files.
            Effect::Pack { id, .. } if self.read_only => {
                if let Some(id) = id {
                    let refusal = self.handle.encoding().error(&id, &ClientError::ReadOnly);
                    self.handle.outbox.push(refusal);
                }
                return None;
            }
            Effect::Pack { id, time, wait } => {
                Request::Pack(PackRequest { session, storage, id, time, wait })
            }
            Effect::Outcome { id, token, since } => {
                let caller = caller(id);
                Request::Outcome(OutcomeQuestion { caller, storage, token, since })
            }
            Effect::Abort => {
                self.count(|stats| &stats.aborts, 1);
                Request::Abort { session, storage }
            }
        };
        if request.awaits_answer() {
            self.handle.unanswered.fetch_add(1, Ordering::AcqRel);
        }
        self.shared.tell(request).await;
        None
    }

    /// Answers `ruok`, after which the connection ends.
    async fn say_how_it_is(&self) -> Option<Option<String>> {
        self.shared.settled().await;
        let status = self.shared.ruok();
        self.handle.outbox.push(frame(status.to_string().as_bytes()));
        Some(None)
    }

    fn count(&self, counter: impl Fn(&Stats) -> &AtomicU64, more: usize) {
        if let Some(storage) = self.storage() {
            counter(&storage.stats).fetch_add(more as u64, Ordering::Relaxed);
        }
    }

    /// The vote of a transaction, or why it cannot be made.
    async fn vote(&self, request: VoteRequest) -> Result<Vote, String> {
        if request.objects() > MANY {
            // The primary's machine has it examined elsewhere.
            let vote = platform::spawn_blocking(move || Vote::from(request)).await;
            return vote.map_err(|error| error.to_string());
        }
        self.warm(&request).await;
        Ok(Vote::from(request))
    }

    async fn upload_chunk(&mut self, bytes: &[u8]) {
        let Some(Ok(upload)) = &mut self.upload else { return };
        let written = match self.shared.room.check() {
            Ok(()) => upload.write(bytes).await,
            Err(source) => Err(upload.failed(source)),
        };
        if let Err(error) = written {
            // The client sends the rest all the same, and hears of it when it votes.
            self.upload = Some(Err(error));
        }
    }

    async fn end_upload(&mut self, oid: Oid) {
        let staged = match self.upload.take() {
            Some(Ok(upload)) => upload.finish().await,
            Some(Err(error)) => Err(error),
            None => return,
        };
        self.staged(oid, staged);
    }

    pub(super) fn begin_upload(&mut self) -> Result<(), String> {
        let blobs = self.storage().and_then(|s| s.blobs.as_ref()).ok_or(NO_BLOBS)?;
        let transfer = blob_files::new_transfer().map_err(|error| error.to_string())?;
        let writer = BlobWriter::new(blobs, transfer);
        self.upload = Some(match self.shared.room.check() {
            Ok(()) => Ok(writer),
            Err(source) => Err(writer.failed(source)),
        });
        Ok(())
    }

    /// An upload has ended: the other nodes fetch it while the client goes on.
    pub(super) fn staged(&mut self, oid: Oid, staged: Result<(Upload, Staged), StorageError>) {
        let staged = match staged {
            Ok((upload, staged)) => {
                let storage = self.storage.clone().unwrap_or_default();
                let staged = StagedBlob::announce(&self.shared, &storage, upload, staged);
                Ok((upload, Box::new(staged) as Box<dyn StagedFile>))
            }
            Err(error) => {
                error!(%error, "cannot keep a blob");
                Err(ClientError::storage(format!("cannot keep a blob: {error}")))
            }
        };
        self.session.staged(oid, staged);
    }

    /// Sends a blob beside whatever else the client asks for.
    pub(super) fn send_blob(&self, id: Value, oid: Oid, serial: Tid) {
        self.handle.unanswered.fetch_add(1, Ordering::AcqRel);
        let handle = self.handle.clone();
        let Some(blobs) = self.storage().and_then(|storage| storage.blobs.as_ref()) else {
            let text = Value::str("Blobs are not supported");
            let error = ClientError::Other("builtins.TypeError", vec![text]);
            return handle.answer(handle.encoding().error(&id, &error));
        };
        let (shared, blobs) = (self.shared.clone(), blobs.clone());
        let storage = self.storage.clone().unwrap_or_default();
        // It ends when the outbox is closed, at the latest.
        tokio::spawn(async move {
            let encoding = handle.encoding();
            let opened = open_right(&shared, &storage, &blobs, (oid, serial)).await;
            let blob = [Value::from(oid.to_bytes()), Value::from(serial.to_bytes())];
            let mut reader = match opened {
                Ok(reader) => reader,
                Err(error) => {
                    let path = blobs.path(oid, serial).display().to_string();
                    let error = if error.kind() == std::io::ErrorKind::NotFound {
                        let text = Value::Str(format!("No blob file at {path}"));
                        let [oid, serial] = blob;
                        ClientError::Other("ZODB.POSException.POSKeyError", vec![text, oid, serial])
                    } else {
                        ClientError::storage(format!("cannot read {path}: {error}"))
                    };
                    return handle.answer(encoding.error(&id, &error));
                }
            };
            handle.outbox.push(encoding.notify("receiveBlobStart", blob.to_vec()));
            loop {
                handle.outbox.room_below(BLOB_QUEUE).await;
                match reader.next().await {
                    Ok(bytes) if bytes.is_empty() => break,
                    Ok(bytes) => {
                        for chunk in bytes.chunks(BLOB_CHUNK) {
                            let [oid, serial] = blob.clone();
                            let chunk = Value::Bytes(bytes.slice_ref(chunk));
                            let arguments = vec![oid, serial, chunk];
                            handle.outbox.push(encoding.notify("receiveBlobChunk", arguments));
                        }
                    }
                    // The client has a part of it and cannot be told otherwise.
                    Err(error) => return handle.cut(&format!("cannot read a blob: {error}")),
                }
                if handle.outbox.close_reason().is_some() {
                    return;
                }
            }
            handle.outbox.push(encoding.notify("receiveBlobStop", blob.to_vec()));
            handle.answer(encoding.reply(&id, Value::None));
        });
    }
}
