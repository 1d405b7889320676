use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use standby_types::disk::{Open, read_all};
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, Oid, Position, Tid};

use super::*;

const DATA: &str = "/db/Data.fs";
const INDEX: &str = "/db/index";

fn open(disk: &MemoryDisk) -> FileStorage {
    open_as(disk, Extent::Whole).unwrap().0
}

fn open_as(disk: &MemoryDisk, extent: Extent) -> Result<(FileStorage, Opened), StorageError> {
    let disk = Arc::new(disk.clone());
    FileStorage::open(disk, Path::new(DATA), Path::new(INDEX), Magic::Fs30, extent, &mut |_, _| ())
}

fn up_to(mark: Mark) -> Extent {
    Extent::UpTo { mark, again: Vec::new() }
}

fn transaction(tid: u64, records: &[(u64, &str)]) -> Transaction {
    Transaction {
        meta: TransactionMeta {
            tid: Tid(tid),
            status: b' ',
            user: Bytes::from_static(b"user"),
            description: Bytes::from_static(b"description"),
            extension: Bytes::new(),
        },
        records: records
            .iter()
            .map(|(oid, data)| Record {
                oid: Oid(*oid),
                data: match *data {
                    "" => RecordData::Gone,
                    data => match data.strip_prefix("back ") {
                        Some(back) => match back.split_once(' ') {
                            Some((tid, data)) => {
                                let data = Bytes::copy_from_slice(data.as_bytes());
                                RecordData::Back(Tid(tid.parse().unwrap()), Some(data))
                            }
                            None => RecordData::Back(Tid(back.parse().unwrap()), None),
                        },
                        None => RecordData::Data(Bytes::copy_from_slice(data.as_bytes())),
                    },
                },
            })
            .collect(),
    }
}

/// Four transactions: two objects, a change, an undo of it together with a deletion.
fn example(storage: &mut FileStorage) {
    storage.append(&transaction(10, &[(0, "root"), (1, "one")])).unwrap();
    storage.append(&transaction(20, &[(1, "uno")])).unwrap();
    storage.append(&transaction(30, &[(1, "back 10 one"), (0, "")])).unwrap();
    storage.append(&transaction(40, &[])).unwrap();
}

fn loaded(reader: &Reader, oid: u64, tid: u64) -> Option<(String, u64, Option<u64>)> {
    let found = reader.load_before(Oid(oid), Tid(tid), Access::Cached).unwrap()?;
    let data = String::from_utf8(found.data.to_vec()).unwrap();
    Some((data, found.serial.0, found.end.map(|tid| tid.0)))
}

fn check_example(storage: &FileStorage) {
    let reader = storage.reader();
    assert_eq!(reader.last_tid(), Tid(40));
    assert_eq!(reader.len(), 2);
    assert_eq!(loaded(&reader, 1, 10), None);
    assert_eq!(loaded(&reader, 1, 11), Some(("one".into(), 10, Some(20))));
    assert_eq!(loaded(&reader, 1, 30), Some(("uno".into(), 20, Some(30))));
    assert_eq!(loaded(&reader, 1, 99), Some(("one".into(), 30, None)));
    assert_eq!(loaded(&reader, 0, 30), Some(("root".into(), 10, Some(30))));
    let gone = reader.load_before(Oid(0), Tid::MAX, Access::Cached);
    assert!(matches!(gone, Err(StorageError::NoKey(Oid(0)))));
    assert!(matches!(reader.serial(Oid(0), Access::Cached), Err(StorageError::NoKey(_))));
    assert_eq!(reader.committed_serial(Oid(0), Access::Cached).unwrap(), Some(Tid(30)));
    assert_eq!(reader.committed_serial(Oid(7), Access::Cached).unwrap(), None);
    assert_eq!(&reader.load_serial(Oid(1), Tid(20), Access::Cached).unwrap()[..], b"uno");
    assert!(reader.load_serial(Oid(1), Tid(21), Access::Cached).is_err());
}

