//! From what is on disk to a node that can run.
//!
//! ```text
//!  state directory   <standby>                       the node
//!  ───────────────   ─────────────────────────────   ─────────────────────────────────────────────
//!  has a checkpoint  any                             resumes: the data files count up to the
//!                                                    checkpoint; the log says what comes after
//!  log is damaged    a majority without it           puts it aside and joins anew, with the data file up to
//!                                                    the checkpoint (`damaged_log.rs`)
//!  has an order to   any                             keeps what only its own timeline has, then resumes
//!  come over                                         with what the other one has too (`change_timeline.rs`)
//!  new               none                            founds a cluster of one
//!  new               the only member                 founds the cluster
//!  new               otherwise                       joins: empty, or with a data file that must be
//!                                                    the beginning of the cluster's history
//!  `founds`          first member                    founds the cluster: a majority of the members has
//!                                                    promised itself (`founding.rs`)
//!  `rolled-back`     a majority without it           as with a damaged log: what it had promised is lost
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use standby_consensus::{
    Command, LogWriter, Member, Membership, Recovered, ending_with_blobs, recover,
};
use standby_filestorage::{
    BlobDir, Extent, FileStorage, LostBlock, Magic, Mark, Mend, StorageError, Tail, take_meta,
};
use standby_types::{Disk, LogIndex, Mutation, NodeId, Oid, Term, Tid, Transfer, mutation};
use tracing::{info, warn};

use crate::config::{Config, StorageSection};
use crate::platform;
use crate::platform::error_text::with_causes;
use crate::platform::hex::random_hex;
use crate::replica::change_timeline;
use crate::replica::damaged_log::{self, LostLog};
use crate::replica::lineage::Relation;
use crate::replica::prepared::{Beginning, Menders, Prepared};
use crate::replica::settings::Settings;
use crate::replica::state_dir::{
    Checkpoint, DamagedFile, Identity, Note, StateDir, StoragePoint, free_name,
};

/// Opens everything. `beginning` matters only for a new node.
pub fn prepare(
    config: &Config,
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    beginning: Beginning,
    menders: &Menders,
) -> anyhow::Result<Prepared> {
    let founds = state.note(&**disk, Note::Founds)?.is_some();
    match (state.identity(&**disk)?, state.checkpoint(&**disk)?) {
        (Some(identity), Some(checkpoint)) if founds && checkpoint.is_blank() => {
            begin(config, disk, state, menders, Some(identity), Beginning::Found)
        }
        (Some(mut identity), Some(mut checkpoint)) => {
            state.end_note(&**disk, Note::Founds)?;
            if let Some(reason) = state.note(&**disk, Note::RolledBack)? {
                // Without members it has begun anew already, and was interrupted.
                if !checkpoint.membership.members.is_empty() {
                    let lost = LostLog::because(reason);
                    (identity, checkpoint) =
                        damaged_log::begin_anew(config, disk, state, &identity, checkpoint, &lost)?;
                }
                state.end_note(&**disk, Note::RolledBack)?;
            }
            let resume = |identity: &Identity, checkpoint, cuts| {
                resume(config, disk, state, menders, identity, checkpoint, cuts)
            };
            let Some(lineage) = state.coming_over(&**disk)? else {
                let error = match resume(&identity, checkpoint.clone(), false) {
                    Err(error) => error,
                    prepared => return prepared,
                };
                let lost = error.downcast::<LostLog>()?;
                let (identity, checkpoint) =
                    damaged_log::begin_anew(config, disk, state, &identity, checkpoint, &lost)?;
                return resume(&identity, checkpoint, false);
            };
            // Another promotion may have come before this node had come over to the last one.
            if checkpoint.has_left() {
                change_timeline::cut(config, disk, state, &checkpoint)?;
            }
            let own = &checkpoint.settings.lineage;
            if own.relation(&lineage) != Relation::Same {
                let cuts = checkpoint.has_left();
                // What is lost may be what only the former timeline has: nothing is thrown away.
                let prepared = resume(&identity, checkpoint, cuts).map_err(|error| match error
                    .downcast::<LostLog>(
                ) {
                    Ok(lost) => anyhow!(
                        "{lost}. This node is to come over to the others' timeline, and cannot \
                             say what only its own has. {}",
                        damaged_log::advice(state)
                    ),
                    Err(error) => error,
                })?;
                change_timeline::leave(config, disk, state, prepared, &lineage)?;
            }
            let checkpoint = state.checkpoint(&**disk)?.context("the checkpoint is gone")?;
            change_timeline::cut(config, disk, state, &checkpoint)?;
            let prepared = resume(&identity, checkpoint, true)?;
            state.end_coming_over(&**disk)?;
            Ok(prepared)
        }
        (identity, _) => begin(config, disk, state, menders, identity, beginning),
    }
}

