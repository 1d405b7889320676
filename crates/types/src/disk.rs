//! The interface to the disk.
//!
//! Everything that stores bytes goes through [`Disk`], so that the same code runs on a real file
//! system, in a simulator, and under injected faults. Calls block.
//!
//! What callers may assume, and no more: bytes written are lost in a power failure until
//! [`File::sync`] has returned; a new name, a rename or a removal is lost until
//! [`Disk::sync_dir`] of its directory has returned; unsynced writes may survive in part and in
//! any order.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How [`Disk::open`] treats a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// The file must exist; it is never written.
    Read,
    /// The file must exist.
    Write,
    /// Make the file if it does not exist.
    Create,
}

/// An open file; shared between threads, without a cursor.
pub trait File: Send + Sync {
    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// As [`File::read_at`], but fails with [`io::ErrorKind::WouldBlock`] where bytes would have
    /// to come from the device. The caller then reads on a thread that may block.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `bytes` at `offset`, growing the file where needed.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or grows the file; what is grown reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Returns once all that was written before the call is durable. After an error the state of
    /// the written bytes is unknown: the caller must stop, never retry.
    fn sync(&self) -> io::Result<()>;

    /// What is read of these bytes next comes from the device, as far as the system allows.
    fn forget_cached(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// True if the length is zero.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// Bytes of a whole file, readable as a slice for as long as the value lives.
pub type Mapped = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A file system.
pub trait Disk: Send + Sync {
    /// Opens a file.
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>>;
    /// Opens for reading a file that somebody else may have put there. A link, a FIFO, a device or
    /// a directory is an error at once. Disks that have files only need not look.
    fn open_foreign(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open(path, Open::Read)
    }
    /// Maps a whole file that nobody writes to as long as the map lives.
    fn map(&self, path: &Path) -> io::Result<Mapped>;
    /// True if the name exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Renames a file, replacing the target atomically; disks of files also a directory.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name, which must not exist.
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// What is in a directory, files and directories, sorted; nothing if it does not exist.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
    /// Makes a directory and its parents.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// As [`Disk::create_dir`], but nobody else may look into the directory if it is made now.
    fn create_private_dir(&self, dir: &Path) -> io::Result<()> {
        self.create_dir(dir)
    }
    /// Removes an empty directory.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;
    /// Nobody is to write to the file from now on; who may look into its directory may read it.
    fn make_read_only(&self, path: &Path) -> io::Result<()>;
    /// Returns after a moment: whoever lacked room tries again then.
    fn wait_for_room(&self);
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// True if there was no room. What was written in part means nothing then and is written anew. A
/// *sync* that fails like this is another matter: see [`File::sync`].
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Tries what needs room until there is some. Not for syncs (see [`is_full`]), nor where a caller
/// can be refused.
pub fn when_room<T>(disk: &dyn Disk, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            // It ends with the process at the latest: without a log there is nothing else to do.
            Err(error) if is_full(&error) => disk.wait_for_room(),
            done => return done,
        }
    }
}

/// Reads until `buf` is full or the file ends; the number of bytes read.
pub fn read_full(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Reads a whole (small) file.
pub fn read_all(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, Open::Read)?;
    let mut bytes = vec![0; file.len()? as usize];
    let n = read_full(&*file, &mut bytes, 0)?;
    bytes.truncate(n);
    Ok(bytes)
}

/// Replaces a (small) file durably: after a crash the name leads to the old bytes or to the new.
pub fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let file = disk.open(&temporary, Open::Create)?;
    file.set_len(0)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    disk.rename(&temporary, path)?;
    disk.sync_dir(parent(path))
}

/// Removes a directory, if it is there, with all that is in it.
pub fn remove_tree(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    for path in disk.list(dir)? {
        match disk.remove(&path).map_err(|error| (error.kind(), error)) {
            // Disks in memory do not know directories by name.
            Err((io::ErrorKind::IsADirectory | io::ErrorKind::NotFound, _)) => {
                remove_tree(disk, &path)?;
            }
            removed => removed.map_err(|(_, error)| error)?,
        }
    }
    match disk.remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The directory that holds `path`.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
