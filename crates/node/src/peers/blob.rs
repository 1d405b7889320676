//! Blobs between nodes.
//!
//! The primary announces each complete upload over its links ([`LinkFrame::Announced`]); each node
//! fetches it into its staging directory and says so. An upload that is given up is called off in
//! the same way. A node that is to persist an entry of the log whose blobs it lacks fetches them
//! the same way: it asks, and is answered by [`BlobFrame`]s.
//!
//! [`LinkFrame::Announced`]: crate::cells::wire::LinkFrame::Announced
//!
//! A list of blobs is sent in the same way, without a hash.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_filestorage::{BlobDir, BlobId, Staged};
use standby_primary::action::{Wanted, WantedBlob};
use standby_types::{Blob, BlobSource, Oid, Tid, Transfer, Upload};
use tokio::io::BufReader;
use tracing::info;

use crate::cells::shared::Shared;
use crate::cells::wire::{BlobFrame, Question, receive, send};
use crate::platform;
use crate::transport::blob_files::{BlobReader, BlobWriter, new_transfer};
use crate::transport::frames::{PeerError, within};
use crate::transport::handshake::{Purpose, connect};
use crate::transport::stream::Stream;

/// Silence after which a fetch is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest piece of a blob.
const MAX_PIECE: usize = 4 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    Blob { storage: String, transfer: Option<String>, revision: Option<(u64, u64)> },
    List { storage: String, up_to: u64 },
}

/// Makes sure that the blob is durable here; fetches it from `address` if it is not.
pub(crate) async fn obtain(
    shared: &Shared,
    wanted: &Wanted,
    address: &str,
) -> Result<(), PeerError> {
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
pub(crate) async fn obtain_old(
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
    list.ask(Request::List { storage: storage.into(), up_to: up_to.0 }).await?;
    let mut fetched = 0;
    while let BlobFrame::Piece(names) = list.piece().await? {
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

/// Fetches the blob of a revision from the first node that has it as it was written, to the place
/// of the damaged one; returns that node's address.
pub(crate) async fn fetch_right(
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
            let repaired = platform::spawn_blocking(move || blobs.repair(&upload, id));
            Ok::<_, PeerError>(repaired.await.map_err(std::io::Error::other)??)
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

/// A node that blobs are fetched from, one after the other.
struct Source(BufReader<Stream>);

impl Source {
    async fn connect(shared: &Shared, address: &str) -> Result<Source, PeerError> {
        let (stream, _) = connect(&shared.introduction(), address, Purpose::Blob).await?;
        Ok(Source(BufReader::with_capacity(1 << 20, stream)))
    }

    async fn ask(&mut self, request: Request) -> Result<(), PeerError> {
        send(&mut self.0, &Question(request)).await
    }

    /// The next piece, or its end.
    async fn piece(&mut self) -> Result<BlobFrame, PeerError> {
        match within(PATIENCE, receive(&mut self.0, MAX_PIECE)).await? {
            BlobFrame::PackedAway => Err(PeerError::PackedAway),
            BlobFrame::Refused(reason) => Err(PeerError::Refused(reason)),
            piece => Ok(piece),
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
        platform::spawn_blocking(move || blobs.place(&blob, tid))
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
        self.ask(request).await?;
        let mut writer = BlobWriter::new(blobs, to);
        let hash = loop {
            match self.piece().await? {
                BlobFrame::Piece(piece) => writer.write(&piece).await?,
                BlobFrame::End(hash) => break hash,
                BlobFrame::PackedAway | BlobFrame::Refused(_) => return Err(damaged()),
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

pub(super) fn blobs_of<'a>(shared: &'a Shared, storage: &str) -> Result<&'a BlobDir, PeerError> {
    shared.storages.get(storage).and_then(|s| s.blobs.as_ref()).ok_or_else(|| {
        PeerError::Protocol(format!(
            "node {} has no blob-dir for the storage {storage:?} in its configuration",
            shared.member.name
        ))
    })
}