fn iterated(reader: &Reader, start: u64, stop: u64) -> Vec<Transaction> {
    let mut iterator = reader.transactions(Tid(start), Tid(stop)).unwrap();
    let mut found = Vec::new();
    while let Some(stored) = iterator.advance().unwrap() {
        let mut records = Vec::new();
        iterator
            .records(&stored, |record| {
                records.push(record);
                Ok::<_, StorageError>(())
            })
            .unwrap();
        found.push(Transaction { meta: stored.meta, records });
    }
    found
}

#[test]
fn a_file_without_a_byte_is_a_new_one() {
    let disk = MemoryDisk::new();
    disk.open(Path::new(DATA), Open::Create).unwrap();
    assert_eq!(open(&disk).reader().len(), 0);
    assert_eq!(read_all(&disk, Path::new(DATA)).unwrap(), b"FS30");
}

#[test]
fn append_load_and_reopen() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    example(&mut storage);
    check_example(&storage);
    check_example(&open(&disk));
}

#[test]
fn iteration_gives_what_was_appended() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    example(&mut storage);
    let reader = storage.reader();
    let all = iterated(&reader, 0, u64::MAX);
    assert_eq!(all[2], transaction(30, &[(1, "back 10 one"), (0, "")]));
    let tids = |found: Vec<Transaction>| found.iter().map(|t| t.meta.tid.0).collect::<Vec<_>>();
    assert_eq!(tids(all), [10, 20, 30, 40]);
    assert_eq!(tids(iterated(&reader, 11, 30)), [20, 30]);
    assert_eq!(tids(iterated(&reader, 30, 30)), [30]);
    assert_eq!(tids(iterated(&reader, 41, 99)), [0; 0]);

    // A copy made from the iteration is equal to the byte.
    let other = MemoryDisk::new();
    let mut copy = open(&other);
    for transaction in iterated(&reader, 0, u64::MAX) {
        copy.append(&transaction).unwrap();
    }
    assert_eq!(
        read_all(&disk, Path::new(DATA)).unwrap(),
        read_all(&other, Path::new(DATA)).unwrap()
    );
}

#[test]
fn newest_oids_come_newest_first() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    example(&mut storage);
    let found = storage.reader().newest_oids(|tid, _| tid < Tid(20)).unwrap();
    assert_eq!(
        found,
        [(Tid(40), vec![]), (Tid(30), vec![Oid(1), Oid(0)]), (Tid(20), vec![Oid(1)])]
    );
}

#[test]
fn history_goes_back_to_the_beginning() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    example(&mut storage);
    let history = |oid, size| {
        let found = storage.reader().history(Oid(oid), size).unwrap();
        found.into_iter().map(|r| (r.meta.tid.0, r.size)).collect::<Vec<_>>()
    };
    assert_eq!(history(1, 2), [(30, 0), (20, 3)]);
    assert_eq!(history(1, 9), [(30, 0), (20, 3), (10, 3)]);
    // An object that is gone has a history.
    assert_eq!(history(0, 9), [(30, 0), (10, 4)]);
    assert!(matches!(storage.reader().history(Oid(7), 1), Err(StorageError::NoKey(Oid(7)))));
    let mut backwards = storage.reader().backwards();
    let mut tids = Vec::new();
    while let Some(transaction) = backwards.step().unwrap() {
        tids.push(transaction.meta.tid.0);
    }
    assert_eq!(tids, [40, 30, 20, 10]);
}

/// What undoing `tid` would write.
fn undone(storage: &FileStorage, tids: &[u64]) -> Result<Vec<Record>, UndoError> {
    let mut records = Vec::new();
    let mut earlier = Undone::new();
    for tid in tids {
        storage.reader().undo(Tid(*tid), &mut earlier, |oid, data| {
            records.push(Record { oid, data });
            Ok::<_, UndoError>(())
        })?;
    }
    Ok(records)
}

