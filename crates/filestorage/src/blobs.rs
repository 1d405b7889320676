//! Blob files, in the layout of `ZODB/blob.py`.
//!
//! ```text
//! BLOBDIR/.layout                              "bushy" or "lawn"
//! BLOBDIR/0x00/…/0x01/0x<16 digits: tid>.blob  bushy: a directory for each byte of the oid
//! BLOBDIR/0x01/0x<16 digits: tid>.blob         lawn: one directory for each oid
//! BLOBDIR/tmp/standby-<32 digits: transfer>    staged: uploaded, not committed
//! ```
//!
//! A file is written and synced under its staged name before its transaction may enter the log; when
//! the transaction is applied it gets its own name. Doing that again changes nothing. The names are
//! durable after [`BlobDir::sync`], which comes before a checkpoint.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use standby_types::disk::{Open, parent, read_all, read_full, replace};
use standby_types::{Blob, BlobSource, Disk, File, Oid, Tid, Transfer, Upload};

use crate::StorageError;
use crate::read::{Access, Reader};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Bushy,
    Lawn,
}

/// A directory of blobs; clones are the same directory.
#[derive(Clone)]
pub struct BlobDir(Arc<Inner>);

struct Inner {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    layout: Layout,
    /// Directories with names that are not durable yet.
    dirty: Mutex<BTreeSet<PathBuf>>,
}

/// How many bytes are copied at once.
const CHUNK: usize = 1 << 20;

