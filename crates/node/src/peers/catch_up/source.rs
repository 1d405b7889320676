//! The node that has what the follower lacks.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use standby_config::Recovery;
use standby_filestorage::{
    BlobDir, BlobId, Hole, Mark, Reader, Record, RecordData, StorageError, StoredTransaction,
    Transactions, may_be_blob,
};
use standby_types::disk::{Open, read_full};
use standby_types::lock::lock;
use standby_types::{Disk, Position, Tid};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::cells::shared::Shared;
use crate::cells::storage::StorageShared;
use crate::cells::wire::{CatchUpFrame, Frame, Question, receive as receive_frame, send};
use crate::peers::blob_repair::repair_for_another;
use crate::peers::catch_up::{Have, QUEUE, Request, hash_of};
use crate::platform;
use crate::transport::frames::PeerError;
use crate::transport::stream::Stream;

/// Bytes of frames that are sent together.
const TOGETHER: usize = 64 << 10;
/// Bytes that are missing from which [`Recovery::Auto`] is fast.
const MUCH: u64 = 1 << 30;
/// Bytes of the data file after which a fast recovery tells anew how much will come.
const ESTIMATE_EVERY: u64 = 16 << 20;
/// Bytes of a blob in one frame.
const BLOB_PIECE: usize = 64 << 10;

/// Serves a follower.
pub(crate) async fn serve(shared: Arc<Shared>, mut stream: Stream, peer: &str) {
    let served = async {
        let Question::<Request>(request) = receive_frame(&mut stream, 1 << 20).await?;
        let (frames, mut queue) = platform::queue(QUEUE);
        let reading_from = shared.clone();
        let reading = platform::spawn_blocking(move || {
            let mut frames = Frames { together: BytesMut::new(), queue: frames, sent: 0 };
            send_all(&reading_from, &request, &mut frames)?;
            frames.flush()
        });
        while let Some(frame) = queue.recv().await {
            stream.write_all(&frame).await?;
        }
        stream.flush().await?;
        drop(queue);
        match reading.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(SendError::Refused(reason))) => {
                send(&mut stream, &CatchUpFrame::Refused(reason.clone())).await?;
                Err(PeerError::Protocol(reason))
            }
            Ok(Err(SendError::NotNow(reason))) => Err(PeerError::Protocol(reason)),
            Ok(Err(SendError::Storage(error))) => Err(PeerError::Protocol(error.to_string())),
            Ok(Err(SendError::Blob(storage, blob, error))) => {
                // The other node tries again.
                repair_for_another(&shared, &storage, blob).await;
                Err(PeerError::Protocol(error.to_string()))
            }
            Ok(Err(SendError::Gone)) => Ok(()),
            Err(error) => Err(PeerError::Protocol(error.to_string())),
        }
    };
    match served.await {
        Ok(()) => info!(peer, "a node has caught up from here"),
        Err(error) => warn!(peer, %error, "a node's catch-up from here ended"),
    }
}

enum SendError {
    Refused(String),
    /// It may go later, or from another node.
    NotNow(String),
    Storage(StorageError),
    /// A blob of a storage is damaged.
    Blob(String, BlobId, StorageError),
    Gone,
}

impl From<StorageError> for SendError {
    fn from(error: StorageError) -> Self {
        SendError::Storage(error)
    }
}

/// Frames on their way to the socket, some together.
struct Frames {
    together: BytesMut,
    queue: mpsc::Sender<Bytes>,
    /// Bytes of content so far.
    sent: u64,
}

impl Frames {
    fn send(&mut self, frame: &CatchUpFrame) -> Result<(), SendError> {
        let refused = |error: PeerError| SendError::NotNow(error.to_string());
        self.sent += frame.append(&mut self.together).map_err(refused)? as u64;
        if self.together.len() >= TOGETHER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), SendError> {
        let frames = self.together.split().freeze();
        platform::send_blocking(&self.queue, frames).map_err(|_| SendError::Gone)
    }
}

