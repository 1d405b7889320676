//! A disk in memory that forgets, at [`MemoryDisk::crash`], all that was not synced.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::disk::{Disk, File, Mapped, Open, parent};
use crate::lock::lock;

/// See the module. Clones share the same files.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    names: Arc<Mutex<Names>>,
}

#[derive(Default)]
struct Names {
    current: BTreeMap<PathBuf, Arc<MemoryFile>>,
    durable: BTreeMap<PathBuf, Arc<MemoryFile>>,
    /// No directory can be opened.
    refuses_dirs: bool,
}

#[derive(Default)]
struct MemoryFile {
    bytes: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    current: Vec<u8>,
    durable: Vec<u8>,
    fail_sync: bool,
    /// Bytes that the device cannot read.
    unreadable: std::ops::Range<usize>,
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a power failure leaves: names and bytes that were synced. Handles that are still open
    /// see the same.
    pub fn crash(&self) {
        let mut names = lock(&self.names);
        names.current = names.durable.clone();
        for file in names.current.values() {
            let mut content = lock(&file.bytes);
            content.current = content.durable.clone();
        }
    }

    /// As [`MemoryDisk::crash`], but of the bytes that were appended to `path` and not synced the
    /// first `keep` survive: a torn write.
    pub fn crash_torn(&self, path: &Path, keep: usize) {
        let torn = lock(&self.names).current.get(path).cloned();
        let kept = torn.as_ref().map(|file| {
            let content = lock(&file.bytes);
            let end = (content.durable.len() + keep).min(content.current.len());
            content.current[..end].to_vec()
        });
        self.crash();
        if let (Some(file), Some(kept)) = (torn, kept) {
            let mut content = lock(&file.bytes);
            content.current = kept.clone();
            content.durable = kept;
        }
    }

    /// Another disk that holds what is durable on this one: a snapshot.
    pub fn copy(&self) -> MemoryDisk {
        let names = lock(&self.names);
        let copied = |(path, file): (&PathBuf, &Arc<MemoryFile>)| {
            let durable = lock(&file.bytes).durable.clone();
            let content = Content { current: durable.clone(), durable, ..Content::default() };
            (path.clone(), Arc::new(MemoryFile { bytes: Mutex::new(content) }))
        };
        let durable: BTreeMap<_, _> = names.durable.iter().map(copied).collect();
        MemoryDisk {
            names: Arc::new(Mutex::new(Names {
                current: durable.clone(),
                durable,
                refuses_dirs: false,
            })),
        }
    }

    /// The next `sync` of this file fails. The one after it does not: Linux tells of an error once.
    pub fn fail_sync(&self, path: &Path) {
        if let Some(file) = lock(&self.names).current.get(path) {
            lock(&file.bytes).fail_sync = true;
        }
    }

    /// From now on no directory can be opened, as in a process that has too many files open, or all
    /// can again.
    pub fn refuse_dirs(&self, refuse: bool) {
        lock(&self.names).refuses_dirs = refuse;
    }

    /// From now on these bytes of a file cannot be read, as on a device with a bad sector; until
    /// they are written.
    pub fn fail_reads(&self, path: &Path, bytes: std::ops::Range<usize>) {
        if let Some(file) = lock(&self.names).current.get(path) {
            lock(&file.bytes).unreadable = bytes;
        }
    }

    fn find(&self, path: &Path) -> io::Result<Arc<MemoryFile>> {
        lock(&self.names).current.get(path).cloned().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("{}: no such file", path.display()))
        })
    }
}

impl File for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = lock(&self.bytes);
        let start = (offset as usize).min(content.current.len());
        let n = buf.len().min(content.current.len() - start);
        if start < content.unreadable.end && content.unreadable.start < start + n {
            return Err(io::Error::other("the device cannot read that"));
        }
        buf[..n].copy_from_slice(&content.current[start..start + n]);
        Ok(n)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut content = lock(&self.bytes);
        let end = offset as usize + bytes.len();
        if content.current.len() < end {
            content.current.resize(end, 0);
        }
        content.current[offset as usize..end].copy_from_slice(bytes);
        if (offset as usize) < content.unreadable.end && content.unreadable.start < end {
            content.unreadable = 0..0;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.bytes).current.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        lock(&self.bytes).current.resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut content = lock(&self.bytes);
        if std::mem::take(&mut content.fail_sync) {
            return Err(io::Error::other("injected fsync error"));
        }
        content.durable = content.current.clone();
        Ok(())
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>> {
        if open == Open::Create {
            let mut names = lock(&self.names);
            return Ok(names.current.entry(path.to_owned()).or_default().clone());
        }
        Ok(self.find(path)?)
    }

    fn map(&self, path: &Path) -> io::Result<Mapped> {
        Ok(Arc::new(lock(&self.find(path)?.bytes).current.clone()))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(lock(&self.names).current.contains_key(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let file = self.find(from)?;
        let mut names = lock(&self.names);
        names.current.remove(from);
        names.current.insert(to.to_owned(), file);
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let file = self.find(from)?;
        match lock(&self.names).current.entry(to.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => {
                Err(io::ErrorKind::AlreadyExists.into())
            }
            std::collections::btree_map::Entry::Vacant(vacant) => {
                vacant.insert(file);
                Ok(())
            }
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.find(path)?;
        lock(&self.names).current.remove(path);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let names = lock(&self.names);
        let inside = |path: &PathBuf| {
            let first = path.strip_prefix(dir).ok()?.components().next()?;
            Some(dir.join(first))
        };
        let found: BTreeSet<PathBuf> = names.current.keys().filter_map(inside).collect();
        Ok(found.into_iter().collect())
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        if self.list(dir)?.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::DirectoryNotEmpty.into())
        }
    }

    fn make_read_only(&self, path: &Path) -> io::Result<()> {
        self.find(path).map(drop)
    }

    /// It never lacks any.
    fn wait_for_room(&self) {}

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut guard = lock(&self.names);
        let names = &mut *guard;
        if names.refuses_dirs {
            return Err(io::Error::other("too many open files"));
        }
        let inside: BTreeSet<PathBuf> = (names.current.keys().chain(names.durable.keys()))
            .filter(|p| parent(p) == dir)
            .cloned()
            .collect();
        for path in inside {
            match names.current.get(&path) {
                Some(file) => names.durable.insert(path, file.clone()),
                None => names.durable.remove(&path),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{read_all, replace};

    #[test]
    fn crash_keeps_exactly_what_was_synced() {
        let disk = MemoryDisk::new();
        let path = Path::new("/d/file");
        let file = disk.open(path, Open::Create).unwrap();
        file.write_at(b"synced", 0).unwrap();
        file.sync().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        file.write_at(b" lost", 6).unwrap();
        disk.open(Path::new("/d/unnamed"), Open::Create).unwrap().sync().unwrap();
        disk.crash_torn(path, 2);
        assert_eq!(read_all(&disk, path).unwrap(), b"synced l");
        assert!(!disk.exists(Path::new("/d/unnamed")).unwrap());
    }

    #[test]
    fn replace_is_durable_and_whole() {
        let disk = MemoryDisk::new();
        let path = Path::new("/d/file");
        replace(&disk, path, b"one").unwrap();
        replace(&disk, path, b"two").unwrap();
        disk.crash();
        assert_eq!(read_all(&disk, path).unwrap(), b"two");
    }
}
