//! Filling the holes that fast recoveries left in a storage's history
//! ([`standby_filestorage::Hole`]).
//!
//! A new data file is made beside the old one, as by a pack: what is before the first hole is
//! copied from the old file, the rest comes from a node that has it all, and what has been
//! committed meanwhile comes from the old file again. Then the applier puts the new file in the old
//! one's place.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use standby_filestorage::{FileStorage, Need, Outcome, Packed, StorageError, copy, copy_most};
use standby_types::Tid;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::cells::apply_task::{CatchUpItem, CatchUpItems};
use crate::cells::reserve::room_for;
use crate::cells::shared::Shared;
use crate::cells::storage::StorageShared;
use crate::peers::blob::obtain_old;
use crate::peers::catch_up::fetch_history;
use crate::platform;
use crate::tasks::packing::pack_path;
use crate::transport::frames::PeerError;

/// Batches between the socket and the file.
const QUEUE: usize = 16;
/// Until a source is looked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// What has come of an attempt.
enum Got {
    /// Everything, up to the new file's last transaction.
    All,
    /// The connection broke; what has come is in the new file.
    Part,
    /// The source has packed what comes: it does not go with what was copied from the old file.
    Packed,
}

/// Makes a data file that has the whole history up to a transaction, which is returned too; tries
/// until there is a node to get it from.
pub(crate) async fn run(shared: &Arc<Shared>, name: &str) -> anyhow::Result<(Outcome, Tid)> {
    let storage = shared.storages.get(name).context("no such storage")?;
    let filled = fill(shared, name, storage).await;
    if filled.is_err() {
        // The disk may be full: what has been written so far must not keep it so.
        let _ = shared.disk.remove(&pack_path(&storage.path));
    }
    filled
}

async fn fill(
    shared: &Arc<Shared>,
    name: &str,
    storage: &StorageShared,
) -> anyhow::Result<(Outcome, Tid)> {
    storage.backfilling.set(Some(0));
    let Some(first) = storage.reader().holes().iter().next().copied() else {
        return Ok((Outcome::Nothing, Tid::NONE));
    };
    let mut target = begin(shared, name, first.after).await?;
    let mut told = false;
    loop {
        let Some((node, address)) = source(shared, name) else {
            if !std::mem::replace(&mut told, true) {
                warn!(storage = name, "no node is there that has the whole history; waiting");
            }
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        info!(storage = name, peer = node, "filling the hole in the history");
        let (file, got) = attempt(shared, name, &address, target).await?;
        target = match got {
            Got::All => match obtain_old(shared, name, file.mark().tid, &address).await {
                Ok(()) => return finish(shared, name, file).await,
                Err(error) => {
                    warn!(storage = name, address, %error, "not all blobs have come; trying again");
                    file
                }
            },
            Got::Packed => begin(shared, name, Tid::NONE).await?,
            Got::Part => file,
        };
        tokio::time::sleep(AGAIN).await;
    }
}

/// A node that has the whole history; the primary if it can be.
fn source(shared: &Shared, storage: &str) -> Option<(String, String)> {
    let status = shared.reports.status();
    let can = |node: &&crate::cells::status::NodeStatus| {
        node.node != shared.member.name
            && matches!(node.state.as_str(), "up" | "cut-off")
            && node.role != "witness"
            && !node.holes.contains_key(storage)
    };
    let mut nodes: Vec<_> = status.nodes.iter().filter(can).collect();
    nodes.sort_by_key(|node| node.role != "primary");
    nodes.first().map(|node| (node.node.clone(), node.peer_address.clone()))
}

/// A new file with the transactions of the old one up to `last`.
async fn begin(shared: &Arc<Shared>, name: &str, last: Tid) -> anyhow::Result<FileStorage> {
    let storage = shared.storages.get(name).context("no such storage")?;
    let (reader, path) = (storage.reader(), pack_path(&storage.path));
    let room = room_for(shared, &storage.path, "filling the hole in its history");
    // What comes from elsewhere is more than that, by as much as is missing.
    room(Need::All(reader.size()))?;
    let made = platform::spawn_blocking(move || -> Result<_, StorageError> {
        let mut target = FileStorage::successor(&reader, &path)?;
        target.set_holes(Default::default());
        copy(&reader, &mut target, Tid::NONE, last, &room)?;
        Ok(target)
    });
    Ok(made.await??)
}

async fn attempt(
    shared: &Arc<Shared>,
    name: &str,
    address: &str,
    target: FileStorage,
) -> anyhow::Result<(FileStorage, Got)> {
    let (items, receiver) = mpsc::channel(QUEUE);
    let after = target.mark().tid;
    // Where the last hole ends, whatever happens meanwhile.
    let reader = shared.storages.get(name).context("no such storage")?.reader();
    let least = reader.holes().iter().last().map_or(Tid::NONE, |hole| hole.through);
    let writing_to = shared.clone();
    let writing = platform::apart(async move {
        let mut target = target;
        let got = write(&writing_to, &mut target, CatchUpItems::new(receiver), after).await?;
        Ok::<_, anyhow::Error>((target, got))
    });
    let percent = |got: u64, of: u64| (got * 100 / of.max(1)).min(99) as u32;
    let show = |progress: &crate::cells::status::CatchUp| {
        if let Some(storage) = shared.storages.get(name) {
            storage.backfilling.set(Some(percent(progress.bytes, progress.total_bytes)));
        }
    };
    let fetched = fetch_history(shared, name, (after, least), address, items, show).await;
    let (target, got) = writing.await??;
    match fetched {
        // The writer has seen why.
        Ok(()) => {}
        Err(_) if matches!(got, Got::Packed) => {}
        Err(PeerError::Refused(reason)) => anyhow::bail!("{address} refuses: {reason}"),
        Err(error) => {
            warn!(storage = name, address, %error, "the history did not come whole; trying again")
        }
    }
    Ok((target, got))
}

async fn write(
    shared: &Shared,
    target: &mut FileStorage,
    mut items: CatchUpItems,
    after: Tid,
) -> anyhow::Result<Got> {
    while let Some(item) = items.next().await {
        let meta = match item {
            CatchUpItem::Begin(_, meta) => meta,
            CatchUpItem::Done => return Ok(Got::All),
            _ => continue,
        };
        if meta.status == b'p' && after > Tid::NONE {
            return Ok(Got::Packed);
        }
        shared.room.check()?;
        // Dropped unless it is finished: it leaves nothing then.
        let mut appender = target.begin(&meta)?;
        loop {
            match items.next().await {
                Some(CatchUpItem::Record(record)) => appender.record(&record)?,
                Some(CatchUpItem::End) => break,
                _ => return Ok(Got::Part),
            }
        }
        appender.finish()?;
    }
    Ok(Got::Part)
}

/// Adds what has been committed meanwhile.
async fn finish(
    shared: &Arc<Shared>,
    name: &str,
    mut target: FileStorage,
) -> anyhow::Result<(Outcome, Tid)> {
    let storage = shared.storages.get(name).context("no such storage")?;
    let room = room_for(shared, &storage.path, "filling the hole in its history");
    let through = target.mark().tid;
    // What the log brings later is told to clients when this node applies it, not before.
    while storage.reader().last_tid() < through {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let reader = storage.reader();
    let done = platform::spawn_blocking(move || -> Result<_, StorageError> {
        let last = copy_most(&reader, &mut target, through, &room)?;
        Ok(Outcome::Packed(Packed::whole(target, last)))
    });
    Ok((done.await??, through))
}