fn changed(result: Result<Vec<Record>, UndoError>) -> Vec<(u64, &'static str)> {
    match result {
        Err(UndoError::Changed(objects)) => objects.into_iter().map(|(o, r)| (o.0, r)).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn undo_gives_back_the_revision_before() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(10, &[(0, "root"), (1, "one")])).unwrap();
    storage.append(&transaction(20, &[(1, "uno")])).unwrap();
    storage.append(&transaction(30, &[(2, "two")])).unwrap();
    let undo_20 = transaction(40, &[(1, "back 10 one")]);
    assert_eq!(undone(&storage, &[20]).unwrap(), undo_20.records);
    // An object that the transaction made is gone.
    assert_eq!(undone(&storage, &[30]).unwrap(), transaction(0, &[(2, "")]).records);
    // Undo, and undo of the undo.
    storage.append(&undo_20).unwrap();
    assert_eq!(undone(&storage, &[40]).unwrap(), transaction(0, &[(1, "back 20 uno")]).records);
    // The data are again those that 10 wrote: it can be undone.
    assert_eq!(undone(&storage, &[10]).unwrap(), transaction(0, &[(0, ""), (1, "")]).records);
    // What 20 wrote is not current any more.
    let modified = "Some data were modified by a later transaction";
    assert_eq!(changed(undone(&storage, &[20])), [(1, modified)]);
    // Several at once see each other: undoing the undo makes 20 current.
    let both = undone(&storage, &[40, 20]).unwrap();
    assert_eq!(both, transaction(0, &[(1, "back 20 uno"), (1, "back 10 one")]).records);
}

#[test]
fn undo_is_refused_with_a_reason() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let mut packed = transaction(10, &[(1, "one")]);
    packed.meta.status = b'p';
    storage.append(&packed).unwrap();
    storage.append(&transaction(20, &[(2, "two")])).unwrap();
    storage.append(&transaction(30, &[(2, "zwei"), (1, "uno")])).unwrap();
    storage.append(&transaction(40, &[(2, "deux")])).unwrap();
    assert!(matches!(undone(&storage, &[11]), Err(UndoError::Unknown(Tid(11)))));
    assert!(matches!(undone(&storage, &[10]), Err(UndoError::Packed(Tid(10)))));
    let added = "Can't undo an add transaction followed by conflicting transactions.";
    assert_eq!(changed(undone(&storage, &[20])), [(2, added)]);
    let modified = "Some data were modified by a later transaction";
    assert_eq!(changed(undone(&storage, &[30])), [(2, modified)]);
    // After the later change is undone, it can be.
    let both = undone(&storage, &[40, 30]).unwrap();
    let expected = [(2, "back 30 zwei"), (2, "back 20 two"), (1, "back 10 one")];
    assert_eq!(both, transaction(0, &expected).records);
    storage.append(&transaction(50, &[(2, "")])).unwrap();
    assert_eq!(changed(undone(&storage, &[40])), [(2, "_loadBack() failed")]);
}

#[test]
fn a_restored_revision_shares_data_if_it_can() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(10, &[(1, "one")])).unwrap();
    storage.append(&transaction(20, &[(1, "uno")])).unwrap();
    let one = Some(Bytes::from_static(b"one"));
    let restored =
        |data, hint: Option<u64>| storage.reader().restored(Oid(1), data, hint.map(Tid)).unwrap();
    assert_eq!(restored(one.clone(), Some(10)), RecordData::Back(Tid(10), one.clone()));
    for hint in [None, Some(20), Some(15)] {
        assert_eq!(restored(one.clone(), hint), RecordData::Data(Bytes::from_static(b"one")));
    }
    assert_eq!(restored(None, None), RecordData::Gone);
    // A node that has packed the revision away writes the data.
    let back = Record { oid: Oid(1), data: RecordData::Back(Tid(5), one) };
    let meta = transaction(30, &[]).meta;
    storage.append(&Transaction { meta, records: vec![back] }).unwrap();
    assert_eq!(loaded(&storage.reader(), 1, 99), Some(("one".into(), 30, None)));
}

