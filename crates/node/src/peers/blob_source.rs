//! Serves nodes that fetch blobs.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use sha2::{Digest, Sha256};
use standby_filestorage::{Access, BlobDir, StorageError};
use standby_types::{Oid, Tid, Transfer};
use tokio::io::AsyncWrite;

use super::blob::{Request, blobs_of};
use super::blob_repair::repair_for_another;
use crate::cells::shared::Shared;
use crate::cells::wire::{BlobFrame, Question, receive, send};
use crate::platform;
use crate::transport::blob_files::BlobReader;
use crate::transport::frames::PeerError;
use crate::transport::stream::Stream;

/// Serves a node that fetches blobs, until it leaves.
pub(crate) async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    loop {
        let request = match receive(&mut stream, 4 << 10).await {
            Ok(Question(request)) => request,
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
                        send_pieces(&mut stream, reader, right).await
                    }
                    Err(_) if is_packed_away(shared, &storage, revision).await? => {
                        send(&mut stream, &BlobFrame::PackedAway).await
                    }
                    Err(error) => {
                        let refused = BlobFrame::Refused(error.to_string());
                        send(&mut stream, &refused).await?;
                        let lacks = revision.is_some_and(|revision| blobs.should_have(revision));
                        if lacks { Err(PeerError::Damaged) } else { Ok(()) }
                    }
                };
                match sent {
                    Err(PeerError::Damaged) if let Some(revision) = revision => {
                        let shared = shared.clone();
                        // The attempts to fetch a right copy have deadlines.
                        tokio::spawn(async move {
                            repair_for_another(&shared, &storage, revision).await;
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
    Ok(platform::spawn_blocking(look).await.map_err(std::io::Error::other)?)
}

/// Sends the names of the blobs of revisions up to `up_to`: oid 8, tid 8 each.
async fn send_list(
    stream: &mut Stream,
    blobs: Option<BlobDir>,
    up_to: Tid,
) -> Result<(), PeerError> {
    let (names, mut queue) = platform::queue::<Bytes>(16);
    let walking = platform::spawn_blocking(move || {
        let Some(blobs) = blobs else { return Ok(()) };
        let mut batch = BytesMut::new();
        blobs.walk(&mut |oid, tid, _| {
            if tid <= up_to {
                batch.put_u64(oid.0);
                batch.put_u64(tid.0);
            }
            if batch.len() >= 1 << 16 {
                // Without a receiver the other node is gone.
                let _ = platform::send_blocking(&names, batch.split().freeze());
            }
            Ok(())
        })?;
        let _ = platform::send_blocking(&names, batch.freeze());
        Ok::<_, StorageError>(())
    });
    while let Some(batch) = queue.recv().await {
        send(stream, &BlobFrame::Piece(batch)).await?;
    }
    walking.await.map_err(std::io::Error::other)??;
    send(stream, &BlobFrame::End(Bytes::new())).await
}

/// Sends the pieces of a blob. If it is not `right`, or cannot be read, who fetches it is told so.
async fn send_pieces(
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
            let hash = Bytes::copy_from_slice(&sha256);
            return send(stream, &BlobFrame::End(hash)).await;
        }
        hash.update(&bytes);
        send(stream, &BlobFrame::Piece(bytes)).await?;
    }
    let refused = BlobFrame::Refused("the blob is damaged on that node".into());
    send(stream, &refused).await?;
    Err(PeerError::Damaged)
}
