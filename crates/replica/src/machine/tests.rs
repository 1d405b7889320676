use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use standby_filestorage::{Access, Extent, Magic, Mark, RecordData, put_meta, put_record};
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, NodeId};

use super::*;

fn replica(disk: &MemoryDisk) -> Replica {
    let arc: Arc<dyn Disk> = Arc::new(disk.clone());
    let (storage, _) = FileStorage::open(
        arc,
        Path::new("/db/Data.fs"),
        Path::new("/state/1.index"),
        Magic::Fs30,
        Extent::Whole,
        &mut |_, _| (),
    )
    .unwrap();
    let dir = BlobDir::open(Arc::new(disk.clone()), Path::new("/blobs")).unwrap();
    let blobs = BTreeMap::from([("1".into(), dir)]);
    let checkpoint = Checkpoint {
        acknowledged: BTreeMap::new(),
        settings: Settings::default(),
        cluster_id: "c".into(),
        index: LogIndex(1),
        term: Term(1),
        log_begins_here: false,
        membership: Membership::default(),
        storages: BTreeMap::from([("1".into(), StoragePoint::of(Mark::START, Oid(0)))]),
    };
    let spill = disk.clone();
    let make_spill: MakeSpill = Arc::new(move || spill.open(Path::new("/spill"), Open::Create));
    Replica::new(&checkpoint, BTreeMap::from([("1".into(), storage)]), blobs, make_spill)
}

fn head(tid: u64) -> Bytes {
    let mut out = BytesMut::new();
    put_meta(&TransactionMeta::new(Tid(tid)), &mut out);
    out.freeze()
}

fn records(list: &[(u64, usize)]) -> Bytes {
    let mut out = BytesMut::new();
    for (oid, len) in list {
        let data = RecordData::Data(vec![*oid as u8; *len].into());
        put_record(&Record { oid: Oid(*oid), data }, &mut out);
    }
    out.freeze()
}

fn ending(tid: u64, parts: &[u64], rest: Bytes) -> ClosingEntry {
    ClosingEntry {
        storage: "1".into(),
        token: None,
        head: head(tid),
        parts: parts.iter().map(|i| LogIndex(*i)).collect(),
        blobs: Vec::new(),
        rest,
    }
}

fn committed(index: u64, term: u64, ending: ClosingEntry) -> Committed {
    let data = Command::Transaction(ending).encode();
    Committed::Command(LogIndex(index), Term(term), data)
}

fn closing(index: u64, term: u64, tid: u64, parts: &[u64], rest: Bytes) -> Committed {
    committed(index, term, ending(tid, parts, rest))
}

fn named(index: u64, tid: u64, token: TransactionToken) -> Committed {
    let ending = ending(tid, &[], records(&[(1, 1)]));
    committed(index, 1, ClosingEntry { token: Some(token), ..ending })
}

fn part(index: u64, term: u64, bytes: Bytes) -> Committed {
    Committed::Command(LogIndex(index), Term(term), Command::Part(bytes).encode())
}

fn length_of(replica: &Replica, oid: u64) -> usize {
    let reader = replica.storage("1").unwrap().reader();
    reader.load_before(Oid(oid), Tid::MAX, Access::Blocking).unwrap().unwrap().data.len()
}

fn apply(replica: &mut Replica, entry: &Committed) -> Option<Applied> {
    match replica.apply(entry).unwrap() {
        Done::Applied(applied) => Some(applied),
        Done::Nothing => None,
        Done::Pack(storage) => panic!("a pack of {storage}"),
    }
}

#[test]
fn entries_are_applied_once() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let entry = closing(2, 1, 10, &[], records(&[(1, 5), (2, 6)]));
    let applied = apply(&mut replica, &entry).unwrap();
    assert_eq!((applied.tid, &applied.oids[..]), (Tid(10), &[Oid(1), Oid(2)][..]));
    assert!(apply(&mut replica, &entry).is_none());
    // The same transaction again under another index: it came from a peer before.
    assert!(apply(&mut replica, &closing(3, 1, 10, &[], records(&[(1, 5)]))).is_none());
    assert_eq!(replica.index(), LogIndex(3));
    assert_eq!(replica.ceilings()["1"], Oid(2));
}

