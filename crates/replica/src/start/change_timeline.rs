//! Coming over to another timeline: a node whose own is over gives up what is not in the other's
//! history, and keeps it in files of its own.
//!
//! ```text
//! DIR/lost-<timeline>-<tid>.fs      beside the data file: the transactions that were given up, the last of which
//!                                   is <tid>; a data file that Python's FileStorage opens
//! DIR/lost-<timeline>-<tid>.blobs/  their blobs
//! ```
//!
//! It happens at the node's start, in steps that may be repeated: the order `STATE-DIR/coming-over`
//! is there; the files of what is lost are durable; the checkpoint says how far the data file
//! counts; the data file and the log are cut; the order is removed. The node then is a follower
//! that lacks what the other timeline has.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use standby_consensus::Recovered;
use standby_filestorage::{
    BlobDir, Extent, FileStorage, Holes, Magic, Mark, Reader, StorageError, copy,
};
use standby_types::disk::{Open, parent, replace};
use standby_types::time::{tid_at, utc};
use standby_types::{Disk, LogIndex, Tid};
use tracing::{info, warn};

use crate::lineage::{Fork, Lineage};
use crate::lost_transactions::{LostTail, blobs_of, lost_path};
use crate::machine::Replica;
use crate::start::Place;
use crate::start::prepared::Prepared;
use crate::state_dir::{Checkpoint, StateDir, StoragePoint};

/// A timeline in words.
pub fn describe_fork(number: u64, fork: &Fork) -> String {
    let time = utc(tid_at(Duration::from_secs(fork.at)));
    format!("timeline {number}, {}, begun by {} at {time}", fork.id, fork.node)
}

/// Notes that this node is to rejoin on a timeline although it has gone on by itself. Returns
/// where that stands.
pub fn accept(disk: &dyn Disk, state: &StateDir, name: &str) -> anyhow::Result<PathBuf> {
    if state.checkpoint(disk)?.is_none() {
        bail!("{}: this node has never been a member of a cluster", state.0.display());
    }
    replace(disk, &state.accepted(), name.as_bytes())?;
    Ok(state.accepted())
}

/// Keeps what is not in the other history, and writes the checkpoint from which the node goes on in
/// it.
pub fn leave(place: &Place<'_>, prepared: Prepared, lineage: &Lineage) -> anyhow::Result<()> {
    let Place { config, disk, state, platform, .. } = *place;
    let own = prepared.checkpoint.settings.lineage.clone();
    let Prepared { checkpoint, storages, blobs, recovered, .. } = prepared;
    let spill_dir = state.0.clone();
    let make_spill = Arc::new(move || (platform.temporary_file)(&spill_dir));
    let replica = Replica::new(&checkpoint, storages, blobs.clone(), make_spill);
    let mut replica = replica.skipping(state.skipped(&**disk)?);
    let certain = apply_rest(place, &mut replica, &recovered, checkpoint.index)?;
    // The checkpoint will count on what has come from the log.
    replica.storages().try_for_each(|(_, storage)| storage.sync().map(drop))?;
    replica.blobs().try_for_each(BlobDir::sync)?;
    let mut points = BTreeMap::new();
    for section in &config.storages {
        let name = &section.name;
        let storage = replica.storage(name).context("a storage is missing")?;
        let reader = storage.reader();
        let common = own.common(lineage, name).last(&reader)?;
        if reader.last_tid() > common {
            let path = lost_path(config, section, own.timeline(), reader.last_tid());
            keep(disk, &reader, blobs.get(name), common, &path).with_context(|| {
                format!("cannot keep the lost transactions in {}", path.display())
            })?;
            let tail = LostTail::read(disk, &path, name, own.timeline())?;
            let LostTail { transactions, from, to, users, objects, .. } = tail;
            let (file, users) = (path.display(), users.join(", "));
            warn!(
                %file, transactions, from, to, users, objects,
                "transactions that only the former timeline had were kept in a file"
            );
        }
        let last = common.min(certain.get(name).copied().unwrap_or(Tid::NONE));
        let mark = mark_of(&reader, last)?;
        let mut holes = Holes::default();
        reader
            .holes()
            .iter()
            .filter(|hole| hole.through <= mark.tid)
            .for_each(|hole| holes.add(*hole));
        let before = checkpoint.storages.get(name);
        let ceiling = replica.ceilings().get(name).copied().unwrap_or_default();
        let point = StoragePoint {
            holes,
            backfill: before.is_some_and(|point| point.backfill),
            ..StoragePoint::of(mark, ceiling)
        };
        points.insert(name.clone(), point);
    }
    let mut settings = checkpoint.settings.clone();
    settings.lineage = lineage.clone();
    state.set_checkpoint(
        &**disk,
        &Checkpoint { settings, storages: points, ..checkpoint.without_log() },
    )?;
    Ok(())
}

