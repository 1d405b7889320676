//! The disk of a simulated machine. It forgets what was not synced when power fails, or keeps a
//! random part of it; it breaks when it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use standby_node::simulated::Random;
use standby_types::disk::{Disk, File, Mapped, Open, parent};

/// What a device writes as a whole.
const SECTOR: usize = 512;

/// See the module. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<Inner>>);

#[derive(Clone)]
struct Inner {
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    files: BTreeMap<u64, Content>,
    next: u64,
    /// Writes and syncs until power fails.
    until_cut: Option<u64>,
    /// Power has failed: nothing can be done.
    dead: bool,
    /// The next sync of a file of the log fails.
    fail_sync: bool,
}

#[derive(Clone, Default)]
struct Content {
    bytes: Vec<u8>,
    durable_len: usize,
    /// What was in sectors that were written since the last sync.
    before: BTreeMap<usize, Vec<u8>>,
    /// Bytes that the device gives back wrong: the system has nothing around them in memory.
    wrong: BTreeSet<usize>,
    /// Sectors that the device cannot read, until they are written.
    bad: BTreeSet<usize>,
}

impl Content {
    /// Remembers what is durable in these bytes before they change.
    fn remember(&mut self, from: usize, to: usize) {
        let to = to.min(self.durable_len);
        if from >= to {
            return;
        }
        for sector in from / SECTOR..to.div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let end = (start + SECTOR).min(self.durable_len).min(self.bytes.len());
            let bytes = self.bytes.get(start..end).unwrap_or_default();
            self.before.entry(sector).or_insert_with(|| bytes.to_vec());
        }
    }

    fn sync(&mut self) {
        self.before.clear();
        self.durable_len = self.bytes.len();
    }

    /// Takes back what is not durable; with `chance`, only a part of it.
    fn forget(&mut self, mut chance: Option<&mut Random>) {
        let mut lost = || chance.as_mut().is_none_or(|chance| chance.one_in(2));
        if lost() || self.bytes.len() < self.durable_len {
            self.bytes.resize(self.durable_len, 0);
        } else {
            // Of what was appended, some sectors have not come so far.
            let first = self.durable_len.div_ceil(SECTOR);
            for sector in first..self.bytes.len().div_ceil(SECTOR) {
                if lost() {
                    let end = ((sector + 1) * SECTOR).min(self.bytes.len());
                    self.bytes[sector * SECTOR..end].fill(0);
                }
            }
        }
        for (sector, before) in std::mem::take(&mut self.before) {
            if lost() {
                let start = sector * SECTOR;
                let end = (start + before.len()).min(self.bytes.len());
                if start < end {
                    self.bytes[start..end].copy_from_slice(&before[..end - start]);
                }
            }
        }
        self.sync();
    }
}