#[test]
fn what_an_undone_transaction_wrote_is_no_revision() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let mut undone = transaction(20, &[(1, "undone"), (2, "new")]);
    undone.meta.status = b'u';
    storage.append(&transaction(10, &[(0, "root"), (1, "one")])).unwrap();
    storage.append(&undone).unwrap();
    storage.append(&transaction(30, &[(0, "root again")])).unwrap();
    let check = |storage: &FileStorage, last: u64| {
        let reader = storage.reader();
        assert_eq!(loaded(&reader, 1, 99), Some(("one".into(), 10, None)));
        assert_eq!(reader.object_at_or_above(Oid(2)), None);
        let mut transactions = reader.transactions(Tid::NONE, Tid::MAX).unwrap();
        let mut tids = Vec::new();
        while let Some(stored) = transactions.advance_past_undone().unwrap() {
            tids.push(stored.meta.tid.0);
        }
        assert_eq!(tids, [10, last]);
    };
    check(&storage, 30);
    // The same after a start, and on a node to which it was copied.
    let (again, _) = open_as(&disk, Extent::Whole).unwrap();
    check(&again, 30);
    let mut transactions = again.reader().transactions(Tid(20), Tid(20)).unwrap();
    let stored = transactions.advance().unwrap().unwrap();
    assert!(transactions.newest_of(&stored).unwrap().is_empty());
    let other = MemoryDisk::new();
    let mut target = open(&other);
    copy(&again.reader(), &mut target, Tid::NONE, Tid::MAX, &|_| Ok(())).unwrap();
    check(&target, 30);
    // A pack keeps the revision before it, and drops what only the undone one refers to.
    let job = Job { time: Tid(25), gc: false };
    let references = |_: &[u8], _: &mut dyn FnMut(Oid)| Ok(());
    let new = Path::new("/db/Data.fs.pack");
    let packed = pack(&again.reader(), job, new, &references, &|_| Ok(()), &mut |_, _| ()).unwrap();
    let Outcome::Packed(packed) = packed else { panic!() };
    check(&packed.target, 30);
}

#[test]
fn packed_transactions_do_not_say_what_they_changed() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let mut packed = transaction(10, &[(0, "root"), (1, "one")]);
    packed.meta.status = b'p';
    storage.append(&packed).unwrap();
    storage.append(&transaction(20, &[(1, "uno")])).unwrap();
    let found = storage.reader().newest_oids(|_, _| false).unwrap();
    assert_eq!(found, [(Tid(20), vec![Oid(1)])]);
}

#[test]
fn index_file_is_used_and_can_be_lost() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(10, &[(0, "root"), (1, "one"), (9, "x")])).unwrap();
    assert!(storage.reader().merge_index(1, &|_| Ok(())).unwrap());
    storage.append(&transaction(20, &[(1, "uno"), (5, "y")])).unwrap();
    let (again, opened) = open_as(&disk, Extent::Whole).unwrap();
    assert_eq!(opened.scanned, 1);
    let reader = again.reader();
    let mut oids = Vec::new();
    let mut from = Oid(0);
    while let Some(oid) = reader.object_at_or_above(from) {
        oids.push(oid.0);
        from = Oid(oid.0 + 1);
    }
    assert_eq!(oids, [0, 1, 5, 9]);
    assert_eq!(reader.len(), 4);
    assert_eq!(reader.highest_oid(), Some(Oid(9)));
    assert!(reader.merge_index(1, &|_| Ok(())).unwrap());
    assert_eq!(open_as(&disk, Extent::Whole).unwrap().1.scanned, 0);

    let index = disk.open(Path::new(INDEX), Open::Write).unwrap();
    index.write_at(b"garbage", 8).unwrap();
    assert_eq!(open_as(&disk, Extent::Whole).unwrap().1.scanned, 2);
}

#[test]
fn rewind_restores_the_former_state() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(10, &[(0, "root"), (1, "one")])).unwrap();
    let before = storage.mark();
    storage.reader().merge_index(1, &|_| Ok(())).unwrap();
    storage.append(&transaction(20, &[(1, "uno"), (2, "two")])).unwrap();
    storage.append(&transaction(30, &[(1, "eins")])).unwrap();
    assert_eq!(storage.rewind(Tid(15)).unwrap(), before);
    let reader = storage.reader();
    assert_eq!(loaded(&reader, 1, 99), Some(("one".into(), 10, None)));
    assert!(matches!(reader.serial(Oid(2), Access::Cached), Err(StorageError::NoKey(_))));
    assert_eq!(reader.len(), 2);
    storage.append(&transaction(40, &[(2, "zwei")])).unwrap();
    assert_eq!(loaded(&open(&disk).reader(), 2, 99), Some(("zwei".into(), 40, None)));
}

