//! A node that was there before: its data files count up to the checkpoint.

use std::collections::BTreeMap;

use anyhow::bail;
use standby_config::StorageSection;
use standby_consensus::{Command, LogWriter, Recovered};
use standby_filestorage::{Extent, Mark, Tail, take_meta};
use standby_types::{LogIndex, Mutation, Tid, mutation};
use tracing::{info, warn};

use crate::start::begin::begin;
use crate::start::open::{open_blobs, open_storage};
use crate::start::prepared::{Beginning, Prepared};
use crate::start::{Place, check_identity, damaged_log};
use crate::state_dir::{Checkpoint, Identity, StoragePoint, free_name};

/// Opens what a former run left; with `cuts`, what the data files hold beyond the checkpoint goes.
pub fn resume(
    place: &Place<'_>,
    identity: &Identity,
    mut checkpoint: Checkpoint,
    cuts: bool,
) -> anyhow::Result<Prepared> {
    let Place { config, disk, state, repairers, .. } = *place;
    check_identity(place, identity)?;
    let listed = |name: &String| config.storages.iter().any(|section| section.name == *name);
    let gone = checkpoint.storages.keys().find(|name| !listed(name));
    if let Some(name) = gone.filter(|_| config.standby.is_some()) {
        bail!(
            "{} has no section for storage {name:?}, which the cluster has and this node holds: \
             write it back (a member without one of the storages must not become primary)",
            config.file.display()
        );
    }
    let mut recovered = damaged_log::read(disk, state, &checkpoint)?;
    let interrupted = state.interrupted_catch_up(&**disk)?;
    let mut extents = Vec::new();
    for section in &config.storages {
        let index = checkpoint.index;
        let Some(point) = checkpoint.storages.get_mut(&section.name) else {
            bail!(
                "storage {:?} is new in {}; adding storages to a running cluster is not supported",
                section.name,
                config.file.display()
            );
        };
        let expected = logged_tids(place, &recovered, index, &section.name)?;
        match tail(place, section, point, expected, cuts || interrupted.is_some())? {
            Ok(_) if mutation::on(Mutation::SkipTruncation) => extents.push(Extent::Whole),
            Ok(again) => extents.push(Extent::UpTo { mark: point.mark, again }),
            Err(reason) => return adopt(place, identity, section, &reason),
        }
    }
    let mut storages = BTreeMap::new();
    for (section, extent) in config.storages.iter().zip(extents) {
        let repair = repairers.get(&section.name).cloned();
        let mut storage = open_storage(place, section, extent, repair)?.0;
        if let Some(point) = checkpoint.storages.get_mut(&section.name) {
            let dug = interrupted.as_ref().and_then(|holes| holes.get(&section.name));
            dug.iter().flat_map(|holes| holes.iter()).for_each(|hole| point.holes.add(*hole));
            storage.set_holes(point.holes.clone());
        }
        storages.insert(section.name.clone(), storage);
    }
    // After a catch-up, and in a new timeline, the log is to begin anew; perhaps it was interrupted
    // before it did. If the log goes on after the checkpoint's entry, it has.
    let begun = recovered.holds(checkpoint.index, checkpoint.term)
        && recovered.last_index() > checkpoint.index;
    let begins =
        (checkpoint.log_begins_here && !begun).then_some((checkpoint.index, checkpoint.term));
    let writer = LogWriter::open(disk.clone(), &state.log(), &mut recovered, begins)?;
    if checkpoint.log_begins_here || interrupted.is_some() {
        checkpoint.log_begins_here = false;
        state.set_checkpoint(&**disk, &checkpoint)?;
    }
    state.end_catching_up(&**disk)?;
    let id = identity.node_id()?;
    info!(node = %id, applied = %checkpoint.index, log_end = %recovered.last_index(), "resuming");
    let unconfirmed = false;
    let blobs = open_blobs(place, &recovered, checkpoint.index)?;
    Ok(Prepared { id, checkpoint, storages, blobs, recovered, writer, unconfirmed })
}

