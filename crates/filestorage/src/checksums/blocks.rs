//! Checksums of a data file, kept beside it: what a disk gives back is compared with what was
//! written.
//!
//! ```text
//! NAME.sums    0    "SBS2"
//!              4    length of a block, 4 bytes
//!              8    groups, one after the other:
//!    group     0    n, the first of its blocks, 4
//!              4    how many blocks it has, 4
//!              8    CRC-32C of the rest of the group, 4
//!              12   CRC-32C of block n: the bytes [n·BLOCK, (n+1)·BLOCK) of the data file; of block n + 1; and so on, 4 each
//! ```
//!
//! A power failure may leave a group of which a part was never written: whatever follows the last
//! whole group counts as not there, and is taken anew.
//!
//! A data file only grows, so a block that is durable never changes. Its checksum is taken soon
//! after the checkpoint that makes it durable. It is compared by a scrub, and whenever a block is
//! read and may come from the device: what the system has in memory is trusted once the block was
//! right. A block whose bytes are wrong is repaired with those of another node, if their checksum
//! is right. What is not a whole block yet, at the file's end, has no checksum.
//!
//! The file belongs to one data file: like the index, it is removed before another data file takes
//! that one's place, and cut to what is durable when the data file is opened.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use standby_types::disk::{Open, parent, read_all, read_full, replace};
use standby_types::lock::lock;
use standby_types::{Disk, File};

/// Length of a block in bytes.
pub const BLOCK: u64 = 16 << 10;

const MAGIC: &[u8; 4] = b"SBS2";
const GROUP_HEADER: usize = 12;

/// Bytes of a data file that are not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DamagedBlock {
    /// Where they begin; there are [`BLOCK`] of them.
    pub offset: u64,
    /// What their CRC-32C should be.
    pub sum: u32,
}

/// The error for a read of bytes that are damaged and cannot be repaired now; inside of an
/// [`io::Error`].
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "damaged: the {BLOCK} bytes at {offset} are not what was written{}",
    if *.asked { ", and no other node that can be reached has them" } else { "" }
)]
pub struct LostBlock {
    /// Where they begin.
    pub offset: u64,
    /// Somebody was asked for the right ones.
    pub asked: bool,
}

impl LostBlock {
    /// True if this is why something could not be read.
    pub fn is_cause(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<LostBlock>())
    }
}

/// Gets the right bytes of a block from elsewhere, if it can. It may block.
pub type Repair = Arc<dyn Fn(DamagedBlock) -> Option<Vec<u8>> + Send + Sync>;

/// What has been found of damage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Blocks that are damaged and could not be repaired, by their offsets.
    pub blocks: BTreeSet<u64>,
    /// How many were repaired since the start.
    pub repaired: u64,
}

/// A data file that compares what is read.
pub(crate) struct ChecksummedFile {
    file: Arc<dyn File>,
    disk: Arc<dyn Disk>,
    sums_path: PathBuf,
    state: RwLock<Sums>,
    /// Bytes of the file that are durable, and will not be changed.
    durable: AtomicU64,
    /// Held by whoever takes checksums, or writes a block anew; never while other nodes are asked.
    writing: Mutex<Writing>,
    /// Held by whoever gets a block from elsewhere.
    repairing: Mutex<()>,
    /// A sync has failed. The system tells of that once; nothing that was written counts as durable
    /// any more.
    lost: AtomicBool,
    damage: Mutex<Damage>,
    repair: Option<Repair>,
}

/// Invariant: `seen` has a bit for each sum.
#[derive(Default)]
struct Sums {
    list: Vec<u32>,
    /// Blocks that were right when they were last read from the device.
    seen: Vec<AtomicU64>,
}

#[derive(Default)]
struct Writing {
    sums: Option<Arc<dyn File>>,
    /// Where the next group is written.
    end: u64,
    /// Another data file has taken this one's place.
    retired: bool,
}

impl Sums {
    fn push(&mut self, sum: u32) {
        let bit = self.list.len() % 64;
        if bit == 0 {
            self.seen.push(AtomicU64::new(0));
        }
        self.list.push(sum);
        self.note_seen(self.list.len() - 1);
    }