/// Row 27 of the end cases, for the data file: a torn tail is cut, and kept in a file.
#[test]
fn row_27_torn_tail_of_the_data_file_is_cut_and_kept() {
    let reference = MemoryDisk::new();
    example(&mut open(&reference));
    let whole = read_all(&reference, Path::new(DATA)).unwrap();
    let ends: Vec<u64> = {
        let tail = Tail::read(&reference, Path::new(DATA), Mark::START).unwrap();
        let Tail::Follows(after) = tail else { panic!("{tail:?}") };
        std::iter::once(4).chain(after.iter().map(|mark| mark.position.0)).collect()
    };
    for cut in 4..whole.len() {
        let disk = MemoryDisk::new();
        let file = disk.open(Path::new(DATA), Open::Create).unwrap();
        file.write_at(&whole[..cut], 0).unwrap();
        let (storage, opened) = open_as(&disk, Extent::Whole).unwrap();
        let kept = *ends.iter().rfind(|end| **end <= cut as u64).unwrap();
        assert_eq!(storage.mark().position, Position(kept), "cut at {cut}");
        match opened.torn {
            None => assert_eq!(kept, cut as u64),
            Some((len, path)) => {
                assert_eq!(len, cut as u64 - kept);
                assert_eq!(read_all(&disk, &path).unwrap(), whole[kept as usize..cut]);
            }
        }
    }
}

#[test]
fn zeros_after_a_power_failure_are_a_torn_tail() {
    let disk = MemoryDisk::new();
    example(&mut open(&disk));
    let file = disk.open(Path::new(DATA), Open::Write).unwrap();
    let len = file.len().unwrap();
    file.set_len(len + 5000).unwrap();
    let (storage, opened) = open_as(&disk, Extent::Whole).unwrap();
    assert_eq!(opened.torn.map(|(len, _)| len), Some(5000));
    check_example(&storage);
}

#[test]
fn damage_is_named_and_never_written_to() {
    let reference = MemoryDisk::new();
    example(&mut open(&reference));
    let whole = read_all(&reference, Path::new(DATA)).unwrap();
    let second = {
        let Tail::Follows(after) = Tail::read(&reference, Path::new(DATA), Mark::START).unwrap()
        else {
            panic!()
        };
        after[0].position.0 as usize
    };
    // The tid goes back; the length reaches beyond the file though others follow; the trailing
    // length is wrong; a record belongs to another transaction.
    for (at, bytes) in [
        (second, &[0u8; 8][..]),
        (second + 8, &[0, 0, 0, 0, 0, 1, 0, 0]),
        (second - 8, &[9; 8]),
        (4 + 23 + 15 + 24, &[0, 0, 0, 0, 0, 0, 0, 9]),
    ] {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        let disk = MemoryDisk::new();
        disk.open(Path::new(DATA), Open::Create).unwrap().write_at(&damaged, 0).unwrap();
        let error = open_as(&disk, Extent::Whole).err().expect("opened a damaged file");
        let StorageError::Damaged { position, .. } = &error else { panic!("{error}") };
        assert!(position.0 <= at as u64 + 100, "{error}");
        assert!(error.to_string().contains("/db/Data.fs: damaged at byte "), "{error}");
        assert_eq!(read_all(&disk, Path::new(DATA)).unwrap(), damaged);
        assert_eq!(disk.list(Path::new("/db")).unwrap().len(), 1);
    }
    let disk = MemoryDisk::new();
    disk.open(Path::new(DATA), Open::Create).unwrap().write_at(b"PK\x03\x04zip", 0).unwrap();
    let error = open_as(&disk, Extent::Whole).err().unwrap().to_string();
    assert!(error.contains("not a FileStorage file"), "{error}");
}

