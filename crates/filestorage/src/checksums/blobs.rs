//! Checksums of blobs, kept beside the data: what a disk gives back is compared with what was
//! written.
//!
//! ```text
//! NAME.blobs.sums    0   "SBB1"
//!                    4   records, one after the other; of two of one revision the later one counts:
//!    record          0   oid, 8
//!                    8   tid, 8
//!                    16  the first 8 bytes of the blob's SHA-256
//!                    24  CRC-32C of the 24 bytes before
//! ```
//!
//! A blob's SHA-256 is in the log, so each node knows what it should have, not what it happened to
//! write. The record of a blob is written when its name is durable: not before, for a start may
//! come between the two, and not after the checkpoint, for then the log does not name the blob
//! again. A blob that has none, because it is older than this file, gets one when it is read for
//! the first time. A file that is torn, or damaged itself, counts up to its first wrong record:
//! what follows is taken anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use standby_types::disk::{Open, read_all, replace};
use standby_types::{Disk, File, Oid, Tid};

const MAGIC: &[u8; 4] = b"SBB1";
const RECORD: usize = 28;

/// A revision of an object.
pub type BlobId = (Oid, Tid);

/// What has been found of damage to blobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobDamage {
    /// Those that are damaged, or missing, and could not be repaired.
    pub blobs: BTreeSet<BlobId>,
    /// How many were repaired since the start.
    pub repaired: u64,
}

/// The checksum of a blob with this SHA-256.
pub(crate) fn sum_of(sha256: &[u8; 32]) -> u64 {
    sha256.iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// The checksums of a directory of blobs.
pub(crate) struct BlobSums {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<BlobId, Known>,
    /// What is not in the file yet, and must not be: the blobs' names may not be durable.
    pending: BTreeSet<BlobId>,
    /// The file has records of what is known no more: it is written anew.
    stale: bool,
    file: Option<Arc<dyn File>>,
    /// Where the next record is written.
    end: u64,
    damage: BlobDamage,
    /// Those that are being fetched.
    repairing: BTreeSet<BlobId>,
}

#[derive(Clone, Copy)]
struct Known {
    sum: u64,
    /// It was right, or was written, since the start: what the system has in memory is trusted.
    seen: bool,
}

fn record((oid, tid): BlobId, sum: u64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..8].copy_from_slice(&oid.to_bytes());
    bytes[8..16].copy_from_slice(&tid.to_bytes());
    bytes[16..24].copy_from_slice(&sum.to_be_bytes());
    let check = crc32c::crc32c(&bytes[..24]);
    bytes[24..].copy_from_slice(&check.to_be_bytes());
    bytes
}

/// The records of a file, up to the first that is wrong, and where that one begins.
fn decode(bytes: &[u8]) -> (BTreeMap<BlobId, Known>, usize) {
    let mut known = BTreeMap::new();
    let Some(records) = bytes.strip_prefix(MAGIC) else { return (known, 0) };
    let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let mut end = MAGIC.len();
    for one in records.chunks_exact(RECORD) {
        if u64::from(crc32c::crc32c(&one[..24])) != number(&one[24..]) {
            break;
        }
        let id = (Oid(number(&one[..8])), Tid(number(&one[8..16])));
        known.insert(id, Known { sum: number(&one[16..24]), seen: false });
        end += RECORD;
    }
    (known, end)
}