/// Applies what the log has after the entry `applied`. Returns the last transaction of each storage
/// that is known to be committed: what follows may have been acknowledged too, and is kept, but it
/// does not count.
fn apply_rest(
    place: &Place<'_>,
    replica: &mut Replica,
    recovered: &Recovered,
    applied: LogIndex,
) -> anyhow::Result<BTreeMap<String, Tid>> {
    let mut certain = replica.last_tids();
    for entry in recovered.entries_after(&**place.disk, &place.state.log(), applied) {
        let entry = entry?;
        let committed = entry.point().0 <= recovered.commit_index();
        match replica.apply(&entry) {
            Ok(_) if committed => certain = replica.last_tids(),
            Ok(_) => {}
            Err(error) if committed => return Err(error.into()),
            Err(error) => {
                warn!(%error, "an entry of the log, perhaps never committed, cannot be kept");
                break;
            }
        }
    }
    Ok(certain)
}

/// Where the data file is to end so that `last` is its last transaction, or the one before; the
/// beginning if what was before has been changed in the light of what came after: packed, or left
/// out by a fast recovery.
fn mark_of(reader: &Reader, last: Tid) -> Result<Mark, StorageError> {
    let mut backwards = reader.backwards();
    let mut end = reader.mark().position;
    loop {
        let Some(stored) = backwards.step()? else { return Ok(Mark::START) };
        if stored.meta.tid <= last {
            let tid = stored.meta.tid;
            let torn = reader.holes().of(tid).is_some_and(|hole| hole.through > tid);
            return Ok(if torn { Mark::START } else { Mark { position: end, tid } });
        }
        if stored.meta.status == b'p' {
            return Ok(Mark::START);
        }
        end = stored.position;
    }
}

/// Writes the transactions after `common` into a file of their own, with their blobs.
fn keep(
    disk: &Arc<dyn Disk>,
    reader: &Reader,
    blobs: Option<&BlobDir>,
    common: Tid,
    path: &Path,
) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let written = FileStorage::successor(reader, &part).and_then(|mut kept| {
        kept.set_holes(Holes::default());
        copy(reader, &mut kept, common, Tid::MAX, &|_| Ok(()))?;
        kept.sync()
    });
    if written.is_err() {
        // The disk may be full: what has been written so far must not keep it so.
        let _ = disk.remove(&part);
    }
    written?;
    if let Some(blobs) = blobs {
        let mut dir = None;
        let mut transactions = reader.transactions(common.next(), Tid::MAX)?;
        while let Some(stored) = transactions.advance()? {
            for (oid, _) in reader.records_of(&stored)? {
                let tid = stored.meta.tid;
                if blobs.has(oid, tid)? {
                    let dir = match &dir {
                        Some(dir) => dir,
                        None => dir.insert(BlobDir::open(disk.clone(), &blobs_of(path))?),
                    };
                    dir.take_copy(blobs, oid, tid)?;
                }
            }
        }
        if let Some(dir) = dir {
            dir.sync()?;
        }
    }
    disk.rename(&part, path)?;
    disk.sync_dir(parent(path))?;
    Ok(())
}

