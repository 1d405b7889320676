//! A data file: opened with recovery, walked forwards and backwards, every object loaded, a
//! transaction appended, and opened again. If only its tids do not grow, it opens after it got new
//! ones.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use standby_filestorage::{
    Access, Extent, FileStorage, Magic, Record, RecordData, StorageError, Transaction,
    TransactionMeta, new_tids, write_renumbered,
};
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, Oid, Tid};

fn open(disk: &MemoryDisk, path: &Path) -> Result<FileStorage, StorageError> {
    let (disk, index) = (Arc::new(disk.clone()), Path::new("/state/1.index"));
    let opened = FileStorage::open(disk, path, index, Magic::Fs30, Extent::Whole, &mut |_, _| ());
    Ok(opened?.0)
}

fn look(storage: &FileStorage) -> Result<(), StorageError> {
    let reader = storage.reader();
    let mut transactions = reader.transactions(Tid::NONE, Tid::MAX)?;
    while let Some(stored) = transactions.advance()? {
        transactions.records(&stored, |record| {
            // Damage is an error, not a panic.
            let _ = reader.load_before(record.oid, Tid::MAX, Access::Blocking);
            let _ = reader.history(record.oid, 3);
            Ok::<_, StorageError>(())
        })?;
        let _ = reader.undo_objects(stored.meta.tid);
    }
    let mut backwards = reader.backwards();
    while backwards.step()?.is_some() {}
    Ok(())
}

fn renumber(disk: &MemoryDisk, path: &Path) -> Result<(), StorageError> {
    let (shared, copy): (Arc<dyn Disk>, _) = (Arc::new(disk.clone()), Path::new("/db/copy"));
    let plan = new_tids(disk, path, &mut |_, _| ())?;
    write_renumbered(&shared, path, &plan, copy, &mut |_| (), &mut |_, _| ())?;
    disk.rename(copy, path).unwrap();
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let (disk, path) = (MemoryDisk::new(), Path::new("/db/Data.fs"));
    let file = disk.open(path, Open::Create).unwrap();
    file.write_at(b"FS30", 0).unwrap();
    file.write_at(data, 4).unwrap();
    let opened = match open(&disk, path) {
        Err(StorageError::TimeWentBack { .. }) => {
            if renumber(&disk, path).is_err() {
                return;
            }
            Ok(open(&disk, path).expect("a file with new tids opens"))
        }
        opened => opened,
    };
    let Ok(mut storage) = opened else { return };
    let _ = look(&storage);
    let tid = storage.mark().tid.next();
    if tid > Tid::MAX {
        return;
    }
    let (user, description, extension) = Default::default();
    let meta = TransactionMeta { tid, status: b' ', user, description, extension };
    let data = RecordData::Data(Bytes::from_static(b"data"));
    let records = vec![Record { oid: Oid(1), data }];
    storage.append(&Transaction { meta, records }).expect("a file that opens can be written");
    drop(storage);
    let again = open(&disk, path).expect("a file that was written opens");
    assert_eq!(again.mark().tid, tid);
    let loaded = again.reader().load_before(Oid(1), Tid::MAX, Access::Blocking);
    assert_eq!(loaded.unwrap().unwrap().data, &b"data"[..]);
});