impl BlobSums {
    /// Reads the file, if it is there and can be read; one that cannot is made anew.
    pub fn open(disk: Arc<dyn Disk>, path: &Path) -> io::Result<BlobSums> {
        let mut state = State::default();
        if disk.exists(path)? {
            let bytes = read_all(&*disk, path).unwrap_or_default();
            let (known, end) = decode(&bytes);
            state.known = known;
            state.stale = end < bytes.len() || end == 0;
            state.end = end as u64;
            if !state.stale {
                state.file = Some(disk.open(path, Open::Write)?);
            }
        }
        Ok(BlobSums { disk, path: path.to_owned(), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checksum that a blob should have.
    pub fn get(&self, id: BlobId) -> Option<u64> {
        self.state().known.get(&id).map(|known| known.sum)
    }

    /// All that are known.
    pub fn ids(&self) -> Vec<BlobId> {
        self.state().known.keys().copied().collect()
    }

    /// True if it was right, or was written, since the start.
    pub fn is_seen(&self, id: BlobId) -> bool {
        self.state().known.get(&id).is_some_and(|known| known.seen)
    }

    /// What the checksum of a blob should be; `seen`, if it is known to be so.
    pub fn note(&self, id: BlobId, sum: u64, seen: bool) {
        let mut state = self.state();
        let before = state.known.get(&id).copied();
        let same = before.filter(|before| before.sum == sum);
        let seen = seen || same.is_some_and(|before| before.seen);
        state.known.insert(id, Known { sum, seen });
        if same.is_none() {
            state.pending.insert(id);
        }
        if seen {
            state.damage.blobs.remove(&id);
        }
    }

    /// The blob is damaged, and nobody has it.
    pub fn note_damaged(&self, id: BlobId) {
        let mut state = self.state();
        state.damage.blobs.insert(id);
        if let Some(known) = state.known.get_mut(&id) {
            known.seen = false;
        }
    }

    /// True if nobody has tried to repair the blob, nor tries at the moment.
    pub fn is_news(&self, id: BlobId) -> bool {
        let state = self.state();
        !state.repairing.contains(&id) && !state.damage.blobs.contains(&id)
    }

    /// The blob is being fetched, or is not any more.
    pub fn note_repairing(&self, id: BlobId, begins: bool) {
        let repairing = &mut self.state().repairing;
        let _ = if begins { repairing.insert(id) } else { repairing.remove(&id) };
    }

    /// The blob was damaged.
    pub fn note_repaired(&self, id: BlobId, sum: u64) {
        self.note(id, sum, true);
        self.state().damage.repaired += 1;
    }

    /// The revisions are gone.
    pub fn forget(&self, ids: &[BlobId]) {
        let mut state = self.state();
        for id in ids {
            state.stale |= state.known.remove(id).is_some();
            state.damage.blobs.remove(id);
        }
    }

    /// What is known of damage.
    pub fn damage(&self) -> BlobDamage {
        self.state().damage.clone()
    }

    /// What has been noted since this was asked last; to be written when the blobs' names are
    /// durable.
    pub fn take_pending(&self) -> BTreeSet<BlobId> {
        std::mem::take(&mut self.state().pending)
    }

    /// They are to be made durable after all.
    pub fn put_back(&self, noted: BTreeSet<BlobId>) {
        self.state().pending.extend(noted);
    }

    /// Makes checksums durable. If that fails, the next call writes the file anew.
    pub fn write(&self, noted: &BTreeSet<BlobId>) -> io::Result<()> {
        let mut state = self.state();
        let written = self.write_as(&mut state, noted);
        state.stale |= written.is_err();
        written
    }

    fn write_as(&self, state: &mut State, noted: &BTreeSet<BlobId>) -> io::Result<()> {
        if noted.is_empty() && !state.stale {
            return Ok(());
        }
        let is_written = |id: &BlobId| !state.pending.contains(id);
        let known = |(id, known): (&BlobId, &Known)| is_written(id).then(|| record(*id, known.sum));
        if state.stale || state.file.is_none() {
            let records = state.known.iter().filter_map(known);
            let bytes = [MAGIC.to_vec(), records.flatten().collect()].concat();
            replace(&*self.disk, &self.path, &bytes)?;
            state.file = Some(self.disk.open(&self.path, Open::Write)?);
            state.end = bytes.len() as u64;
            state.stale = false;
            return Ok(());
        }
        let records = noted.iter().filter_map(|id| known((id, state.known.get(id)?)));
        let bytes: Vec<u8> = records.flatten().collect();
        if let Some(file) = &state.file {
            file.write_at(&bytes, state.end)?;
            file.sync()?;
        }
        state.end += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use standby_types::memory::MemoryDisk;

    use super::*;

    const ONE: BlobId = (Oid(1), Tid(1));
    const TWO: BlobId = (Oid(2), Tid(1));

    fn open(disk: &MemoryDisk) -> BlobSums {
        BlobSums::open(Arc::new(disk.clone()), Path::new("/1.blobs.sums")).unwrap()
    }

    fn sync(sums: &BlobSums) {
        sums.write(&sums.take_pending()).unwrap();
    }

    #[test]
    fn checksums_are_durable_when_they_are_synced() {
        let disk = MemoryDisk::new();
        let sums = open(&disk);
        sums.note(ONE, 7, true);
        sync(&sums);
        sums.note(TWO, 8, true);
        disk.crash();
        let sums = open(&disk);
        assert_eq!((sums.get(ONE), sums.get(TWO)), (Some(7), None));
        assert!(!sums.is_seen(ONE), "that was before the start");
        sums.note(TWO, 8, true);
        sums.note(ONE, 9, true);
        sync(&sums);
        disk.crash();
        let sums = open(&disk);
        assert_eq!((sums.get(ONE), sums.get(TWO)), (Some(9), Some(8)));
        // What comes in between waits for the next time, even if all is written anew.
        sums.note((Oid(3), Tid(3)), 1, true);
        let pending = sums.take_pending();
        sums.note((Oid(4), Tid(3)), 1, true);
        sums.forget(&[(Oid(3), Tid(3))]);
        sums.write(&pending).unwrap();
        assert_eq!(open(&disk).ids(), [ONE, TWO]);
        sums.forget(&[ONE, (Oid(4), Tid(3))]);
        sync(&sums);
        disk.crash();
        assert_eq!(open(&disk).ids(), [TWO]);
    }

    #[test]
    fn a_torn_or_damaged_file_counts_up_to_there() {
        let disk = MemoryDisk::new();
        let sums = open(&disk);
        let ids = [ONE, TWO, (Oid(3), Tid(9))];
        ids.iter().for_each(|id| sums.note(*id, 7, true));
        sync(&sums);
        let whole = read_all(&disk, Path::new("/1.blobs.sums")).unwrap();
        for at in 0..whole.len() {
            let before = at.saturating_sub(4) / RECORD;
            for damaged in [whole[..at].to_vec(), {
                let mut flipped = whole.clone();
                flipped[at] ^= 4;
                flipped
            }] {
                let disk = MemoryDisk::new();
                let path = Path::new("/1.blobs.sums");
                disk.open(path, Open::Create).unwrap().write_at(&damaged, 0).unwrap();
                let sums = open(&disk);
                let expected = if at < 4 { 0 } else { before };
                assert_eq!(sums.ids(), ids[..expected], "{at}");
                ids.iter().for_each(|id| sums.note(*id, 7, true));
                sync(&sums);
                assert_eq!(open(&disk).ids(), ids, "{at}");
            }
        }
    }
}
