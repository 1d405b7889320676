//! Parts of the history that a file does not have, because a fast recovery left them out.

use standby_types::Tid;

/// The transactions with `after < tid <= through` are not all here, nor with all of their records.
///
/// What is here is the newest revision of then: for each object changed in the hole, the revision
/// that was current at `through`. So everything is known about the moments up to `after` and from
/// `through` on, and only the predecessors of the hole's records are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The last transaction before it.
    pub after: Tid,
    /// Its last transaction.
    pub through: Tid,
}

impl Hole {
    /// True if the transaction is one of the hole.
    pub fn contains(&self, tid: Tid) -> bool {
        self.after < tid && tid <= self.through
    }
}

/// The holes of a file, in order; none touches another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holes(Vec<Hole>);

impl Holes {
    /// Adds a hole; those that it meets become one with it.
    pub fn add(&mut self, hole: Hole) {
        if hole.after >= hole.through {
            return;
        }
        let mut hole = hole;
        self.0.retain(|other| {
            let apart = other.through < hole.after || hole.through < other.after;
            if !apart {
                hole.after = hole.after.min(other.after);
                hole.through = hole.through.max(other.through);
            }
            apart
        });
        let at = self.0.partition_point(|other| other.after < hole.after);
        self.0.insert(at, hole);
    }

    /// A pack to this time has been done: what a hole lacks up to there would be gone anyway.
    pub fn packed(&mut self, time: Tid) {
        self.0.retain(|hole| hole.through > time);
    }

    /// What was missing up to this transaction is here now.
    pub fn filled(&mut self, through: Tid) {
        self.0.retain_mut(|hole| {
            hole.after = hole.after.max(through);
            hole.after < hole.through
        });
    }

    /// The hole that the transaction is in.
    pub fn of(&self, tid: Tid) -> Option<Hole> {
        self.0.iter().find(|hole| hole.contains(tid)).copied()
    }

    /// The first hole with transactions between these two, both included.
    pub fn between(&self, start: Tid, stop: Tid) -> Option<Hole> {
        self.0.iter().find(|hole| start <= hole.through && hole.after < stop).copied()
    }

