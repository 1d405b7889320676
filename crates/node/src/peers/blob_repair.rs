//! Damaged blobs, fetched again from a node that has them.

use std::io;
use std::sync::Arc;

use standby_filestorage::{Access, BlobDir, BlobId, Found, StorageError};
use tracing::warn;

use crate::cells::shared::Shared;
use crate::peers::blob::fetch_right;
use crate::platform;
use crate::transport::blob_files::BlobReader;

/// Opens the blob of a revision for a client, when it is what was written.
pub(crate) async fn open_right(
    shared: &Arc<Shared>,
    storage: &str,
    blobs: &BlobDir,
    id: BlobId,
) -> io::Result<BlobReader> {
    let looking = blobs.clone();
    let found = platform::spawn_blocking(move || looking.look_at(id));
    let found = found.await.map_err(io::Error::other)?;
    if found == Found::Damaged && !repair(shared, storage, id).await {
        let text = match shared.config.standby {
            Some(_) => "it is damaged, and no other node that can be reached has it",
            None => "it is damaged",
        };
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    BlobReader::open(blobs, None, Some(id)).await
}

/// Fetches a blob that is damaged here from a node that has it. False if none has: then it is known
/// as damage.
pub(crate) async fn repair(shared: &Arc<Shared>, storage: &str, id: BlobId) -> bool {
    let Some((stored, blobs)) =
        shared.storages.get(storage).and_then(|s| Some((s, s.blobs.as_ref()?)))
    else {
        return false;
    };
    let reader = stored.reader();
    let found = platform::spawn_blocking(move || reader.load_serial(id.0, id.1, Access::Blocking));
    if let Ok(Err(StorageError::NoKey(_) | StorageError::Hole(_))) = found.await {
        // A pack has removed it meanwhile, or it is older than what a fast recovery has brought.
        blobs.note_gone(id);
        return true;
    }
    blobs.note_repairing(id, true);
    let repaired = fetch_right(shared, storage, blobs, id).await;
    blobs.note_repairing(id, false);
    match &repaired {
        Some(address) => {
            let (oid, tid) = id;
            warn!(storage, %oid, %tid, address, "a damaged blob is repaired from a node");
        }
        None => blobs.note_damaged(id),
    }
    repaired.is_some()
}

/// Repairs a blob that another node has asked for. What is known already the scrub tries again: two
/// nodes on which the same blob is damaged would ask each other for ever.
pub(crate) async fn repair_for_another(shared: &Arc<Shared>, storage: &str, id: BlobId) {
    let blobs = shared.storages.get(storage).and_then(|stored| stored.blobs.as_ref());
    if blobs.is_some_and(|blobs| blobs.is_news(id)) {
        repair(shared, storage, id).await;
    }
}