impl BlobDir {
    /// Opens a directory; makes it if it does not exist. One that somebody else made keeps its
    /// layout.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<BlobDir, StorageError> {
        let failed = StorageError::io(dir, "use it as the directory of blobs");
        let marker = dir.join(".layout");
        let layout = if disk.exists(&marker).map_err(&failed)? {
            let text = read_all(&*disk, &marker).map_err(&failed)?;
            match text.trim_ascii() {
                b"bushy" => Layout::Bushy,
                b"lawn" => Layout::Lawn,
                other => {
                    let text = format!(
                        "unknown layout {:?} in {}",
                        other.escape_ascii().to_string(),
                        marker.display()
                    );
                    return Err(failed(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
            }
        } else {
            disk.create_dir(dir).map_err(&failed)?;
            let hidden = |path: &PathBuf| name_of(path).is_some_and(|name| name.starts_with('.'));
            let used = disk.list(dir).map_err(&failed)?.iter().any(|path| !hidden(path));
            let (layout, text) = match used {
                // As Python takes a directory without the marker.
                true => (Layout::Lawn, "lawn"),
                false => (Layout::Bushy, "bushy"),
            };
            replace(&*disk, &marker, text.as_bytes()).map_err(&failed)?;
            layout
        };
        disk.create_dir(&dir.join("tmp")).map_err(&failed)?;
        disk.sync_dir(dir).map_err(&failed)?;
        let dirty = Mutex::default();
        Ok(BlobDir(Arc::new(Inner { disk, dir: dir.to_owned(), layout, dirty })))
    }

    /// Where it is.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.0.disk
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The directory of an object's blobs.
    pub fn object_dir(&self, oid: Oid) -> PathBuf {
        match self.0.layout {
            Layout::Bushy => {
                let bytes = oid.to_bytes();
                bytes.iter().fold(self.0.dir.clone(), |dir, byte| dir.join(format!("0x{byte:02x}")))
            }
            Layout::Lawn => {
                let digits = format!("{:x}", oid.0);
                let even = digits.len().next_multiple_of(2);
                self.0.dir.join(format!("0x{digits:0>even$}"))
            }
        }
    }

    /// The blob of an object's revision.
    pub fn path(&self, oid: Oid, tid: Tid) -> PathBuf {
        self.object_dir(oid).join(format!("0x{:016x}.blob", tid.0))
    }

    /// An upload that is not committed.
    pub fn staged(&self, transfer: Transfer) -> PathBuf {
        self.0.dir.join("tmp").join(format!("standby-{transfer}"))
    }

    /// True if the object's revision has a blob here.
    pub fn has(&self, oid: Oid, tid: Tid) -> Result<bool, StorageError> {
        let path = self.path(oid, tid);
        self.0.disk.exists(&path).map_err(StorageError::io(&path, "look for it"))
    }

    /// True if the upload is here and durable.
    pub fn has_staged(&self, transfer: Transfer) -> Result<bool, StorageError> {
        let path = self.staged(transfer);
        self.0.disk.exists(&path).map_err(StorageError::io(&path, "look for it"))
    }

    /// Begins an upload.
    pub fn stage(&self, transfer: Transfer) -> Result<Staging, StorageError> {
        let (path, whole) = (self.partial(transfer), self.staged(transfer));
        let file =
            self.0.disk.open(&path, Open::Create).map_err(StorageError::io(&path, "make"))?;
        file.set_len(0).map_err(StorageError::io(&path, "make"))?;
        let disk = self.0.disk.clone();
        let staged = Some(Staged { disk, paths: [path, whole] });
        Ok(Staging { file, transfer, len: 0, hash: Sha256::new(), staged })
    }

    fn partial(&self, transfer: Transfer) -> PathBuf {
        self.0.dir.join("tmp").join(format!("standby-{transfer}.part"))
    }

    /// Takes a file that a client has put into the object's directory as an upload.
    pub fn adopt(
        &self,
        oid: Oid,
        name: &str,
        transfer: Transfer,
    ) -> Result<(Upload, Staged), StorageError> {
        let from = self.object_dir(oid).join(name);
        let mut staging = self.stage(transfer)?;
        // Only after a rename is it sure that nobody writes there any more.
        let to = self.partial(transfer);
        self.0.disk.rename(&from, &to).map_err(StorageError::io(&from, "take"))?;
        // It may be read-only already; reading is enough to sync it.
        staging.file = self.0.disk.open(&to, Open::Read).map_err(StorageError::io(&to, "open"))?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = read_full(&*staging.file, &mut buffer, staging.len)
                .map_err(StorageError::io(&to, "read"))?;
            if n == 0 {
                return staging.finish();
            }
            staging.hash.update(&buffer[..n]);
            staging.len += n as u64;
        }
    }

    /// Gives a blob its name as that of a revision. False if the revision that it is to be copied from
    /// has none. An upload that is not there, under either name, is an error.
    pub fn place(&self, blob: &Blob, tid: Tid) -> Result<bool, StorageError> {
        let disk = &self.0.disk;
        let to = self.path(blob.oid, tid);
        let failed = StorageError::io(&to, "put the blob there");
        let there = disk.exists(&to).map_err(&failed)?;
        let done = match blob.source {
            BlobSource::Upload(upload) => {
                let staged = self.staged(upload.transfer);
                if !there {
                    self.name(&to, || disk.rename(&staged, &to)).map_err(&failed)?;
                } else if disk.exists(&staged).map_err(&failed)? {
                    disk.remove(&staged).map_err(&failed)?;
                }
                true
            }
            BlobSource::Copy(of) if !there => {
                let from = self.path(blob.oid, of);
                let found = disk.exists(&from).map_err(&failed)?;
                if found && self.name(&to, || disk.hard_link(&from, &to)).is_err() {
                    // Not every file system has links, nor any number of them.
                    self.copy(&from, &to).map_err(&failed)?;
                }
                found
            }
            BlobSource::Copy(_) => true,
        };
        self.note_dirty(&to);
        Ok(done)
    }

    /// The name of a blob is not durable yet.
    fn note_dirty(&self, path: &Path) {
        let mut dirty = self.0.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        dirty.insert(self.0.dir.join("tmp"));
        for dir in path.ancestors().skip(1).take_while(|dir| dir.starts_with(&self.0.dir)) {
            if !dirty.insert(dir.to_owned()) {
                break;
            }
        }
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        let disk = &self.0.disk;
        // Taken for an upload that nobody names, if the process ends meanwhile.
        let part = self.0.dir.join("tmp").join("standby-copy");
        let (source, target) = (disk.open(from, Open::Read)?, disk.open(&part, Open::Create)?);
        target.set_len(0)?;
        let (mut buffer, mut at) = (vec![0; CHUNK], 0);
        loop {
            let n = read_full(&*source, &mut buffer, at)?;
            if n == 0 {
                break;
            }
            target.write_at(&buffer[..n], at)?;
            at += n as u64;
        }
        target.sync()?;
        disk.make_read_only(&part)?;
        self.name(to, || disk.rename(&part, to))
    }

    /// Names a file; a directory may be removed as empty in the moment in which it is made.
    fn name(&self, to: &Path, name: impl Fn() -> io::Result<()>) -> io::Result<()> {
        for _ in 0..10 {
            self.0.disk.create_dir(parent(to))?;
            match name() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other,
            }
        }
        name()
    }