#[test]
fn opening_at_a_mark_cuts_what_follows() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let mark = storage.append(&transaction(10, &[(0, "root")])).unwrap();
    storage.append(&transaction(20, &[(0, "later")])).unwrap();
    storage.reader().merge_index(1, &|_| Ok(())).unwrap();
    let (storage, _) = open_as(&disk, up_to(mark)).unwrap();
    assert_eq!(storage.mark(), mark);
    assert_eq!(loaded(&storage.reader(), 0, 99), Some(("root".into(), 10, None)));
    let elsewhere = Mark { position: Position(30), tid: Tid(10) };
    assert!(matches!(open_as(&disk, up_to(elsewhere)), Err(StorageError::Damaged { .. })));
}

/// A process that is killed while it replays its log leaves a file with all that was in it before.
#[test]
fn what_is_appended_again_never_leaves_the_file() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let mark = storage.append(&transaction(10, &[(0, "root")])).unwrap();
    let big = "x".repeat(9 << 20);
    let log = [
        transaction(20, &[(0, "later")]),
        transaction(30, &[(1, &big), (2, &big), (3, "end")]),
        transaction(40, &[(0, "last")]),
    ];
    for transaction in &log {
        storage.append(transaction).unwrap();
    }
    let whole = read_all(&disk, Path::new(DATA)).unwrap();
    let Tail::Follows(again) = Tail::read(&disk, Path::new(DATA), mark).unwrap() else { panic!() };
    assert_eq!(again.len(), 3);
    let file = disk.open(Path::new(DATA), Open::Write).unwrap();
    file.write_at(b"torn", whole.len() as u64).unwrap();

    let extent = Extent::UpTo { mark, again };
    let (mut storage, _) = open_as(&disk, extent.clone()).unwrap();
    let unchanged = || assert!(read_all(&disk, Path::new(DATA)).unwrap() == whole);
    for transaction in &log {
        unchanged();
        assert!(storage.mark().tid < transaction.meta.tid);
        assert_eq!(loaded(&storage.reader(), 0, 99).unwrap().2, None);
        let mut appender = storage.begin(&transaction.meta).unwrap();
        for record in &transaction.records {
            appender.record(record).unwrap();
            unchanged();
        }
        appender.finish().unwrap();
    }
    unchanged();
    assert_eq!(open(&disk).mark(), storage.mark());
    // What comes after them is appended as always.
    storage.append(&transaction(50, &[(5, "new")])).unwrap();
    assert_eq!(open(&disk).mark(), storage.mark());

    // Another transaction than the one that was expected, or one of another length, ends it.
    for other in [transaction(25, &[(0, "x")]), transaction(20, &[(0, "longer than it was")])] {
        file.write_at(&whole, 0).unwrap();
        let (mut storage, _) = open_as(&disk, extent.clone()).unwrap();
        let end = storage.append(&other).unwrap();
        assert_eq!(read_all(&disk, Path::new(DATA)).unwrap().len() as u64, end.position.0);
        assert_eq!(open(&disk).mark(), end);
    }
}

#[test]
fn tail_tells_what_others_wrote() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let first = storage.append(&transaction(10, &[(0, "root")])).unwrap();
    let second = storage.append(&transaction(20, &[(0, "later")])).unwrap();
    let path = Path::new(DATA);
    assert_eq!(Tail::read(&disk, path, first).unwrap(), Tail::Follows(vec![second]));
    let other = Mark { tid: Tid(11), ..first };
    assert!(matches!(Tail::read(&disk, path, other).unwrap(), Tail::Different(_)));
    storage.rewind(Tid::NONE).unwrap();
    assert!(matches!(Tail::read(&disk, path, first).unwrap(), Tail::Different(_)));
}

