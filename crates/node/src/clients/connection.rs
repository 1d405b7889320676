//! One client's connection: frames in, effects performed, replies out.

mod effects;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use standby_filestorage::{Access, StorageError, Undone};
use standby_primary::Request;
use standby_types::Tid;
use standby_zeo::{
    ClientError, Expected, FrameReader, Options, Read, Session, Value, VoteAnswer, VoteOutcome,
    VoteRequest,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, join};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::task::coop::consume_budget;
use tracing::{debug, info, warn};

use crate::cells::client_errors::read_failed;
use crate::cells::gate::Pass;
use crate::cells::reserve;
use crate::cells::sessions::{Mail, SessionHandle};
use crate::cells::shared::Shared;
use crate::cells::storage::StorageShared;
use crate::clients::history_calls::{self, Iterators};
use crate::clients::newcomer::{MOST_SAID, Newcomer};
use crate::platform::{self, Instant, drain};
use crate::transport::blob_files::BlobWriter;
use crate::transport::socket::Cutter;

/// Bytes of a blob in one message to a client, as the Python server sends them.
const BLOB_CHUNK: usize = 59_000;
/// Bytes in a client's queue above which a blob waits.
const BLOB_QUEUE: usize = 2 << 20;
/// Why an upload cannot begin.
const NO_BLOBS: &str = "the client stores a blob, but the storage has no blob-dir";
/// How long a client whose session has ended may take to read what is queued for it.
const LEAVING: Duration = Duration::from_secs(2);
/// Calls of a client that the primary's machine has to answer; beyond it no more are read.
const UNANSWERED: usize = 1000;
/// How long a client that is to leave must have said nothing.
const QUIET: Duration = Duration::from_millis(2);
/// The same of a client that begins its transactions with a call (`server-sync`): it leaves just
/// after the answer to that, unless it is idle.
const IDLE: Duration = Duration::from_millis(50);
/// How long a client may take to agree on TLS, and then to ask for a storage. Stock clients do both
/// at once.
const HELLO: Duration = Duration::from_secs(20);

/// Serves a client until one side closes; returns the client if it has not registered and this node
/// cannot serve it any more.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    client: Newcomer,
    read_only: bool,
    pass: &Pass,
) -> Option<Newcomer> {
    let Newcomer { read, write, cutter, peer, greeted, said } = client;
    let about = About { peer: peer.clone(), cutter: cutter.clone(), pass, read_only };
    let Some(tls) = &shared.tls else {
        let left = talk(shared, about, (read, write), greeted, said).await?;
        let (read, write, said) = left;
        return Some(Newcomer { read, write, cutter, peer, greeted: true, said });
    };
    let read = std::io::Cursor::new(said).chain(read);
    let agreed = tokio::time::timeout(HELLO, tls.acceptor().accept(join(read, write))).await;
    match agreed.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
        Ok(stream) => {
            // Nobody else could go on with what is encrypted here: if this node cannot serve it, it
            // is closed.
            talk(shared, about, tokio::io::split(stream), false, BytesMut::new()).await;
        }
        Err(error) => shared
            .strangers_lines
            .tell(|untold| warn!(client = peer, %error, untold, "no TLS with a client")),
    }
    None
}

/// What is known of a client that comes.
struct About<'a> {
    peer: String,
    cutter: Option<Arc<Cutter>>,
    pass: &'a Pass,
    read_only: bool,
}

