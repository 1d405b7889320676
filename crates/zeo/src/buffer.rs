//! What a client has stored since `tpc_begin`.
//!
//! Data beyond [`SPILL_ABOVE`] go to a temporary file, so that a transaction of any size costs
//! bounded memory.

use std::collections::HashMap;
use std::io;

use bytes::Bytes;
use standby_types::{Oid, Tid};

use crate::spill::{MakeSpill, Slot, Spill};

/// Bytes of a transaction that are kept in memory.
pub const SPILL_ABOVE: usize = 4 << 20;

/// What a transaction says about itself. Each text has at most 65 535 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Who commits.
    pub user: Bytes,
    /// What is done.
    pub description: Bytes,
    /// A pickled dict, or nothing.
    pub extension: Bytes,
}

/// A store.
#[derive(Clone, Debug)]
pub struct Write {
    /// The object.
    pub oid: Oid,
    /// The serial of the revision that the change is based on; zero for a new object.
    pub serial: Tid,
    slot: Slot,
}

/// A transaction before it is finished. Of several stores of one object the last one counts.
pub struct Buffer {
    /// Its head.
    pub meta: Meta,
    writes: Vec<Write>,
    by_oid: HashMap<Oid, usize>,
    /// Objects that must not have changed since they were read.
    checks: Vec<(Oid, Tid)>,
    spill: Spill,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("writes", &self.writes.len()).finish_non_exhaustive()
    }
}

impl Buffer {
    /// An empty transaction.
    pub fn new(meta: Meta, make_spill: MakeSpill) -> Buffer {
        Buffer {
            meta,
            writes: Vec::new(),
            by_oid: HashMap::new(),
            checks: Vec::new(),
            spill: Spill::new(SPILL_ABOVE, make_spill),
        }
    }

    /// Adds a store.
    pub fn store(&mut self, oid: Oid, serial: Tid, data: Bytes) -> io::Result<()> {
        let slot = self.spill.put(data)?;
        let write = Write { oid, serial, slot };
        match self.by_oid.get(&oid) {
            Some(at) => self.writes[*at] = write,
            None => {
                self.by_oid.insert(oid, self.writes.len());
                self.writes.push(write);
            }
        }
        Ok(())
    }

    /// Adds a check.
    pub fn check(&mut self, oid: Oid, serial: Tid) {
        self.checks.push((oid, serial));
    }

    /// The stores, in the order in which the objects first came.
    pub fn writes(&self) -> &[Write] {
        &self.writes
    }

    /// The checks.
    pub fn checks(&self) -> &[(Oid, Tid)] {
        &self.checks
    }

    /// The data of a store.
    pub fn data(&self, write: &Write) -> io::Result<Bytes> {
        self.spill.get(&write.slot)
    }

    /// The data of the store of `oid`.
    pub fn data_of(&self, oid: Oid) -> io::Result<Bytes> {
        let at = self.by_oid.get(&oid).ok_or(io::ErrorKind::NotFound)?;
        self.data(&self.writes[*at])
    }

    /// The serial that the client's change of `oid` is based on.
    pub fn serial_of(&self, oid: Oid) -> Option<Tid> {
        self.by_oid.get(&oid).map(|at| self.writes[*at].serial)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use standby_types::Disk;
    use standby_types::disk::Open;
    use standby_types::memory::MemoryDisk;

    use super::*;

    #[test]
    fn large_transactions_spill_and_come_back() {
        let disk = MemoryDisk::new();
        let spill_disk = disk.clone();
        let make: MakeSpill = Arc::new(move || spill_disk.open(Path::new("/spill"), Open::Create));
        let mut buffer = Buffer::new(Meta::default(), make);
        let data = |i: u64| Bytes::from(vec![i as u8; 1 << 20]);
        for i in 0..8 {
            buffer.store(Oid(i), Tid(0), data(i)).unwrap();
        }
        buffer.store(Oid(2), Tid(9), Bytes::from_static(b"resolved")).unwrap();
        assert_eq!(disk.list(Path::new("/")).unwrap().len(), 1);
        assert_eq!(buffer.writes().len(), 8);
        for write in buffer.writes() {
            let expected = match write.oid {
                Oid(2) => Bytes::from_static(b"resolved"),
                oid => data(oid.0),
            };
            assert_eq!(buffer.data(write).unwrap(), expected);
        }
        assert_eq!(buffer.serial_of(Oid(2)), Some(Tid(9)));
    }
}
