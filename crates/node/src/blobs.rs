//! Blob files between disk and connections, without blocking a task.
//!
//! Before a client gets a blob it is compared with its checksum, unless it was right since the start and still is in
//! memory; a damaged one is fetched from another node first.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_filestorage::{Access, BlobDir, BlobId, Found, Staged, Staging, StorageError};
use standby_types::disk::Open;
use standby_types::{File, Oid, Tid, Transfer, Upload};
use standby_zeo::StagedFile;
use tracing::warn;

use crate::machine;
use crate::node::Shared;
use crate::peers::{Announcement, fetch_right};

/// Bytes that are read or written at once.
const CHUNK: usize = 1 << 20;

/// A fresh name for an upload.
pub fn new_transfer() -> io::Result<Transfer> {
    let mut random = [0; 16];
    machine::fill_random(&mut random)?;
    Ok(Transfer(random))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    machine::spawn_blocking(work).await.unwrap_or_else(|error| {
        let (path, action) = (Path::new("").to_owned(), "finish");
        Err(StorageError::Io { path, action, source: io::Error::other(error) })
    })
}

/// Writes an upload. Dropped before it is finished, it leaves nothing.
pub struct BlobWriter {
    blobs: BlobDir,
    transfer: Transfer,
    staging: Option<Staging>,
    pending: BytesMut,
}

impl BlobWriter {
    /// Begins an upload under this name.
    pub fn new(blobs: &BlobDir, transfer: Transfer) -> BlobWriter {
        BlobWriter { blobs: blobs.clone(), transfer, staging: None, pending: BytesMut::new() }
    }

    /// The error for bytes that cannot be kept.
    pub fn failed(&self, source: io::Error) -> StorageError {
        StorageError::Io { path: self.blobs.dir().to_owned(), action: "write", source }
    }

    /// Adds bytes.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), StorageError> {
        let (blobs, transfer) = (self.blobs.clone(), self.transfer);
        let (staging, bytes) = (self.staging.take(), self.pending.split().freeze());
        let written = blocking(move || {
            let mut staging = staging.map_or_else(|| blobs.stage(transfer), Ok)?;
            staging.write(&bytes).map_err(|source| StorageError::Io {
                path: blobs.staged(transfer),
                action: "write",
                source,
            })?;
            Ok(staging)
        });
        self.staging = Some(written.await?);
        Ok(())
    }

    /// Makes the upload durable.
    pub async fn finish(mut self) -> Result<(Upload, Staged), StorageError> {
        self.flush().await?;
        match self.staging.take() {
            Some(staging) => blocking(move || staging.finish()).await,
            None => unreachable!("flush has begun the upload"),
        }
    }
}

/// Takes a file that a client has put into the object's directory.
pub async fn adopt(
    blobs: &BlobDir,
    oid: Oid,
    name: String,
) -> Result<(Upload, Staged), StorageError> {
    let blobs = blobs.clone();
    blocking(move || {
        let failed = |source| StorageError::Io {
            path: blobs.dir().to_owned(),
            action: "name an upload in",
            source,
        };
        blobs.adopt(oid, &name, new_transfer().map_err(failed)?)
    })
    .await
}

/// Reads a blob piece by piece.
pub struct BlobReader {
    file: Arc<dyn File>,
    at: u64,
}