    fn note_seen(&self, block: usize) {
        self.seen[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
    }

    fn is_seen(&self, block: usize) -> bool {
        self.seen[block / 64].load(Ordering::Relaxed) & (1 << (block % 64)) != 0
    }

    fn truncate(&mut self, blocks: usize) {
        self.list.truncate(blocks);
        self.seen.truncate(blocks.div_ceil(64));
    }

    /// The blocks with checksums that these bytes touch.
    fn blocks(&self, offset: u64, len: usize) -> std::ops::Range<usize> {
        let first = (offset / BLOCK) as usize;
        let end = (offset + len as u64).div_ceil(BLOCK) as usize;
        first.min(self.list.len())..end.min(self.list.len())
    }
}

/// How the file begins.
fn header() -> Vec<u8> {
    [&MAGIC[..], &(BLOCK as u32).to_be_bytes()].concat()
}

/// How many blocks have checksums in the bytes of a file of them.
pub fn blocks_in(sums: &[u8]) -> usize {
    decode(sums).0.len()
}

/// A group, as it stands in the file.
fn group(first: usize, sums: &[u32]) -> Vec<u8> {
    let mut rest = Vec::with_capacity(4 * sums.len());
    sums.iter().for_each(|sum| rest.extend_from_slice(&sum.to_be_bytes()));
    let head = [(first as u32).to_be_bytes(), (sums.len() as u32).to_be_bytes()].concat();
    let of_all = crc32c::crc32c_append(crc32c::crc32c(&head), &rest);
    [head, of_all.to_be_bytes().to_vec(), rest].concat()
}

/// The checksums in a file's whole groups, and where these end.
fn decode(bytes: &[u8]) -> (Vec<u32>, usize) {
    let mut sums = Vec::new();
    if !bytes.starts_with(&header()) {
        return (sums, 0);
    }
    let number = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    let mut at = header().len();
    while let (Some(first), Some(count), Some(sum)) = (number(at), number(at + 4), number(at + 8)) {
        let end = at + GROUP_HEADER + 4 * count as usize;
        let Some(rest) = bytes.get(at + GROUP_HEADER..end) else { break };
        let of_all = crc32c::crc32c_append(crc32c::crc32c(&bytes[at..at + 8]), rest);
        if first as usize != sums.len() || count == 0 || of_all != sum {
            break;
        }
        let (words, _) = rest.as_chunks::<4>();
        sums.extend(words.iter().map(|word| u32::from_be_bytes(*word)));
        at = end;
    }
    (sums, at)
}

impl ChecksummedFile {
    /// A file of which the first `durable` bytes do not change any more; its checksums are read if
    /// they are there.
    pub fn open(
        file: Arc<dyn File>,
        disk: Arc<dyn Disk>,
        sums_path: &Path,
        durable: u64,
        repair: Option<Repair>,
    ) -> io::Result<ChecksummedFile> {
        let checked = ChecksummedFile::anew(file, disk, sums_path, repair);
        checked.durable.store(durable, Ordering::Release);
        if !checked.disk.exists(sums_path)? {
            return Ok(checked);
        }
        let bytes = read_all(&*checked.disk, sums_path)?;
        let (mut list, end) = decode(&bytes);
        let blocks = (durable / BLOCK) as usize;
        let fits = list.len() <= blocks && end == bytes.len();
        list.truncate(blocks);
        let mut writing = lock(&checked.writing);
        if fits {
            writing.sums = Some(checked.disk.open(sums_path, Open::Write)?);
            writing.end = end as u64;
        } else {
            // Torn, of another version, or of what is not there any more.
            checked.rewrite(&mut writing, &list)?;
        }
        drop(writing);
        let mut state = checked.state.write().unwrap_or_else(PoisonError::into_inner);
        state.seen.resize_with(list.len().div_ceil(64), AtomicU64::default);
        state.list = list;
        drop(state);
        Ok(checked)
    }

    /// Writes the file of checksums anew.
    fn rewrite(&self, writing: &mut Writing, list: &[u32]) -> io::Result<()> {
        let mut bytes = header();
        if !list.is_empty() {
            bytes.extend_from_slice(&group(0, list));
        }
        replace(&*self.disk, &self.sums_path, &bytes)?;
        writing.sums = Some(self.disk.open(&self.sums_path, Open::Write)?);
        writing.end = bytes.len() as u64;
        Ok(())
    }

