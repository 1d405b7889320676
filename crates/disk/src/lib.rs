//! The real disk.

use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::ReadWriteFlags;
use standby_types::disk::{Disk, File, Mapped, Open};

/// Memory is faster, devices are slower.
const SLOW_READ: Duration = Duration::from_micros(500);
/// Reads that go to the blocking pool after a slow one.
const AFTER_SLOW_READ: u32 = 256;

/// Until who lacks room tries again.
const ROOM: Duration = Duration::from_millis(100);

/// The file system of the machine.
pub struct OsDisk;

struct OsFile {
    file: fs::File,
    /// The file system cannot say whether bytes are in memory (`RWF_NOWAIT`): overlayfs, older
    /// tmpfs.
    cannot_say: AtomicBool,
    /// So many reads are left to the blocking pool, since one took long.
    to_pool: AtomicU32,
}

impl OsFile {
    fn new(file: fs::File) -> OsFile {
        OsFile { file, cannot_say: AtomicBool::new(false), to_pool: AtomicU32::new(0) }
    }

    /// Where nobody can say whether bytes are in memory, they are taken to be there as long as
    /// reads are fast. One read in some hundreds may wait for the device; a hop to the blocking
    /// pool for each would cost more than all loads.
    fn read_probably_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.to_pool.load(Ordering::Relaxed);
        if left > 0 {
            // Lost updates do not matter: it ends all the same.
            self.to_pool.store(left - 1, Ordering::Relaxed);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let started = Instant::now();
        let read = self.file.read_at(buf, offset);
        if started.elapsed() > SLOW_READ {
            self.to_pool.store(AFTER_SLOW_READ, Ordering::Relaxed);
        }
        read
    }
}

impl File for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.cannot_say.load(Ordering::Relaxed) {
            return self.read_probably_cached_at(buf, offset);
        }
        let mut slices = [IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.file, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                self.cannot_say.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::WouldBlock.into())
            }
            other => Ok(other?),
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        let advice = rustix::fs::Advice::DontNeed;
        Ok(rustix::fs::fadvise(&self.file, offset, std::num::NonZeroU64::new(len), advice)?)
    }
}

struct Map(memmap2::Mmap);

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Disk for OsDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(open != Open::Read);
        if open == Open::Create {
            options.create(true).truncate(false);
        }
        Ok(Arc::new(OsFile::new(options.open(path)?)))
    }

    fn open_foreign(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(rustix::io::Errno::LOOP) => return Err(not_a_file("a symbolic link")),
            opened => fs::File::from(opened?),
        };
        match opened.metadata()?.file_type() {
            kind if kind.is_file() => Ok(Arc::new(OsFile::new(opened))),
            kind if kind.is_dir() => Err(not_a_file("a directory")),
            _ => Err(not_a_file("a pipe or a device")),
        }
    }

    #[allow(unsafe_code)]
    fn map(&self, path: &Path) -> io::Result<Mapped> {
        let file = fs::File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Arc::new([]));
        }
        // SAFETY: only index files are mapped. They are written under another name, synced and then
        // renamed into place; a file with this name is never written or cut again, only
        // unlinked, and the state directory belongs to this process (it holds the lock file).
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Arc::new(Map(map)))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?,
        };
        paths.sort();
        Ok(paths)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn create_private_dir(&self, dir: &Path) -> io::Result<()> {
        // The directories above it are not only ours.
        fs::create_dir_all(standby_types::disk::parent(dir))?;
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            made => made,
        }
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    fn make_read_only(&self, path: &Path) -> io::Result<()> {
        let of_dir = fs::metadata(standby_types::disk::parent(path))?.permissions().mode();
        let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
        fs::set_permissions(path, fs::Permissions::from_mode((mode | of_dir & 0o444) & !0o222))
    }

    fn wait_for_room(&self) {
        std::thread::sleep(ROOM);
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }
}

fn not_a_file(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, not a file"))
}

/// A file without a name, gone when it is dropped.
pub fn temporary_file(dir: &Path) -> io::Result<Arc<dyn File>> {
    let flags =
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let file = rustix::fs::open(dir, flags, mode)?;
    Ok(Arc::new(OsFile::new(file.into())))
}

/// FileStorage's lock on a data file: an exclusive `flock` on `PATH.lock`, with the process id in
/// it. Released when it is dropped, or when the process ends in whatever way.
pub struct LockFile {
    _file: fs::File,
}

impl LockFile {
    /// Takes the lock; fails if another process holds it, be it Standby or Python.
    pub fn take(data_file: &Path) -> io::Result<LockFile> {
        let path = PathBuf::from(format!("{}.lock", data_file.display()));
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            let holder = match holder.trim() {
                "" => String::new(),
                pid => format!(" (process {pid})"),
            };
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!(
                    "{} is in use by another program{holder}: it holds the lock on {}",
                    data_file.display(),
                    path.display()
                ),
            ));
        }
        file.set_len(0)?;
        writeln!(file, " {}", std::process::id())?;
        file.flush()?;
        Ok(LockFile { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use standby_types::disk::remove_tree;

    use super::*;

    #[test]
    fn cached_reads_see_what_was_just_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = OsDisk.open(&path, Open::Create).unwrap();
        file.write_at(b"hello", 3).unwrap();
        let mut buf = [0; 16];
        match file.read_cached_at(&mut buf, 0) {
            Ok(n) => assert_eq!(&buf[..n], b"\0\0\0hello"),
            // Some file systems cannot; then reads go to the blocking pool.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert_eq!((*OsDisk.map(&path).unwrap()).as_ref(), b"\0\0\0hello");
    }

    #[test]
    fn a_data_file_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let lock = LockFile::take(&path).unwrap();
        let error = LockFile::take(&path).err().unwrap().to_string();
        assert!(error.contains("is in use by another program (process"), "{error}");
        drop(lock);
        LockFile::take(&path).unwrap();
    }

    #[test]
    fn a_tree_is_removed_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("inner/empty")).unwrap();
        fs::write(tree.join("inner/file"), "x").unwrap();
        fs::write(dir.path().join("beside"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path(), tree.join("link")).unwrap();
        remove_tree(&OsDisk, &tree).unwrap();
        remove_tree(&OsDisk, &tree).unwrap();
        assert_eq!(OsDisk.list(dir.path()).unwrap(), [dir.path().join("beside")]);
    }

    #[test]
    fn a_private_directory_is_private_and_those_above_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("outer/inner");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        OsDisk.create_private_dir(&inner).unwrap();
        OsDisk.create_private_dir(&inner).unwrap();
        fs::create_dir(dir.path().join("usual")).unwrap();
        assert_eq!(mode(&inner), 0o700);
        assert_eq!(mode(&dir.path().join("outer")), mode(&dir.path().join("usual")));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(OsDisk.create_private_dir(&dir.path().join("file")).is_err());
    }

    #[test]
    fn only_a_file_is_opened_that_somebody_else_put_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        fs::create_dir(path("directory")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
        assert_eq!(OsDisk.open_foreign(&path("file")).unwrap().len().unwrap(), 1);
        for (name, told) in
            [("link", "a symbolic link"), ("directory", "a directory"), ("pipe", "a pipe")]
        {
            let error = OsDisk.open_foreign(&path(name)).err().unwrap().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn temporary_files_have_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = temporary_file(dir.path()).unwrap();
        file.write_at(b"x", 0).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