/// Returns what is left of the connection, and what the client has said, if it waits on.
async fn talk<R, W>(
    shared: Arc<Shared>,
    About { peer, cutter, pass, read_only }: About<'_>,
    (mut read, write): (R, W),
    greeted: bool,
    said: BytesMut,
) -> Option<(R, W, BytesMut)>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Send + Unpin + 'static,
{
    // One letter for each answer that the session waits for, and a few that end it.
    let (mailbox, mail) = mpsc::unbounded_channel();
    let id = shared.sessions.next_id();
    let handle = SessionHandle::new(id, peer, mailbox, cutter, &shared.memory, !read_only);
    let handle = Arc::new(handle);
    shared.sessions.add(handle.clone());
    let options = Options {
        msgpack: shared.config.zeo.msgpack,
        read_only: read_only || shared.config.zeo.read_only,
        read_only_storages: shared.read_only_storages.clone(),
        make_spill: reserve::guarded(shared.clone()),
        limits: shared.config.limits(),
    };
    let session = Session::new(options);
    if !greeted {
        handle.outbox.push(session.greeting());
    }
    let mut connection = Connection {
        shared: shared.clone(),
        handle: handle.clone(),
        session,
        storage: None,
        read_only,
        iterators: Iterators::default(),
        undo_log: Arc::default(),
        upload: None,
        syncs: false,
        said: Some(said),
        waits_on: false,
    };
    // It is joined when the connection ends.
    let sending = tokio::spawn(send(handle.clone(), write));
    let ended = {
        let mut running = pin!(connection.run(&mut read, mail));
        tokio::select! {
            biased;
            ended = &mut running => ended,
            () = pass.wanted() => {
                handle.cut("another client needs its place");
                running.await
            }
        }
    };
    connection.log_end(ended);
    let storage = connection.storage.clone();
    shared.tell(Request::Closed { session: handle.id, storage }).await;
    handle.outbox.finish();
    if connection.waits_on {
        let write = tokio::time::timeout(LEAVING, sending).await;
        let Some(write) = write.ok().and_then(Result::ok).flatten() else {
            handle.cut("it does not take its greeting");
            return None;
        };
        return Some((read, write, connection.said?));
    }
    close(&handle, read, sending).await;
    None
}

/// Ends a connection whose client does not wait on.
async fn close<R, W>(handle: &SessionHandle, read: R, sending: JoinHandle<Option<W>>)
where
    R: AsyncRead + Unpin,
{
    if handle.is_reader() {
        let _ = sending.await;
    } else {
        let _ = tokio::time::timeout(LEAVING, sending).await;
        handle.cut("it does not take what was queued for it");
    }
    // Blobs that are still being sent wait for room that nobody makes any more.
    handle.outbox.close("the connection is closed");
    drain(read).await;
}

/// Writes what is queued for a client until its connection ends; returns the connection's half if
/// the client waits on.
async fn send<W>(handle: Arc<SessionHandle>, write: W) -> Option<W>
where
    W: AsyncWrite + Send + Unpin + 'static,
{
    let sent = handle.outbox.send_to(write).await;
    let closed = match sent {
        Ok(write) if handle.is_waiting_on() => return Some(write),
        Ok(mut write) => write.shutdown().await,
        Err(error) => Err(error),
    };
    if closed.is_err() {
        // Whoever waits for room in the queue must not wait for a client that is gone.
        handle.cut("the client cannot be reached any more");
    }
    None
}

struct Connection {
    shared: Arc<Shared>,
    handle: Arc<SessionHandle>,
    session: Session,
    /// The storage that the client asked for.
    storage: Option<String>,
    read_only: bool,
    iterators: Iterators,
    /// Held while the undo log is looked at.
    undo_log: Arc<tokio::sync::Mutex<()>>,
    /// The upload that has begun and not ended, or why it has failed.
    upload: Option<Result<BlobWriter, StorageError>>,
    /// The client has begun a transaction with a call.
    syncs: bool,
    /// What the client has said, until it is registered.
    said: Option<BytesMut>,
    /// It has not registered, and waits on without this session.
    waits_on: bool,
}