fn send_all(shared: &Shared, request: &Request, frames: &mut Frames) -> Result<(), SendError> {
    let applied = shared.applied().0;
    if applied < request.index {
        return Err(SendError::NotNow(format!(
            "entry {} is asked for, and this node has applied the log up to entry {applied}",
            request.index
        )));
    }
    let wanted = |name: &String| request.only.as_ref().is_none_or(|only| only == name);
    if request.progress {
        let missing = |(name, storage): (&String, &StorageShared)| {
            let from = request.storages.get(name).map_or(0, |have| have.position);
            storage.reader().size().saturating_sub(from)
        };
        let storages = shared.storages.iter().filter(|(name, _)| wanted(name));
        let total: u64 = storages.map(missing).sum();
        frames.send(&CatchUpFrame::Total(total))?;
    }
    for (name, storage) in shared.storages.iter().filter(|(name, _)| wanted(name)) {
        let Some(have) = request.storages.get(name) else {
            let reason = format!("its configuration lacks the storage {name:?}");
            return Err(SendError::Refused(reason));
        };
        let reader = storage.reader();
        let known = check_beginning(&*shared.disk, &storage.path, &reader, name, have)?;
        if reader.last_tid() < Tid(have.least) || !reader.is_whole() {
            let reason = "this node has not come far enough itself".to_owned();
            return Err(SendError::NotNow(reason));
        }
        frames.send(&CatchUpFrame::Storage(name.clone()))?;
        let transactions = reader.transactions(Tid(have.tid).next(), Tid::MAX)?;
        let fast = match request.recovery {
            Recovery::Normal => false,
            Recovery::Fast => true,
            Recovery::Auto => transactions.bytes_left() > MUCH,
        } && request.holes;
        send_holes(&reader, &transactions, (request, have, known), fast, frames)?;
        if request.outcomes {
            // Of what is applied by now. Entries of the log that come again change nothing.
            let outcomes = lock(&storage.outcomes).clone();
            frames.send(&CatchUpFrame::Outcomes(outcomes))?;
        }
        let blobs = storage.blobs.as_ref().filter(|_| !request.without_blobs);
        Sending { storage: name, transactions, blobs, fast }.run(frames)?;
    }
    frames.send(&CatchUpFrame::Done)
}

/// Tells what is missing in what will come.
fn send_holes(
    reader: &Reader,
    transactions: &Transactions,
    (request, have, known): (&Request, &Have, Option<Position>),
    fast: bool,
    frames: &mut Frames,
) -> Result<(), SendError> {
    let (first, last) = (Tid(have.tid), transactions.last_tid());
    let mut holes = reader.holes();
    holes.filled(first);
    if fast {
        holes.add(Hole { after: first, through: last });
    }
    if request.holes
        && let Some(through) = packed_since(reader, have, known)?
    {
        holes.add(Hole { after: first, through });
    }
    if !holes.is_empty() && !request.holes {
        let reason =
            "there is a hole in the history of this node; the other node cannot do with that";
        return Err(SendError::NotNow(reason.into()));
    }
    for hole in holes.iter() {
        frames.send(&CatchUpFrame::Hole(*hole))?;
    }
    Ok(())
}

/// Up to where a pack has removed what a follower that was away never had: what the follower has of
/// these objects was not current just before. `None` if its file is the beginning of this one;
/// `known` is where its last transaction ends here.
fn packed_since(
    reader: &Reader,
    have: &Have,
    known: Option<Position>,
) -> Result<Option<Tid>, StorageError> {
    let first = Tid(have.tid);
    // A pack that had removed anything would have moved it.
    if first == Tid::NONE || known == Some(Position(have.position)) {
        return Ok(None);
    }
    let mut backwards = reader.backwards();
    while let Some(stored) = backwards.step()?.filter(|stored| stored.meta.tid > first) {
        if stored.meta.status == b'p' {
            return Ok(Some(stored.meta.tid));
        }
    }
    Ok(None)
}

/// The transactions of a storage on their way to a follower.
struct Sending<'a> {
    storage: &'a str,
    transactions: Transactions,
    blobs: Option<&'a BlobDir>,
    fast: bool,
}