#[test]
fn what_became_of_a_transaction_is_known_after_a_restart_and_a_catch_up() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let token = |number| TransactionToken { client: [1; 16], number };
    let known = |replica: &Replica, number| replica.outcome("1", token(number), Tid::NONE);
    replica.apply(&named(2, 10, token(1))).unwrap();
    assert_eq!(known(&replica, 1), Outcome::Committed(Tid(10)));
    assert_eq!(known(&replica, 2), Outcome::NotCommitted);
    let checkpoint = replica.checkpoint().unwrap();
    // The data file has the transaction already; what is known of it comes from the log alone.
    replica.apply(&named(3, 11, token(2))).unwrap();
    *lock(&replica.storages["1"].outcomes) = checkpoint.storages["1"].outcomes.clone();
    replica.apply(&named(4, 11, token(2))).unwrap();
    assert_eq!(known(&replica, 2), Outcome::Committed(Tid(11)));
    assert_eq!(known(&replica, 3), Outcome::NotCommitted);
    // A node that catches up gets what the other one knows; of an old version it gets nothing.
    let point = |index| AppliedPoint { index: LogIndex(index), ..replica.point() };
    let (first, second) = (point(7), point(8));
    let mut theirs = Outcomes::default();
    theirs.committed(token(4), Tid(11));
    replica.set_outcomes("1", theirs).unwrap();
    replica.caught_up(&first).unwrap();
    assert_eq!(known(&replica, 4), Outcome::Committed(Tid(11)));
    replica.caught_up(&second).unwrap();
    assert_eq!(known(&replica, 4), Outcome::Forgotten);
    assert_eq!(replica.outcome("1", token(5), Tid(11)), Outcome::NotCommitted);
}

#[test]
fn long_transactions_come_in_parts_that_interleave() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let long = records(&[(1, 3 << 20), (2, 100), (3, 30 << 20)]);
    let (mut index, mut parts, mut rest) = (2, Vec::new(), long);
    while rest.len() > 1 << 20 {
        replica.apply(&part(index, 1, rest.split_to(1 << 20))).unwrap();
        parts.push(index);
        assert!(replica.checkpoint().is_none() && replica.point().open_parts);
        replica.apply(&closing(index + 1, 1, index, &[], records(&[(9, index as usize)]))).unwrap();
        index += 2;
    }
    let applied = apply(&mut replica, &closing(index, 1, 1000, &parts, rest)).unwrap();
    assert_eq!(applied.oids.len(), 3);
    assert_eq!((length_of(&replica, 1), length_of(&replica, 3)), (3 << 20, 30 << 20));
    assert!(replica.checkpoint().is_some());
}

#[test]
fn parts_of_a_former_leader_are_forgotten() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    replica.apply(&part(2, 1, records(&[(1, 100)]))).unwrap();
    replica.apply(&Committed::Empty(LogIndex(3), Term(2))).unwrap();
    assert!(replica.checkpoint().is_some());
}

#[test]
fn catch_up_and_log_may_overlap() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let meta = take_meta(&mut head(10)).unwrap();
    let record = Record { oid: Oid(4), data: RecordData::Data(Bytes::from_static(b"x")) };
    let mut copying = replica.begin_copy("1", &meta).unwrap();
    copying.record(&record, &[]).unwrap();
    let copied = copying.finish().unwrap().unwrap();
    assert_eq!(copied.tid, Tid(10));
    let mut target = replica.point();
    (target.index, target.term) = (LogIndex(7), Term(3));
    target.membership = Membership::founded_by(standby_consensus::Member {
        id: NodeId(1),
        name: "n1".into(),
        group: "g".into(),
        peer_address: "h:1".into(),
        witness: false,
    });
    replica.caught_up(&target).unwrap();
    assert!(apply(&mut replica, &closing(7, 3, 10, &[], records(&[(4, 1)]))).is_none());
    assert!(apply(&mut replica, &closing(8, 3, 11, &[], records(&[(4, 1)]))).is_some());
    assert_eq!(replica.point().membership, target.membership);
}

