//! How data files and directories of blobs are opened.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;
use standby_config::StorageSection;
use standby_consensus::{Recovered, closing_with_blobs};
use standby_filestorage::{BlobDir, Extent, FileStorage, Magic, Repair};
use standby_types::{Disk, LogIndex, Oid, Transfer};
use tracing::{info, warn};

use crate::start::Place;

/// Opens the directories of blobs. What was staged there by a former run goes, except what entries
/// of the log after `applied` name.
pub fn open_blobs(
    place: &Place<'_>,
    recovered: &Recovered,
    applied: LogIndex,
) -> anyhow::Result<BTreeMap<String, BlobDir>> {
    let Place { config, disk, state, .. } = *place;
    let mut needed: BTreeMap<String, BTreeSet<Transfer>> = BTreeMap::new();
    for (_, data) in recovered.data_after(&**disk, &state.log(), applied)? {
        let Some(closing) = closing_with_blobs(&data) else { continue };
        let transfers: Vec<_> = closing.uploads().map(|upload| upload.transfer).collect();
        needed.entry(closing.storage).or_default().extend(transfers);
    }
    let mut opened = BTreeMap::new();
    for section in &config.storages {
        let Some(dir) = &section.blob_dir else { continue };
        // As Python makes it: blobs are nobody else's business.
        disk.create_private_dir(dir)
            .with_context(|| format!("cannot make blob-dir {}", dir.display()))?;
        let blobs = BlobDir::open_checked(disk.clone(), dir, &state.blob_sums(&section.name))?;
        let removed =
            blobs.remove_staged_except(needed.get(&section.name).unwrap_or(&BTreeSet::new()))?;
        if removed > 0 {
            info!(dir = %dir.display(), removed, "removed uploads that were never committed");
        }
        opened.insert(section.name.clone(), blobs);
    }
    Ok(opened)
}

/// Python's index beside a link names positions in what the link points at, which a pack replaces.
pub fn forget_index_of_link(disk: &dyn Disk, link: &Path) -> anyhow::Result<()> {
    let index = PathBuf::from(format!("{}.index", link.display()));
    if disk.exists(&index)? {
        disk.remove(&index).with_context(|| format!("cannot remove {}", index.display()))?;
    }
    Ok(())
}

/// Opens a data file that no checkpoint knows; also returns its highest oid.
pub fn open_whole(
    place: &Place<'_>,
    section: &StorageSection,
) -> anyhow::Result<(FileStorage, Oid)> {
    let Place { disk, state, repairers, .. } = *place;
    let index = state.index(&section.name);
    if disk.exists(&index)? {
        disk.remove(&index)?;
    }
    open_storage(place, section, Extent::Whole, repairers.get(&section.name).cloned())
}

/// Opens a data file as far as it counts; also returns its highest oid.
pub fn open_storage(
    place: &Place<'_>,
    section: &StorageSection,
    extent: Extent,
    repair: Option<Repair>,
) -> anyhow::Result<(FileStorage, Oid)> {
    let Place { disk, state, .. } = *place;
    let path: &Path = &section.path;
    let mut shown = 0;
    let mut progress = |done: u64, total: u64| {
        let percent = done * 100 / total.max(1);
        if percent >= shown + 5 {
            shown = percent;
            info!(file = %path.display(), percent, "reading the data file to build its index");
        }
    };
    let index = state.index(&section.name);
    let (storage, opened) = FileStorage::open_repairing(
        disk.clone(),
        path,
        &index,
        Magic::Fs30,
        extent,
        repair,
        &mut progress,
    )?;
    if opened.created {
        info!(file = %path.display(), "made a new data file");
    }
    if let Some((len, _)) = opened.torn.as_ref().filter(|_| section.protected) {
        warn!(
            file = %path.display(), bytes = len,
            "the data file ends in a transaction that is not complete; it is not served"
        );
    } else if let Some((len, kept)) = &opened.torn {
        warn!(
            file = %path.display(), bytes = len, kept = %kept.display(),
            "the data file ended in a transaction that was never completed; it was cut off and kept"
        );
    }
    info!(
        file = %path.display(), last_tid = %storage.mark().tid, objects = storage.reader().len(),
        bytes = storage.reader().size(), "opened"
    );
    let highest = storage.reader().highest_oid().unwrap_or(Oid(0));
    Ok((storage, highest))
}