impl Connection {
    /// Returns why the connection is to be closed, `None` if the client closed it or the node
    /// has other reasons.
    async fn run(
        &mut self,
        mut socket: impl AsyncReadExt + Unpin,
        mut mail: mpsc::UnboundedReceiver<Mail>,
    ) -> Option<String> {
        let mut frames = FrameReader::default();
        frames.buffer().extend_from_slice(self.said.as_deref().unwrap_or_default());
        let mut effects = Vec::new();
        let hello = Instant::now() + HELLO;
        loop {
            loop {
                while let Ok(mail) = mail.try_recv() {
                    if !self.mail(mail).await {
                        return None;
                    }
                }
                let frame = match frames.next_frame(self.session.frame_limit()) {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return Some(error.to_string()),
                };
                if !self.read_only && !self.shared.lease.holds(self.shared.now()) {
                    // Not a word more: another node may be primary.
                    return match self.wait_on() {
                        true => None,
                        false => Some("this node is not primary any more".into()),
                    };
                }
                self.session.receive(frame, &mut effects);
                for effect in effects.drain(..) {
                    if let Some(reason) = self.perform(effect).await {
                        return reason;
                    }
                }
                self.count_received(&frames);
                if !self.session.in_transaction() {
                    // However it ended.
                    self.handle.set_uploads(false);
                }
                self.handle.outbox.room().await;
                self.handle.few_unanswered(UNANSWERED).await;
                // Who sends a million messages takes turns with the others.
                consume_budget().await;
            }
            tokio::select! {
                biased;
                () = self.handle.outbox.closed() => return None,
                Some(mail) = mail.recv() => {
                    if !self.mail(mail).await {
                        return None;
                    }
                }
                read = socket.read_buf(frames.buffer()) => match read {
                    Ok(0) | Err(_) => return None,
                    Ok(read) => {
                        self.note_said(&frames.buffer()[..], read);
                        self.count_received(&frames);
                    }
                },
                () = tokio::time::sleep(if self.syncs { IDLE } else { QUIET }), if self.may_leave() => {
                    self.wait_on();
                    return None;
                }
                () = tokio::time::sleep_until(hello), if self.session.is_stranger() => {
                    let seconds = HELLO.as_secs();
                    return Some(format!("it has not asked for a storage within {seconds} seconds"));
                }
            }
        }
    }

    /// Logs that the connection ends, and the reason for which it is closed.
    fn log_end(&self, reason: Option<String>) {
        let client = &self.handle.peer;
        let label = self.session.label().unwrap_or("");
        match (reason, self.handle.outbox.close_reason()) {
            (Some(reason), _) if self.session.is_stranger() => {
                self.shared.strangers_lines.tell(|untold| {
                    warn!(%client, %reason, untold, "closed the connection of a stranger");
                });
            }
            (Some(reason), _) => warn!(%client, label, %reason, "closed a client's connection"),
            (None, Some(reason)) => info!(%client, label, reason, "closed a client's connection"),
            (None, None) if self.waits_on => debug!(%client, "a client waits on"),
            (None, None) => debug!(%client, label, "a client has left"),
        }
    }

    fn count_received(&self, frames: &FrameReader) {
        self.handle.received.set(frames.held() + self.session.held());
    }

    /// True if the client has not registered: it waits on, and the session is to end.
    fn wait_on(&mut self) -> bool {
        self.waits_on = self.said.is_some() && self.handle.waits_on();
        self.waits_on
    }

    /// The last bytes of the buffer have come just now.
    fn note_said(&mut self, buffer: &[u8], read: usize) {
        if let Some(said) = &mut self.said {
            said.extend_from_slice(&buffer[buffer.len() - read..]);
        }
        self.said.take_if(|said| said.len() > MOST_SAID);
    }

    /// True if the session is to end and nothing of it is under way. The client must be quiet too:
    /// of a connection that closes it only notices what is in flight. What it sends within a
    /// transaction, and is lost, applications try again without a word; a call that begins a
    /// transaction they do not.
    fn may_leave(&self) -> bool {
        self.handle.is_leaving()
            && self.handle.unanswered.load(Ordering::Acquire) == 0
            && !self.session.in_transaction()
    }