impl BlobReader {
    /// Opens an upload or, once it is committed, the blob that it has become.
    pub async fn open(
        blobs: &BlobDir,
        transfer: Option<Transfer>,
        revision: Option<(Oid, Tid)>,
    ) -> io::Result<BlobReader> {
        let staged = transfer.map(|transfer| blobs.staged(transfer));
        let placed = revision.map(|(oid, tid)| blobs.path(oid, tid));
        let disk = blobs.disk().clone();
        let opened = machine::spawn_blocking(move || {
            for path in [staged, placed].iter().flatten() {
                match disk.open(path, Open::Read) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    other => return other,
                }
            }
            Err(io::ErrorKind::NotFound.into())
        });
        Ok(BlobReader { file: opened.await.map_err(io::Error::other)??, at: 0 })
    }

    /// Opens the blob of a revision for a client, when it is what was written.
    pub async fn open_right(
        shared: &Arc<Shared>,
        storage: &str,
        blobs: &BlobDir,
        id: BlobId,
    ) -> io::Result<BlobReader> {
        let looking = blobs.clone();
        let found = machine::spawn_blocking(move || looking.look_at(id));
        let found = found.await.map_err(io::Error::other)?;
        if found == Found::Damaged && !mend(shared, storage, id).await {
            let text = match shared.config.standby {
                Some(_) => "it is damaged, and no other node that can be reached has it",
                None => "it is damaged",
            };
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        BlobReader::open(blobs, None, Some(id)).await
    }

    /// The next piece; empty at the end.
    pub async fn next(&mut self) -> io::Result<Bytes> {
        let (file, at) = (self.file.clone(), self.at);
        let read = machine::spawn_blocking(move || -> io::Result<Bytes> {
            let mut buffer = vec![0; CHUNK];
            let n = standby_types::disk::read_full(&*file, &mut buffer, at)?;
            buffer.truncate(n);
            Ok(buffer.into())
        });
        let bytes = read.await.map_err(io::Error::other)??;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }
}

/// Fetches a blob that is damaged here from a node that has it. False if none has: then it is known as damage.
pub async fn mend(shared: &Arc<Shared>, storage: &str, id: BlobId) -> bool {
    let Some((stored, blobs)) =
        shared.storages.get(storage).and_then(|s| Some((s, s.blobs.as_ref()?)))
    else {
        return false;
    };
    let reader = stored.reader();
    let found = machine::spawn_blocking(move || reader.load_serial(id.0, id.1, Access::Blocking));
    if let Ok(Err(StorageError::NoKey(_) | StorageError::Hole(_))) = found.await {
        // A pack has removed it meanwhile, or it is older than what a fast recovery has brought.
        blobs.note_gone(id);
        return true;
    }
    blobs.note_mending(id, true);
    let mended = fetch_right(shared, storage, blobs, id).await;
    blobs.note_mending(id, false);
    match &mended {
        Some(address) => {
            let (oid, tid) = id;
            warn!(storage, %oid, %tid, address, "a damaged blob is mended from a node");
        }
        None => blobs.note_damaged(id),
    }
    mended.is_some()
}

/// Mends a blob that another node has asked for. What is known already the scrub tries again: two nodes on which the same
/// blob is damaged would ask each other for ever.
pub async fn mend_for_another(shared: &Arc<Shared>, storage: &str, id: BlobId) {
    let blobs = shared.storages.get(storage).and_then(|stored| stored.blobs.as_ref());
    if blobs.is_some_and(|blobs| blobs.is_news(id)) {
        mend(shared, storage, id).await;
    }
}

/// A session's hold on its upload. The other nodes are told of the upload; and if it is given up, of
/// that.
pub struct StagedBlob {
    shared: Arc<Shared>,
    announcement: Announcement,
    staged: Option<Staged>,
}

impl StagedBlob {
    /// Tells the other nodes: they fetch the upload while the client goes on.
    pub fn announce(
        shared: &Arc<Shared>,
        storage: &str,
        upload: Upload,
        staged: Staged,
    ) -> StagedBlob {
        let announcement = Announcement::of(storage, upload);
        shared.peers.announce(&announcement);
        StagedBlob { shared: shared.clone(), announcement, staged: Some(staged) }
    }
}

impl StagedFile for StagedBlob {
    fn keep(mut self: Box<Self>) {
        if let Some(staged) = self.staged.take() {
            staged.keep();
        }
    }
}

impl Drop for StagedBlob {
    fn drop(&mut self) {
        if self.staged.is_some() {
            self.shared.peers.forget(&self.announcement);
        }
    }
}