    /// An upload is not needed: its transaction is there already, or will never be.
    pub fn discard(&self, transfer: Transfer) -> Result<(), StorageError> {
        let path = self.staged(transfer);
        remove_if_there(&*self.0.disk, &path).map_err(StorageError::io(&path, "remove"))
    }

    /// Makes the names of all blobs placed so far durable.
    pub fn sync(&self) -> Result<(), StorageError> {
        let dirty =
            std::mem::take(&mut *self.0.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        for dir in dirty {
            match self.0.disk.sync_dir(&dir) {
                // A pack has removed all that was in it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(StorageError::io(&dir, "sync"))?,
            }
        }
        Ok(())
    }

    /// Removes the uploads of a former run, except those that the log still names.
    pub fn remove_staged_except(&self, needed: &BTreeSet<Transfer>) -> Result<usize, StorageError> {
        let tmp = self.0.dir.join("tmp");
        let failed = StorageError::io(&tmp, "clean up");
        let mut removed = 0;
        for path in self.0.disk.list(&tmp).map_err(&failed)? {
            let Some(name) = name_of(&path).and_then(|name| name.strip_prefix("standby-")) else {
                continue;
            };
            if Transfer::parse(name).is_none_or(|transfer| !needed.contains(&transfer)) {
                self.0.disk.remove(&path).map_err(&failed)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// After a pack: removes the blobs of revisions up to `last` that are not in the data file any
    /// more; or, with `old`, moves them there, and gives those that stay a second name there: that
    /// directory belongs to the data file of before the pack. Returns the number of blobs that
    /// are gone.
    pub fn remove_packed(
        &self,
        reader: &Reader,
        last: Tid,
        old: Option<&Path>,
    ) -> Result<usize, StorageError> {
        let disk = &self.0.disk;
        if let Some(old) = old {
            let failed = StorageError::io(old, "make");
            disk.create_dir(old).map_err(&failed)?;
            let marker = self.0.dir.join(".layout");
            disk.hard_link(&marker, &old.join(".layout")).map_err(&failed)?;
        }
        let mut removed = 0;
        self.walk(&mut |oid, tid, path| {
            if tid > last {
                return Ok(());
            }
            let failed = StorageError::io(path, "remove");
            let kept = match reader.load_serial(oid, tid, Access::Blocking) {
                Ok(_) => true,
                Err(StorageError::NoKey(_)) => false,
                Err(error) => return Err(error),
            };
            let there = old.map(|old| old.join(path.strip_prefix(&self.0.dir).unwrap_or(path)));
            if let Some(there) = &there {
                disk.create_dir(parent(there)).map_err(&failed)?;
            }
            removed += usize::from(!kept);
            match (there, kept) {
                (Some(there), true) => disk.hard_link(path, &there).map_err(&failed)?,
                (Some(there), false) => disk.rename(path, &there).map_err(&failed)?,
                (None, false) => disk.remove(path).map_err(&failed)?,
                (None, true) => return Ok(()),
            }
            if !kept {
                // Up to the first one that is not empty.
                for dir in path.ancestors().skip(1).take_while(|dir| *dir != self.0.dir) {
                    if disk.remove_dir(dir).is_err() {
                        break;
                    }
                }
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// Gives the blob of a revision in another directory a second name, or a copy, in this one.
    pub fn take_copy(&self, of: &BlobDir, oid: Oid, tid: Tid) -> Result<(), StorageError> {
        let (from, to) = (of.path(oid, tid), self.path(oid, tid));
        let disk = &self.0.disk;
        let failed = StorageError::io(&to, "keep a copy there");
        if disk.exists(&to).map_err(&failed)? {
            return Ok(());
        }
        if self.name(&to, || disk.hard_link(&from, &to)).is_err() {
            self.copy(&from, &to).map_err(&failed)?;
        }
        self.note_dirty(&to);
        Ok(())
    }

    /// Removes the blobs of revisions after `tid`; returns how many there were.
    pub fn remove_after(&self, last: Tid) -> Result<usize, StorageError> {
        let mut removed = 0;
        self.walk(&mut |_, tid, path| {
            if tid > last {
                self.0.disk.remove(path).map_err(StorageError::io(path, "remove"))?;
                removed += 1;
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// Calls `each` for every blob.
    pub fn walk(
        &self,
        each: &mut dyn FnMut(Oid, Tid, &Path) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let depth = match self.0.layout {
            Layout::Bushy => 8,
            Layout::Lawn => 1,
        };
        self.walk_in(&self.0.dir, depth, 0, each)
    }

    fn walk_in(
        &self,
        dir: &Path,
        depth: usize,
        oid: u64,
        each: &mut dyn FnMut(Oid, Tid, &Path) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        for path in self.0.disk.list(dir).map_err(StorageError::io(dir, "list"))? {
            let Some(digits) = name_of(&path).and_then(|name| name.strip_prefix("0x")) else {
                continue;
            };
            if depth == 0 {
                let tid =
                    digits.strip_suffix(".blob").and_then(|t| u64::from_str_radix(t, 16).ok());
                if let Some(tid) = tid {
                    each(Oid(oid), Tid(tid), &path)?;
                }
            } else if let Ok(part) = u64::from_str_radix(digits, 16) {
                let oid = if self.0.layout == Layout::Bushy { oid << 8 | part } else { part };
                self.walk_in(&path, depth - 1, oid, each)?;
            }
        }
        Ok(())
    }
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn remove_if_there(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    match disk.remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// An upload while it is being written. Dropped, it leaves nothing.
pub struct Staging {
    file: Arc<dyn File>,
    transfer: Transfer,
    len: u64,
    hash: Sha256,
    staged: Option<Staged>,
}

impl Staging {
    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, self.len)?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes it durable under its staged name.
    pub fn finish(mut self) -> Result<(Upload, Staged), StorageError> {
        let Some(staged) = self.staged.take() else {
            return Err(StorageError::io(Path::new(""), "finish")(io::ErrorKind::NotFound.into()));
        };
        let [part, whole] = &staged.paths.clone();
        let failed = StorageError::io(whole, "write");
        self.file.sync().map_err(&failed)?;
        staged.disk.make_read_only(part).map_err(&failed)?;
        staged.disk.rename(part, whole).map_err(&failed)?;
        staged.disk.sync_dir(parent(whole)).map_err(&failed)?;
        let sha256 = std::mem::take(&mut self.hash).finalize().into();
        Ok((Upload { transfer: self.transfer, len: self.len, sha256 }, staged))
    }
}

/// Keeps an upload on disk; when it is dropped, the file goes, unless it was [`Staged::keep`]ed.
pub struct Staged {
    disk: Arc<dyn Disk>,
    paths: [PathBuf; 2],
}

impl Staged {
    /// The file stays: the log names it.
    pub fn keep(mut self) {
        self.paths = Default::default();
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for path in self.paths.iter().filter(|path| !path.as_os_str().is_empty()) {
            // What cannot be removed now goes at the next start.
            let _ = remove_if_there(&*self.disk, path);
        }
    }
}

/// True if a record's data are those of a blob object. Source: `ZODB.blob.is_blob_record`; here a
/// record is only looked at, so this may be true for others that name the class.
pub fn may_be_blob(data: &[u8]) -> bool {
    let head = &data[..data.len().min(64)];
    head.windows(9).any(|window| window == b"ZODB.blob")
}

#[cfg(test)]
mod tests {
    use standby_types::memory::MemoryDisk;

    use super::*;

    const TRANSFER: Transfer = Transfer([7; 16]);

    fn open(disk: &MemoryDisk) -> BlobDir {
        BlobDir::open(Arc::new(disk.clone()), Path::new("/blobs")).unwrap()
    }

    fn upload(blobs: &BlobDir, bytes: &[u8]) -> (Upload, Staged) {
        let mut staging = blobs.stage(TRANSFER).unwrap();
        bytes.chunks(3).for_each(|chunk| staging.write(chunk).unwrap());
        staging.finish().unwrap()
    }

    fn blob(oid: u64, source: BlobSource) -> Blob {
        Blob { oid: Oid(oid), source }
    }

    #[test]
    fn paths_are_those_of_zodb() {
        let disk = MemoryDisk::new();
        let path = open(&disk).path(Oid(0x1ff), Tid(0x03c0));
        let expected = "/blobs/0x00/0x00/0x00/0x00/0x00/0x00/0x01/0xff/0x00000000000003c0.blob";
        assert_eq!(path, Path::new(expected));

        let disk = MemoryDisk::new();
        disk.open(Path::new("/blobs/0x01/0x0000000000000002.blob"), Open::Create).unwrap();
        let lawn = open(&disk);
        assert_eq!(
            lawn.path(Oid(0x1ff), Tid(2)),
            Path::new("/blobs/0x01ff/0x0000000000000002.blob")
        );
        assert_eq!(lawn.object_dir(Oid(0)), Path::new("/blobs/0x00"));
        let mut found = Vec::new();
        lawn.walk(&mut |oid, tid, _| {
            found.push((oid, tid));
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [(Oid(1), Tid(2))]);
        assert_eq!(read_all(&disk, Path::new("/blobs/.layout")).unwrap(), b"lawn");
    }

    #[test]
    fn uploads_are_placed_once_and_survive() {
        let disk = MemoryDisk::new();
        let blobs = open(&disk);
        let (upload, staged) = upload(&blobs, b"some bytes");
        assert_eq!(upload.len, 10);
        staged.keep();
        disk.crash();
        let one = blob(1, BlobSource::Upload(upload));
        assert!(blobs.place(&one, Tid(5)).unwrap());
        assert!(blobs.place(&one, Tid(5)).unwrap());
        blobs.sync().unwrap();
        disk.crash();
        assert_eq!(read_all(&disk, &blobs.path(Oid(1), Tid(5))).unwrap(), b"some bytes");
        assert!(!blobs.has_staged(TRANSFER).unwrap());
        assert!(blobs.place(&blob(1, BlobSource::Copy(Tid(5))), Tid(6)).unwrap());
        assert_eq!(read_all(&disk, &blobs.path(Oid(1), Tid(6))).unwrap(), b"some bytes");
        assert!(!blobs.place(&blob(1, BlobSource::Copy(Tid(4))), Tid(7)).unwrap());
        let missing = blob(2, BlobSource::Upload(upload));
        assert!(blobs.place(&missing, Tid(8)).is_err());
    }

    #[test]
    fn without_links_a_blob_is_copied() {
        let disk = MemoryDisk::new();
        let blobs = open(&disk);
        let (upload, staged) = upload(&blobs, &vec![7; CHUNK + 5]);
        staged.keep();
        blobs.place(&blob(1, BlobSource::Upload(upload)), Tid(5)).unwrap();
        blobs.copy(&blobs.path(Oid(1), Tid(5)), &blobs.path(Oid(1), Tid(6))).unwrap();
        assert_eq!(read_all(&disk, &blobs.path(Oid(1), Tid(6))).unwrap(), vec![7; CHUNK + 5]);
        assert!(blobs.has(Oid(1), Tid(5)).unwrap());
        assert_eq!(blobs.remove_staged_except(&BTreeSet::new()).unwrap(), 0);
    }

    #[test]
    fn what_is_not_committed_leaves_nothing() {
        let disk = MemoryDisk::new();
        let blobs = open(&disk);
        let empty = disk.list(Path::new("/blobs/tmp")).unwrap();
        let mut staging = blobs.stage(TRANSFER).unwrap();
        staging.write(b"half").unwrap();
        drop(staging);
        drop(upload(&blobs, b"whole"));
        assert_eq!(disk.list(Path::new("/blobs/tmp")).unwrap(), empty);

        upload(&blobs, b"of a former run").1.keep();
        assert_eq!(blobs.remove_staged_except(&BTreeSet::from([TRANSFER])).unwrap(), 0);
        assert_eq!(blobs.remove_staged_except(&BTreeSet::new()).unwrap(), 1);
    }

    #[test]
    fn files_of_clients_are_taken() {
        let disk = MemoryDisk::new();
        let blobs = open(&disk);
        let file = disk.open(&blobs.object_dir(Oid(3)).join("x.tmp"), Open::Create).unwrap();
        file.write_at(b"shared", 0).unwrap();
        let (taken, staged) = blobs.adopt(Oid(3), "x.tmp", TRANSFER).unwrap();
        let expected: [u8; 32] = Sha256::digest(b"shared").into();
        assert_eq!((taken.len, taken.sha256), (6, expected));
        drop(staged);
        assert!(blobs.adopt(Oid(3), "x.tmp", TRANSFER).is_err());
    }
}