    /// A new file, which has no checksums yet.
    pub fn anew(
        file: Arc<dyn File>,
        disk: Arc<dyn Disk>,
        sums_path: &Path,
        repair: Option<Repair>,
    ) -> ChecksummedFile {
        ChecksummedFile {
            file,
            disk,
            sums_path: sums_path.to_owned(),
            state: RwLock::default(),
            durable: AtomicU64::new(0),
            writing: Mutex::default(),
            repairing: Mutex::default(),
            lost: AtomicBool::new(false),
            damage: Mutex::default(),
            repair,
        }
    }

    /// Who repairs.
    pub fn repairer(&self) -> &Option<Repair> {
        &self.repair
    }

    /// The bytes before `end` are durable, and will not be changed.
    pub fn note_durable(&self, end: u64) {
        self.durable.fetch_max(end, Ordering::AcqRel);
    }

    /// Another data file takes the place of this one: its checksums go.
    pub fn retire(&self) -> io::Result<()> {
        let mut writing = lock(&self.writing);
        writing.retired = true;
        writing.sums = None;
        if self.disk.exists(&self.sums_path)? {
            self.disk.remove(&self.sums_path)?;
            self.disk.sync_dir(parent(&self.sums_path))?;
        }
        Ok(())
    }

    /// Takes the checksums of durable blocks that have none, at most so many; true if there are
    /// more.
    pub fn take_sums(&self, most: usize) -> io::Result<bool> {
        let mut writing = lock(&self.writing);
        let durable = (self.durable.load(Ordering::Acquire) / BLOCK) as usize;
        let first = self.state.read().unwrap_or_else(PoisonError::into_inner).list.len();
        let end = durable.min(first + most);
        if writing.retired || first >= end {
            return Ok(false);
        }
        let mut buffer = vec![0; BLOCK as usize];
        let mut taken = Vec::new();
        for block in first..end {
            if read_full(&*self.file, &mut buffer, block as u64 * BLOCK)? < buffer.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            taken.push(crc32c::crc32c(&buffer));
        }
        if writing.sums.is_none() {
            self.rewrite(&mut writing, &[])?;
        }
        let (group, at) = (group(first, &taken), writing.end);
        if let Some(file) = &writing.sums {
            file.write_at(&group, at)?;
            file.sync()?;
        }
        writing.end += group.len() as u64;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // The file was cut meanwhile, perhaps.
        if state.list.len() == first {
            taken.into_iter().for_each(|sum| state.push(sum));
        }
        Ok(end < durable)
    }

    /// How many blocks have checksums.
    pub fn blocks(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).list.len()
    }

    /// Reads these blocks from the device and compares them; repairs what is damaged.
    pub fn scrub(&self, blocks: std::ops::Range<usize>) -> io::Result<()> {
        let len = blocks.len() as u64 * BLOCK;
        self.file.forget_cached(blocks.start as u64 * BLOCK, len)?;
        let mut buffer = vec![0; BLOCK as usize];
        for block in blocks {
            // Of what it does to a damaged block, the file remembers.
            let _ = self.check(block, &mut buffer);
        }
        Ok(())
    }

    /// What is known of damage.
    pub fn damage(&self) -> Damage {
        lock(&self.damage).clone()
    }

