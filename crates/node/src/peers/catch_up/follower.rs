//! The node that catches up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use standby_config::Recovery;
use standby_consensus::AppliedPoint;
use standby_filestorage::Mark;
use standby_types::{Blob, BlobSource, NodeId, Oid, Tid};
use tokio::io::BufReader;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::cells::apply_task::{ApplyTask, CatchUpItem, CatchUpItems};
use crate::cells::events::TaskReport;
use crate::cells::shared::Shared;
use crate::cells::status::CatchUp;
use crate::cells::wire::{CatchUpFrame, Frame, Question, send};
use crate::peers::blob::obtain_old;
use crate::peers::catch_up::{Have, QUEUE, Request, hash_of};
use crate::platform::Instant;
use crate::transport::blob_files::{BlobWriter, new_transfer};
use crate::transport::frames::{PeerError, blocking, read_frame, within};
use crate::transport::handshake::{Purpose, connect};
use crate::transport::stream::Stream;

/// Silence after which a catch-up is given up and begun again.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the progress of a catch-up is logged.
const PROGRESS: Duration = Duration::from_secs(5);
/// A record is as long as the longest object.
const MAX_RECORD: usize = u32::MAX as usize;
/// Records in one batch.
const BATCH: usize = 256;
/// Bytes from which a batch is not made longer.
const BATCH_BYTES: u64 = 1 << 20;

/// Fetches from `from` what is missing, again and again until it is complete.
pub(crate) async fn fetch(
    shared: Arc<Shared>,
    from: NodeId,
    address: String,
    target: AppliedPoint,
) {
    loop {
        match attempt(&shared, &address, &target).await {
            Ok(()) => return,
            Err(PeerError::Refused(reason)) => {
                let error = anyhow::anyhow!(
                    "node {from} at {address} refuses to let this node catch up: {reason}"
                );
                return shared.report(TaskReport::Fatal(error));
            }
            Err(error) => warn!(address, %error, "the catch-up was interrupted; trying again"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn attempt(
    shared: &Arc<Shared>,
    address: &str,
    target: &AppliedPoint,
) -> Result<(), PeerError> {
    shared.room.check()?;
    let (mut stream, peer) = connect(&shared.introduction(), address, Purpose::CatchUp).await?;
    let unconfirmed = shared.is_unconfirmed();
    if unconfirmed {
        for (name, storage) in &shared.storages {
            obtain_old(shared, name, storage.reader().last_tid(), address).await?;
        }
    }
    let request = blocking({
        let shared = shared.clone();
        let index = target.index.0;
        move || request(&shared, unconfirmed, index)
    })
    .await?;
    info!(peer = peer.node, target = %target.index, "catching up");
    send(&mut stream, &Question(request)).await?;
    let (items, receiver) = mpsc::channel(QUEUE);
    shared.apply(ApplyTask::CatchUp { items: CatchUpItems::new(receiver), target: target.clone() });
    let _shown = Shown(shared);
    receive(shared, stream, &peer.node, items, |progress| {
        shared.show_catch_up(Some(progress.clone()));
    })
    .await
}

/// Gets the whole history of one storage from the transaction `after` on, for a backfill.
pub(crate) async fn fetch_history(
    shared: &Shared,
    storage: &str,
    (after, least): (Tid, Tid),
    address: &str,
    items: mpsc::Sender<Vec<CatchUpItem>>,
    show: impl FnMut(&CatchUp),
) -> Result<(), PeerError> {
    let (mut stream, peer) = connect(&shared.introduction(), address, Purpose::CatchUp).await?;
    let have = Have { tid: after.0, position: 0, sha256: None, least: least.0 };
    let request = Request {
        storages: BTreeMap::from([(storage.to_owned(), have)]),
        progress: true,
        holes: false,
        outcomes: false,
        recovery: Recovery::Normal,
        without_blobs: true,
        only: Some(storage.to_owned()),
        index: 0,
    };
    send(&mut stream, &Question(request)).await?;
    receive(shared, stream, &peer.node, items, show).await
}

/// Passes on what a source sends, until it says that that is all.
async fn receive(
    shared: &Shared,
    stream: Stream,
    peer: &str,
    items: mpsc::Sender<Vec<CatchUpItem>>,
    mut show: impl FnMut(&CatchUp),
) -> Result<(), PeerError> {
    let mut source = Source::new(shared, stream, peer);
    let mut batch = Vec::with_capacity(BATCH);
    let mut passed_on = 0;
    loop {
        let Some(item) = source.next().await? else { continue };
        let done = matches!(item, CatchUpItem::Done);
        if done {
            shared.confirm();
        }
        batch.push(item);
        let small = batch.len() < BATCH && source.progress.bytes - passed_on < BATCH_BYTES;
        if !done && small && !source.stream.buffer().is_empty() {
            continue;
        }
        passed_on = source.progress.bytes;
        show(source.progress());
        let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
        if items.send(full).await.is_err() {
            return Err(PeerError::Protocol("a newer catch-up has replaced this one".into()));
        }
        if done {
            source.log_end();
            return Ok(());
        }
    }
}

/// The connection to a source, and what has come so far.
struct Source<'a> {
    shared: &'a Shared,
    stream: BufReader<Stream>,
    peer: &'a str,
    /// Whose transactions come.
    storage: String,
    /// The blob that is coming.
    blob: Option<(Oid, BlobWriter)>,
    begun: Instant,
    progress: CatchUp,
    progress_logged: Instant,
}

impl<'a> Source<'a> {
    fn new(shared: &'a Shared, stream: Stream, peer: &'a str) -> Source<'a> {
        let stream = BufReader::with_capacity(1 << 20, stream);
        let (begun, progress) = (Instant::now(), CatchUp::default());
        let (storage, blob) = (String::new(), None);
        Source { shared, stream, peer, storage, blob, begun, progress, progress_logged: begun }
    }

    /// Receives a frame; returns what it makes for the applier, if it does.
    async fn next(&mut self) -> Result<Option<CatchUpItem>, PeerError> {
        let (kind, content) = within(PATIENCE, read_frame(&mut self.stream, MAX_RECORD)).await?;
        self.shared.room.check()?;
        self.progress.bytes += content.len() as u64;
        self.log_progress();
        self.keep_to_rate().await;
        let no_blob = || PeerError::Protocol("bytes of no blob".into());
        Ok(Some(match CatchUpFrame::take(kind, content)? {
            CatchUpFrame::Storage(name) => {
                self.storage = name;
                return Ok(None);
            }
            CatchUpFrame::Total(bytes) => {
                self.progress.total_bytes = bytes;
                return Ok(None);
            }
            CatchUpFrame::Hole(hole) => CatchUpItem::Hole(self.storage.clone(), hole),
            CatchUpFrame::Outcomes(outcomes) => {
                CatchUpItem::Outcomes(self.storage.clone(), outcomes)
            }
            CatchUpFrame::Begin(meta) => {
                self.progress.transactions += 1;
                CatchUpItem::Begin(self.storage.clone(), meta)
            }
            CatchUpFrame::Blob(oid) => {
                self.blob = Some((oid, begin_blob(self.shared, &self.storage)?));
                return Ok(None);
            }
            CatchUpFrame::BlobPiece(bytes) => {
                let (_, writer) = self.blob.as_mut().ok_or_else(no_blob)?;
                writer.write(&bytes).await?;
                return Ok(None);
            }
            CatchUpFrame::BlobEnd(sha256) => {
                let (oid, writer) = self.blob.take().ok_or_else(no_blob)?;
                let (upload, staged) = writer.finish().await?;
                if upload.sha256[..] != sha256[..] {
                    return Err(PeerError::Protocol("a blob has arrived damaged".into()));
                }
                CatchUpItem::Blob(Blob { oid, source: BlobSource::Upload(upload) }, staged)
            }
            CatchUpFrame::Record(record) => CatchUpItem::Record(record),
            CatchUpFrame::End => CatchUpItem::End,
            CatchUpFrame::Done => CatchUpItem::Done,
            CatchUpFrame::Refused(reason) => return Err(PeerError::Refused(reason)),
        }))
    }

    /// Waits if more has come than `catch-up-rate` allows. The sender waits too, when its socket is
    /// full.
    async fn keep_to_rate(&self) {
        let standby = self.shared.config.standby.as_ref();
        let Some(rate) = standby.and_then(|standby| standby.catch_up_rate) else { return };
        let due = Duration::from_secs_f64(self.progress.bytes as f64 / rate as f64);
        if due > self.begun.elapsed() + Duration::from_millis(10) {
            tokio::time::sleep(due - self.begun.elapsed()).await;
        }
    }

    fn progress(&mut self) -> &CatchUp {
        self.progress.seconds = self.begun.elapsed().as_secs_f64();
        &self.progress
    }

    fn log_progress(&mut self) {
        if self.progress_logged.elapsed() > PROGRESS {
            self.progress_logged = Instant::now();
            let CatchUp { bytes, total_bytes, transactions, .. } = self.progress;
            let (megabytes, of) = (bytes >> 20, total_bytes >> 20);
            info!(peer = self.peer, megabytes, of, transactions, "catching up");
        }
    }

    fn log_end(&self) {
        let CatchUp { bytes, transactions, seconds, .. } = self.progress;
        let per_second = |n: u64| (n as f64 / seconds.max(1e-6)) as u64;
        info!(
            peer = self.peer,
            transactions,
            bytes,
            seconds,
            transactions_per_s = per_second(transactions),
            bytes_per_s = per_second(bytes),
            "everything has come"
        );
    }
}

/// A catch-up is shown until it ends, however it does.
struct Shown<'a>(&'a Shared);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.0.show_catch_up(None);
    }
}

