//! The index file.
//!
//! ```text
//!  0  "SBYINDEX"                                  8
//!  8  position up to which Data.fs is indexed     8
//! 16  tid of the transaction that ends there      8
//! 24  number of entries                           8
//! 32  CRC-32C of bytes 0..32                      4
//! 36  zero                                        4
//! 40  entries: oid 8, position 8; ascending by oid
//! ```

use std::io;
use std::path::{Path, PathBuf};

use standby_types::disk::Mapped;
use standby_types::{Disk, Oid, Position, Tid};

use super::{Growing, write_in_place};
use crate::file::format::number;
use crate::file::mark::Mark;
use crate::room::{Need, Room};

const MAGIC: &[u8; 8] = b"SBYINDEX";
const HEADER: usize = 40;
const ENTRY: usize = 16;
/// So many entries are a megabyte.
const MEGABYTE: u64 = 1 << 16;

pub(crate) struct Sorted {
    bytes: Mapped,
    len: usize,
    pub mark: Mark,
}

impl Sorted {
    /// Opens an index file; `None` if there is none, or it is not whole.
    pub fn open(disk: &dyn Disk, path: &Path) -> Option<Sorted> {
        let bytes = disk.map(path).ok()?;
        let all = (*bytes).as_ref();
        let header = all.get(..HEADER)?;
        let sum = u32::from_be_bytes(header[32..36].try_into().ok()?);
        if &header[..8] != MAGIC || crc32c::crc32c(&header[..32]) != sum {
            return None;
        }
        let mark = Mark { position: Position(number(header, 8)), tid: Tid(number(header, 16)) };
        let len = usize::try_from(number(header, 24)).ok()?;
        if len.checked_mul(ENTRY)?.checked_add(HEADER)? != all.len() {
            return None;
        }
        Some(Sorted { bytes, len, mark })
    }

    /// Bytes of an index file with so many entries.
    pub fn size_of(entries: u64) -> u64 {
        HEADER as u64 + entries * ENTRY as u64
    }

    /// Writes an index file and opens it. Nothing of it is left if it cannot be written.
    pub fn write(
        disk: &dyn Disk,
        path: &Path,
        mark: Mark,
        entries: impl Iterator<Item = (Oid, Position)>,
        room: Room<'_>,
    ) -> io::Result<Sorted> {
        let temporary = PathBuf::from(format!("{}.new", path.display()));
        write_in_place(disk, &temporary, path, |file| {
            let mut growing = Growing::new(file.clone(), HEADER as u64);
            let mut count = 0u64;
            for (oid, position) in entries {
                growing.put(&oid.to_bytes())?;
                growing.put(&position.to_bytes())?;
                count += 1;
                if count.is_multiple_of(MEGABYTE) {
                    room(Need::Next)?;
                }
            }
            growing.flush()?;
            let mut header = Vec::with_capacity(HEADER);
            header.extend_from_slice(MAGIC);
            header.extend_from_slice(&mark.position.to_bytes());
            header.extend_from_slice(&mark.tid.to_bytes());
            header.extend_from_slice(&count.to_be_bytes());
            header.extend_from_slice(&crc32c::crc32c(&header).to_be_bytes());
            header.extend_from_slice(&[0; 4]);
            file.write_at(&header, 0)
        })?;
        Sorted::open(disk, path)
            .ok_or_else(|| io::Error::other("the index file just written cannot be read back"))
    }

    pub fn len(&self) -> u64 {
        self.len as u64
    }

    pub fn get(&self, oid: Oid) -> Option<Position> {
        let at = self.lower_bound(oid);
        (at < self.len && self.oid(at) == oid).then(|| self.position(at))
    }

    pub fn at_or_above(&self, oid: Oid) -> Option<Oid> {
        let at = self.lower_bound(oid);
        (at < self.len).then(|| self.oid(at))
    }

    pub fn highest(&self) -> Option<Oid> {
        self.len.checked_sub(1).map(|last| self.oid(last))
    }

    pub fn iter(&self) -> impl Iterator<Item = (Oid, Position)> + '_ {
        (0..self.len).map(|at| (self.oid(at), self.position(at)))
    }

    /// The first entry whose oid is not below `oid`.
    fn lower_bound(&self, oid: Oid) -> usize {
        let (mut low, mut high) = (0, self.len);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.oid(middle) < oid { low = middle + 1 } else { high = middle }
        }
        low
    }

    fn oid(&self, at: usize) -> Oid {
        Oid(number((*self.bytes).as_ref(), HEADER + at * ENTRY))
    }

    fn position(&self, at: usize) -> Position {
        Position(number((*self.bytes).as_ref(), HEADER + at * ENTRY + 8))
    }
}
