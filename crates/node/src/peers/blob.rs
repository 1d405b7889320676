//! Blobs between nodes.
//!
//! The primary announces each complete upload over its links ('a', JSON); each node fetches it into its
//! staging directory and says so ('g', the transfer's name). An upload that is given up is called off in
//! the same way ('d', JSON). A node that is to persist
//! an entry of the log whose blobs it lacks fetches them the same way.
//!
//! ```text
//! fetching node                          serving node
//!    'q' JSON: what is wanted      ─────▶
//!                                  ◀─────  'x' reason, or: 'p' it was packed away, or: 'c' bytes …
//!                                  ◀─────  'h' SHA-256 of all bytes
//! ```
//!
//! A list of blobs is sent in the same way, without a hash.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use standby_filestorage::{Access, BlobDir, BlobId, Staged, StorageError};
use standby_types::{Blob, BlobSource, Oid, Tid, Transfer, Upload};
use tokio::io::{AsyncWrite, BufReader};
use tracing::info;

use super::{PeerError, Purpose, connect, read_frame, within, write_frame};
use crate::blobs::{BlobReader, BlobWriter, mend_for_another, new_transfer};
use crate::hex::{hex, unhex};
use crate::machine;
use crate::node::Shared;
use crate::stream::Stream;

/// Silence after which a fetch is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest piece of a blob.
const MAX_PIECE: usize = 4 << 20;

/// What is said of an upload: that it is to be had, or that it is given up.
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
        let sha256 = hex(&upload.sha256);
        let transfer = upload.transfer.to_string();
        Announcement { storage: storage.into(), transfer, len: upload.len, sha256 }
    }

    /// The storage.
    pub fn storage(&self) -> &str {
        &self.storage
    }

    /// The upload; `None` if this is none.
    pub fn upload(&self) -> Option<Upload> {
        let sha256 = unhex(&self.sha256)?.try_into().ok()?;
        Some(Upload { transfer: Transfer::parse(&self.transfer)?, len: self.len, sha256 })
    }
}

/// A blob that a node is to have.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The storage.
    pub storage: String,
    /// The blob.
    pub blob: WantedBlob,
}

/// See [`Wanted`].
#[derive(Debug, Clone, Copy)]
pub enum WantedBlob {
    /// An upload, and the revision that it belongs to, if its transaction is in the log.
    Upload(Upload, Option<(Oid, Tid)>),
    /// That of a revision which this node does not have, for it lies in a hole: an undo brings it back.
    Copy {
        /// The object.
        oid: Oid,
        /// The revision in the hole.
        of: Tid,
        /// The undo.
        by: Tid,
    },
}