/// Found by a simulation: a second checkpoint, made before the log had begun anew, did not say so.
#[test]
fn every_checkpoint_says_that_the_log_is_to_begin_anew_until_it_has() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    assert!(!replica.checkpoint().unwrap().log_begins_here);
    let target = AppliedPoint { index: LogIndex(7), term: Term(3), ..replica.point() };
    replica.caught_up(&target).unwrap();
    for _ in 0..2 {
        assert!(replica.checkpoint().unwrap().log_begins_here);
    }
    replica.apply(&Committed::Empty(LogIndex(8), Term(3))).unwrap();
    assert!(!replica.checkpoint().unwrap().log_begins_here);
}

/// What is to be packed survives a restart, until it is done.
#[test]
fn packs_stand_in_the_checkpoint() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let command = |time| {
        let command = Command::Pack { storage: "1".into(), time: Tid(time), gc: true };
        Committed::Command(LogIndex(time), Term(1), command.encode())
    };
    for time in [5, 6] {
        assert!(matches!(replica.apply(&command(time)).unwrap(), Done::Pack(name) if name == "1"));
    }
    let packs = |replica: &Replica| replica.checkpoint().unwrap().storages["1"].packs.clone();
    let job = |time| Job { time: Tid(time), gc: true };
    assert_eq!(packs(&replica), [job(5), job(6)]);
    assert_eq!(replica.next_pack("1"), Some(job(5)));
    replica.pack_ended("1");
    assert_eq!(packs(&replica), [job(6)]);
}

#[test]
fn unknown_storages_and_garbage_are_errors() {
    let disk = MemoryDisk::new();
    let mut replica = replica(&disk);
    let ending = ClosingEntry { storage: "2".into(), ..ending(1, &[], Bytes::new()) };
    let entry = Committed::Command(LogIndex(2), Term(1), Command::Transaction(ending).encode());
    assert!(matches!(replica.apply(&entry), Err(ApplyError::UnknownStorage(_))));
    let entry = Committed::Command(LogIndex(2), Term(1), Bytes::from_static(b"?"));
    assert!(matches!(replica.apply(&entry), Err(ApplyError::Unfit { index: LogIndex(2), .. })));
    let cut = records(&[(1, 50)]).slice(..30);
    assert!(matches!(
        replica.apply(&closing(2, 1, 10, &[], cut)),
        Err(ApplyError::Unfit { index: LogIndex(2), .. })
    ));
}