fn gone() -> io::Error {
    io::Error::other("power has failed")
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> SimDisk {
        SimDisk(Arc::new(Mutex::new(Inner {
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            files: BTreeMap::new(),
            next: 0,
            until_cut: None,
            dead: false,
            fail_sync: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power fails after so many more writes, syncs and changes of names.
    pub fn cut_after(&self, operations: u64) {
        self.lock().until_cut = Some(operations);
    }

    /// True if power has failed meanwhile.
    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// The next sync of the log fails.
    pub fn fail_sync(&self) {
        self.lock().fail_sync = true;
    }

    /// Nothing of what was to go wrong comes any more.
    pub fn repair(&self) {
        let mut inner = self.lock();
        (inner.until_cut, inner.fail_sync) = (None, false);
    }

    /// Power fails: what was not synced is gone; with `chance`, only a random part of it.
    pub fn cut(&self, mut chance: Option<&mut Random>) {
        let inner = &mut *self.lock();
        let all: BTreeSet<PathBuf> =
            inner.names.keys().chain(inner.durable_names.keys()).cloned().collect();
        let mut dirs: BTreeMap<PathBuf, bool> = BTreeMap::new();
        let before = inner.names.clone();
        for path in all {
            // File systems write the names of a directory together, and in order.
            let lost = *dirs
                .entry(parent(&path).to_owned())
                .or_insert_with(|| chance.as_mut().is_none_or(|chance| chance.one_in(2)));
            if lost {
                match inner.durable_names.get(&path) {
                    Some(file) => inner.names.insert(path, *file),
                    None => inner.names.remove(&path),
                };
            }
        }
        keep_renamed(&inner.durable_names, &before, &mut inner.names);
        for content in inner.files.values_mut() {
            content.forget(chance.as_deref_mut());
        }
        let kept: BTreeSet<u64> = inner.names.values().copied().collect();
        inner.files.retain(|file, _| kept.contains(file));
        inner.durable_names = inner.names.clone();
        (inner.until_cut, inner.dead, inner.fail_sync) = (None, false, false);
    }

    /// An empty disk is put in the place of this one. Nobody may have a file of it open.
    pub fn lose(&self) {
        let inner = &mut *self.lock();
        (inner.names, inner.durable_names, inner.files) = Default::default();
        (inner.until_cut, inner.dead, inner.fail_sync) = (None, false, false);
    }

    /// A snapshot of what is durable.
    pub fn snapshot(&self) -> SimDisk {
        let snapshot = SimDisk(Arc::new(Mutex::new(self.lock().clone())));
        snapshot.cut(None);
        snapshot
    }

    /// What was in the snapshot is there again, and nothing else. Nobody may have a file of it
    /// open.
    pub fn put_back(&self, snapshot: &SimDisk) {
        *self.lock() = snapshot.lock().clone();
    }

    /// The bytes of a file; `None` if there is none of that name.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let inner = self.lock();
        let file = inner.names.get(path)?;
        inner.files.get(file).map(|content| content.bytes.clone())
    }

    /// A bit of a file changes, as on a device that ages.
    pub fn flip(&self, path: &Path, offset: usize) {
        let inner = &mut *self.lock();
        let content = inner.names.get(path).and_then(|file| inner.files.get_mut(file));
        if let Some(content) = content
            && let Some(byte) = content.bytes.get_mut(offset)
        {
            *byte ^= 0x10;
            if !content.wrong.remove(&offset) {
                content.wrong.insert(offset);
            }
        }
    }

    /// A sector of a file cannot be read any more.
    pub fn spoil(&self, path: &Path, offset: usize) {
        let inner = &mut *self.lock();
        if let Some(content) = inner.names.get(path).and_then(|file| inner.files.get_mut(file)) {
            content.bad.insert(offset / SECTOR);
        }
    }

    /// Everything can be read again.
    pub fn unspoil(&self) {
        self.lock().files.values_mut().for_each(|content| content.bad.clear());
    }

    /// The names of all files.
    pub fn names(&self) -> Vec<PathBuf> {
        self.lock().names.keys().cloned().collect()
    }
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn alive(&self) -> io::Result<()> {
        if self.dead { Err(gone()) } else { Ok(()) }
    }

    /// Something is about to change.
    fn change(&mut self) -> io::Result<()> {
        self.alive()?;
        if let Some(left) = &mut self.until_cut {
            if *left == 0 {
                self.dead = true;
                return Err(gone());
            }
            *left -= 1;
        }
        Ok(())
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        self.alive()?;
        self.names.get(path).copied().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("{}: no such file", path.display()))
        })
    }
}

/// File systems with a journal write both ends of a rename together: a file that had a durable name
/// `before`, and has one `now`, does not lose both.
fn keep_renamed(
    before: &BTreeMap<PathBuf, u64>,
    now: &BTreeMap<PathBuf, u64>,
    kept: &mut BTreeMap<PathBuf, u64>,
) {
    let there: BTreeSet<u64> = kept.values().copied().collect();
    let had: BTreeSet<u64> =
        before.values().filter(|file| !there.contains(file)).copied().collect();
    let renamed = now.iter().filter(|(_, file)| had.contains(file));
    kept.extend(renamed.map(|(path, file)| (path.clone(), *file)));
}

/// The sectors of some bytes.
fn sectors(offset: u64, len: usize) -> std::ops::Range<usize> {
    offset as usize / SECTOR..(offset as usize + len).div_ceil(SECTOR)
}

struct SimFile {
    disk: SimDisk,
    file: u64,
    is_log: bool,
}

impl SimFile {
    fn with<T>(&self, work: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
        let mut inner = self.disk.lock();
        inner.alive()?;
        inner.files.get_mut(&self.file).map(work).ok_or_else(gone)
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|content| {
            if content.bad.range(sectors(offset, buf.len())).next().is_some() {
                return Err(io::Error::other("the device cannot read a sector"));
            }
            let start = (offset as usize).min(content.bytes.len());
            let n = buf.len().min(content.bytes.len() - start);
            buf[..n].copy_from_slice(&content.bytes[start..start + n]);
            Ok(n)
        })?
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = offset as usize..offset as usize + buf.len();
        let sectors = sectors(offset, buf.len());
        let device = |content: &mut Content| {
            content.wrong.range(bytes).next().is_some()
                || content.bad.range(sectors).next().is_some()
        };
        if self.with(device)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.lock().change()?;
        self.with(|content| {
            let (start, end) = (offset as usize, offset as usize + bytes.len());
            content.remember(start, end);
            if content.bytes.len() < end {
                content.bytes.resize(end, 0);
            }
            content.bytes[start..end].copy_from_slice(bytes);
            content.wrong.retain(|at| !(start..end).contains(at));
            content.bad.retain(|sector| !sectors(offset, bytes.len()).contains(sector));
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|content| content.bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.lock().change()?;
        self.with(|content| {
            content.remember(len as usize, usize::MAX);
            content.bytes.resize(len as usize, 0);
        })
    }

    fn sync(&self) -> io::Result<()> {
        {
            let mut inner = self.disk.lock();
            inner.change()?;
            if self.is_log && std::mem::take(&mut inner.fail_sync) {
                return Err(io::Error::other("the device cannot sync"));
            }
        }
        self.with(Content::sync)
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>> {
        let mut inner = self.lock();
        let file = match inner.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && open == Open::Create => {
                inner.change()?;
                let file = inner.next;
                inner.next += 1;
                inner.names.insert(path.to_owned(), file);
                inner.files.insert(file, Content::default());
                file
            }
            found => found?,
        };
        let is_log = parent(path).ends_with("log");
        Ok(Arc::new(SimFile { disk: self.clone(), file, is_log }))
    }

    fn map(&self, path: &Path) -> io::Result<Mapped> {
        self.lock().find(path)?;
        Ok(Arc::new(self.bytes(path).unwrap_or_default()))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let inner = self.lock();
        inner.alive()?;
        Ok(inner.names.contains_key(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.lock();
        if let Ok(file) = inner.find(from) {
            inner.change()?;
            inner.names.remove(from);
            inner.names.insert(to.to_owned(), file);
            return Ok(());
        }
        // A directory, which has its new name for good at once.
        let inside = |path: &PathBuf| path.strip_prefix(from).is_ok();
        if !inner.names.keys().any(inside) {
            return inner.find(from).map(drop);
        }
        inner.change()?;
        let inner = &mut *inner;
        for names in [&mut inner.names, &mut inner.durable_names] {
            let moved: Vec<_> = names.extract_if(.., |path, _| inside(path)).collect();
            for (path, file) in moved {
                names.insert(to.join(path.strip_prefix(from).unwrap_or(&path)), file);
            }
        }
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.lock();
        let file = inner.find(from)?;
        if inner.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        inner.change()?;
        inner.names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.lock();
        inner.find(path)?;
        inner.change()?;
        inner.names.remove(path);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let inner = self.lock();
        inner.alive()?;
        let inside = |path: &PathBuf| {
            let first = path.strip_prefix(dir).ok()?.components().next()?;
            Some(dir.join(first))
        };
        let found: BTreeSet<PathBuf> = inner.names.keys().filter_map(inside).collect();
        Ok(found.into_iter().collect())
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        self.lock().alive()
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        match self.list(dir)?.is_empty() {
            true => Ok(()),
            false => Err(io::ErrorKind::DirectoryNotEmpty.into()),
        }
    }

    fn make_read_only(&self, path: &Path) -> io::Result<()> {
        self.lock().find(path).map(drop)
    }

    /// It never lacks any.
    fn wait_for_room(&self) {}

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let inner = &mut *self.lock();
        inner.change()?;
        let all: BTreeSet<PathBuf> = (inner.names.keys().chain(inner.durable_names.keys()))
            .filter(|path| parent(path) == dir)
            .cloned()
            .collect();
        let before = inner.durable_names.clone();
        for path in all {
            match inner.names.get(&path) {
                Some(file) => inner.durable_names.insert(path, *file),
                None => inner.durable_names.remove(&path),
            };
        }
        keep_renamed(&before, &inner.names, &mut inner.durable_names);
        Ok(())
    }
}