    /// True if a file whose last transaction is `last` shows a moment that was: none in a hole.
    pub fn are_filled_up_to(&self, last: Tid) -> bool {
        !self.0.iter().any(|hole| hole.after < last && last < hole.through)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Hole> {
        self.0.iter()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;
    use standby_types::Oid;
    use standby_types::memory::MemoryDisk;

    use super::*;
    use crate::{
        Access, Extent, FileStorage, Job, Magic, Outcome, Packed, Reader, Record, RecordData,
        StorageError, Transaction, TransactionMeta, UndoError, Undone, copy, copy_rest, pack,
    };

    fn holes(ranges: &[(u64, u64)]) -> Holes {
        let mut holes = Holes::default();
        for (after, through) in ranges {
            holes.add(Hole { after: Tid(*after), through: Tid(*through) });
        }
        holes
    }

    fn ranges(holes: &Holes) -> Vec<(u64, u64)> {
        holes.iter().map(|hole| (hole.after.0, hole.through.0)).collect()
    }

    #[test]
    fn holes_that_meet_are_one() {
        assert_eq!(ranges(&holes(&[(10, 20), (30, 40), (5, 5)])), [(10, 20), (30, 40)]);
        // A catch-up that broke off within its hole, and the next one.
        assert_eq!(ranges(&holes(&[(10, 20), (15, 30)])), [(10, 30)]);
        assert_eq!(ranges(&holes(&[(10, 20), (30, 40), (20, 30)])), [(10, 40)]);
    }

    #[test]
    fn a_moment_in_a_hole_never_was() {
        let holes = holes(&[(10, 20)]);
        let shown = |last| holes.are_filled_up_to(Tid(last));
        assert_eq!([9, 10, 11, 19, 20, 21].map(shown), [true, true, false, false, true, true]);
        let inside = |tid| holes.of(Tid(tid)).is_some();
        assert_eq!([10, 11, 20, 21].map(inside), [false, true, true, false]);
        let met = |start, stop| holes.between(Tid(start), Tid(stop)).is_some();
        assert!(!met(0, 10) && met(0, 11) && met(20, 99) && !met(21, 99));
    }

    #[test]
    fn holes_are_filled_from_below() {
        let mut holes = holes(&[(10, 20), (30, 40)]);
        holes.filled(Tid(20));
        assert_eq!(ranges(&holes), [(30, 40)]);
        holes.filled(Tid(35));
        assert_eq!(ranges(&holes), [(35, 40)]);
    }

    #[test]
    fn a_pack_ends_what_is_below_it() {
        let mut holes = holes(&[(10, 20), (30, 40)]);
        holes.packed(Tid(19));
        assert_eq!(ranges(&holes), [(10, 20), (30, 40)]);
        holes.packed(Tid(20));
        assert_eq!(ranges(&holes), [(30, 40)]);
    }

    fn open(name: &str) -> FileStorage {
        let disk = Arc::new(MemoryDisk::new());
        let (path, index) = (format!("/{name}.fs"), format!("/{name}.index"));
        let (path, index) = (Path::new(&path), Path::new(&index));
        FileStorage::open(disk, path, index, Magic::Fs30, Extent::Whole, &mut |_, _| ()).unwrap().0
    }

    /// What a random transaction does to an object.
    #[derive(Clone, Debug)]
    enum Change {
        /// Each byte is the oid of an object that it refers to.
        Refer(Vec<u8>),
        Delete,
        /// Undo its newest change.
        Undo,
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            6 => proptest::collection::vec(0u8..6, 1..3).prop_map(Change::Refer),
            1 => Just(Change::Delete),
            2 => Just(Change::Undo),
        ]
    }

    /// Transactions 10, 20, … of these changes.
    fn full(commits: &[(u64, Change)]) -> FileStorage {
        let mut storage = open("full");
        for (nth, (oid, change)) in
            [(0, Change::Refer(vec![1, 2]))].iter().chain(commits).enumerate()
        {
            let oid = Oid(*oid);
            let undone = || {
                let reader = storage.reader();
                let serial = reader.committed_serial(oid, Access::Blocking).unwrap()?;
                let mut data = None;
                let each = |_, record| -> Result<(), UndoError> {
                    data = Some(record);
                    Ok(())
                };
                reader.undo(serial, &mut Undone::new(), each).ok()?;
                data
            };
            let data = match change {
                Change::Refer(oids) => RecordData::Data(Bytes::from(oids.clone())),
                Change::Delete => RecordData::Gone,
                Change::Undo => undone().unwrap_or(RecordData::Gone),
            };
            let meta = TransactionMeta { tid: Tid(nth as u64 * 10 + 10), ..meta() };
            let records = vec![Record { oid, data }];
            storage.append(&Transaction { meta, records }).unwrap();
        }
        storage
    }

    fn meta() -> TransactionMeta {
        let empty = Bytes::new;
        let (user, description, extension) = (empty(), empty(), empty());
        TransactionMeta { tid: Tid::NONE, status: b' ', user, description, extension }
    }

    /// The same after a fast recovery from `hole.after` to `hole.through`.
    fn recovered(full: &Reader, hole: Hole) -> FileStorage {
        let mut target = open("recovered");
        let mut holes = Holes::default();
        holes.add(hole);
        target.set_holes(holes);
        // What the source sees when it begins, at the end of the hole.
        let mut before = open("before");
        copy(full, &mut before, Tid::NONE, hole.through, &|_| Ok(())).unwrap();
        let mut transactions = before.reader().transactions(Tid::NONE, Tid::MAX).unwrap();
        while let Some(stored) = transactions.advance().unwrap() {
            let inside = hole.contains(stored.meta.tid);
            let mut meta = stored.meta.clone();
            let newest = transactions.newest_of(&stored).unwrap();
            if inside {
                meta.status = b'p';
                if newest.is_empty() && meta.tid != hole.through {
                    continue;
                }
            }
            let mut appender = target.begin(&meta).unwrap();
            for (_, at) in before.reader().records_of(&stored).unwrap() {
                if !inside || newest.contains(&at) {
                    appender.record(&transactions.record_at(&stored, at).unwrap()).unwrap();
                }
            }
            appender.finish().unwrap();
        }
        copy_rest(full, &mut target, hole.through).unwrap();
        target
    }

    fn packed(storage: FileStorage, job: Job, to: &str) -> FileStorage {
        let references = |data: &[u8], each: &mut dyn FnMut(Oid)| {
            data.iter().for_each(|byte| each(Oid(u64::from(*byte))));
            Ok(())
        };
        let reader = storage.reader();
        match pack(&reader, job, Path::new(to), &references, &|_| Ok(()), &mut |_, _| ()).unwrap() {
            Outcome::Packed(Packed { mut target, last, .. }) => {
                copy_rest(&reader, &mut target, last).unwrap();
                target
            }
            Outcome::Nothing => storage,
        }
    }

    type Undo = Vec<(Oid, Option<Bytes>)>;

    fn undo(reader: &Reader, tid: Tid) -> Result<Undo, UndoError> {
        let mut out = Vec::new();
        reader.undo(tid, &mut Undone::new(), |oid, data| -> Result<(), UndoError> {
            out.push(match data {
                RecordData::Data(data) => (oid, Some(data)),
                RecordData::Back(_, data) => (oid, data),
                RecordData::Gone => (oid, None),
            });
            Ok(())
        })?;
        Ok(out)
    }

    proptest! {
        /// What is said is true, and only what lies in the hole is not said.
        #[test]
        fn nothing_that_is_told_is_wrong(
            commits in proptest::collection::vec((0u64..6, change()), 1..30),
            ends: (proptest::sample::Index, proptest::sample::Index),
            pack_time in 0u64..320, gc: bool)
        {
            let full = full(&commits);
            let count = commits.len() as u64 + 1;
            let at = |index: proptest::sample::Index| index.index(count as usize + 1) as u64 * 10;
            let (first, second) = (at(ends.0), at(ends.1));
            let hole = Hole { after: Tid(first.min(second)), through: Tid(first.max(second)) };
            let recovered = recovered(&full.reader(), hole);
            let (whole, some) = (full.reader(), recovered.reader());
            prop_assert!(some.is_whole());
            for oid in (0..6).map(Oid) {
                for tid in (0..count * 10 + 20).map(Tid) {
                    let expected = whole.load_before(oid, tid, Access::Blocking);
                    match some.load_before(oid, tid, Access::Blocking) {
                        Err(StorageError::Hole(_)) => {
                            prop_assert!(hole.contains(tid) && tid > hole.after.next());
                        }
                        Ok(Some(found)) => {
                            let expected = expected.unwrap().unwrap();
                            prop_assert_eq!((&found.data, found.serial), (&expected.data, expected.serial));
                            // It may have been replaced later than is said, never earlier.
                            prop_assert!(found.end.is_none() == expected.end.is_none());
                            prop_assert!(found.end <= expected.end && found.end.is_none_or(|end| end >= tid));
                        }
                        Ok(None) => prop_assert_eq!(expected.unwrap(), None),
                        Err(StorageError::NoKey(_)) => match expected {
                            // Before the object was.
                            Ok(None) => {}
                            other => prop_assert!(matches!(other, Err(StorageError::NoKey(_)))),
                        },
                        Err(other) => return Err(TestCaseError::fail(other.to_string())),
                    }
                }
                let history = |reader: &Reader, size| {
                    let found = reader.history(oid, size).ok()?;
                    Some(found.into_iter().map(|past| past.meta.tid).collect::<Vec<_>>())
                };
                for size in 1..5 {
                    if let Some(found) = history(&some, size) {
                        prop_assert_eq!(Some(found), history(&whole, size));
                    }
                }
            }
            for tid in (1..=count).map(|nth| Tid(nth * 10)) {
                match undo(&some, tid) {
                    Err(UndoError::Storage(StorageError::Hole(_))) => prop_assert!(hole.contains(tid)),
                    Ok(found) => prop_assert_eq!(found, undo(&whole, tid).unwrap()),
                    Err(_) => prop_assert!(undo(&whole, tid).is_err()),
                }
            }
            // A pack removes nothing that anything refers to.
            let recovered = packed(recovered, Job { time: Tid(pack_time), gc }, "/r.pack");
            let now = |storage: &FileStorage, oid: u8| {
                let oid = Oid(u64::from(oid));
                let found = storage.reader().load_before(oid, Tid::MAX, Access::Blocking);
                found.ok().flatten().map(|found| (found.data, found.serial))
            };
            for oid in 0..6 {
                let Some((data, serial)) = now(&recovered, oid) else {
                    prop_assert!(oid > 0 || now(&full, 0).is_none());
                    continue;
                };
                prop_assert_eq!(now(&full, oid), Some((data.clone(), serial)));
                for other in data {
                    prop_assert_eq!(now(&recovered, other), now(&full, other), "{} {}", oid, other);
                }
            }
        }
    }
}