impl Sending<'_> {
    fn run(mut self, frames: &mut Frames) -> Result<(), SendError> {
        let mut told = self.transactions.bytes_left();
        let (total, before) = (told, frames.sent);
        while let Some(stored) = self.transactions.advance()? {
            if self.fast {
                self.send_newest(&stored, frames)?;
                let left = self.transactions.bytes_left();
                if told - left > ESTIMATE_EVERY {
                    told = left;
                    let so_far = frames.sent - before;
                    let all = so_far as f64 * (total as f64 / (total - left) as f64);
                    frames.send(&CatchUpFrame::Total(before + all as u64))?;
                }
                continue;
            }
            self.send_head(&stored, frames)?;
            self.transactions
                .records(&stored, |record| self.send_record(record, &stored, frames))?;
            frames.send(&CatchUpFrame::End)?;
        }
        Ok(())
    }

    /// Sends of a transaction what is current at the end of them all.
    fn send_newest(
        &self,
        stored: &StoredTransaction,
        frames: &mut Frames,
    ) -> Result<(), SendError> {
        let newest = self.transactions.newest_of(stored)?;
        // The last transaction is where the follower's hole ends.
        if newest.is_empty() && stored.meta.tid != self.transactions.last_tid() {
            return Ok(());
        }
        self.send_head(stored, frames)?;
        for position in newest {
            let record = self.transactions.record_at(stored, position)?;
            self.send_record(record, stored, frames)?;
        }
        frames.send(&CatchUpFrame::End)
    }

    fn send_head(&self, stored: &StoredTransaction, frames: &mut Frames) -> Result<(), SendError> {
        frames.send(&CatchUpFrame::Begin(stored.meta.clone()))
    }

    fn send_record(
        &self,
        record: Record,
        stored: &StoredTransaction,
        frames: &mut Frames,
    ) -> Result<(), SendError> {
        if let Some(blobs) = self.blobs
            && may_have_blob(&record)
        {
            send_blob(self.storage, blobs, (record.oid, stored.meta.tid), frames)?;
        }
        frames.send(&CatchUpFrame::Record(record))
    }
}

fn may_have_blob(record: &Record) -> bool {
    match &record.data {
        RecordData::Data(data) | RecordData::Back(_, Some(data)) => may_be_blob(data),
        RecordData::Back(_, None) | RecordData::Gone => false,
    }
}

/// Sends the blob of a revision, if it has one.
fn send_blob(
    storage: &str,
    blobs: &BlobDir,
    (oid, tid): BlobId,
    frames: &mut Frames,
) -> Result<(), SendError> {
    let path = blobs.path(oid, tid);
    let failed = |source| {
        let error = StorageError::Io { path: path.clone(), action: "read", source };
        SendError::Blob(storage.to_owned(), (oid, tid), error)
    };
    let file = match blobs.disk().open(&path, Open::Read) {
        Err(error) if error.kind() == ErrorKind::NotFound && !blobs.should_have((oid, tid)) => {
            return Ok(());
        }
        other => other.map_err(failed)?,
    };
    frames.send(&CatchUpFrame::Blob(oid))?;
    let (mut hash, mut buffer, mut at) = (Sha256::new(), vec![0; BLOB_PIECE], 0);
    loop {
        let n = read_full(&*file, &mut buffer, at).map_err(failed)?;
        if n == 0 {
            let sha256: [u8; 32] = hash.finalize().into();
            if !blobs.may_be((oid, tid), &sha256) {
                let damaged = "it is damaged: its checksum is wrong";
                return Err(failed(std::io::Error::new(ErrorKind::InvalidData, damaged)));
            }
            let hash = Bytes::copy_from_slice(&sha256);
            return frames.send(&CatchUpFrame::BlobEnd(hash));
        }
        hash.update(&buffer[..n]);
        frames.send(&CatchUpFrame::BlobPiece(Bytes::copy_from_slice(&buffer[..n])))?;
        at += n as u64;
    }
}

/// True if a pack may have removed the transaction: all that is left of that time is packed.
fn is_packed(reader: &Reader, tid: Tid) -> Result<bool, StorageError> {
    let mut backwards = reader.backwards();
    while let Some(transaction) = backwards.step()? {
        if transaction.meta.tid < tid {
            return Ok(transaction.meta.status == b'p');
        }
    }
    Ok(true)
}

