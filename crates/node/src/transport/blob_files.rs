//! Blob files between disk and connections, without blocking a task.
//!
//! Before a client gets a blob it is compared with its checksum, unless it was right since the
//! start and still is in memory; a damaged one is fetched from another node first.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_filestorage::{BlobDir, Staged, Staging, StorageError};
use standby_types::disk::Open;
use standby_types::{File, Oid, Tid, Transfer, Upload};

use crate::platform;

/// Bytes that are read or written at once.
const CHUNK: usize = 1 << 20;

/// A fresh name for an upload.
pub(crate) fn new_transfer() -> io::Result<Transfer> {
    let mut random = [0; 16];
    platform::fill_random(&mut random)?;
    Ok(Transfer(random))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    platform::spawn_blocking(work).await.unwrap_or_else(|error| {
        let (path, action) = (Path::new("").to_owned(), "finish");
        Err(StorageError::Io { path, action, source: io::Error::other(error) })
    })
}

/// Writes an upload. Dropped before it is finished, it leaves nothing.
pub(crate) struct BlobWriter {
    blobs: BlobDir,
    transfer: Transfer,
    staging: Option<Staging>,
    pending: BytesMut,
}

impl BlobWriter {
    /// Begins an upload under this name.
    pub(crate) fn new(blobs: &BlobDir, transfer: Transfer) -> BlobWriter {
        BlobWriter { blobs: blobs.clone(), transfer, staging: None, pending: BytesMut::new() }
    }

    /// The error for bytes that cannot be kept.
    pub(crate) fn failed(&self, source: io::Error) -> StorageError {
        StorageError::Io { path: self.blobs.dir().to_owned(), action: "write", source }
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
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
    pub(crate) async fn finish(mut self) -> Result<(Upload, Staged), StorageError> {
        self.flush().await?;
        match self.staging.take() {
            Some(staging) => blocking(move || staging.finish()).await,
            None => unreachable!("flush has begun the upload"),
        }
    }
}

/// Takes a file that a client has put into the object's directory.
pub(crate) async fn adopt(
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
pub(crate) struct BlobReader {
    file: Arc<dyn File>,
    at: u64,
}

impl BlobReader {
    /// Opens an upload or, once it is committed, the blob that it has become.
    pub(crate) async fn open(
        blobs: &BlobDir,
        transfer: Option<Transfer>,
        revision: Option<(Oid, Tid)>,
    ) -> io::Result<BlobReader> {
        let staged = transfer.map(|transfer| blobs.staged(transfer));
        let placed = revision.map(|(oid, tid)| blobs.path(oid, tid));
        let disk = blobs.disk().clone();
        let opened = platform::spawn_blocking(move || {
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
    pub(crate) async fn next(&mut self) -> io::Result<Bytes> {
        let (file, at) = (self.file.clone(), self.at);
        let read = platform::spawn_blocking(move || -> io::Result<Bytes> {
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
