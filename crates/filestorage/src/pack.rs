//! Packing: a new file without what nobody needs any more. Source of the rules:
//! `ZODB/FileStorage/fspack.py`.
//!
//! Up to the pack time, only revisions that were current then are kept, and with garbage collection
//! only of objects that can be reached from the root, or from what was committed later. (fspack
//! looks at later transactions only where they point back; to follow all of them costs little, and
//! never leaves a reference without an object.) What is committed later is copied as it is. The
//! packed part has no back pointers, and its records no predecessors.
//!
//! A record whose references cannot be told stops the pack, but for one that was committed later
//! and that nothing refers to. Beside that there is a net ([`Removed::check`]): before the new file
//! is put in place, nothing in it may refer to what was removed; also what was committed while the
//! pack was under way.
//!
//! [`pack`] does nearly all of the work beside commits, on a thread of its own; then the writer
//! of the storage copies what is left ([`copy_rest`]) and puts the new file in place
//! ([`FileStorage::replace_with`]).
//!
//! The moments within a hole ([`crate::Hole`]) cannot be seen, so what was current or could be
//! reached then is not known: a pack to one of them packs to the beginning of the hole.
//!
//! Memory: 16 bytes for each object and a bit, twice that while the file is scanned.

use std::path::Path;

use standby_types::{Oid, Position, Tid};

use crate::error::{StorageError, Unreadable};
use crate::file::format::{DATA_HEADER, DataHeader, UNDONE};
use crate::file::iterate::shared_data;
use crate::file::mark::Mark;
use crate::file::open::FileStorage;
use crate::file::read::{Access, Reader};
use crate::file::scan::Window;
use crate::file::transaction::{Record, RecordData};
use crate::room::{Need, Room};

/// What is to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Revisions that were not current at this time go.
    pub time: Tid,
    /// Objects that cannot be reached from the root go.
    pub gc: bool,
}

/// What a pack has come to.
pub enum Outcome {
    /// There is nothing to remove; the new file is gone again.
    Nothing,
    /// The new file, durable as far as it goes: up to the transaction `last` of the old one, which
    /// need not be in it.
    Packed(Packed),
}

/// A new file that is nearly complete.
pub struct Packed {
    /// The new file.
    pub target: FileStorage,
    /// The last transaction that was looked at.
    pub last: Tid,
    /// The objects that are not in it.
    pub removed: Removed,
    /// Records committed after the pack time whose references cannot be told. Nothing refers to
    /// their objects.
    pub unreadable: Vec<Unreadable>,
}

impl Packed {
    /// A new file from which nothing was removed.
    pub fn whole(target: FileStorage, last: Tid) -> Packed {
        Packed { target, last, removed: Removed::default(), unreadable: Vec::new() }
    }
}

/// The objects that a pack has removed as garbage.
#[derive(Debug, Default)]
pub struct Removed(Vec<Oid>);

