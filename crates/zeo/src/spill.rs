//! Byte strings that are kept in memory up to a limit, and beyond it in a temporary file.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use standby_types::File;
use standby_types::disk::read_full;

/// Makes a temporary file; it vanishes when it is dropped.
pub type MakeSpill = Arc<dyn Fn() -> io::Result<Arc<dyn File>> + Send + Sync>;

/// See the module.
pub struct Spill {
    limit: usize,
    in_memory: usize,
    file: Option<(Arc<dyn File>, u64)>,
    make: MakeSpill,
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
            self.file = Some(((self.make)()?, 0));
        }
        let (file, end) = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
        file.write_at(&bytes, *end)?;
        let slot = Kept::Spilled { offset: *end, len: bytes.len() };
        *end += bytes.len() as u64;
        Ok(Slot(slot))
    }

    /// What was kept.
    pub fn get(&self, slot: &Slot) -> io::Result<Bytes> {
        match (&slot.0, &self.file) {
            (Kept::Memory(bytes), _) => Ok(bytes.clone()),
            (Kept::Spilled { offset, len }, Some((file, _))) => {
                let mut bytes = vec![0; *len];
                if read_full(&**file, &mut bytes, *offset)? < *len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(bytes.into())
            }
            (Kept::Spilled { .. }, None) => Err(io::ErrorKind::NotFound.into()),
        }
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
