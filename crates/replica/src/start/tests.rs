//! Tests of how a node begins.

use std::sync::atomic::{AtomicUsize, Ordering};

use standby_filestorage::{BLOCK, Record, RecordData, Repair, Transaction, TransactionMeta};
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;
use standby_types::{Oid, Tid};

use super::*;
use crate::start::ground::Ground;

/// Found by a simulation: until its first restart a node could not repair anything.
#[test]
fn row_28_a_new_node_mends_its_file_too() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
    let text =
        "<zeo>\n address 127.0.0.1:1\n</zeo>\n<filestorage>\n path /Data.fs\n</filestorage>\n";
    let asked = Arc::new(AtomicUsize::new(0));
    let (times, shared) = (asked.clone(), disk.clone());
    let repair: Repair = Arc::new(move |block| {
        times.fetch_add(1, Ordering::Relaxed);
        let mut bytes = vec![0; BLOCK as usize];
        let file = shared.open(Path::new("/intact"), Open::Read).ok()?;
        file.read_at(&mut bytes, block.offset).ok()?;
        Some(bytes)
    });
    let mut ground = Ground::new(disk.clone(), text);
    ground.repairers.insert("1".to_owned(), repair);
    let prepared = prepare(&ground.place(), Beginning::Bootstrap).unwrap();
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