fn begin_blob(shared: &Shared, storage: &str) -> Result<BlobWriter, PeerError> {
    let blobs = shared.storages.get(storage).and_then(|s| s.blobs.as_ref()).ok_or_else(|| {
        PeerError::Refused(format!(
            "the storage {storage:?} has blobs, but the configuration of this node has no blob-dir \
            for it"
        ))
    })?;
    Ok(BlobWriter::new(blobs, new_transfer()?))
}

fn request(shared: &Shared, unconfirmed: bool, index: u64) -> Result<Request, PeerError> {
    let mut storages = BTreeMap::new();
    for (name, storage) in &shared.storages {
        let reader = storage.reader();
        let (mark, holes) = (reader.mark(), reader.holes());
        let sha256 = (unconfirmed && mark != Mark::START)
            .then(|| hash_of(&*shared.disk, &storage.path, mark))
            .transpose()?;
        let least = holes.of(mark.tid).map_or(0, |hole| hole.through.0);
        let have = Have { tid: mark.tid.0, position: mark.position.0, sha256, least };
        storages.insert(name.clone(), have);
    }
    let recovery = shared.config.standby.as_ref().map(|s| s.recovery).unwrap_or_default();
    Ok(Request {
        storages,
        progress: true,
        holes: true,
        outcomes: true,
        recovery,
        without_blobs: false,
        only: None,
        index,
    })
}
