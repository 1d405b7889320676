//! Blob files between disk and connections, without blocking a task.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_filestorage::{BlobDir, Staged, Staging, StorageError};
use standby_types::disk::Open;
use standby_types::{File, Oid, Tid, Transfer, Upload};
use standby_zeo::StagedFile;

use crate::machine;
use crate::node::Shared;
use crate::peers::Announcement;

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
