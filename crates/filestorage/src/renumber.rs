//! New tids for files whose tids do not grow: Python's FileStorage writes such files when a clock
//! is set back.
//!
//! As few transactions as possible get another tid: those of the longest sequence that grows keep
//! theirs, and the others fit in between. Nothing else of the file changes, so positions stay what
//! they are.

use std::path::Path;
use std::sync::Arc;

use standby_types::disk::{Open, parent, read_full};
use standby_types::{Disk, File, Oid, Position, Tid};

use crate::StorageError;
use crate::blobs::may_be_blob;
use crate::file::mark::Mark;
use crate::file::open::read_magic;
use crate::file::scan::{Found, Scanner, Window};
use crate::pack::data_at;

/// A transaction that gets another tid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renumbered {
    /// Where it begins.
    pub position: Position,
    /// The tid that it has.
    pub old: Tid,
    /// The tid that it gets.
    pub new: Tid,
}

/// What is to be done to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTids {
    /// All complete transactions of the file.
    pub transactions: u64,
    /// Those that get another tid, in order.
    pub renumbered: Vec<Renumbered>,
    /// The end of the last complete transaction.
    pub end: Position,
    /// Bytes of an incomplete transaction that follow.
    pub torn: u64,
}

/// What must change so that the tids of a file grow. `progress(done, total)` is called now and
/// then, in bytes.
pub fn new_tids(
    disk: &dyn Disk,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<NewTids, StorageError> {
    let io = |action| StorageError::io(path, action);
    let file = disk.open(path, Open::Read).map_err(io("open"))?;
    read_magic(path, &*file)?;
    let len = file.len().map_err(io("read the length of"))?;
    let mut scanner = Scanner::in_any_order(path, file, len);
    let (mut positions, mut tids) = (Vec::new(), Vec::new());
    while let Found::Transaction { header, position, end } = scanner.next(&mut |_, _| ())? {
        positions.push(position);
        tids.push(header.tid.0);
        progress(end.0, len);
    }
    let renumbered = positions.into_iter().zip(tids.iter().zip(growing(&tids)));
    let renumbered = renumbered.filter(|(_, (old, new))| **old != *new);
    Ok(NewTids {
        transactions: tids.len() as u64,
        renumbered: renumbered
            .map(|(position, (old, new))| Renumbered { position, old: Tid(*old), new: Tid(new) })
            .collect(),
        end: scanner.position,
        torn: len - scanner.position.0,
    })
}

/// A revision that gets another serial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct NewSerial {
    pub oid: Oid,
    pub transaction: Renumbered,
    /// It may be a blob ([`may_be_blob`]), whose file is named after the serial.
    pub may_be_blob: bool,
}