    /// False if the session is to end.
    async fn mail(&mut self, mail: Mail) -> bool {
        match mail {
            // See `may_leave`.
            Mail::Leave => {}
            Mail::LeaveNow => return false,
            Mail::WaitOn => {
                self.wait_on();
                return false;
            }
            Mail::Registered(accepted) => {
                self.session.registered(accepted);
                self.said = None;
                if accepted {
                    self.handle.registered(self.session.settled_for_read_only());
                    let read_write = self.session.is_read_write();
                    debug!(
                        client = %self.handle.peer, storage = self.storage, read_write, "a client \
                        has registered"
                    );
                }
            }
            Mail::Voted(outcome) => {
                let outcome = match outcome {
                    VoteOutcome::Answer(VoteAnswer::Voted) => self.work_out().await,
                    other => other,
                };
                self.voted(outcome);
            }
        }
        true
    }

    fn voted(&mut self, outcome: VoteOutcome) {
        if let Some(reply) = self.session.voted(outcome) {
            self.handle.outbox.push(reply);
        }
    }

    /// The transaction holds its locks: works out what could not be known before.
    async fn work_out(&mut self) -> VoteOutcome {
        let voted = VoteOutcome::Answer(VoteAnswer::Voted);
        let Some(storage) = self.storage() else { return voted };
        let (reader, blobs) = (storage.reader(), storage.blobs.clone());
        let mut undone = Undone::new();
        let failed = loop {
            let later = match self.session.take_deferred() {
                Ok(later) if later.is_empty() => return voted,
                Ok(later) => later,
                Err(error) => break cannot_keep(&error),
            };
            let (reader, blobs) = (reader.clone(), blobs.clone());
            let (results, mut received) = platform::queue(16);
            let working = platform::spawn_blocking(move || {
                let each = |out| platform::send_blocking(&results, out).is_ok();
                let worked =
                    history_calls::work_out(&reader, blobs.as_ref(), later, &mut undone, each);
                worked.map(|()| undone)
            });
            let mut kept = Ok(());
            while let Some(out) = received.recv().await {
                kept = kept.and_then(|()| self.session.resolved(out));
            }
            match (working.await, kept) {
                (Ok(Ok(so_far)), Ok(())) => undone = so_far,
                (Ok(Err(error)), _) => break error,
                (Err(error), _) => break ClientError::storage(error.to_string()),
                (_, Err(error)) => break cannot_keep(&error),
            }
        };
        let (session, storage) = (self.handle.id, self.storage.clone().unwrap_or_default());
        self.shared.tell(Request::Abort { session, storage }).await;
        VoteOutcome::Failed(failed)
    }

    /// The objects that a vote's undos change.
    async fn undo_objects(&self, request: &mut VoteRequest) -> Result<(), ClientError> {
        let Some(storage) = self.storage().filter(|_| !request.undos.is_empty()) else {
            return Ok(());
        };
        let (reader, undos) = (storage.reader().clone(), request.undos.clone());
        let (limits, objects) = (self.shared.config.limits(), request.objects());
        let found = platform::spawn_blocking(move || {
            history_calls::undo_objects(&reader, &undos, |undone| limits.check(objects + undone, 0))
        });
        let oids = found.await.unwrap_or_else(|e| Err(ClientError::storage(e.to_string())))?;
        request.writes.extend(oids.into_iter().map(|oid| (oid, Expected::Any)));
        Ok(())
    }

    fn storage(&self) -> Option<&StorageShared> {
        self.shared.storages.get(self.storage.as_deref()?)
    }

    /// Brings into memory what the machine is about to compare, so that it need not wait for a
    /// disk.
    async fn warm(&self, request: &VoteRequest) {
        let Some(storage) = self.storage() else { return };
        let writes = request.writes.iter().map(|(oid, _)| *oid);
        let oids = writes.chain(request.checks.iter().map(|(oid, _)| *oid));
        let cold: Vec<_> = oids
            .filter(|oid| {
                let read = storage.reader().committed_serial(*oid, Access::Cached);
                matches!(read, Err(StorageError::NotCached))
            })
            .collect();
        if cold.is_empty() {
            return;
        }
        let reader = storage.reader().clone();
        let _ = platform::spawn_blocking(move || {
            for oid in cold {
                // An error will be found again, and answered, by the primary's machine.
                let _ = reader.committed_serial(oid, Access::Blocking);
            }
        })
        .await;
    }