/// Opens the directories of blobs. What was staged there by a former run goes, except what entries
/// of the log after `applied` name.
fn open_blobs(
    config: &Config,
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    recovered: &Recovered,
    applied: LogIndex,
) -> anyhow::Result<BTreeMap<String, BlobDir>> {
    let mut needed: BTreeMap<String, BTreeSet<Transfer>> = BTreeMap::new();
    for (_, data) in recovered.data_after(&**disk, &state.log(), applied)? {
        let Some(ending) = ending_with_blobs(&data) else { continue };
        let transfers: Vec<_> = ending.uploads().map(|upload| upload.transfer).collect();
        needed.entry(ending.storage).or_default().extend(transfers);
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

fn begin(
    config: &Config,
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    menders: &Menders,
    identity: Option<Identity>,
    beginning: Beginning,
) -> anyhow::Result<Prepared> {
    let identity = match identity {
        Some(identity) => identity,
        None => Identity {
            id: random_hex(8)?,
            node: config.standby.as_ref().map_or("alone".into(), |s| s.node.clone()),
            cluster: config.standby.as_ref().map_or("alone".into(), |s| s.cluster.clone()),
        },
    };
    check_identity(config, state, &identity)?;
    state.set_identity(&**disk, &identity)?;
    // A log without a checkpoint is what an interrupted beginning left.
    for path in disk.list(&state.log())? {
        disk.remove(&path)?;
    }
    let id = identity.node_id()?;
    let mut storages = BTreeMap::new();
    let mut points = BTreeMap::new();
    let mut unconfirmed = false;
    for section in &config.storages {
        let (storage, ceiling) = open_whole(disk, state, section, menders)?;
        unconfirmed |= storage.mark() != Mark::START;
        let mark = storage.mark();
        points.insert(section.name.clone(), StoragePoint::of(mark, ceiling));
        storages.insert(section.name.clone(), storage);
    }
    let found = beginning == Beginning::Found;
    let now = platform::wall_clock().as_secs();
    let mut recovered = recover(disk, &state.log())?;
    // A new cluster's log begins after an entry that never was, so that every other node gets
    // what this one has by catching up.
    let start = if found { (LogIndex(1), Term(1)) } else { (LogIndex(0), Term(0)) };
    let writer = LogWriter::open(disk.clone(), &state.log(), &mut recovered, Some(start))?;
    let me = self_as_member(config, id);
    let checkpoint = Checkpoint {
        settings: match found {
            true => Settings { founded: now, ..Settings::founded_in(&me.group) },
            false => Settings::default(),
        },
        acknowledged: BTreeMap::new(),
        cluster_id: if found { random_hex(16)? } else { String::new() },
        index: start.0,
        term: start.1,
        log_begins_here: false,
        membership: if found { Membership::founded_by(me) } else { Membership::default() },
        storages: points,
    };
    state.set_checkpoint(&**disk, &checkpoint)?;
    if found {
        info!(node = %id, cluster = %checkpoint.cluster_id, "founded a cluster");
    }
    let unconfirmed = unconfirmed && !found;
    let blobs = open_blobs(config, disk, state, &recovered, checkpoint.index)?;
    Ok(Prepared { id, checkpoint, storages, blobs, recovered, writer, unconfirmed })
}

/// Says what a person can do about a file that a start must read and cannot: what has no checksum,
/// or is needed before the other nodes can be asked, is not mended.
pub fn explain(error: anyhow::Error, config: &Config) -> anyhow::Error {
    let state = StateDir(config.state_dir());
    let io_errors = || error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    let eio = Some(rustix::io::Errno::IO.raw_os_error());
    let lost_block = io_errors().any(LostBlock::is_cause);
    let in_state = error.chain().any(|cause| cause.is::<DamagedFile>());
    let in_data = error
        .chain()
        .any(|cause| matches!(cause.downcast_ref(), Some(StorageError::Damaged { .. })));
    if !in_state && !in_data && !lost_block && !io_errors().any(|e| e.raw_os_error() == eio) {
        return error;
    }
    let advice = match &config.standby {
        Some(_) if lost_block => format!(
            "Start the other nodes first: this one asks them for these bytes. If they do not have \
            them: {}",
            damaged_log::advice(&state)
        ),
        Some(_) => damaged_log::advice(&state),
        None if in_state => damaged_log::advice_to_one_alone(&state),
        None => "Restore the file from a backup, or get out of it what can be read, with \
                 python -m ZODB.fsrecover"
            .to_owned(),
    };
    anyhow!("{}. {advice}", with_causes(&error))
}

/// Opens what a former run left; with `cuts`, what the data files hold beyond the checkpoint goes.
fn resume(
    config: &Config,
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    menders: &Menders,
    identity: &Identity,
    mut checkpoint: Checkpoint,
    cuts: bool,
) -> anyhow::Result<Prepared> {
    check_identity(config, state, identity)?;
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
    let skipped = state.skipped(&**disk)?;
    let is_skipped = |at: LogIndex| skipped.iter().any(|(index, _)| *index == at);
    let mut extents = Vec::new();
    for section in &config.storages {
        let Some(point) = checkpoint.storages.get_mut(&section.name) else {
            bail!(
                "storage {:?} is new in {}; adding storages to a running cluster is not supported",
                section.name,
                config.file.display()
            );
        };
        let mut expected = logged_tids(disk, state, &recovered, checkpoint.index, &section.name)?;
        let mut found = Tail::read(&**disk, &section.path, point.mark)?;
        if let (Tail::Different(_), Some(packed)) = (&found, point.packed) {
            // The checkpoint was made just before a packed file took the place of the old one.
            found = Tail::read(&**disk, &section.path, packed)?;
            if matches!(found, Tail::Follows(_)) {
                point.mark = packed;
            }
        }
        point.packed = None;
        // After a catch-up the data file is ahead of the entry that the checkpoint names.
        expected.retain(|(_, tid)| *tid > point.mark.tid);
        if let Tail::Follows(found) = &found {
            let is_there = |tid: Tid| found.iter().any(|mark| mark.tid == tid);
            expected.retain(|(index, tid)| !is_skipped(*index) || is_there(*tid));
        }
        let tail = match found {
            Tail::Different(reason) => Err(reason),
            Tail::Follows(_) if cuts || interrupted.is_some() => Ok(Vec::new()),
            Tail::Follows(found) => {
                let tid = |nth| expected.get(nth).map(|(_, tid)| *tid);
                let strange = |(nth, mark): &(usize, &Mark)| tid(*nth) != Some(mark.tid);
                match found.iter().enumerate().find(strange) {
                    Some((_, mark)) => {
                        Err(format!("transaction {} is not in Standby's log", mark.tid))
                    }
                    None => Ok(found),
                }
            }
        };
        match tail {
            Ok(_) if mutation::on(Mutation::SkipTruncation) => extents.push(Extent::Whole),
            Ok(again) => extents.push(Extent::UpTo { mark: point.mark, again }),
            Err(reason) => {
                return adopt((config, menders), disk, state, identity, section, &reason);
            }
        }
    }
    let mut storages = BTreeMap::new();
    for (section, extent) in config.storages.iter().zip(extents) {
        let mend = menders.get(&section.name).cloned();
        let mut storage = open_storage(disk, state, section, extent, mend)?.0;
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
    let blobs = open_blobs(config, disk, state, &recovered, checkpoint.index)?;
    Ok(Prepared { id, checkpoint, storages, blobs, recovered, writer, unconfirmed })
}

/// The data file is not the one that Standby left. One node alone takes it as it is; a member of a
/// cluster must not.
fn adopt(
    (config, menders): (&Config, &Menders),
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    identity: &Identity,
    section: &StorageSection,
    reason: &str,
) -> anyhow::Result<Prepared> {
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
    begin(config, disk, state, menders, Some(identity.clone()), Beginning::Found)
}

/// The tids of a storage's transactions in the log after `applied`, in order. Of an entry that says
/// nothing whoever applies it tells.
fn logged_tids(
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    recovered: &Recovered,
    applied: LogIndex,
    storage: &str,
) -> anyhow::Result<Vec<(LogIndex, Tid)>> {
    let mut tids = Vec::new();
    for (index, data) in recovered.data_after(&**disk, &state.log(), applied)? {
        if let Ok(Command::Transaction(ending)) = Command::decode(data)
            && ending.storage == storage
            && let Ok(meta) = take_meta(&mut ending.head.clone())
        {
            tids.push((index, meta.tid));
        }
    }
    Ok(tids)
}

fn check_identity(config: &Config, state: &StateDir, identity: &Identity) -> anyhow::Result<()> {
    let Some(standby) = &config.standby else { return Ok(()) };
    if identity.node != standby.node || identity.cluster != standby.cluster {
        bail!(
            "{} belongs to node {} of cluster {}, not to node {} of cluster {}: each node needs a \
             state-dir of its own",
            state.0.display(),
            identity.node,
            identity.cluster,
            standby.node,
            standby.cluster
        );
    }
    Ok(())
}

/// This node as the others will know it.
pub fn self_as_member(config: &Config, id: NodeId) -> Member {
    match &config.standby {
        Some(standby) => Member {
            id,
            name: standby.node.clone(),
            group: standby.group.clone(),
            peer_address: standby.peer_address.to_string(),
            witness: standby.witness,
        },
        None => Member {
            id,
            name: "alone".into(),
            group: "alone".into(),
            peer_address: String::new(),
            witness: false,
        },
    }
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
fn open_whole(
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    section: &StorageSection,
    menders: &Menders,
) -> anyhow::Result<(FileStorage, Oid)> {
    let index = state.index(&section.name);
    if disk.exists(&index)? {
        disk.remove(&index)?;
    }
    open_storage(disk, state, section, Extent::Whole, menders.get(&section.name).cloned())
}

fn open_storage(
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    section: &StorageSection,
    extent: Extent,
    mend: Option<Mend>,
) -> anyhow::Result<(FileStorage, Oid)> {
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
    let (storage, opened) = FileStorage::open_mending(
        disk.clone(),
        path,
        &index,
        Magic::Fs30,
        extent,
        mend,
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use standby_filestorage::{BLOCK, Record, RecordData, Transaction, TransactionMeta};
    use standby_types::disk::Open;
    use standby_types::memory::MemoryDisk;

    use super::*;

    /// Found by a simulation: until its first restart a node could not mend anything.
    #[test]
    fn row_28_a_new_node_mends_its_file_too() {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
        let text =
            "<zeo>\n address 127.0.0.1:1\n</zeo>\n<filestorage>\n path /Data.fs\n</filestorage>\n";
        let config = Config::parse(Path::new("/zeo.conf"), text).unwrap();
        let state = StateDir(config.state_dir());
        let asked = Arc::new(AtomicUsize::new(0));
        let (times, shared) = (asked.clone(), disk.clone());
        let mend: Mend = Arc::new(move |block| {
            times.fetch_add(1, Ordering::Relaxed);
            let mut bytes = vec![0; BLOCK as usize];
            let file = shared.open(Path::new("/intact"), Open::Read).ok()?;
            file.read_at(&mut bytes, block.offset).ok()?;
            Some(bytes)
        });
        let menders = BTreeMap::from([("1".to_owned(), mend)]);
        let prepared = prepare(&config, &disk, &state, Beginning::Found, &menders).unwrap();
        let mut storages = prepared.storages;
        let storage = storages.get_mut("1").unwrap();
        let meta = TransactionMeta::new(Tid(10));
        let data = RecordData::Data(vec![7; 3 * BLOCK as usize].into());
        let records = vec![Record { oid: Oid(1), data }];
        storage.append(&Transaction { meta, records }).unwrap();
        storage.sync().unwrap();
        let reader = storage.reader();
        reader.note_durable(storage.mark());
        reader.take_sums(9).unwrap();
        let file = disk.open(Path::new("/Data.fs"), Open::Write).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        disk.open(Path::new("/intact"), Open::Create).unwrap().write_at(&bytes, 0).unwrap();
        file.write_at(b"?", BLOCK + 5).unwrap();
        reader.scrub(0..3).unwrap();
        assert_eq!((asked.load(Ordering::Relaxed), reader.damage().blocks.len()), (1, 0));
    }
}