/// Makes the disk what the new checkpoint says: the log is empty, the blobs of what is lost are
/// gone, and a data file that does not count at all is put aside.
pub fn cut(place: &Place<'_>, checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let Place { config, disk, state, .. } = *place;
    for path in disk.list(&state.log())? {
        disk.remove(&path)?;
    }
    disk.sync_dir(&state.log())?;
    for section in &config.storages {
        let Some(point) = checkpoint.storages.get(&section.name) else { continue };
        let index = state.index(&section.name);
        if disk.exists(&index)? {
            disk.remove(&index)?;
        }
        let path = &section.path;
        if point.mark == Mark::START {
            if disk.exists(path)? && disk.open(path, Open::Read)?.len()? > 4 {
                let timeline = checkpoint.settings.lineage.timeline();
                let aside = PathBuf::from(format!("{}.before-timeline-{timeline}", path.display()));
                disk.rename(path, &aside)?;
                disk.sync_dir(parent(path))?;
                warn!(
                    file = %aside.display(),
                    "the data file was packed, or recovered fast, after the timelines parted: it \
                     cannot be cut. It is put aside, and everything comes from the other nodes"
                );
            }
            FileStorage::open(
                disk.clone(),
                path,
                &index,
                Magic::Fs30,
                Extent::Whole,
                &mut |_, _| (),
            )?;
        }
        if let Some(dir) = &section.blob_dir
            && disk.exists(dir)?
        {
            let sums = state.blob_sums(&section.name);
            let blobs = BlobDir::open_checked(disk.clone(), dir, &sums)?;
            let removed = blobs.remove_after(point.mark.tid)?;
            info!(dir = %dir.display(), removed, "removed the blobs of lost transactions");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use standby_disk::OsDisk;
    use standby_filestorage::{Record, RecordData, Transaction, TransactionMeta};
    use standby_types::LogIndex;
    use standby_types::Oid;
    use standby_types::memory::MemoryDisk;

    use super::*;
    use crate::lineage::Departure;
    use crate::lost_transactions::{lost_tails, open_lost};
    use crate::start::ground::Ground;
    use crate::start::prepare;
    use crate::start::prepared::Beginning;

    const NODE: &str =
        "cluster c\nnode n1\ngroup g\npeer-address 127.0.0.1:1\nmember n1 127.0.0.1:1 g\n";

    fn add(storage: &mut FileStorage, tid: u64, data: &str) {
        let meta = TransactionMeta { user: "somebody".into(), ..TransactionMeta::new(Tid(tid)) };
        let data = RecordData::Data(format!("{data} {tid}").into());
        storage.append(&Transaction { meta, records: vec![Record { oid: Oid(1), data }] }).unwrap();
    }

    /// Begun by a node that has transactions up to `after`, and knows that those up to `certain`
    /// were committed.
    fn fork_of(id: &str, certain: u64, after: u64, last: &str) -> Fork {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
        let (path, index, whole) = (Path::new("/Data.fs"), Path::new("/index"), Extent::Whole);
        let opened = FileStorage::open(disk, path, index, Magic::Fs30, whole, &mut |_, _| ());
        let mut storage = opened.unwrap().0;
        for tid in (10..=after).step_by(10) {
            add(&mut storage, tid, if tid == after { last } else { "data" });
        }
        let departure = Departure::new(&storage.reader(), Tid(certain), Tid(after + 100)).unwrap();
        Fork::new(id.into(), "n9".into(), 0, [("1".to_owned(), departure)])
    }

    fn fork(id: &str, after: u64) -> Fork {
        fork_of(id, after, after, "data")
    }

    fn lineage(forks: &[(&str, u64)]) -> Lineage {
        let mut lineage = Lineage::default();
        forks.iter().for_each(|(id, after)| lineage.begin(fork(id, *after)));
        lineage
    }

    struct Node {
        _dir: tempfile::TempDir,
        ground: Ground,
    }

    impl Node {
        /// A node that has the transactions 10, 20 and 30, and is to rejoin on a timeline that
        /// has the first two.
        fn new() -> Node {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().display();
            let text = format!(
                "<zeo>\naddress localhost:8100\n</zeo>\n<filestorage>\npath \
                {path}/Data.fs\n</filestorage>\n\
                 <standby>\n{NODE}state-dir {path}/state\n</standby>\n"
            );
            let node = Node { _dir: dir, ground: Ground::new(Arc::new(OsDisk), &text) };
            let mut prepared = node.start();
            let storage = prepared.storages.get_mut("1").unwrap();
            for tid in [10, 20, 30] {
                add(storage, tid, "data");
            }
            let mark = storage.mark();
            let mut checkpoint = prepared.checkpoint;
            checkpoint.storages.get_mut("1").unwrap().mark = mark;
            node.ground.state.set_checkpoint(&*node.ground.disk, &checkpoint).unwrap();
            node.order(&lineage(&[("a", 20)]));
            node
        }

        fn start(&self) -> Prepared {
            prepare(&self.ground.place(), Beginning::Bootstrap).unwrap()
        }

        fn start_without_order(&self) -> Prepared {
            self.ground.state.end_rejoining(&*self.ground.disk).unwrap();
            self.start()
        }

        fn order(&self, lineage: &Lineage) {
            self.ground.state.set_rejoining(&*self.ground.disk, lineage).unwrap();
        }

        /// As the start does it, up to the new checkpoint.
        fn leave(&self) {
            let order = self.ground.state.rejoining(&*self.ground.disk).unwrap().unwrap();
            let prepared = self.start_without_order();
            self.order(&order);
            leave(&self.ground.place(), prepared, &order).unwrap();
        }

        fn checkpoint(&self) -> Checkpoint {
            self.ground.state.checkpoint(&*self.ground.disk).unwrap().unwrap()
        }

        /// The next start ends what was begun.
        fn check(&self, timeline: u64) {
            for _ in 0..2 {
                let prepared = self.start();
                assert_eq!(prepared.storages["1"].mark().tid, Tid(20));
                assert_eq!(prepared.checkpoint.settings.lineage.timeline(), timeline);
                assert_eq!(prepared.recovered.last_index(), LogIndex(0));
                assert_eq!(self.ground.state.rejoining(&*self.ground.disk).unwrap(), None);
            }
            let lost = lost_tails(&self.ground.config, &self.ground.disk).unwrap();
            let [tail] = &lost[..] else { panic!("{lost:?}") };
            assert_eq!((tail.transactions, tail.objects, tail.timeline), (1, 1, 1));
            assert_eq!(
                (&tail.first, &tail.users),
                (&Tid(30).to_string(), &vec!["somebody".into()])
            );
            assert!(tail.file.ends_with(format!("lost-1-{}.fs", Tid(30))));
            let kept = open_lost(&self.ground.disk, &tail.file).unwrap();
            assert_eq!(kept.last_tid(), Tid(30));
        }
    }

    #[test]
    fn a_lost_file_that_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lost-1-00.fs");
        let disk: Arc<dyn Disk> = Arc::new(OsDisk);
        assert!(open_lost(&disk, &file).is_err() && !file.exists());
    }

    #[test]
    fn a_node_comes_over() {
        Node::new().check(2);
    }

    /// Found by the model: the promoted node counted a transaction that had never been committed,
    /// and this one had another one with the same tid in its place.
    #[test]
    fn what_only_looks_like_the_other_history_is_lost() {
        let node = Node::new();
        let mut lineage = Lineage::default();
        lineage.begin(fork_of("a", 10, 20, "never committed"));
        node.order(&lineage);
        assert_eq!(node.start().storages["1"].mark().tid, Tid(10));
        let lost = lost_tails(&node.ground.config, &node.ground.disk).unwrap();
        assert_eq!((lost.len(), lost[0].transactions), (1, 2));
        assert_eq!((&lost[0].first, &lost[0].last), (&Tid(20).to_string(), &Tid(30).to_string()));
    }

    #[test]
    fn what_the_promoted_node_was_not_certain_of_may_be_the_same() {
        let node = Node::new();
        let mut lineage = Lineage::default();
        lineage.begin(fork_of("a", 0, 20, "data"));
        node.order(&lineage);
        node.check(2);
    }

    /// Found by a simulation: the new checkpoint named an end of the data file that was not
    /// durable.
    #[test]
    fn what_came_from_the_log_is_durable_before_the_checkpoint_counts_on_it() {
        let text = format!(
            "<zeo>\naddress localhost:8100\n</zeo>\n<filestorage>\npath /Data.fs\n</filestorage>\n\
             <standby>\n{NODE}state-dir /state\n</standby>\n"
        );
        let memory = MemoryDisk::new();
        let ground = Ground::new(Arc::new(memory.clone()), &text);
        let start = || prepare(&ground.place(), Beginning::Bootstrap).unwrap();
        let mut prepared = start();
        // As if the log had brought it.
        add(prepared.storages.get_mut("1").unwrap(), 10, "data");
        leave(&ground.place(), prepared, &lineage(&[("a", 10)])).unwrap();
        memory.crash();
        assert_eq!(start().storages["1"].mark().tid, Tid(10));
    }

    #[test]
    fn it_goes_on_after_a_crash_before_the_checkpoint() {
        let node = Node::new();
        let before = node.checkpoint();
        node.leave();
        node.ground.state.set_checkpoint(&*node.ground.disk, &before).unwrap();
        node.check(2);
    }

    #[test]
    fn it_goes_on_after_a_crash_before_and_after_the_cut() {
        let node = Node::new();
        node.leave();
        node.check(2);
        let node = Node::new();
        node.leave();
        cut(&node.ground.place(), &node.checkpoint()).unwrap();
        node.check(2);
    }

    #[test]
    fn another_promotion_may_come_in_between() {
        let node = Node::new();
        node.leave();
        node.order(&lineage(&[("a", 20), ("b", 500)]));
        node.check(3);
    }

    #[test]
    fn what_was_packed_cannot_be_cut() {
        let node = Node::new();
        let mut prepared = node.start_without_order();
        let storage = prepared.storages.get_mut("1").unwrap();
        assert_eq!(mark_of(&storage.reader(), Tid(25)).unwrap().tid, Tid(20));
        assert_eq!(mark_of(&storage.reader(), Tid(30)).unwrap(), storage.mark());
        assert_eq!(mark_of(&storage.reader(), Tid(5)).unwrap(), Mark::START);
        let meta = TransactionMeta { status: b'p', ..TransactionMeta::new(Tid(40)) };
        storage.append(&Transaction { meta, records: Vec::new() }).unwrap();
        assert_eq!(mark_of(&storage.reader(), Tid(25)).unwrap(), Mark::START);
        assert_eq!(mark_of(&storage.reader(), Tid(40)).unwrap(), storage.mark());
    }
}