impl Removed {
    /// Looks at what the new file has of the transactions after `after`: nothing there may refer to
    /// an object that was removed (and was not brought back since).
    pub fn check(
        &self,
        target: &Reader,
        after: Tid,
        references: References<'_>,
    ) -> Result<(), StorageError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut transactions = target.transactions(after.next(), Tid::MAX)?;
        while let Some(stored) = transactions.advance_past_undone()? {
            for (from, position) in target.records_of(&stored)? {
                let mut gone = None;
                let seen = refer(target, from, position, references, &mut |to| {
                    if self.0.binary_search(&to).is_ok()
                        && target.shared.read().index.get(to).is_none()
                    {
                        gone = Some(to);
                    }
                });
                match (seen, gone) {
                    // Whether that matters was told when the pack was planned.
                    (Ok(()) | Err(StorageError::References { .. }), None) => {}
                    (Err(error), None) => return Err(error),
                    (_, Some(to)) => {
                        let (path, tid) = (target.shared.path.clone(), stored.meta.tid);
                        return Err(StorageError::StillReferred { path, from, tid, to });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Finds the references of a record's data; an error is the reason why it cannot be read.
pub type References<'a> = &'a dyn Fn(&[u8], &mut dyn FnMut(Oid)) -> Result<(), String>;

/// Remaining bytes that [`copy_most`] leaves to [`copy_rest`].
const REST: u64 = 1 << 20;

/// Packs what `reader` reads into a new file `to`. `progress(done, total)` is called now and then,
/// in bytes. `room` is asked before anything is written, and before each transaction.
pub fn pack(
    reader: &Reader,
    job: Job,
    to: &Path,
    references: References<'_>,
    room: Room<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Outcome, StorageError> {
    let job = match reader.hole_of(job.time) {
        Some(hole) if job.time < hole.through => Job { time: hole.after, ..job },
        _ => job,
    };
    let total = reader.size() * 2;
    let mut plan = Plan::make(reader, job, &mut |done| progress(done, total))?;
    if plan.redundant {
        return Ok(Outcome::Nothing);
    }
    if job.gc {
        plan.reach(reader, references)?;
    } else {
        plan.reached = vec![true; plan.current.len()];
    }
    room(Need::All(plan.needed(reader)?)).map_err(StorageError::io(to, "write"))?;
    let mut target = FileStorage::successor(reader, to)?;
    let mut holes = reader.holes();
    holes.packed(job.time);
    target.set_holes(holes);
    plan.copy(reader, &mut target, room, &mut |done| progress(total / 2 + done, total))?;
    if target.mark().position == plan.end {
        drop(target);
        let io = |action| StorageError::io(to, action);
        reader.shared.disk.remove(to).map_err(io("remove"))?;
        return Ok(Outcome::Nothing);
    }
    let last = copy_most(reader, &mut target, plan.last, room)?;
    let removed = plan.removed();
    removed.check(&target.reader(), Tid::NONE, references)?;
    Ok(Outcome::Packed(Packed { target, last, removed, unreadable: plan.unreadable }))
}

/// Copies the transactions after `last` into a new file while more are committed, until little is
/// left to [`copy_rest`]; what is copied is durable then. Returns the last one.
pub fn copy_most(
    reader: &Reader,
    target: &mut FileStorage,
    last: Tid,
    room: Room<'_>,
) -> Result<Tid, StorageError> {
    let mut last = last;
    loop {
        last = copy(reader, target, last, Tid::MAX, room)?;
        target.sync()?;
        if reader.transactions(last.next(), Tid::MAX)?.bytes_left() < REST {
            return Ok(last);
        }
    }
}

/// Copies the transactions after `last` into a new file; returns the last one.
pub fn copy_rest(
    reader: &Reader,
    target: &mut FileStorage,
    last: Tid,
) -> Result<Tid, StorageError> {
    copy(reader, target, last, Tid::MAX, &|_| Ok(()))
}

/// Copies the transactions after `after` up to `through` into a new file; returns the last one.
pub fn copy(
    reader: &Reader,
    target: &mut FileStorage,
    after: Tid,
    through: Tid,
    room: Room<'_>,
) -> Result<Tid, StorageError> {
    let mut last = after;
    let mut transactions = reader.transactions(after.next(), through)?;
    while let Some(stored) = transactions.advance()? {
        room(Need::Next).map_err(StorageError::io(&target.shared.path, "write"))?;
        let mut appender = target.begin(&stored.meta)?;
        transactions.records(&stored, |record| appender.record(&record))?;
        appender.finish()?;
        last = stored.meta.tid;
    }
    Ok(last)
}

/// What a pack keeps of the file up to the pack time.
struct Plan {
    /// The objects that existed at the pack time, with their records of then; by oid.
    current: Vec<(Oid, Position)>,
    /// Which of them can be reached.
    reached: Vec<bool>,
    /// The end of the last transaction at or before the pack time.
    end: Position,
    last: Tid,
    /// Later records whose references cannot be told, and do not matter.
    unreadable: Vec<Unreadable>,
    /// The file is packed already, to this time or a later one.
    redundant: bool,
}

impl Plan {
    fn make(
        reader: &Reader,
        job: Job,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Plan, StorageError> {
        let mut window = Window::new(&reader.shared.path, reader.shared.file.clone());
        let end = reader.size();
        let mut plan = Plan {
            current: Vec::new(),
            reached: Vec::new(),
            end: Mark::START.position,
            last: Tid::NONE,
            unreadable: Vec::new(),
            redundant: false,
        };
        let (mut unpacked, mut compact_at) = (false, 1 << 16);
        let mut at = Mark::START.position.0;
        let mut told = at;
        while at < end {
            let Some(header) = window.txn_header(at)? else {
                return window.damaged(at, "a transaction is cut off");
            };
            let before = header.tid <= job.time;
            if before {
                unpacked |= header.status != b'p';
                plan.last = header.tid;
            } else if plan.end.0 == at && !unpacked && header.status == b'p' {
                plan.redundant = true;
                return Ok(plan);
            }
            let next = at.saturating_add(header.length).saturating_add(8);
            let mut record_at = at + header.full_len();
            while record_at < next - 8 {
                let record = match window.data_header(record_at)? {
                    Some(record) if record_at.saturating_add(record.full_len()) <= next - 8 => {
                        record
                    }
                    _ => return window.damaged(record_at, "a data record is cut off"),
                };
                if before && header.status != UNDONE {
                    let back = back_of(&mut window, &record, record_at)?;
                    // Position 0: gone.
                    let kept = if record.data_len > 0 || back > 0 { record_at } else { 0 };
                    plan.current.push((record.oid, Position(kept)));
                }
                record_at += record.full_len();
            }
            at = next;
            if before {
                plan.end = Position(at);
            }
            if plan.current.len() > compact_at {
                compact(&mut plan.current);
                compact_at = plan.current.len() * 2 + (1 << 16);
            }
            if at - told > 64 << 20 {
                told = at;
                progress(at);
            }
        }
        compact(&mut plan.current);
        plan.current.retain(|(_, position)| *position != Position(0));
        Ok(plan)
    }

    fn place(&self, oid: Oid) -> Option<usize> {
        self.current.binary_search_by_key(&oid, |(oid, _)| *oid).ok()
    }

    /// Marks what can be reached from the root, and from all that was committed later: an undo
    /// brings back references to what was garbage at the pack time.
    fn reach(&mut self, reader: &Reader, references: References<'_>) -> Result<(), StorageError> {
        self.reached = vec![false; self.current.len()];
        self.reach_from(reader, references, vec![Oid(0)])?;
        let mut later = reader.transactions(self.last.next(), Tid::MAX)?;
        while let Some(stored) = later.advance_past_undone()? {
            for (oid, position) in reader.records_of(&stored)? {
                let mut todo = Vec::new();
                match refer(reader, oid, position, references, &mut |oid| todo.push(oid)) {
                    Ok(()) => self.reach_from(reader, references, todo)?,
                    Err(StorageError::References { record, .. }) => self.unreadable.push(record),
                    Err(error) => return Err(error),
                }
            }
        }
        self.check_unreadable(reader, references)
    }

    /// A later record whose references cannot be told is an error if anything refers to its object.
    fn check_unreadable(
        &self,
        reader: &Reader,
        references: References<'_>,
    ) -> Result<(), StorageError> {
        if self.unreadable.is_empty() {
            return Ok(());
        }
        let mut matters = self.unreadable.iter().find(|record| record.oid == Oid(0));
        let mut look = |oid, position| {
            let found = refer(reader, oid, position, references, &mut |to| {
                let here = |record: &&Unreadable| record.oid == to && to != oid;
                matters = matters.or_else(|| self.unreadable.iter().find(here));
            });
            match found {
                Err(StorageError::References { .. }) => Ok(()),
                other => other,
            }
        };
        let kept = self.current.iter().zip(&self.reached).filter(|(_, reached)| **reached);
        for ((oid, position), _) in kept {
            look(*oid, *position)?;
        }
        let mut later = reader.transactions(self.last.next(), Tid::MAX)?;
        while let Some(stored) = later.advance()? {
            for (oid, position) in reader.records_of(&stored)? {
                look(oid, position)?;
            }
        }
        match matters {
            None => Ok(()),
            Some(record) => Err(StorageError::References {
                path: reader.shared.path.clone(),
                record: record.clone(),
            }),
        }
    }

    /// What existed at the pack time and cannot be reached.
    fn removed(&self) -> Removed {
        let all = self.current.iter().zip(&self.reached);
        Removed(all.filter(|(_, reached)| !**reached).map(|((oid, _), _)| *oid).collect())
    }

    fn reach_from(
        &mut self,
        reader: &Reader,
        references: References<'_>,
        mut todo: Vec<Oid>,
    ) -> Result<(), StorageError> {
        while let Some(oid) = todo.pop() {
            // A reference to an object that does not exist: not the pack's business.
            let Some(place) = self.place(oid) else { continue };
            if std::mem::replace(&mut self.reached[place], true) {
                continue;
            }
            let position = self.current[place].1;
            refer(reader, oid, position, references, &mut |oid| {
                if self.place(oid).is_some_and(|place| !self.reached[place]) {
                    todo.push(oid);
                }
            })?;
        }
        Ok(())
    }

    fn keeps(&self, oid: Oid, position: Position) -> bool {
        self.place(oid)
            .is_some_and(|place| self.reached[place] && self.current[place].1 == position)
    }

    /// Bytes that the new file takes: what is kept, and what was committed later.
    fn needed(&self, reader: &Reader) -> Result<u64, StorageError> {
        let mut transactions = reader.transactions(Tid::NONE, self.last)?;
        let mut window = Window::new(&reader.shared.path, reader.shared.file.clone());
        let mut needed = Mark::START.position.0 + reader.size().saturating_sub(self.end.0);
        while let Some(stored) = transactions.advance()? {
            let mut kept = 0;
            for (oid, position) in reader.records_of(&stored)? {
                if self.keeps(oid, position) {
                    kept += match window.data_header(position.0)? {
                        Some(header) if header.data_len > 0 => header.full_len(),
                        // The packed file has no back pointers.
                        _ => {
                            let data = data_at(&mut window, oid, position)?;
                            DATA_HEADER + data.map_or(8, |data| data.len() as u64)
                        }
                    };
                }
            }
            if kept > 0 {
                needed += kept + stored.overhead();
            }
        }
        Ok(needed)
    }

    /// Copies what is kept.
    fn copy(
        &self,
        reader: &Reader,
        target: &mut FileStorage,
        room: Room<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), StorageError> {
        let mut transactions = reader.transactions(Tid::NONE, self.last)?;
        let mut window = Window::new(&reader.shared.path, reader.shared.file.clone());
        let mut told = 0;
        while let Some(stored) = transactions.advance()? {
            let mut kept = reader.records_of(&stored)?;
            kept.retain(|(oid, position)| self.keeps(*oid, *position));
            if !kept.is_empty() {
                room(Need::Next).map_err(StorageError::io(&target.shared.path, "write"))?;
                let mut meta = stored.meta.clone();
                meta.status = b'p';
                let mut appender = target.begin_packed(&meta)?;
                for (oid, position) in kept {
                    let data = match data_at(&mut window, oid, position)? {
                        Some(data) => RecordData::Data(data),
                        None => RecordData::Gone,
                    };
                    appender.record(&Record { oid, data })?;
                }
                appender.finish()?;
            }
            let done = stored.end().0;
            if done - told > 64 << 20 {
                told = done;
                progress(done);
            }
        }
        Ok(())
    }
}

/// Keeps the last entry of each object, in order of oid.
fn compact(current: &mut Vec<(Oid, Position)>) {
    // Stable: entries of one object stay in the order of the file.
    current.sort_by_key(|(oid, _)| *oid);
    let mut kept = 0;
    for at in 0..current.len() {
        let last_of_oid = current.get(at + 1).is_none_or(|next| next.0 != current[at].0);
        if last_of_oid {
            current[kept] = current[at];
            kept += 1;
        }
    }
    current.truncate(kept);
}

fn back_of(window: &mut Window<'_>, record: &DataHeader, at: u64) -> Result<u64, StorageError> {
    if record.data_len > 0 {
        return Ok(0);
    }
    match window.number(at + DATA_HEADER)? {
        Some(back) => Ok(back),
        None => window.damaged(at, "a back pointer is cut off"),
    }
}

/// The data of a record, its own or those that it shares.
pub(crate) fn data_at(
    window: &mut Window<'_>,
    oid: Oid,
    position: Position,
) -> Result<Option<bytes::Bytes>, StorageError> {
    let Some(header) = window.data_header(position.0)? else {
        return window.damaged(position.0, "a data record is cut off");
    };
    if header.data_len == 0 {
        return Ok(match shared_data(window, position.0, oid)? {
            RecordData::Back(_, data) => data,
            RecordData::Data(data) => Some(data),
            RecordData::Gone => None,
        });
    }
    match window.get(position.0 + DATA_HEADER, header.data_len as usize)? {
        Some(bytes) => Ok(Some(bytes::Bytes::copy_from_slice(bytes))),
        None => window.damaged(position.0, "a data record is longer than the file"),
    }
}

/// Gives what the record of `oid` at `position` refers to.
fn refer(
    reader: &Reader,
    oid: Oid,
    position: Position,
    references: References<'_>,
    each: &mut dyn FnMut(Oid),
) -> Result<(), StorageError> {
    let (header, head) = reader.record(oid, position, Access::Blocking)?;
    let data = match reader.data(oid, position, &header, head, Access::Blocking) {
        Ok(data) => data,
        Err(StorageError::NoKey(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    references(&data, each).map_err(|reason| StorageError::References {
        path: reader.shared.path.clone(),
        record: Unreadable { oid, tid: header.serial, position, reason },
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;
    use standby_types::Disk;
    use standby_types::disk::{Open, read_all};
    use standby_types::memory::MemoryDisk;

    use super::*;
    use crate::file::format::Magic;
    use crate::file::open::Extent;
    use crate::file::transaction::{Transaction, TransactionMeta};

    const DATA: &str = "/db/Data.fs";
    const NEW: &str = "/db/Data.fs.pack";
    const PLENTY: Room<'static> = &|_| Ok(());

    #[test]
    fn row_50_room_is_asked_for_before_anything_is_written() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        for tid in 1..=100 {
            append(&mut storage, tid, &[(0, data(&[1])), (1, data(&[2; 1000]))]);
        }
        let references = |data: &[u8], each: &mut dyn FnMut(Oid)| {
            data.iter().for_each(|byte| each(Oid(u64::from(*byte))));
            Ok(())
        };
        let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
        let packed_if = |room: Room<'_>| {
            let job = Job { time: Tid(50), gc: true };
            pack(&storage.reader(), job, Path::new(NEW), &references, room, &mut |_, _| ())
        };
        let asked = std::cell::Cell::new(0);
        let refuses = |need| match need {
            Need::All(bytes) => {
                asked.set(bytes);
                full()
            }
            Need::Next => Ok(()),
        };
        assert!(packed_if(&refuses).is_err() && !disk.exists(Path::new(NEW)).unwrap());
        // What was asked for is what it takes.
        let Outcome::Packed(packed) = packed_if(PLENTY).unwrap() else { panic!() };
        let size = packed.target.reader().size();
        assert!(asked.get() >= size && asked.get() < size + 100, "{} {size}", asked.get());
        drop(packed);
        let times = std::cell::Cell::new(0);
        let later = |need| {
            times.set(times.get() + 1);
            if need == Need::Next && times.get() > 20 { full() } else { Ok(()) }
        };
        assert!(packed_if(&later).is_err());
        assert_eq!(times.get(), 21);
    }

    fn open(disk: &MemoryDisk) -> FileStorage {
        let (path, index) = (Path::new(DATA), Path::new("/state/1.index"));
        let extent = Extent::Whole;
        FileStorage::open(Arc::new(disk.clone()), path, index, Magic::Fs30, extent, &mut |_, _| ())
            .unwrap()
            .0
    }

    /// In these tests each byte of an object's data is the oid of an object that it refers to.
    fn append(storage: &mut FileStorage, tid: u64, records: &[(u64, RecordData)]) {
        let meta = TransactionMeta::new(Tid(tid));
        let record =
            |(oid, data): &(u64, RecordData)| Record { oid: Oid(*oid), data: data.clone() };
        let records = records.iter().map(record).collect();
        storage.append(&Transaction { meta, records }).unwrap();
    }

    fn data(references: &[u8]) -> RecordData {
        RecordData::Data(Bytes::copy_from_slice(references))
    }

    fn packed(storage: &FileStorage, time: u64, gc: bool) -> Option<FileStorage> {
        packed_to(storage, time, gc).map(|(target, _)| target)
    }

    fn packed_to(storage: &FileStorage, time: u64, gc: bool) -> Option<(FileStorage, Tid)> {
        let references = |data: &[u8], each: &mut dyn FnMut(Oid)| {
            data.iter().for_each(|byte| each(Oid(u64::from(*byte))));
            Ok(())
        };
        let job = Job { time: Tid(time), gc };
        match pack(&storage.reader(), job, Path::new(NEW), &references, PLENTY, &mut |_, _| ())
            .unwrap()
        {
            Outcome::Packed(packed) => Some((packed.target, packed.last)),
            Outcome::Nothing => None,
        }
    }

    fn load(storage: &FileStorage, oid: u64, tid: u64) -> Option<Vec<u8>> {
        let found = storage.reader().load_before(Oid(oid), Tid(tid), Access::Blocking).ok()??;
        Some(found.data.to_vec())
    }

    fn tids(storage: &FileStorage) -> Vec<(u64, u8)> {
        let mut transactions = storage.reader().transactions(Tid::NONE, Tid::MAX).unwrap();
        let mut tids = Vec::new();
        while let Some(stored) = transactions.advance().unwrap() {
            tids.push((stored.meta.tid.0, stored.meta.status));
        }
        tids
    }

    #[test]
    fn old_revisions_and_garbage_go() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[2])), (2, data(&[9]))]);
        append(&mut storage, 20, &[(1, data(&[3])), (3, data(&[9]))]);
        append(&mut storage, 30, &[(4, data(&[9]))]);
        append(&mut storage, 40, &[(1, data(&[3, 9]))]);
        storage.reader().merge_index(1, &|_| Ok(())).unwrap();
        let before = read_all(&disk, Path::new(DATA)).unwrap();
        let python_index = Path::new("/db/Data.fs.index");
        disk.open(python_index, Open::Create).unwrap();

        // Without collection, what nobody refers to stays.
        let all = packed(&storage, 30, false).unwrap();
        assert_eq!(tids(&all), [(10, b'p'), (20, b'p'), (30, b'p'), (40, b' ')]);
        assert_eq!((all.reader().len(), load(&all, 1, 11)), (5, None));

        let new = packed(&storage, 30, true).unwrap();
        assert_eq!(tids(&new), [(10, b'p'), (20, b'p'), (40, b' ')]);
        assert_eq!(new.reader().len(), 3);
        assert_eq!(load(&new, 1, 40), Some(vec![3]));
        assert_eq!(load(&new, 1, 99), Some(vec![3, 9]));
        assert_eq!(load(&new, 2, 99), None);

        // Commits go on meanwhile; then the new file takes the place of the old one.
        let old_reader = storage.reader();
        let source = storage.source();
        append(&mut storage, 50, &[(3, data(&[]))]);
        let mut new = new;
        assert_eq!(copy_rest(&storage.reader(), &mut new, Tid(40)).unwrap(), Tid(50));
        new.sync().unwrap();
        storage.sync().unwrap();
        storage.replace_with(new, Path::new(NEW), true).unwrap();
        disk.crash();
        assert_eq!(tids(&storage).last(), Some(&(50, b' ')));
        assert_eq!(source.reader().len(), 3);
        assert_eq!(old_reader.len(), 5);
        assert!(!disk.exists(Path::new("/state/1.index")).unwrap());
        assert!(!disk.exists(python_index).unwrap());
        let old = read_all(&disk, Path::new("/db/Data.fs.old")).unwrap();
        assert!(old.starts_with(&before));
        append(&mut storage, 60, &[(1, data(&[]))]);
        assert_eq!(tids(&open(&disk)), tids(&storage));
    }

    const UNREADABLE: u8 = 255;
    type Commit<'a> = (u64, &'a [(u64, RecordData)]);

    /// As in the other tests; a record with 255 in it cannot be read.
    fn or_unreadable(data: &[u8], each: &mut dyn FnMut(Oid)) -> Result<(), String> {
        if data.contains(&UNREADABLE) {
            return Err("255".into());
        }
        data.iter().for_each(|byte| each(Oid(u64::from(*byte))));
        Ok(())
    }

    #[test]
    fn a_record_that_cannot_be_read_stops_a_pack_if_it_matters() {
        let bad = || data(&[UNREADABLE]);
        let job = Job { time: Tid(25), gc: true };
        let packed = |commits: &[Commit<'_>]| {
            let disk = MemoryDisk::new();
            let mut storage = open(&disk);
            append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[]))]);
            commits.iter().for_each(|(tid, records)| append(&mut storage, *tid, records));
            pack(&storage.reader(), job, Path::new(NEW), &or_unreadable, PLENTY, &mut |_, _| ())
        };
        // Garbage at the pack time: nobody looks.
        let Ok(Outcome::Packed(done)) = packed(&[(20, &[(2, bad())])]) else { panic!() };
        assert!(done.unreadable.is_empty() && load(&done.target, 2, 99).is_none());
        // Written later, and nothing refers to it: kept, and told.
        let Ok(Outcome::Packed(done)) = packed(&[(20, &[(1, data(&[1]))]), (30, &[(2, bad())])])
        else {
            panic!()
        };
        assert_eq!((done.unreadable.len(), done.unreadable[0].oid), (1, Oid(2)));
        assert_eq!(load(&done.target, 2, 99), Some(vec![UNREADABLE]));
        // Reachable at the pack time; referred to later only; the root; reachable, and changed
        // later.
        let cases: [&[Commit<'_>]; 4] = [
            &[(20, &[(2, bad()), (0, data(&[1, 2]))])],
            &[(20, &[(1, data(&[1]))]), (30, &[(2, bad())]), (40, &[(0, data(&[1, 2]))])],
            &[(20, &[(1, data(&[1]))]), (30, &[(0, bad())])],
            &[(20, &[(2, data(&[1])), (0, data(&[1, 2]))]), (30, &[(2, bad())])],
        ];
        for commits in cases {
            let Err(error) = packed(commits) else { panic!() };
            let told = error.to_string();
            assert!(matches!(error, StorageError::References { .. }), "{told}");
            assert!(told.contains("written by transaction") && told.contains("pack-gc false"));
        }
    }

    #[test]
    fn what_is_committed_meanwhile_may_not_refer_to_garbage() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[1])), (2, data(&[1]))]);
        append(&mut storage, 20, &[(1, data(&[1]))]);
        let job = Job { time: Tid(15), gc: true };
        let path = Path::new(NEW);
        let outcome =
            pack(&storage.reader(), job, path, &or_unreadable, PLENTY, &mut |_, _| ()).unwrap();
        let Outcome::Packed(Packed { mut target, last, removed, .. }) = outcome else { panic!() };
        removed.check(&target.reader(), Tid::NONE, &or_unreadable).unwrap();
        // A client had seen object 2, and refers to it again.
        append(&mut storage, 30, &[(1, data(&[2]))]);
        copy_rest(&storage.reader(), &mut target, last).unwrap();
        let error = removed.check(&target.reader(), last, &or_unreadable).unwrap_err();
        assert!(matches!(error, StorageError::StillReferred { to: Oid(2), .. }), "{error}");
        // It is there again if it was written anew.
        append(&mut storage, 40, &[(2, data(&[1]))]);
        copy_rest(&storage.reader(), &mut target, Tid(30)).unwrap();
        removed.check(&target.reader(), last, &or_unreadable).unwrap();
    }

    #[test]
    fn the_last_transaction_may_be_garbage() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[]))]);
        append(&mut storage, 20, &[(2, data(&[9]))]);
        let (mut new, last) = packed_to(&storage, 30, true).unwrap();
        assert_eq!((last, tids(&new)), (Tid(20), vec![(10, b'p')]));
        append(&mut storage, 40, &[(1, data(&[1]))]);
        copy_rest(&storage.reader(), &mut new, last).unwrap();
        assert_eq!(tids(&new), [(10, b'p'), (40, b' ')]);
    }

    #[test]
    fn what_is_pointed_back_to_is_kept() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[2])), (2, data(&[9]))]);
        append(&mut storage, 20, &[(1, data(&[9]))]);
        // An undo after the pack time: 1 refers to 2 again.
        let back = RecordData::Back(Tid(10), Some(Bytes::from_static(&[2])));
        append(&mut storage, 30, &[(1, back)]);
        let new = packed(&storage, 20, true).unwrap();
        assert_eq!(load(&new, 1, 99), Some(vec![2]));
        assert_eq!(load(&new, 2, 99), Some(vec![9]));
    }

    #[test]
    fn there_may_be_nothing_to_do() {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        append(&mut storage, 10, &[(0, data(&[1])), (1, data(&[9]))]);
        append(&mut storage, 20, &[(1, data(&[8]))]);
        assert!(packed(&storage, 5, true).is_none());
        assert!(packed(&storage, 15, true).is_none());
        assert!(!disk.exists(Path::new(NEW)).unwrap());
        let new = packed(&storage, 30, true).unwrap();
        storage.replace_with(new, Path::new(NEW), false).unwrap();
        assert!(!disk.exists(Path::new("/db/Data.fs.old")).unwrap());
        // Packed to a later time already.
        assert!(packed(&storage, 15, true).is_none());
        assert_eq!(load(&storage, 1, 99), Some(vec![8]));
    }

    proptest! {
        /// After the pack time nothing differs for what can be reached; the file opens again.
        #[test]
        fn the_present_does_not_change(
            commits in proptest::collection::vec(
                (0u64..6, proptest::option::weighted(0.9, proptest::collection::vec(0u8..6, 1..3))),
                1..30),
            time in 0u64..300, gc: bool)
        {
            let disk = MemoryDisk::new();
            let mut storage = open(&disk);
            append(&mut storage, 5, &[(0, data(&[1, 2]))]);
            for (nth, (oid, references)) in commits.iter().enumerate() {
                let content = references.as_ref().map_or(RecordData::Gone, |r| data(r));
                append(&mut storage, (nth as u64 + 1) * 10, &[(*oid, content)]);
            }
            let Some(new) = packed(&storage, time, gc) else { return Ok(()) };
            let mut reachable = std::collections::BTreeSet::new();
            let mut todo = vec![0];
            while let Some(oid) = todo.pop() {
                if reachable.insert(oid) {
                    let found = load(&storage, oid, u64::MAX / 4).unwrap_or_default();
                    todo.extend(found.into_iter().map(u64::from));
                }
            }
            for oid in reachable {
                let (before, after) = (load(&storage, oid, u64::MAX / 4), load(&new, oid, u64::MAX / 4));
                prop_assert_eq!(before, after, "{}", oid);
            }
            new.sync().unwrap();
            storage.replace_with(new, Path::new(NEW), false).unwrap();
            prop_assert_eq!(tids(&open(&disk)), tids(&storage));
        }
    }
}