/// What a data file holds beyond the checkpoint: transactions that the log has too, and that will
/// be applied again; none if what is there `goes`. Or the reason for which the file is not the one
/// that Standby left.
fn tail(
    place: &Place<'_>,
    section: &StorageSection,
    point: &mut StoragePoint,
    mut expected: Vec<(LogIndex, Tid)>,
    goes: bool,
) -> anyhow::Result<Result<Vec<Mark>, String>> {
    let disk = &**place.disk;
    let mut found = Tail::read(disk, &section.path, point.mark)?;
    if let (Tail::Different(_), Some(packed)) = (&found, point.packed) {
        // The checkpoint was made just before a packed file took the place of the old one.
        found = Tail::read(disk, &section.path, packed)?;
        if matches!(found, Tail::Follows(_)) {
            point.mark = packed;
        }
    }
    point.packed = None;
    let found = match found {
        Tail::Different(reason) => return Ok(Err(reason)),
        Tail::Follows(_) if goes => return Ok(Ok(Vec::new())),
        Tail::Follows(found) => found,
    };
    // After a catch-up the data file is ahead of the entry that the checkpoint names.
    expected.retain(|(_, tid)| *tid > point.mark.tid);
    let skipped = place.state.skipped(disk)?;
    let is_skipped = |at: LogIndex| skipped.iter().any(|(index, _)| *index == at);
    let is_there = |tid: Tid| found.iter().any(|mark| mark.tid == tid);
    expected.retain(|(index, tid)| !is_skipped(*index) || is_there(*tid));
    let tid = |nth| expected.get(nth).map(|(_, tid)| *tid);
    let strange = |(nth, mark): &(usize, &Mark)| tid(*nth) != Some(mark.tid);
    if let Some((_, mark)) = found.iter().enumerate().find(strange) {
        return Ok(Err(format!("transaction {} is not in Standby's log", mark.tid)));
    }
    Ok(Ok(found))
}

/// The data file is not the one that Standby left. One node alone takes it as it is; a member of a
/// cluster must not.
fn adopt(
    place: &Place<'_>,
    identity: &Identity,
    section: &StorageSection,
    reason: &str,
) -> anyhow::Result<Prepared> {
    let Place { config, disk, state, .. } = *place;
    let path = section.path.display();
    if let Some(standby) = &config.standby {
        bail!(
            "{path} was changed by another program while this node was down ({reason}), so it is \
             not the cluster's history any more. To go on with the cluster's data: move {path} and \
             {} away, and start again; the node fetches everything from the others. To found the \
             cluster anew from this file: stop all nodes, remove the state directory of each, \
             keep this file on the first member ({}) only, and start that first",
            state.0.display(),
            standby.members.first().map_or("the one that founds", |first| &first.name),
        );
    }
    let kept = free_name(&**disk, &state.0, "replaced")?;
    warn!(
        file = %path, reason, kept = %kept.display(),
        "the data file was changed by another program while Standby was down; it is taken as it \
         is, and Standby's log of the time before is kept"
    );
    disk.rename(&state.0, &kept)?;
    begin(place, Some(identity.clone()), Beginning::Bootstrap)
}

/// The tids of a storage's transactions in the log after `applied`, in order. Of an entry that says
/// nothing whoever applies it tells.
fn logged_tids(
    place: &Place<'_>,
    recovered: &Recovered,
    applied: LogIndex,
    storage: &str,
) -> anyhow::Result<Vec<(LogIndex, Tid)>> {
    let Place { disk, state, .. } = *place;
    let mut tids = Vec::new();
    for (index, data) in recovered.data_after(&**disk, &state.log(), applied)? {
        if let Ok(Command::Transaction(closing)) = Command::decode(data)
            && closing.storage == storage
            && let Ok(meta) = take_meta(&mut closing.head.clone())
        {
            tids.push((index, meta.tid));
        }
    }
    Ok(tids)
}