/// A data file that this cluster did not write is welcome if it is the beginning of ours. Returns
/// where its last transaction ends here, if that has not been packed away.
fn check_beginning(
    disk: &dyn Disk,
    path: &Path,
    reader: &Reader,
    name: &str,
    have: &Have,
) -> Result<Option<Position>, SendError> {
    let foreign = || {
        SendError::Refused(format!(
            "its data file of storage {name:?} is not the beginning of the cluster's history: it \
             holds another database. To let the node join, move that file away"
        ))
    };
    let tid = Tid(have.tid);
    if have.sha256.is_none() && tid > reader.last_tid() {
        // This node was restarted, and does not know yet which entries of its log count.
        let reason = "the other node has more than this one, which has just been started";
        return Err(SendError::NotNow(reason.into()));
    }
    let end = match tid {
        Tid::NONE => None,
        tid => reader.transactions(tid, tid)?.advance()?.map(|stored| stored.end()),
    };
    let fits = |end: Position| have.sha256.is_none() || end.0 == have.position;
    let known = tid == Tid::NONE || end.is_some_and(fits);
    let may_have_been = || -> Result<bool, StorageError> {
        let in_a_hole = reader.holes().of(tid).is_some();
        Ok(have.sha256.is_none() && (in_a_hole || is_packed(reader, tid)?))
    };
    if !known && !may_have_been()? {
        return Err(foreign());
    }
    if let Some(theirs) = &have.sha256 {
        let mark = Mark { position: Position(have.position), tid };
        let ours = hash_of(disk, path, mark).map_err(|source| {
            SendError::Storage(StorageError::Io { path: path.to_owned(), action: "read", source })
        })?;
        if ours != *theirs {
            return Err(foreign());
        }
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use standby_filestorage::{Extent, FileStorage, Holes, Magic, Transaction};
    use standby_types::memory::MemoryDisk;

    use super::*;

    const PATH: &str = "/Data.fs";

    fn storage(tids: &[u64]) -> (Arc<dyn Disk>, FileStorage) {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
        let (path, index) = (Path::new(PATH), Path::new("/index"));
        let whole = Extent::Whole;
        let opened =
            FileStorage::open(disk.clone(), path, index, Magic::Fs30, whole, &mut |_, _| ());
        let mut storage = opened.unwrap().0;
        for tid in tids {
            let meta = standby_filestorage::TransactionMeta::new(Tid(*tid));
            storage.append(&Transaction { meta, records: Vec::new() }).unwrap();
        }
        (disk, storage)
    }

    fn asks(
        disk: &Arc<dyn Disk>,
        storage: &FileStorage,
        tid: u64,
        sha256: Option<&str>,
    ) -> Result<Option<Position>, SendError> {
        let have = Have { tid, position: 0, sha256: sha256.map(Into::into), least: 0 };
        check_beginning(&**disk, Path::new(PATH), &storage.reader(), "1", &have)
    }

    /// Found by a simulation: the source was restarted, and took the follower for a stranger.
    #[test]
    fn a_follower_that_has_more_is_no_stranger() {
        let (disk, storage) = storage(&[10, 20]);
        let asks = |tid, sha256| asks(&disk, &storage, tid, sha256);
        assert!(asks(20, None).is_ok() && asks(0, None).is_ok());
        assert!(matches!(asks(30, None), Err(SendError::NotNow(_))));
        assert!(matches!(asks(15, None), Err(SendError::Refused(_))));
        // Nobody knows yet whether that file belongs here.
        assert!(matches!(asks(30, Some("00")), Err(SendError::Refused(_))));
    }

    /// Found by a simulation: the follower stood where this node, which had caught up over a pack,
    /// has a hole.
    #[test]
    fn a_follower_whose_last_transaction_is_in_a_hole_is_no_stranger() {
        let (disk, mut storage) = storage(&[10, 30]);
        assert!(matches!(asks(&disk, &storage, 20, None), Err(SendError::Refused(_))));
        let mut holes = Holes::default();
        holes.add(Hole { after: Tid(10), through: Tid(30) });
        storage.set_holes(holes);
        assert!(asks(&disk, &storage, 20, None).is_ok());
        assert!(matches!(asks(&disk, &storage, 20, Some("00")), Err(SendError::Refused(_))));
    }
}