    /// The bytes of a block for another node: `None` if there is no such block, or it is damaged
    /// here too.
    pub fn block(&self, offset: u64) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; BLOCK as usize];
        let n = read_full(&*self.file, &mut buffer, offset)?;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let sum = state.list.get((offset / BLOCK) as usize).copied();
        let whole = n == buffer.len() && sum.is_none_or(|sum| sum == crc32c::crc32c(&buffer));
        Ok(whole.then_some(buffer))
    }

    /// Compares a block with its checksum, and repairs it if need be. What cannot be read is
    /// damaged too. Returns true if the buffer holds the right bytes then, false if the block has
    /// no checksum.
    fn check(&self, block: usize, buffer: &mut [u8]) -> io::Result<bool> {
        let offset = block as u64 * BLOCK;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sum) = state.list.get(block).copied() else { return Ok(false) };
        if self.is_right(buffer, DamagedBlock { offset, sum }) {
            state.note_seen(block);
            drop(state);
            lock(&self.damage).blocks.remove(&offset);
            return Ok(true);
        }
        drop(state);
        self.repair_block(DamagedBlock { offset, sum }, buffer)?;
        Ok(true)
    }

    fn is_right(&self, buffer: &mut [u8], block: DamagedBlock) -> bool {
        let read = read_full(&*self.file, buffer, block.offset);
        read.is_ok_and(|n| n == buffer.len()) && crc32c::crc32c(buffer) == block.sum
    }

    fn repair_block(&self, damaged: DamagedBlock, buffer: &mut [u8]) -> io::Result<()> {
        let _repairing = lock(&self.repairing);
        let offset = damaged.offset;
        // Somebody else may have repaired it meanwhile.
        if self.is_right(buffer, damaged) {
            return Ok(());
        }
        let right =
            |bytes: &Vec<u8>| bytes.len() as u64 == BLOCK && crc32c::crc32c(bytes) == damaged.sum;
        let repaired = self.repair.as_ref().and_then(|repair| repair(damaged)).filter(right);
        let Some(bytes) = repaired else {
            lock(&self.damage).blocks.insert(offset);
            let lost = LostBlock { offset, asked: self.repair.is_some() };
            return Err(io::Error::new(io::ErrorKind::InvalidData, lost));
        };
        let _writing = lock(&self.writing);
        // Also if another data file has taken this one's place: readers of before go on with this
        // one.
        self.file.write_at(&bytes, offset)?;
        self.sync()?;
        buffer.copy_from_slice(&bytes);
        let mut damage = lock(&self.damage);
        damage.blocks.remove(&offset);
        damage.repaired += 1;
        Ok(())
    }

    /// Repairs what of these bytes cannot be read.
    fn repair_all(&self, offset: u64, len: usize) -> io::Result<()> {
        let blocks = self.state.read().unwrap_or_else(PoisonError::into_inner).blocks(offset, len);
        let mut buffer = vec![0; BLOCK as usize];
        blocks.into_iter().try_for_each(|block| self.check(block, &mut buffer).map(drop))
    }

    /// Makes what was read from `offset` on what was written there, or fails.
    fn verify(&self, read: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + read.len() as u64;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let is_right = |block: &usize| {
            let start = *block as u64 * BLOCK;
            let whole = offset <= start && start + BLOCK <= end;
            let right = whole && {
                let from = (start - offset) as usize;
                crc32c::crc32c(&read[from..from + BLOCK as usize]) == state.list[*block]
            };
            if right {
                state.note_seen(*block);
            }
            right
        };
        let blocks = state.blocks(offset, read.len());
        let others: Vec<usize> = blocks.filter(|block| !is_right(block)).collect();
        drop(state);
        let mut buffer = vec![0; if others.is_empty() { 0 } else { BLOCK as usize }];
        for block in others {
            if self.check(block, &mut buffer)? {
                // What is given out is what was compared, whoever repairs it meanwhile.
                let start = block as u64 * BLOCK;
                let (from, to) = (start.max(offset), (start + BLOCK).min(end));
                let right = &buffer[(from - start) as usize..(to - start) as usize];
                read[(from - offset) as usize..(to - offset) as usize].copy_from_slice(right);
            }
        }
        Ok(())
    }
}

impl File for ChecksummedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = match self.file.read_at(buf, offset) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.repair_all(offset, buf.len())?;
                self.file.read_at(buf, offset)?
            }
            other => other?,
        };
        self.verify(&mut buf[..n], offset)?;
        Ok(n)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = self.file.read_cached_at(buf, offset)?;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match state.blocks(offset, n).all(|block| state.is_seen(block)) {
            true => Ok(n),
            // It is compared where one may wait.
            false => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut writing = lock(&self.writing);
        self.durable.fetch_min(len, Ordering::AcqRel);
        let blocks = (len / BLOCK) as usize;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.list.len() > blocks {
            state.truncate(blocks);
            if writing.sums.is_some() {
                // Durable before other bytes stand there: the former checksums would call them
                // damaged.
                self.rewrite(&mut writing, &state.list)?;
            }
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        let synced = self.file.sync();
        if synced.is_err() {
            self.lost.store(true, Ordering::Release);
        } else if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier sync of it has failed"));
        }
        synced
    }
}

#[cfg(test)]
mod tests {
    use standby_types::memory::MemoryDisk;

    use super::*;

    const PATH: &str = "/Data.fs";
    const SUMS: &str = "/1.sums";

    fn content(blocks: u64) -> Vec<u8> {
        (0..blocks * BLOCK + 100).map(|at| (at / 7 % 251) as u8).collect()
    }