impl WantedBlob {
    /// What it is called while it is on its way.
    pub fn transfer(&self) -> Transfer {
        match self {
            WantedBlob::Upload(upload, _) => upload.transfer,
            WantedBlob::Copy { oid, by, .. } => Transfer::of_revision(*oid, *by),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Blob { storage: String, transfer: Option<String>, revision: Option<(u64, u64)> },
    List { storage: String, up_to: u64 },
}

/// Makes sure that the blob is durable here; fetches it from `address` if it is not.
pub async fn obtain(shared: &Shared, wanted: &Wanted, address: &str) -> Result<(), PeerError> {
    shared.room.check()?;
    let blobs = blobs_of(shared, &wanted.storage)?;
    let storage = &wanted.storage;
    let (upload, revision) = match &wanted.blob {
        WantedBlob::Upload(upload, revision) => (upload, revision),
        WantedBlob::Copy { oid, of, by } => {
            if is_here(blobs, None, Some((*oid, *of))).await? {
                return Ok(());
            }
            let mut source = Source::connect(shared, address).await?;
            for tid in [*of, *by] {
                match source.place(blobs, storage, *oid, tid).await {
                    // It may have been packed away since.
                    Err(PeerError::Refused(_) | PeerError::PackedAway) => {}
                    placed => return placed,
                }
            }
            return Ok(());
        }
    };
    if is_here(blobs, Some(upload.transfer), *revision).await? {
        return Ok(());
    }
    let mut source = Source::connect(shared, address).await?;
    let (got, staged) =
        source.fetch(blobs, storage, Some(upload.transfer), upload.transfer, *revision).await?;
    if got != *upload {
        return Err(damaged());
    }
    staged.keep();
    Ok(())
}

/// Fetches the blobs of revisions up to `up_to` that are missing here: the data file may have been
/// copied without them.
pub async fn obtain_old(
    shared: &Shared,
    storage: &str,
    up_to: Tid,
    address: &str,
) -> Result<(), PeerError> {
    let Some(blobs) = shared.storages.get(storage).and_then(|s| s.blobs.as_ref()) else {
        return Ok(());
    };
    let mut list = Source::connect(shared, address).await?;
    let mut source = Source::connect(shared, address).await?;
    list.ask(&Request::List { storage: storage.into(), up_to: up_to.0 }).await?;
    let mut fetched = 0;
    while let Piece::Bytes(names) = list.piece().await? {
        for name in names.chunks_exact(16) {
            let (Some(oid), Some(tid)) = (Oid::from_slice(&name[..8]), Tid::from_slice(&name[8..]))
            else {
                continue;
            };
            if is_here(blobs, None, Some((oid, tid))).await? {
                continue;
            }
            source.place(blobs, storage, oid, tid).await?;
            fetched += 1;
        }
    }
    if fetched > 0 {
        info!(storage, fetched, "fetched blobs that the data file's copy came without");
    }
    Ok(())
}

/// Fetches the blob of a revision from the first node that has it as it was written, to the place of the damaged
/// one; returns that node's address.
pub async fn fetch_right(
    shared: &Shared,
    storage: &str,
    blobs: &BlobDir,
    id: BlobId,
) -> Option<String> {
    for address in shared.helpers.addresses() {
        let fetched = async {
            shared.room.check()?;
            let mut source = Source::connect(shared, &address).await?;
            let to = new_transfer()?;
            let (upload, _staged) = source.fetch(blobs, storage, None, to, Some(id)).await?;
            let blobs = blobs.clone();
            let mended = machine::spawn_blocking(move || blobs.mend(&upload, id));
            Ok::<_, PeerError>(mended.await.map_err(std::io::Error::other)??)
        };
        match fetched.await {
            Ok(true) => return Some(address),
            Ok(false) => info!(address, "the blob of that node is not the same there"),
            Err(error) => info!(address, %error, "cannot get a damaged blob from a node"),
        }
    }
    None
}

fn damaged() -> PeerError {
    PeerError::Protocol("a blob has arrived damaged".into())
}

enum Piece {
    Bytes(Bytes),
    /// That is all; its hash.
    End(Bytes),
}

/// A node that blobs are fetched from, one after the other.
struct Source(BufReader<Stream>);

impl Source {
    async fn connect(shared: &Shared, address: &str) -> Result<Source, PeerError> {
        let (stream, _) = connect(&shared.introduction(), address, Purpose::Blob).await?;
        Ok(Source(BufReader::with_capacity(1 << 20, stream)))
    }

    async fn ask(&mut self, request: &Request) -> Result<(), PeerError> {
        let json = serde_json::to_vec(request)?;
        write_frame(&mut self.0, b'q', &json).await
    }

    async fn piece(&mut self) -> Result<Piece, PeerError> {
        match within(PATIENCE, read_frame(&mut self.0, MAX_PIECE)).await? {
            (b'c', bytes) => Ok(Piece::Bytes(bytes)),
            (b'h', hash) => Ok(Piece::End(hash)),
            (b'p', _) => Err(PeerError::PackedAway),
            (b'x', why) => Err(PeerError::Refused(String::from_utf8_lossy(&why).into_owned())),
            (other, _) => Err(PeerError::Protocol(format!("a frame of unknown kind {other}"))),
        }
    }

    /// Fetches the blob of a revision to where it belongs.
    async fn place(
        &mut self,
        blobs: &BlobDir,
        storage: &str,
        oid: Oid,
        tid: Tid,
    ) -> Result<(), PeerError> {
        let (transfer, revision) = (new_transfer()?, Some((oid, tid)));
        let (upload, _staged) = self.fetch(blobs, storage, None, transfer, revision).await?;
        let blob = Blob { oid, source: BlobSource::Upload(upload) };
        let blobs = blobs.clone();
        machine::spawn_blocking(move || blobs.place(&blob, tid))
            .await
            .map_err(std::io::Error::other)??;
        Ok(())
    }

    /// Fetches an upload, or what it has become, into the staging directory under the name `to`.
    async fn fetch(
        &mut self,
        blobs: &BlobDir,
        storage: &str,
        transfer: Option<Transfer>,
        to: Transfer,
        revision: Option<(Oid, Tid)>,
    ) -> Result<(Upload, Staged), PeerError> {
        let request = Request::Blob {
            storage: storage.into(),
            transfer: transfer.map(|transfer| transfer.to_string()),
            revision: revision.map(|(oid, tid)| (oid.0, tid.0)),
        };
        self.ask(&request).await?;
        let mut writer = BlobWriter::new(blobs, to);
        let hash = loop {
            match self.piece().await? {
                Piece::Bytes(piece) => writer.write(&piece).await?,
                Piece::End(hash) => break hash,
            }
        };
        let (upload, staged) = writer.finish().await?;
        if upload.sha256[..] == hash[..] { Ok((upload, staged)) } else { Err(damaged()) }
    }
}

async fn is_here(
    blobs: &BlobDir,
    transfer: Option<Transfer>,
    revision: Option<(Oid, Tid)>,
) -> Result<bool, PeerError> {
    match BlobReader::open(blobs, transfer, revision).await {
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

/// Serves a node that fetches blobs, until it leaves.
pub async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    loop {
        let request = match read_frame(&mut stream, 4 << 10).await {
            Ok((b'q', json)) => serde_json::from_slice(&json)?,
            Ok(_) => return Err(PeerError::Protocol("no request for a blob".into())),
            Err(PeerError::Io(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        match request {
            Request::Blob { storage, transfer, revision } => {
                let blobs = blobs_of(shared, &storage)?;
                let transfer = transfer.as_deref().and_then(Transfer::parse);
                let revision = revision.map(|(oid, tid)| (Oid(oid), Tid(tid)));
                let found = BlobReader::open(blobs, transfer, revision).await;
                let sent = match found {
                    Ok(reader) => {
                        let right = |sha256: &[u8; 32]| {
                            revision.is_none_or(|revision| blobs.may_be(revision, sha256))
                        };
                        send(&mut stream, reader, right).await
                    }
                    Err(_) if is_packed_away(shared, &storage, revision).await? => {
                        write_frame(&mut stream, b'p', b"").await
                    }
                    Err(error) => {
                        write_frame(&mut stream, b'x', error.to_string().as_bytes()).await?;
                        let lacks = revision.is_some_and(|revision| blobs.should_have(revision));
                        if lacks { Err(PeerError::Damaged) } else { Ok(()) }
                    }
                };
                match sent {
                    Err(PeerError::Damaged) if let Some(revision) = revision => {
                        let shared = shared.clone();
                        tokio::spawn(async move {
                            mend_for_another(&shared, &storage, revision).await;
                        });
                    }
                    sent => sent?,
                }
            }
            Request::List { storage, up_to } => {
                let blobs = shared.storages.get(&storage).and_then(|s| s.blobs.clone());
                send_list(&mut stream, blobs, Tid(up_to)).await?;
            }
        }
    }
}

/// True if the storage has come further than the revision, and has it no more.
async fn is_packed_away(
    shared: &Shared,
    storage: &str,
    revision: Option<(Oid, Tid)>,
) -> Result<bool, PeerError> {
    let reader = shared.storages.get(storage).map(|storage| storage.reader().clone());
    let (Some(reader), Some((oid, tid))) = (reader, revision) else { return Ok(false) };
    let look = move || {
        let found = reader.load_serial(oid, tid, Access::Blocking);
        reader.last_tid() >= tid && matches!(found, Err(StorageError::NoKey(_)))
    };
    Ok(machine::spawn_blocking(look).await.map_err(std::io::Error::other)?)
}

/// Sends the names of the blobs of revisions up to `up_to`: oid 8, tid 8 each.
async fn send_list(
    stream: &mut Stream,
    blobs: Option<BlobDir>,
    up_to: Tid,
) -> Result<(), PeerError> {
    let (names, mut queue) = machine::queue::<Bytes>(16);
    let walking = machine::spawn_blocking(move || {
        let Some(blobs) = blobs else { return Ok(()) };
        let mut batch = BytesMut::new();
        blobs.walk(&mut |oid, tid, _| {
            if tid <= up_to {
                batch.put_u64(oid.0);
                batch.put_u64(tid.0);
            }
            if batch.len() >= 1 << 16 {
                // Without a receiver the other node is gone.
                let _ = machine::send_blocking(&names, batch.split().freeze());
            }
            Ok(())
        })?;
        let _ = machine::send_blocking(&names, batch.freeze());
        Ok::<_, StorageError>(())
    });
    while let Some(batch) = queue.recv().await {
        write_frame(stream, b'c', &batch).await?;
    }
    walking.await.map_err(std::io::Error::other)??;
    write_frame(stream, b'h', b"").await
}

/// Sends the pieces of a blob. If it is not `right`, or cannot be read, who fetches it is told so.
async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    mut reader: BlobReader,
    right: impl Fn(&[u8; 32]) -> bool,
) -> Result<(), PeerError> {
    let mut hash = Sha256::new();
    loop {
        let Ok(bytes) = reader.next().await else { break };
        if bytes.is_empty() {
            let sha256 = std::mem::take(&mut hash).finalize().into();
            if !right(&sha256) {
                break;
            }
            return write_frame(stream, b'h', &sha256).await;
        }
        hash.update(&bytes);
        write_frame(stream, b'c', &bytes).await?;
    }
    write_frame(stream, b'x', b"the blob is damaged on that node").await?;
    Err(PeerError::Damaged)
}
