//! `read-only true` in a `<filestorage>` of a node alone: the disk as it sees it. (A member of a
//! cluster takes what the others commit; it refuses the writes and packs of clients.)
//!
//! The data file and the blobs are read from the real disk and never written, not even to cut a
//! torn tail; what a node would keep beside them is in memory, and goes with the process. So a file
//! can be served from a mount that is read-only, and while another program writes to it (what that
//! one commits is seen after the next start, as with Python).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::bail;
use standby_config::Config;
use standby_types::disk::{Disk, File, Mapped, Open};
use standby_types::memory::MemoryDisk;

/// Checks the read-only storages of a configuration; the disk that protects them, if there are any.
pub(crate) fn protect(config: &Config, disk: Arc<dyn Disk>) -> anyhow::Result<Arc<dyn Disk>> {
    let storages = || config.storages.iter().filter(|section| section.protected);
    for section in storages() {
        if !disk.exists(&section.path)? {
            bail!(
                "{} does not exist, and \"read-only true\" (in {}) lets nobody make it",
                section.path.display(),
                config.file.display()
            );
        }
    }
    if storages().next().is_none() {
        return Ok(disk);
    }
    let files = storages().map(|section| section.path.clone()).collect();
    let dirs = storages().filter_map(|section| section.blob_dir.clone()).collect();
    let hidden = config.is_read_only().then(|| config.state_dir());
    Ok(Arc::new(Protected { disk, memory: MemoryDisk::new(), files, dirs, hidden }))
}

struct Protected {
    disk: Arc<dyn Disk>,
    /// What is made where nothing may be written.
    memory: MemoryDisk,
    /// Data files: neither they nor what is named after them is written.
    files: Vec<PathBuf>,
    /// In these directories nothing is written.
    dirs: Vec<PathBuf>,
    /// What is in this directory from a time when the node could write does not matter: it is
    /// another one in memory.
    hidden: Option<PathBuf>,
}

fn refused() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "\"read-only true\" forbids writing to it")
}

impl Protected {
    fn protects(&self, path: &Path) -> bool {
        let named_after = |file: &PathBuf| {
            let rest = path.as_os_str().as_encoded_bytes();
            let rest = rest.strip_prefix(file.as_os_str().as_encoded_bytes());
            rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'.')))
        };
        let inside = |dir: &PathBuf| path.starts_with(dir);
        self.hides(path) || self.files.iter().any(named_after) || self.dirs.iter().any(inside)
    }

    fn hides(&self, path: &Path) -> bool {
        self.hidden.as_ref().is_some_and(|dir| path.starts_with(dir))
    }

    /// True if a file of that name is on the real disk, as far as one may see.
    fn is_real(&self, path: &Path) -> io::Result<bool> {
        Ok(!self.hides(path) && self.disk.exists(path)?)
    }

    /// The disk that has the file.
    fn holder(&self, path: &Path) -> io::Result<&dyn Disk> {
        let in_memory = self.hides(path) || self.protects(path) && self.memory.exists(path)?;
        Ok(if in_memory { &self.memory } else { &*self.disk })
    }

    /// The disk on which a name may be changed.
    fn changed(&self, path: &Path) -> io::Result<&dyn Disk> {
        match self.protects(path) {
            false => Ok(&*self.disk),
            true if self.memory.exists(path)? || !self.is_real(path)? => Ok(&self.memory),
            true => Err(refused()),
        }
    }
}

impl Disk for Protected {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>> {
        let holder = self.holder(path)?;
        let is_plain = open == Open::Read || !self.protects(path);
        if is_plain || self.hides(path) || self.memory.exists(path)? {
            return holder.open(path, open);
        }
        if open == Open::Create && !self.is_real(path)? {
            return self.memory.open(path, open);
        }
        let file = self.disk.open(path, Open::Read)?;
        let len = AtomicU64::new(file.len()?);
        Ok(Arc::new(Kept { file, len }))
    }

    fn open_foreign(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.holder(path)?.open_foreign(path)
    }

    fn map(&self, path: &Path) -> io::Result<Mapped> {
        self.holder(path)?.map(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.holder(path)?.exists(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.protects(from) == self.protects(to) {
            true => {
                self.changed(to)?;
                self.changed(from)?.rename(from, to)
            }
            false => Err(refused()),
        }
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.changed(from)?;
        self.changed(to)?.hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.changed(path)?.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut found = if self.hides(dir) { Vec::new() } else { self.disk.list(dir)? };
        found.extend(self.memory.list(dir)?);
        found.sort();
        found.dedup();
        Ok(found)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if self.protects(dir) { Ok(()) } else { self.disk.create_dir(dir) }
    }

    fn create_private_dir(&self, dir: &Path) -> io::Result<()> {
        if self.protects(dir) { Ok(()) } else { self.disk.create_private_dir(dir) }
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.changed(dir)?.remove_dir(dir)
    }

    fn make_read_only(&self, path: &Path) -> io::Result<()> {
        self.changed(path)?.make_read_only(path)
    }

    fn wait_for_room(&self) {
        self.disk.wait_for_room();
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.protects(dir) { Ok(()) } else { self.disk.sync_dir(dir) }
    }
}

/// A file that is never written. It may seem shorter: a torn tail is passed over, not cut.
struct Kept {
    file: Arc<dyn File>,
    len: AtomicU64,
}

impl Kept {
    fn seen<'b>(&self, buf: &'b mut [u8], offset: u64) -> &'b mut [u8] {
        let left = self.len.load(Ordering::Acquire).saturating_sub(offset);
        let most = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        &mut buf[..most]
    }
}