    fn disk_with(bytes: &[u8]) -> (Arc<dyn Disk>, MemoryDisk) {
        let memory = MemoryDisk::new();
        let disk: Arc<dyn Disk> = Arc::new(memory.clone());
        disk.open(Path::new(PATH), Open::Create).unwrap().write_at(bytes, 0).unwrap();
        (disk, memory)
    }

    fn open(disk: &Arc<dyn Disk>, durable: u64) -> ChecksummedFile {
        open_repairing(disk, durable, None)
    }

    fn open_repairing(
        disk: &Arc<dyn Disk>,
        durable: u64,
        repair: Option<Repair>,
    ) -> ChecksummedFile {
        let file = disk.open(Path::new(PATH), Open::Write).unwrap();
        ChecksummedFile::open(file, disk.clone(), Path::new(SUMS), durable, repair).unwrap()
    }

    fn damage(disk: &Arc<dyn Disk>, at: u64) {
        disk.open(Path::new(PATH), Open::Write).unwrap().write_at(b"?", at).unwrap();
    }

    #[test]
    fn damage_is_found_when_it_is_read() {
        let bytes = content(5);
        let (disk, _) = disk_with(&bytes);
        let checked = open(&disk, bytes.len() as u64);
        assert!(checked.take_sums(3).unwrap(), "there are more");
        assert!(!checked.take_sums(3).unwrap());
        assert_eq!(checked.blocks(), 5);
        damage(&disk, 2 * BLOCK + 17);
        // Another start: nothing has been seen yet.
        let checked = open(&disk, bytes.len() as u64);
        let mut buf = vec![0; 100];
        assert_eq!(
            checked.read_cached_at(&mut buf, 50).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        checked.read_at(&mut buf, 50).unwrap();
        assert_eq!(checked.read_cached_at(&mut buf, 50).unwrap(), 100);
        // Beside the damage, but in its block; and over the edge of a block.
        for at in [2 * BLOCK + 5000, 2 * BLOCK - 50, 3 * BLOCK - 50] {
            let error = checked.read_at(&mut buf, at).unwrap_err();
            assert!(error.to_string().contains("not what was written"), "{error}");
            assert!(checked.read_cached_at(&mut buf, at).is_err());
        }
        assert_eq!(checked.damage().blocks, BTreeSet::from([2 * BLOCK]));
        assert_eq!(checked.block(2 * BLOCK).unwrap(), None);
        // A large read gets it too.
        assert!(checked.read_at(&mut vec![0; bytes.len()], 3).is_err());
        // What is no whole block has no checksum.
        damage(&disk, 5 * BLOCK + 1);
        checked.read_at(&mut buf, 5 * BLOCK).unwrap();
    }

    #[test]
    fn a_failed_sync_of_a_mended_block_is_told_to_who_syncs_next() {
        let bytes = content(2);
        let (disk, memory) = disk_with(&bytes);
        open(&disk, bytes.len() as u64).take_sums(9).unwrap();
        damage(&disk, BLOCK + 5);
        let right = bytes[BLOCK as usize..2 * BLOCK as usize].to_vec();
        let checked =
            open_repairing(&disk, bytes.len() as u64, Some(Arc::new(move |_| Some(right.clone()))));
        checked.write_at(b"committed", bytes.len() as u64).unwrap();
        memory.fail_sync(Path::new(PATH));
        checked.scrub(0..2).unwrap();
        for _ in 0..2 {
            let error = checked.sync().unwrap_err().to_string();
            assert!(error.contains("an earlier sync of it has failed"), "{error}");
        }
    }

    #[test]
    fn checksums_are_taken_while_another_node_is_asked_for_a_block() {
        let bytes = content(2);
        let (disk, _) = disk_with(&bytes);
        open(&disk, BLOCK).take_sums(9).unwrap();
        damage(&disk, 5);
        let (asked, was_asked) = std::sync::mpsc::channel();
        let (answer, answered) = std::sync::mpsc::channel::<()>();
        let (asked, answered) = (Mutex::new(asked), Mutex::new(answered));
        let repair: Repair = Arc::new(move |_| {
            lock(&asked).send(()).unwrap();
            lock(&answered).recv().unwrap();
            None
        });
        let checked = Arc::new(open_repairing(&disk, bytes.len() as u64, Some(repair)));
        let reader = checked.clone();
        let reading = std::thread::spawn(move || reader.read_at(&mut [0; 10], 0).is_err());
        was_asked.recv().unwrap();
        checked.take_sums(9).unwrap();
        assert_eq!(checked.blocks(), 2);
        checked.retire().unwrap();
        answer.send(()).unwrap();
        assert!(reading.join().unwrap());
    }

    #[test]
    fn damage_is_mended_with_the_right_bytes_only() {
        let bytes = content(3);
        let (disk, memory) = disk_with(&bytes);
        open(&disk, bytes.len() as u64).take_sums(9).unwrap();
        damage(&disk, BLOCK);
        let right = bytes.clone();
        let asked = Arc::new(AtomicU64::new(0));
        let times = asked.clone();
        let repair: Repair = Arc::new(move |damaged: DamagedBlock| {
            let from = damaged.offset as usize;
            let mut block = right[from..from + BLOCK as usize].to_vec();
            // The first time the other node has something else.
            if times.fetch_add(1, Ordering::Relaxed) == 0 {
                block[9] ^= 1;
            }
            Some(block)
        });
        let checked = open_repairing(&disk, bytes.len() as u64, Some(repair));
        let mut buf = vec![0; 10];
        assert!(checked.read_at(&mut buf, BLOCK + 100).is_err());
        assert_eq!(checked.damage().blocks.len(), 1);
        assert_eq!(checked.read_at(&mut buf, BLOCK - 5).unwrap(), 10);
        assert_eq!(buf, bytes[BLOCK as usize - 5..][..10]);
        assert_eq!(checked.damage(), Damage { blocks: BTreeSet::new(), repaired: 1 });
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        // A sector that cannot be read is written anew.
        memory.fail_reads(Path::new(PATH), 2 * BLOCK as usize + 5..2 * BLOCK as usize + 9);
        assert_eq!(checked.read_at(&mut buf, 3 * BLOCK - 5).unwrap(), 10);
        assert_eq!(checked.damage().repaired, 2);
        // It stays repaired.
        let mut all = vec![0; bytes.len()];
        open(&disk, bytes.len() as u64).read_at(&mut all, 0).unwrap();
        assert_eq!(all, bytes);
    }

    /// What a device gives a second time is compared again: a catch-up must not pass damage on.
    #[test]
    fn damage_is_found_although_the_block_was_right_before() {
        let bytes = content(4);
        let (disk, _) = disk_with(&bytes);
        let checked = open(&disk, bytes.len() as u64);
        checked.take_sums(9).unwrap();
        let mut all = vec![0; bytes.len()];
        checked.read_at(&mut all, 0).unwrap();
        damage(&disk, 2 * BLOCK + 3);
        for (at, len) in [(2 * BLOCK, 10), (BLOCK + 5, 3 * BLOCK as usize), (0, bytes.len())] {
            assert!(checked.read_at(&mut vec![0; len], at).is_err(), "{len} bytes at {at}");
        }
        checked.read_at(&mut all[..100], BLOCK).unwrap();
    }

    #[test]
    fn a_scrub_finds_what_was_seen_before() {
        let bytes = content(3);
        let (disk, _) = disk_with(&bytes);
        let checked = open(&disk, bytes.len() as u64);
        checked.take_sums(9).unwrap();
        damage(&disk, 2 * BLOCK + 3);
        checked.scrub(0..3).unwrap();
        assert_eq!(checked.damage().blocks, BTreeSet::from([2 * BLOCK]));
    }

    #[test]
    fn checksums_follow_their_file() {
        let bytes = content(5);
        let (disk, _) = disk_with(&bytes);
        let checked = open(&disk, 3 * BLOCK + 5);
        checked.take_sums(9).unwrap();
        assert_eq!(checked.blocks(), 3, "only what is durable");
        checked.note_durable(5 * BLOCK);
        checked.take_sums(9).unwrap();
        assert_eq!(checked.blocks(), 5);
        // What is written anew after a cut has other checksums.
        checked.set_len(4 * BLOCK - 1).unwrap();
        assert_eq!(checked.blocks(), 3);
        checked.write_at(&vec![7; 2 * BLOCK as usize], 4 * BLOCK - 1).unwrap();
        checked.note_durable(5 * BLOCK);
        checked.take_sums(9).unwrap();
        let mut all = vec![0; 5 * BLOCK as usize];
        open(&disk, 5 * BLOCK).read_at(&mut all, 0).unwrap();
        // A start that knows less to be durable forgets the rest.
        assert_eq!(open(&disk, 2 * BLOCK + 1).blocks(), 2);
        assert_eq!(open(&disk, 5 * BLOCK).blocks(), 2);
        // A torn file of checksums is taken anew.
        disk.open(Path::new(SUMS), Open::Write).unwrap().set_len(6).unwrap();
        assert_eq!(open(&disk, 5 * BLOCK).blocks(), 0);
        let checked = open(&disk, 5 * BLOCK);
        checked.take_sums(9).unwrap();
        // Nothing is taken of a file whose place another one has.
        checked.note_durable(9 * BLOCK);
        checked.retire().unwrap();
        assert!(!disk.exists(Path::new(SUMS)).unwrap());
        assert!(!checked.take_sums(9).unwrap() && !disk.exists(Path::new(SUMS)).unwrap());
    }

    /// Found by a simulation: the file had grown, but its last sectors were never written.
    #[test]
    fn a_group_of_which_a_part_was_never_written_does_not_count() {
        let bytes = content(9);
        let (disk, _) = disk_with(&bytes);
        let checked = open(&disk, bytes.len() as u64);
        checked.take_sums(4).unwrap();
        let whole = read_all(&*disk, Path::new(SUMS)).unwrap().len();
        checked.take_sums(9).unwrap();
        let end = read_all(&*disk, Path::new(SUMS)).unwrap().len();
        let right = read_all(&*disk, Path::new(SUMS)).unwrap();
        for from in whole..end {
            let file = disk.open(Path::new(SUMS), Open::Write).unwrap();
            file.write_at(&right, 0).unwrap();
            file.write_at(&vec![0; end - from], from as u64).unwrap();
            let checked = open(&disk, bytes.len() as u64);
            checked.read_at(&mut vec![0; bytes.len()], 0).unwrap();
            let zeros = right[from..].iter().all(|byte| *byte == 0);
            assert_eq!(checked.blocks(), if zeros { 9 } else { 4 }, "zeros from {from} on");
            checked.take_sums(9).unwrap();
            assert_eq!(open(&disk, bytes.len() as u64).blocks(), 9);
        }
    }

    /// As if another reader repaired the file between two reads of this one.
    struct RepairedMeanwhile(Arc<dyn File>, AtomicU64);

    impl File for RepairedMeanwhile {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let n = self.0.read_at(buf, offset)?;
            if self.1.fetch_add(1, Ordering::Relaxed) == 0 {
                buf[0] ^= 1;
            }
            Ok(n)
        }

        fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.read_at(buf, offset)
        }

        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_at(bytes, offset)
        }

        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync(&self) -> io::Result<()> {
            self.0.sync()
        }
    }

    #[test]
    fn what_was_read_before_another_reader_mended_it_is_not_given_out() {
        let bytes = content(3);
        let (disk, _) = disk_with(&bytes);
        open(&disk, bytes.len() as u64).take_sums(9).unwrap();
        for len in [10, BLOCK as usize] {
            let file = disk.open(Path::new(PATH), Open::Write).unwrap();
            let file = Arc::new(RepairedMeanwhile(file, AtomicU64::new(0)));
            let (durable, sums) = (bytes.len() as u64, Path::new(SUMS));
            let checked = ChecksummedFile::open(file, disk.clone(), sums, durable, None).unwrap();
            let mut buf = vec![0; len];
            assert_eq!(checked.read_at(&mut buf, BLOCK).unwrap(), len);
            assert!(buf == bytes[BLOCK as usize..][..len], "{len} bytes");
        }
    }

    #[test]
    fn a_reader_of_a_file_that_was_replaced_gets_no_wrong_data_either() {
        let bytes = content(3);
        let (disk, _) = disk_with(&bytes);
        open(&disk, bytes.len() as u64).take_sums(9).unwrap();
        damage(&disk, BLOCK);
        let right = bytes.clone();
        let repair: Repair = Arc::new(move |damaged: DamagedBlock| {
            Some(right[damaged.offset as usize..][..BLOCK as usize].to_vec())
        });
        let checked = open_repairing(&disk, bytes.len() as u64, Some(repair));
        checked.retire().unwrap();
        let mut buf = vec![0; 10];
        checked.read_at(&mut buf, BLOCK).unwrap();
        assert_eq!(buf, bytes[BLOCK as usize..][..10]);
    }
}