#[test]
fn long_transactions_are_whole_or_torn() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(10, &[(0, "root")])).unwrap();
    let big = Bytes::from(vec![b'x'; 1 << 20]);
    let meta = transaction(20, &[]).meta;
    let mut appender = storage.begin(&meta).unwrap();
    for oid in 1..=9 {
        appender.record(&Record { oid: Oid(oid), data: RecordData::Data(big.clone()) }).unwrap();
    }
    // Killed here: the file ends in a torn tail.
    let image = read_all(&disk, Path::new(DATA)).unwrap();
    appender.finish().unwrap();
    let reader = storage.reader();
    assert_eq!(reader.load_before(Oid(9), Tid::MAX, Access::Cached).unwrap().unwrap().data, big);
    assert_eq!(open(&disk).mark(), storage.mark());

    let killed = MemoryDisk::new();
    killed.open(Path::new(DATA), Open::Create).unwrap().write_at(&image, 0).unwrap();
    let (storage, opened) = open_as(&killed, Extent::Whole).unwrap();
    assert_eq!(storage.mark().tid, Tid(10));
    assert!(opened.torn.is_some());
}

/// A call must not take the state's lock twice: with a writer waiting in between, neither would
/// ever go on.
#[test]
fn readers_and_the_writer_do_not_block_each_other() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    storage.append(&transaction(1, &[(0, "root"), (1, "one")])).unwrap();
    let (done, finished) = std::sync::mpsc::channel();
    let mut threads = Vec::new();
    for _ in 0..3 {
        let (reader, done) = (storage.reader(), done.clone());
        threads.push(std::thread::spawn(move || {
            while reader.last_tid() < Tid(60_000) {
                // A read at the very end may find that the file has grown meanwhile.
                let cached = |found: Result<(), StorageError>| {
                    assert!(matches!(found, Ok(()) | Err(StorageError::NotCached)), "{found:?}");
                };
                cached(reader.committed_serial(Oid(1), Access::Cached).map(drop));
                cached(reader.serial(Oid(0), Access::Cached).map(drop));
                cached(reader.load_before(Oid(1), Tid::MAX, Access::Cached).map(drop));
                reader.position_of(Oid(1), Tid(1)).unwrap();
                reader.object_at_or_above(Oid(0));
            }
            done.send(()).unwrap();
        }));
    }
    threads.push(std::thread::spawn(move || {
        for tid in 2..=60_000 {
            storage.append(&transaction(tid, &[(tid % 2, "data")])).unwrap();
        }
        done.send(()).unwrap();
    }));
    for _ in 0..4 {
        finished.recv_timeout(std::time::Duration::from_secs(60)).expect("a deadlock");
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn transactions_out_of_order_are_refused() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    example(&mut storage);
    for tid in [40, 39, u64::MAX] {
        let refused = storage.append(&transaction(tid, &[]));
        assert!(matches!(refused, Err(StorageError::OutOfOrder { .. })));
    }
}