impl File for Kept {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(self.seen(buf, offset), offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_cached_at(self.seen(buf, offset), offset)
    }

    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Err(refused())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len.load(Ordering::Acquire))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.len.load(Ordering::Acquire) {
            return Err(refused());
        }
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.forget_cached(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use standby_types::disk::{read_all, replace};

    use super::*;

    fn protected() -> (MemoryDisk, Arc<dyn Disk>) {
        let real = MemoryDisk::new();
        let written = |path: &str, bytes: &[u8]| replace(&real, Path::new(path), bytes).unwrap();
        written("/db/Data.fs", b"FS30 torn");
        written("/db/Data.fs.index", b"python's");
        written("/blobs/0x01/blob", b"blob");
        written("/db/Data.fs.standby/identity", b"of a former run");
        let text = "<zeo>\n address 127.0.0.1:1\n</zeo>\n<filestorage>\n path /db/Data.fs\n \
                    blob-dir /blobs\n read-only true\n</filestorage>\n";
        let config = Config::parse(Path::new("/zeo.conf"), text).unwrap();
        let disk = protect(&config, Arc::new(real.clone())).unwrap();
        (real, disk)
    }

    #[test]
    fn a_torn_tail_is_passed_over_and_stays() {
        let (real, disk) = protected();
        let path = Path::new("/db/Data.fs");
        let file = disk.open(path, Open::Write).unwrap();
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(100).is_err());
        file.set_len(4).unwrap();
        let mut buf = [0; 20];
        assert_eq!((file.read_at(&mut buf, 0).unwrap(), &buf[..4]), (4, &b"FS30"[..]));
        assert_eq!(file.read_at(&mut buf, 10).unwrap(), 0);
        assert_eq!(read_all(&real, path).unwrap(), b"FS30 torn");
    }

    #[test]
    fn what_would_be_made_there_is_in_memory() {
        let (real, disk) = protected();
        let before = real.list(Path::new("/")).unwrap();
        // What a former run left is another directory's.
        let identity = Path::new("/db/Data.fs.standby/identity");
        assert!(!disk.exists(identity).unwrap() && disk.open(identity, Open::Read).is_err());
        assert!(disk.list(identity.parent().unwrap()).unwrap().is_empty());
        for path in
            ["/db/Data.fs.tr0", "/db/Data.fs.standby/identity", "/blobs/.layout", "/blobs/tmp/x"]
        {
            replace(&*disk, Path::new(path), b"new").unwrap();
            assert_eq!(read_all(&*disk, Path::new(path)).unwrap(), b"new");
            assert!(disk.list(Path::new(path).parent().unwrap()).unwrap().contains(&path.into()));
            disk.remove(Path::new(path)).unwrap();
            assert!(!disk.exists(Path::new(path)).unwrap());
        }
        assert_eq!(read_all(&real, identity).unwrap(), b"of a former run");
        replace(&*disk, Path::new("/elsewhere"), b"real").unwrap();
        assert_eq!(read_all(&real, Path::new("/elsewhere")).unwrap(), b"real");
        assert_eq!(real.list(Path::new("/")).unwrap().len(), before.len() + 1);
        assert_eq!(real.list(Path::new("/blobs")).unwrap().len(), 1);
    }

    #[test]
    fn what_is_there_is_neither_removed_nor_renamed() {
        let (_, disk) = protected();
        let data = Path::new("/db/Data.fs");
        let old = Path::new("/db/Data.fs.old");
        for refused in [
            disk.remove(data),
            disk.rename(data, old),
            disk.hard_link(data, old),
            disk.remove(Path::new("/db/Data.fs.index")),
            disk.make_read_only(Path::new("/blobs/0x01/blob")),
            disk.rename(Path::new("/blobs/0x01/blob"), Path::new("/elsewhere")),
            replace(&*disk, data, b"x"),
        ] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_not_made() {
        let text = "<zeo>\n address 127.0.0.1:1\n</zeo>\n<filestorage>\n path /x\n read-only \
            true\n</filestorage>\n";
        let config = Config::parse(Path::new("/zeo.conf"), text).unwrap();
        let error = protect(&config, Arc::new(MemoryDisk::new())).err().unwrap().to_string();
        assert!(error.contains("/x does not exist"), "{error}");
    }
}