#[test]
fn blobs_are_there_with_their_transaction_and_replayed() {
    let disk = MemoryDisk::new();
    let mut first = replica(&disk);
    let transfer = standby_types::Transfer([3; 16]);
    let dir = BlobDir::open(Arc::new(disk.clone()), Path::new("/blobs")).unwrap();
    let mut staging = dir.stage(transfer).unwrap();
    staging.write(b"blob").unwrap();
    let (upload, staged) = staging.finish().unwrap();
    staged.keep();
    let blob = |source| Blob { oid: Oid(1), source };
    let entry = |index, tid, blobs: Vec<Blob>| {
        let ending = ending(tid, &[], records(&[(1, 5)]));
        committed(index, 1, ClosingEntry { blobs, ..ending })
    };
    let entries = [
        entry(2, 10, vec![blob(BlobSource::Upload(upload))]),
        entry(3, 11, vec![blob(BlobSource::Copy(Tid(10)))]),
    ];
    for found in &entries {
        apply(&mut first, found).unwrap();
    }
    for tid in [10, 11] {
        assert!(dir.has(Oid(1), Tid(tid)).unwrap());
    }
    assert!(!dir.has_staged(transfer).unwrap());
    drop(first);
    // After a crash without a checkpoint the data file is new again, and the blobs are there or
    // staged.
    disk.remove(Path::new("/db/Data.fs")).unwrap();
    let mut second = replica(&disk);
    for found in &entries {
        apply(&mut second, found).unwrap();
    }
    // A transaction that a peer has sent before: its upload is not needed.
    let mut staging = dir.stage(transfer).unwrap();
    staging.write(b"blob").unwrap();
    staging.finish().unwrap().1.keep();
    assert!(apply(&mut second, &entry(4, 11, vec![blob(BlobSource::Upload(upload))])).is_none());
    assert!(!dir.has_staged(transfer).unwrap());
    // One that is nowhere stops the node: it would differ from the others.
    let missing = entry(5, 12, vec![Blob { oid: Oid(7), source: BlobSource::Upload(upload) }]);
    assert!(matches!(second.apply(&missing), Err(ApplyError::Storage(_))));
}

/// What no node can apply stops all of them, until all are told to leave it out. What can be
/// applied is applied.
#[test]
fn an_entry_that_no_node_can_apply_is_left_out_if_that_is_decided() {
    let unfit = [
        Committed::Command(LogIndex(3), Term(1), Bytes::from_static(b"?")),
        closing(3, 1, u64::MAX, &[2], records(&[(1, 5)])),
        closing(3, 1, 30, &[2], Bytes::from_static(b"no record, nor the beginning of one ......")),
    ];
    for entry in unfit {
        let part = Command::Part(records(&[(7, 5)])).encode();
        let part = Committed::Command(LogIndex(2), Term(1), part);
        for (skipped, is_left_out) in [((3, 1), true), ((3, 2), false), ((2, 1), false)] {
            let disk = MemoryDisk::new();
            let skipped = (LogIndex(skipped.0), Term(skipped.1));
            let mut replica = replica(&disk).skipping(BTreeSet::from([skipped]));
            assert!(matches!(replica.apply(&part), Ok(Done::Nothing)));
            match replica.apply(&entry) {
                Ok(Done::Nothing) => assert!(is_left_out),
                Err(error) => {
                    let text = error.to_string();
                    assert!(!is_left_out && text.contains("skip-entry"), "{text}");
                    assert!(text.contains("--index 3 --term 1"), "{text}");
                    assert_eq!(replica.index(), LogIndex(2));
                    continue;
                }
                Ok(done) => panic!("{done:?}"),
            }
            if entry.point().0 == LogIndex(3)
                && !matches!(&entry, Committed::Command(_, _, data) if data == "?")
            {
                assert!(replica.checkpoint().is_some(), "its parts are not kept");
            }
            let next = closing(4, 2, 40, &[], records(&[(2, 5)]));
            assert!(matches!(replica.apply(&next), Ok(Done::Applied(_))));
            assert_eq!((replica.index(), replica.last_tids()["1"]), (LogIndex(4), Tid(40)));
            let reader = replica.storage("1").unwrap().reader();
            assert_eq!(reader.len(), 1, "nothing of it is there");
        }
    }
}

#[test]
fn what_this_machine_lacks_is_never_left_out() {
    let disk = MemoryDisk::new();
    let skipped = BTreeSet::from([(LogIndex(2), Term(1))]);
    let mut replica = replica(&disk).skipping(skipped);
    let ending = ClosingEntry { storage: "another".into(), ..ending(10, &[], Bytes::new()) };
    let entry = Command::Transaction(ending).encode();
    let entry = Committed::Command(LogIndex(2), Term(1), entry);
    assert!(matches!(replica.apply(&entry), Err(ApplyError::UnknownStorage(_))));
}
