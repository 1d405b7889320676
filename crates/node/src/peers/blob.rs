//! Blobs between nodes.
//!
//! While a client uploads, the primary announces each complete upload over its links ('a', JSON);
//! each node fetches it into its staging directory and says so ('g', JSON). A node that is to persist
//! an entry of the log whose blobs it lacks fetches them the same way.
//!
//! ```text
//! fetching node                          serving node
//!    'q' JSON: storage, transfer,  ─────▶
//!        perhaps oid and tid
//!                                  ◀─────  'x' reason, or: 'c' bytes …
//!                                  ◀─────  'h' SHA-256 of all bytes
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use standby_filestorage::BlobDir;
use standby_types::{Oid, Tid, Transfer, Upload};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};

use super::{PeerError, Purpose, connect, read_frame, write_frame};
use crate::blobs::{BlobReader, BlobWriter};
use crate::node::Shared;
use crate::stream::Stream;

/// Silence after which a fetch is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest piece of a blob.
const MAX_PIECE: usize = 4 << 20;

/// What is said of an upload: that it is to be had, or that it has arrived.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Announcement {
    storage: String,
    transfer: String,
    len: u64,
    sha256: String,
}

impl Announcement {
    /// An announcement of an upload.
    pub fn of(storage: &str, upload: Upload) -> Announcement {
        let sha256 = upload.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        let transfer = upload.transfer.to_string();
        Announcement { storage: storage.into(), transfer, len: upload.len, sha256 }
    }

    /// The storage.
    pub fn storage(&self) -> &str {
        &self.storage
    }

    /// The upload; `None` if this is none.
    pub fn upload(&self) -> Option<Upload> {
        let mut sha256 = [0; 32];
        let digits = (self.sha256.len() == 64).then_some(self.sha256.as_bytes())?;
        for (byte, pair) in sha256.iter_mut().zip(digits.chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Upload { transfer: Transfer::parse(&self.transfer)?, len: self.len, sha256 })
    }
}

/// A blob that a node is to have.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The storage.
    pub storage: String,
    /// The upload.
    pub upload: Upload,
    /// The revision that it belongs to, if its transaction is in the log.
    pub revision: Option<(Oid, Tid)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    storage: String,
    transfer: String,
    revision: Option<(u64, u64)>,
}

/// Makes sure that the blob is durable here; fetches it from `address` if it is not.
pub async fn obtain(shared: &Shared, wanted: &Wanted, address: &str) -> Result<(), PeerError> {
    let blobs = blobs_of(shared, &wanted.storage)?;
    let Wanted { upload, revision, .. } = wanted;
    if is_here(blobs, upload.transfer, *revision).await? {
        return Ok(());
    }
    let (mut stream, _) = connect(&shared.introduction(), address, Purpose::Blob).await?;
    let request = Request {
        storage: wanted.storage.clone(),
        transfer: upload.transfer.to_string(),
        revision: revision.map(|(oid, tid)| (oid.0, tid.0)),
    };
    let json = serde_json::to_vec(&request).map_err(|e| PeerError::Protocol(e.to_string()))?;
    write_frame(&mut stream, b'q', &json).await?;
    let mut stream = BufReader::with_capacity(1 << 20, stream);
    let mut writer = BlobWriter::new(blobs, upload.transfer);
    while let Some(piece) = piece(&mut stream).await? {
        writer.write(&piece).await?;
    }
    let (got, staged) = writer.finish().await?;
    if got != *upload {
        return Err(PeerError::Protocol(format!("blob {} has arrived damaged", upload.transfer)));
    }
    staged.keep();
    Ok(())
}

async fn is_here(
    blobs: &BlobDir,
    transfer: Transfer,
    revision: Option<(Oid, Tid)>,
) -> Result<bool, PeerError> {
    match BlobReader::open(blobs, Some(transfer), revision).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn blobs_of<'a>(shared: &'a Shared, storage: &str) -> Result<&'a BlobDir, PeerError> {
    shared.storages.get(storage).and_then(|s| s.blobs.as_ref()).ok_or_else(|| {
        PeerError::Protocol(format!(
            "node {} has no blob-dir for the storage {storage:?} in its configuration",
            shared.member.name
        ))
    })
}

/// The next piece of a blob; `None` when it is complete.
async fn piece(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Bytes>, PeerError> {
    let next = tokio::time::timeout(PATIENCE, read_frame(stream, MAX_PIECE)).await;
    match next.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?? {
        (b'c', bytes) => Ok(Some(bytes)),
        (b'h', _) => Ok(None),
        (b'x', reason) => Err(PeerError::Refused(String::from_utf8_lossy(&reason).into_owned())),
        (other, _) => Err(PeerError::Protocol(format!("a frame of unknown kind {other}"))),
    }
}

/// Serves a node that fetches a blob.
pub async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let request: Request = match read_frame(&mut stream, 4 << 10).await? {
        (b'q', json) => {
            serde_json::from_slice(&json).map_err(|e| PeerError::Protocol(e.to_string()))?
        }
        _ => return Err(PeerError::Protocol("no request for a blob".into())),
    };
    let blobs = blobs_of(shared, &request.storage)?;
    let revision = request.revision.map(|(oid, tid)| (Oid(oid), Tid(tid)));
    match BlobReader::open(blobs, Transfer::parse(&request.transfer), revision).await {
        Ok(reader) => send(&mut stream, reader).await,
        Err(error) => write_frame(&mut stream, b'x', error.to_string().as_bytes()).await,
    }
}

/// Sends the pieces of a blob.
async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    mut reader: BlobReader,
) -> Result<(), PeerError> {
    let mut hash = Sha256::new();
    loop {
        let bytes = reader.next().await?;
        if bytes.is_empty() {
            return write_frame(stream, b'h', &hash.finalize()).await;
        }
        hash.update(&bytes);
        write_frame(stream, b'c', &bytes).await?;
    }
}