proptest! {
    #[test]
    fn transactions_travel(records in proptest::collection::vec(
        (any::<u64>(), prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..50).prop_map(|v| RecordData::Data(v.into())),
            any::<(u64, Option<Vec<u8>>)>()
                .prop_map(|(tid, data)| RecordData::Back(Tid(tid), data.map(Bytes::from))),
            Just(RecordData::Gone),
        ]), 0..20), status: u8, user: Vec<u8>)
    {
        let meta = TransactionMeta {
            tid: Tid(7), status, user: user.into(),
            description: Bytes::from_static(b"d"), extension: Bytes::new(),
        };
        let mut out = BytesMut::new();
        put_meta(&meta, &mut out);
        for (oid, data) in &records {
            put_record(&Record { oid: Oid(*oid), data: data.clone() }, &mut out);
        }
        let mut bytes = out.freeze();
        prop_assert_eq!(take_meta(&mut bytes), Ok(meta));
        for (oid, data) in records {
            let len = record_len(&bytes).unwrap().unwrap();
            prop_assert!(record_len(&bytes[..len.min(16)]).unwrap().is_none_or(|l| l == len));
            prop_assert!(record_len(&bytes[..len.min(24)]).unwrap().is_none_or(|l| l == len));
            prop_assert_eq!(bytes.clone().split_to(len).len(), len);
            prop_assert_eq!(take_record(&mut bytes), Ok(Record { oid: Oid(oid), data }));
        }
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = Bytes::from(bytes);
        while take_record(&mut bytes).is_ok() {}
        let _ = take_meta(&mut bytes);
    }

    /// Whatever one byte of a file becomes: it opens, or is called damaged; no panic, and no
    /// transaction before the damage is lost.
    #[test]
    fn one_wrong_byte(at in 4usize..430, byte: u8) {
        let disk = MemoryDisk::new();
        example(&mut open(&disk));
        let file = disk.open(Path::new(DATA), Open::Write).unwrap();
        let before = read_all(&disk, Path::new(DATA)).unwrap();
        file.write_at(&[byte], (at % before.len()) as u64).unwrap();
        if let Ok((storage, _)) = open_as(&disk, Extent::Whole) {
            let reader = storage.reader();
            for oid in 0..3 {
                for tid in [5, 15, 25, 35, 45] {
                    let _ = reader.load_before(Oid(oid), Tid(tid), Access::Cached);
                }
            }
            let mut iterator = reader.transactions(Tid(0), Tid::MAX).unwrap();
            while let Ok(Some(stored)) = iterator.advance() {
                let _ = iterator.records(&stored, |_| Ok::<_, StorageError>(()));
            }
        }
    }

    /// The same operations through the index file, a rewind and a reopening give the same state.
    #[test]
    fn index_agrees_with_a_scan(steps in proptest::collection::vec(
        (0u64..6, 0u8..8), 1..40))
    {
        let disk = MemoryDisk::new();
        let mut storage = open(&disk);
        let mut tid = 0u64;
        for (oid, what) in steps {
            tid += 10;
            match what {
                0 => { storage.reader().merge_index(1, &|_| Ok(())).unwrap(); }
                1 => { storage.rewind(Tid(tid.saturating_sub(25))).unwrap(); }
                2 => { storage = open(&disk); }
                _ => { storage.append(&transaction(tid, &[(oid, "x"), (oid + 1, "y")])).unwrap(); }
            }
            let fresh = MemoryDisk::new();
            let bytes = read_all(&disk, Path::new(DATA)).unwrap();
            fresh.open(Path::new(DATA), Open::Create).unwrap().write_at(&bytes, 0).unwrap();
            let scanned = open(&fresh);
            prop_assert_eq!(scanned.mark(), storage.mark());
            prop_assert_eq!(scanned.reader().len(), storage.reader().len());
            for oid in 0..8 {
                prop_assert_eq!(
                    scanned.reader().committed_serial(Oid(oid), Access::Cached).unwrap(),
                    storage.reader().committed_serial(Oid(oid), Access::Cached).unwrap()
                );
            }
        }
    }
}

/// As `fsIndex.save` writes it, but for the opcodes: it may write a shorter length and a shorter
/// position.
#[test]
fn pythons_index_is_written_of_what_is_in_the_index_file() {
    let disk = MemoryDisk::new();
    let mut storage = open(&disk);
    let reader = storage.reader();
    assert!(!reader.write_python_index().unwrap());
    storage.append(&transaction(1, &[(0xFFFF, "a"), (0x10000, "b")])).unwrap();
    assert!(!reader.write_python_index().unwrap());
    assert!(reader.merge_index(1, &|_| Ok(())).unwrap() && reader.write_python_index().unwrap());
    let expected: &[&[u8]] = &[
        b"\x80\x03\x8a\x09",
        &reader.size().to_le_bytes(),
        b"\0.",
        b"\x80\x03C\x06\0\0\0\0\0\0B\x08\0\0\0\xff\xff\0\0\0\0\0\x2a\x86.",
        b"\x80\x03C\x06\0\0\0\0\0\x01B\x08\0\0\0\0\0\0\0\0\0\0\x55\x86.",
        b"\x80\x03N.",
    ];
    let path = Path::new("/db/Data.fs.index");
    assert_eq!(read_all(&disk, path).unwrap(), expected.concat());
    assert!(!disk.exists(Path::new("/db/Data.fs.index.index_tmp")).unwrap());

    // It goes with what it describes.
    storage.rewind(Tid::NONE).unwrap();
    assert!(!disk.exists(path).unwrap());
}