/// Copies the complete transactions of `path` to the file `to`, with the new tids; durable on
/// return. `each` sees the revisions that get another serial.
pub fn write_renumbered(
    disk: &Arc<dyn Disk>,
    path: &Path,
    plan: &NewTids,
    to: &Path,
    each: &mut dyn FnMut(NewSerial),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StorageError> {
    const CHUNK: usize = 1 << 20;
    let end = plan.end.0;
    let from = disk.open(path, Open::Read).map_err(StorageError::io(path, "open"))?;
    let io = |action| StorageError::io(to, action);
    let copy = disk.open(to, Open::Create).map_err(io("create"))?;
    copy.set_len(0).map_err(io("cut"))?;
    let (mut buffer, mut at) = (vec![0; CHUNK], 0);
    while at < end {
        let wanted = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
        let n =
            read_full(&*from, &mut buffer[..wanted], at).map_err(StorageError::io(path, "read"))?;
        if n < wanted {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(StorageError::io(path, "read all of")(source));
        }
        copy.write_at(&buffer[..n], at).map_err(io("write"))?;
        at += n as u64;
        progress(at, end);
    }
    for renumbered in &plan.renumbered {
        write_tid(to, &copy, renumbered, each)?;
    }
    // Nobody else looks at the copy before it takes the place of the file.
    let mut scanner = Scanner::new(to, copy.clone(), Mark::START.position, Tid::NONE, end);
    while scanner.next(&mut |_, _| ())? != Found::End {}
    copy.sync().map_err(io("sync"))?;
    disk.sync_dir(parent(to)).map_err(io("sync the directory of"))
}

/// Gives a transaction and its records another tid.
fn write_tid(
    path: &Path,
    file: &Arc<dyn File>,
    renumbered: &Renumbered,
    each: &mut dyn FnMut(NewSerial),
) -> Result<(), StorageError> {
    let failed = StorageError::io(path, "write");
    let start = renumbered.position.0;
    let mut found = Vec::new();
    let end = file.len().map_err(&failed)?;
    let mut scanner = Scanner::in_any_order(path, file.clone(), end);
    scanner.position = renumbered.position;
    scanner.next(&mut |record, position| found.push((record.oid, position)))?;
    file.write_at(&renumbered.new.to_bytes(), start).map_err(&failed)?;
    let mut window = Window::new(path, file.clone());
    for (oid, position) in found {
        file.write_at(&renumbered.new.to_bytes(), position.0 + 8).map_err(&failed)?;
        let data = data_at(&mut window, oid, position)?;
        let may_be_blob = data.is_some_and(|data| may_be_blob(&data));
        each(NewSerial { oid, transaction: *renumbered, may_be_blob });
    }
    Ok(())
}

/// Numbers that grow and differ from `tids` in as few places as possible.
///
/// Those that stay must leave room for those between them: `tid - place` must not fall. The longest
/// such sequence is found as in patience sorting: `piles[n]` is the place of the lowest number that
/// ends one of `n + 1` numbers.
fn growing(tids: &[u64]) -> Vec<u64> {
    let room = |place: usize| tids[place].checked_sub(place as u64 + 1);
    let most = |place: usize| Tid::MAX.0 - (tids.len() - 1 - place) as u64;
    let mut piles: Vec<usize> = Vec::new();
    let mut before = vec![None; tids.len()];
    for place in 0..tids.len() {
        if room(place).is_none() || tids[place] > most(place) {
            continue;
        }
        let pile = piles.partition_point(|other| room(*other) <= room(place));
        before[place] = pile.checked_sub(1).map(|below| piles[below]);
        match piles.get_mut(pile) {
            Some(top) => *top = place,
            None => piles.push(place),
        }
    }
    let mut stays = vec![false; tids.len()];
    let mut next = piles.last().copied();
    while let Some(place) = next {
        stays[place] = true;
        next = before[place];
    }
    // The first ones come just before the first that stays.
    let mut last = stays.iter().position(|stays| *stays).and_then(room).unwrap_or(0);
    let new = tids.iter().zip(stays).map(|(tid, stays)| {
        last = if stays { *tid } else { last + 1 };
        last
    });
    new.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use standby_types::disk::read_all;
    use standby_types::memory::MemoryDisk;

    use super::*;
    use crate::file::format::Magic;
    use crate::{Extent, FileStorage, Record, RecordData, Transaction, TransactionMeta};

    #[test]
    fn as_few_tids_as_possible_change() {
        let max = Tid::MAX.0;
        for (tids, expected) in [
            (&[][..], &[][..]),
            (&[5, 6, 9], &[5, 6, 9]),
            // A clock was set back, for one transaction or for all that follow.
            (&[10, 90, 20, 30], &[10, 11, 20, 30]),
            (&[10, 20, 30, 5, 40], &[10, 20, 30, 31, 40]),
            (&[10, 20, 30, 40, 5], &[10, 20, 30, 40, 41]),
            (&[10, 20, 20, 30], &[10, 20, 21, 30]),
            // No room between 20 and 21.
            (&[20, 20, 21, 30], &[19, 20, 21, 30]),
            // None below 1, and none above the highest.
            (&[1, 1, 1], &[1, 2, 3]),
            (&[0, 0, 2, 7], &[4, 5, 6, 7]),
            (&[max, max, max], &[max - 2, max - 1, max][..]),
            (&[u64::MAX, 3], &[2, 3]),
            (&[u64::MAX, 0], &[1, 2]),
        ] {
            let new = growing(tids);
            assert_eq!(new.first(), expected.first());
            let changed =
                |new: &[u64]| tids.iter().zip(new).filter(|(old, new)| old != new).count();
            assert!(new.is_sorted_by(|a, b| a < b), "{tids:?}: {new:?}");
            assert_eq!(changed(&new), changed(expected), "{tids:?}: {new:?}");
        }
    }

    proptest! {
        /// Compared with all subsets.
        #[test]
        fn no_other_numbers_change_less(tids in prop::collection::vec(0u64..24, 0..10)) {
            let new = growing(&tids);
            prop_assert!(new.is_sorted_by(|a, b| a < b));
            prop_assert!(new.iter().all(|tid| *tid >= 1 && *tid <= Tid::MAX.0));
            let stay = tids.iter().zip(&new).filter(|(old, new)| old == new).count();
            let possible = |kept: u32| {
                let mut last = 0;
                tids.iter().enumerate().all(|(place, tid)| {
                    let stays = kept & 1 << place != 0;
                    let fits = !stays || *tid > last;
                    last = if stays { *tid } else { last + 1 };
                    fits
                })
            };
            let most = (0..1u32 << tids.len()).filter(|kept| possible(*kept)).map(u32::count_ones).max();
            prop_assert_eq!(stay as u32, most.unwrap_or(0));
        }
    }

    fn file_with(disk: &MemoryDisk, path: &Path, tids: &[u64]) {
        let open = |disk: &MemoryDisk| {
            let disk = Arc::new(disk.clone());
            let index = Path::new("/index");
            FileStorage::open(disk, path, index, Magic::Fs30, Extent::Whole, &mut |_, _| ())
                .unwrap()
                .0
        };
        let mut storage = open(disk);
        let mut positions = Vec::new();
        for number in 1..=tids.len() as u64 {
            positions.push(storage.mark().position.0);
            let record = |oid| Record { oid: Oid(oid), data: RecordData::Data(vec![7; 30].into()) };
            let meta = TransactionMeta::new(Tid(number));
            storage
                .append(&Transaction { meta, records: vec![record(1), record(number)] })
                .unwrap();
        }
        drop(storage);
        let file = disk.open(path, Open::Write).unwrap();
        for (position, tid) in positions.into_iter().zip(tids) {
            // Both records follow the header of 23 bytes, and have 42 and 30 bytes.
            for at in [position, position + 31, position + 23 + 72 + 8] {
                file.write_at(&tid.to_be_bytes(), at).unwrap();
            }
        }
    }

    #[test]
    fn a_file_of_any_order_becomes_one_that_is_served() {
        let disk = MemoryDisk::new();
        let (path, to) = (Path::new("/Data.fs"), Path::new("/new"));
        file_with(&disk, path, &[10, 90, 20, 20, 30]);
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let index = Path::new("/index");
        let open = |path| {
            let opened = FileStorage::open(
                shared.clone(),
                path,
                index,
                Magic::Fs30,
                Extent::Whole,
                &mut |_, _| (),
            );
            opened.map(|(storage, _)| storage)
        };
        let error = open(path).map(|_| ()).unwrap_err();
        assert!(matches!(error, StorageError::TimeWentBack { last: Tid(90), tid: Tid(20), .. }));
        assert!(error.to_string().contains("standby renumber /Data.fs"), "{error}");
        // A torn tail is no transaction.
        let before = read_all(&disk, path).unwrap();
        disk.open(path, Open::Write).unwrap().write_at(&[0; 9], before.len() as u64).unwrap();

        let plan = new_tids(&disk, path, &mut |_, _| ()).unwrap();
        let news: Vec<_> = plan.renumbered.iter().map(|t| (t.old.0, t.new.0)).collect();
        assert_eq!(news, [(90, 11), (20, 12)]);
        assert_eq!((plan.transactions, plan.end.0, plan.torn), (5, before.len() as u64, 9));
        let mut objects = Vec::new();
        let mut each = |serial: NewSerial| objects.push((serial.oid.0, serial.transaction.new.0));
        write_renumbered(&shared, path, &plan, to, &mut each, &mut |_, _| ()).unwrap();
        assert_eq!(objects, [(1, 11), (2, 11), (1, 12), (3, 12)]);
        let storage = open(to).unwrap();
        let reader = storage.reader();
        let mut transactions = reader.transactions(Tid::NONE, Tid::MAX).unwrap();
        let mut found = Vec::new();
        while let Some(stored) = transactions.advance().unwrap() {
            for (oid, _) in reader.records_of(&stored).unwrap() {
                let data = reader.load_serial(oid, stored.meta.tid, crate::Access::Blocking);
                assert_eq!(data.unwrap().len(), 30);
            }
            found.push(stored.meta.tid.0);
        }
        assert_eq!(found, [10, 11, 12, 20, 30]);
        // All else is as it was.
        let expected = Path::new("/expected");
        file_with(&disk, expected, &[10, 11, 12, 20, 30]);
        assert_eq!(read_all(&disk, to).unwrap(), read_all(&disk, expected).unwrap());
    }

    #[test]
    fn damage_is_not_taken_for_a_clock() {
        let disk = MemoryDisk::new();
        let path = Path::new("/Data.fs");
        file_with(&disk, path, &[10, 20, 15]);
        let len = read_all(&disk, path).unwrap().len() as u64;
        disk.open(path, Open::Write).unwrap().write_at(b"?", len - 1).unwrap();
        let shared = Arc::new(disk.clone());
        let opened = FileStorage::open(
            shared,
            path,
            Path::new("/index"),
            Magic::Fs30,
            Extent::Whole,
            &mut |_, _| (),
        );
        assert!(matches!(opened.map(|_| ()), Err(StorageError::Damaged { .. })));
        assert!(matches!(new_tids(&disk, path, &mut |_, _| ()), Err(StorageError::Damaged { .. })));
    }
}
