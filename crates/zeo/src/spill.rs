//! Byte strings that are kept in memory up to a limit, and beyond it in a temporary file.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use standby_types::File;
use standby_types::disk::read_full;

/// Makes a temporary file; it vanishes when it is dropped.
pub type MakeSpill = Arc<dyn Fn() -> io::Result<Arc<dyn File>> + Send + Sync>;

/// Bytes for the file that are written together: a call for each of a million short strings would
/// take most of the time.
const TOGETHER: usize = 256 << 10;

/// See the module.
pub struct Spill {
    limit: usize,
    in_memory: usize,
    file: Option<Spilled>,
    make: MakeSpill,
}

struct Spilled {
    file: Arc<dyn File>,
    /// Length of the file.
    written: u64,
    /// What comes next in it.
    tail: Vec<u8>,
}

/// Where a byte string is kept.
#[derive(Clone, Debug)]
pub struct Slot(Kept);

#[derive(Clone, Debug)]
enum Kept {
    Memory(Bytes),
    Spilled { offset: u64, len: usize },
}

impl Spill {
    /// Nothing kept yet; at most `limit` bytes will be in memory.
    pub fn new(limit: usize, make: MakeSpill) -> Spill {
        Spill { limit, in_memory: 0, file: None, make }
    }

    /// Keeps `bytes`.
    pub fn put(&mut self, bytes: Bytes) -> io::Result<Slot> {
        if self.in_memory + bytes.len() <= self.limit {
            self.in_memory += bytes.len();
            return Ok(Slot(Kept::Memory(bytes)));
        }
        if self.file.is_none() {
            self.file = Some(Spilled { file: (self.make)()?, written: 0, tail: Vec::new() });
        }
        let spilled = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let offset = spilled.written + spilled.tail.len() as u64;
        let slot = Kept::Spilled { offset, len: bytes.len() };
        spilled.tail.extend_from_slice(&bytes);
        if spilled.tail.len() >= TOGETHER {
            spilled.file.write_at(&spilled.tail, spilled.written)?;
            spilled.written += spilled.tail.len() as u64;
            spilled.tail.clear();
        }
        Ok(Slot(slot))
    }

    /// What was kept.
    pub fn get(&self, slot: &Slot) -> io::Result<Bytes> {
        match (&slot.0, &self.file) {
            (Kept::Memory(bytes), _) => Ok(bytes.clone()),
            (Kept::Spilled { offset, len }, Some(spilled)) => {
                if let Some(at) = offset.checked_sub(spilled.written) {
                    let bytes =
                        usize::try_from(at).ok().and_then(|at| spilled.tail.get(at..at + len));
                    return bytes
                        .map(Bytes::copy_from_slice)
                        .ok_or(io::ErrorKind::UnexpectedEof.into());
                }
                let mut bytes = vec![0; *len];
                if read_full(&*spilled.file, &mut bytes, *offset)? < *len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(bytes.into())
            }
            (Kept::Spilled { .. }, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Bytes that are kept in memory.
    pub fn held(&self) -> usize {
        self.in_memory + self.file.as_ref().map_or(0, |spilled| spilled.tail.capacity())
    }

    /// A byte string is not needed any more; the file shrinks only by [`Spill::clear`].
    pub fn release(&mut self, slot: Slot) {
        if let Kept::Memory(bytes) = slot.0 {
            self.in_memory -= bytes.len();
        }
    }

    /// Nothing is needed any more.
    pub fn clear(&mut self) {
        self.in_memory = 0;
        self.file = None;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use standby_types::Disk;
    use standby_types::disk::{Open, read_all};
    use standby_types::memory::MemoryDisk;

    use super::*;

    #[test]
    fn what_is_not_written_yet_is_read_as_well() {
        let disk = MemoryDisk::new();
        let path = Path::new("/spill");
        let of_spill = disk.clone();
        let mut spill = Spill::new(10, Arc::new(move || of_spill.open(path, Open::Create)));
        let strings: Vec<_> = (0..5000u32)
            .map(|n| Bytes::from(n.to_be_bytes().repeat(1 + n as usize % 50)))
            .collect();
        let slots: Vec<_> = strings.iter().map(|bytes| spill.put(bytes.clone()).unwrap()).collect();
        for (bytes, slot) in strings.iter().zip(&slots) {
            assert_eq!(spill.get(slot).unwrap(), bytes);
        }
        let total = strings.iter().map(Bytes::len).sum::<usize>();
        let written = read_all(&disk, path).unwrap().len();
        assert!(written > TOGETHER && total - written < TOGETHER, "{written} of {total}");
        spill.clear();
        assert!(spill.get(&slots[4999]).is_err());
    }
}