    /// Evaluates a read and queues its reply, as one step.
    async fn read(&self, id: Value, read: Read) -> Result<(), String> {
        let Some(storage) = self.storage() else { return Err("no storage".into()) };
        if let Read::Status = read {
            self.shared.settled().await;
        }
        if let Read::LoadBefore(..) = read {
            storage.stats.loads.fetch_add(1, Ordering::Relaxed);
        }
        // A page that was brought in may be gone again before it is used; not for ever.
        for _ in 0..3 {
            let evaluated = self
                .handle
                .outbox
                .evaluate(|last_tid| self.evaluate(storage, &id, read, last_tid, Access::Cached));
            if evaluated.is_ok() {
                return Ok(());
            }
            let reader = storage.reader().clone();
            let fetched = platform::spawn_blocking(move || match read {
                Read::LoadBefore(oid, tid) => {
                    reader.load_before(oid, tid, Access::Blocking).map(drop)
                }
                Read::LoadSerial(oid, tid) => {
                    reader.load_serial(oid, tid, Access::Blocking).map(drop)
                }
                Read::GetTid(oid) => reader.serial(oid, Access::Blocking).map(drop),
                Read::LastTransaction | Read::Info | Read::Status => Ok(()),
            });
            // Its errors come again when it is evaluated.
            let _ = fetched.await;
        }
        let evaluated = self
            .handle
            .outbox
            .evaluate(|last_tid| self.evaluate(storage, &id, read, last_tid, Access::Blocking));
        evaluated.map_err(|NotCached| "a read cannot be evaluated".into())
    }

    fn evaluate(
        &self,
        storage: &StorageShared,
        id: &Value,
        read: Read,
        last_tid: Tid,
        access: Access,
    ) -> Result<Bytes, NotCached> {
        let reader = &storage.reader();
        let answer = |value: Value| self.session.answer(id, Ok(value));
        let found = match read {
            Read::LoadBefore(oid, tid) => reader.load_before(oid, tid, access).map(|revision| {
                self.session.loaded(id, revision.map(|r| (r.data, r.serial, r.end)))
            }),
            Read::LoadSerial(oid, serial) => {
                reader.load_serial(oid, serial, access).map(|data| answer(data.into()))
            }
            Read::GetTid(oid) => {
                reader.serial(oid, access).map(|serial| answer(serial.to_bytes().into()))
            }
            Read::LastTransaction => Ok(answer(last_tid.to_bytes().into())),
            Read::Info => Ok(answer(self.shared.info(storage))),
            Read::Status => Ok(answer(self.shared.server_status(storage, self.storage.as_deref()))),
        };
        match found {
            Ok(reply) => Ok(reply),
            Err(StorageError::NotCached) => Err(NotCached),
            Err(StorageError::NoKey(oid)) => {
                let error = ClientError::PosKey(oid.to_bytes().into());
                Ok(self.session.answer(id, Err(error)))
            }
            // As below a pack: ZODB makes of it an error after which the application tries again.
            Err(StorageError::Hole(_)) if matches!(read, Read::LoadBefore(..)) => {
                Ok(self.session.loaded(id, None))
            }
            Err(error @ StorageError::Hole(_)) => {
                Ok(self.session.answer(id, Err(history_calls::not_here(&error))))
            }
            Err(error) => Ok(self.session.answer(id, Err(read_failed(&error)))),
        }
    }
}

struct NotCached;

fn cannot_keep(error: &std::io::Error) -> ClientError {
    ClientError::storage(format!("cannot keep a large transaction: {error}"))
}
