//! Blob files, in the layout of `ZODB/blob.py`.
//!
//! ```text
//! BLOBDIR/.layout                              "bushy" or "lawn"
//! BLOBDIR/0x00/…/0x01/0x<16 digits: tid>.blob  bushy: a directory for each byte of the oid
//! BLOBDIR/0x01/0x<16 digits: tid>.blob         lawn: one directory for each oid
//! BLOBDIR/tmp/standby-<32 digits: transfer>    staged: uploaded, not committed
//! ```
//!
//! A file is written and synced under its staged name before its transaction may enter the log;
//! when the transaction is applied it gets its own name. Doing that again changes nothing. The
//! names are durable after [`BlobDir::sync`], which comes before a checkpoint.
//!
//! Damage is found by checksums (see `checksums/blobs.rs`), if the directory was opened with a file
//! of them: before a blob is read ([`BlobDir::look_at`]), and by whoever goes through all of them
//! ([`BlobDir::checking`]).

mod staging;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use standby_types::disk::{Open, parent, read_all, read_full, replace};
use standby_types::{Blob, BlobSource, Disk, File, Mutation, Oid, Tid, Transfer, Upload, mutation};

use crate::StorageError;
pub use crate::blobs::staging::{Staged, Staging};
use crate::checksums::blobs::{BlobDamage, BlobId, BlobSums, sum_of};
use crate::file::read::{Access, Reader};

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
    sums: Option<BlobSums>,
}

/// How many bytes are copied at once.
const CHUNK: usize = 1 << 20;

impl BlobDir {
    /// Opens a directory; makes it if it does not exist. One that somebody else made keeps its
    /// layout. Nobody looks for damage.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<BlobDir, StorageError> {
        BlobDir::open_with(disk, dir, None)
    }

    /// As [`BlobDir::open`]; blobs are compared with the checksums in this file.
    pub fn open_checked(
        disk: Arc<dyn Disk>,
        dir: &Path,
        sums: &Path,
    ) -> Result<BlobDir, StorageError> {
        let failed = StorageError::io(sums, "use it for the checksums of blobs");
        let sums = BlobSums::open(disk.clone(), sums).map_err(failed)?;
        BlobDir::open_with(disk, dir, Some(sums))
    }

    fn open_with(
        disk: Arc<dyn Disk>,
        dir: &Path,
        sums: Option<BlobSums>,
    ) -> Result<BlobDir, StorageError> {
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
        Ok(BlobDir(Arc::new(Inner { disk, dir: dir.to_owned(), layout, dirty, sums })))
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
        staging.file = self.0.disk.open_foreign(&to).map_err(StorageError::io(&from, "take"))?;
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

    /// Gives a blob its name as that of a revision. False if the revision that it is to be copied
    /// from has none. An upload that is not there, under either name, is an error.
    pub fn place(&self, blob: &Blob, tid: Tid) -> Result<bool, StorageError> {
        let disk = &self.0.disk;
        let to = self.path(blob.oid, tid);
        let failed = StorageError::io(&to, "put the blob there");
        let there = disk.exists(&to).map_err(&failed)?;
        let (done, sum) = match blob.source {
            BlobSource::Upload(upload) => {
                let staged = self.staged(upload.transfer);
                if !there {
                    self.name(&to, || disk.rename(&staged, &to)).map_err(&failed)?;
                } else if disk.exists(&staged).map_err(&failed)? {
                    disk.remove(&staged).map_err(&failed)?;
                }
                (true, Some(sum_of(&upload.sha256)))
            }
            BlobSource::Copy(of) if !there => {
                let from = self.path(blob.oid, of);
                let found = disk.exists(&from).map_err(&failed)?;
                if found && self.name(&to, || disk.hard_link(&from, &to)).is_err() {
                    // Not every file system has links, nor any number of them.
                    self.copy(&from, &to).map_err(&failed)?;
                }
                (found, self.sum((blob.oid, of)).filter(|_| found))
            }
            BlobSource::Copy(of) => (true, self.sum((blob.oid, of))),
        };
        self.note_dirty(&to);
        if let Some(sum) = sum {
            let written = !there && matches!(blob.source, BlobSource::Upload(_));
            self.note((blob.oid, tid), sum, written);
        }
        Ok(done)
    }

    fn note(&self, id: BlobId, sum: u64, seen: bool) {
        if let Some(sums) = &self.0.sums {
            sums.note(id, sum, seen);
        }
    }

    fn forget(&self, ids: &[BlobId]) {
        if let Some(sums) = &self.0.sums {
            sums.forget(ids);
        }
    }

    fn write_sums(&self, noted: &BTreeSet<BlobId>) -> Result<(), StorageError> {
        let Some(sums) = &self.0.sums else { return Ok(()) };
        sums.write(noted).map_err(StorageError::io(sums.path(), "write"))
    }

    /// The checksum of a revision's blob, if it is known.
    fn sum(&self, id: BlobId) -> Option<u64> {
        self.0.sums.as_ref().and_then(|sums| sums.get(id))
    }

    /// True if a blob with this SHA-256 may be that of the revision.
    pub fn may_be(&self, (oid, tid): BlobId, sha256: &[u8; 32]) -> bool {
        self.sum((oid, tid)).is_none_or(|sum| sum == sum_of(sha256))
    }

    /// True if the revision is known to have a blob.
    pub fn should_have(&self, id: BlobId) -> bool {
        self.sum(id).is_some()
    }

    /// Looks whether a blob is right before somebody reads it. One that was right since the start
    /// is trusted if the system has all of it in memory. Where none should be, none is right.
    pub fn look_at(&self, id: BlobId) -> Found {
        match &self.0.sums {
            None => Found::Right,
            Some(_) if mutation::on(Mutation::GiveOutDamagedBlobs) => Found::Right,
            Some(_) if !self.should_have(id) && matches!(self.has(id.0, id.1), Ok(false)) => {
                Found::Right
            }
            Some(sums) if sums.is_seen(id) && self.is_cached(id).unwrap_or(false) => Found::Right,
            Some(_) => Checking { from_device: false, ..self.checking(id) }.finish(),
        }
    }

    fn is_cached(&self, id: BlobId) -> io::Result<bool> {
        let file = self.0.disk.open(&self.path(id.0, id.1), Open::Read)?;
        let (mut piece, mut at) = (vec![0; CHUNK], 0);
        loop {
            match file.read_cached_at(&mut piece, at) {
                Ok(0) => return Ok(at == file.len()?),
                Ok(n) => at += n as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// What is known of damage.
    pub fn damage(&self) -> BlobDamage {
        self.0.sums.as_ref().map(BlobSums::damage).unwrap_or_default()
    }

    /// The blob is not what it should be, and nobody has it.
    pub fn note_damaged(&self, id: BlobId) {
        if let Some(sums) = &self.0.sums {
            sums.note_damaged(id);
        }
    }

    /// True if a blob is not known to be damaged, and nobody is repairing it.
    pub fn is_news(&self, id: BlobId) -> bool {
        self.0.sums.as_ref().is_some_and(|sums| sums.is_news(id))
    }

    /// A blob is being fetched to repair it, or is not any more.
    pub fn note_repairing(&self, id: BlobId, begins: bool) {
        if let Some(sums) = &self.0.sums {
            sums.note_repairing(id, begins);
        }
    }

    /// A revision is in the data file no more: its blob need not be here.
    pub fn note_gone(&self, id: BlobId) {
        self.forget(&[id]);
    }

    /// All blobs that are here, or should be.
    pub fn ids(&self) -> Result<Vec<BlobId>, StorageError> {
        let known = self.0.sums.as_ref().map(BlobSums::ids).unwrap_or_default();
        let mut ids: BTreeSet<BlobId> = known.into_iter().collect();
        self.walk(&mut |oid, tid, _| {
            ids.insert((oid, tid));
            Ok(())
        })?;
        Ok(ids.into_iter().collect())
    }

    /// Begins to compare a blob, as the device gives it, with its checksum.
    pub fn checking(&self, id: BlobId) -> Checking {
        let (blobs, hash) = (self.clone(), Sha256::new());
        Checking { blobs, id, from_device: true, file: None, at: 0, hash }
    }

    /// Puts an upload in the place of a damaged blob, durably. False if it is not what was there.
    pub fn repair(&self, upload: &Upload, id: BlobId) -> Result<bool, StorageError> {
        if !self.may_be(id, &upload.sha256) {
            return Ok(false);
        }
        let (from, to) = (self.staged(upload.transfer), self.path(id.0, id.1));
        let failed = StorageError::io(&to, "repair");
        self.name(&to, || self.0.disk.rename(&from, &to)).map_err(&failed)?;
        self.0.disk.sync_dir(parent(&to)).map_err(&failed)?;
        if let Some(sums) = &self.0.sums {
            sums.note_repaired(id, sum_of(&upload.sha256));
        }
        Ok(true)
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

    /// Makes the names of all blobs placed so far durable, and their checksums.
    pub fn sync(&self) -> Result<(), StorageError> {
        let noted = self.0.sums.as_ref().map(BlobSums::take_pending).unwrap_or_default();
        let dirty =
            std::mem::take(&mut *self.0.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        for dir in &dirty {
            match self.0.disk.sync_dir(dir) {
                // A pack has removed all that was in it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    // What was not made durable is still to be: whoever tries again must not take
                    // it for done.
                    if let Some(sums) = &self.0.sums {
                        sums.put_back(noted);
                    }
                    let error = StorageError::io(dir, "sync")(error);
                    self.0.dirty.lock().unwrap_or_else(PoisonError::into_inner).extend(dirty);
                    return Err(error);
                }
                Ok(()) => {}
            }
        }
        self.write_sums(&noted)
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
        let mut removed = Vec::new();
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
            match (there, kept) {
                (Some(there), true) => disk.hard_link(path, &there).map_err(&failed)?,
                (Some(there), false) => disk.rename(path, &there).map_err(&failed)?,
                (None, false) => disk.remove(path).map_err(&failed)?,
                (None, true) => return Ok(()),
            }
            if !kept {
                removed.push((oid, tid));
                // Up to the first one that is not empty.
                for dir in path.ancestors().skip(1).take_while(|dir| *dir != self.0.dir) {
                    if disk.remove_dir(dir).is_err() {
                        break;
                    }
                }
            }
            Ok(())
        })?;
        self.forget(&removed);
        Ok(removed.len())
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
        if let Some(sums) = &self.0.sums {
            // Durable before others can get these names.
            let after = sums.ids().into_iter().filter(|(_, tid)| *tid > last);
            sums.forget(&Vec::from_iter(after));
            self.write_sums(&BTreeSet::new())?;
        }
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

/// Whether a blob is what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is.
    Right,
    /// It is not, it is not there, or it cannot be read.
    Damaged,
}

/// A blob that is being compared with its checksum.
pub struct Checking {
    blobs: BlobDir,
    id: BlobId,
    from_device: bool,
    file: Option<Arc<dyn File>>,
    at: u64,
    hash: Sha256,
}

impl Checking {
    /// The revision.
    pub fn id(&self) -> BlobId {
        self.id
    }

    /// How many bytes were read so far.
    pub fn bytes(&self) -> u64 {
        self.at
    }

    /// Reads the next piece; how the blob is, once all is read. A blob without a checksum gets one.
    pub fn step(&mut self) -> Option<Found> {
        let Ok(piece) = self.read() else { return Some(Found::Damaged) };
        if !piece.is_empty() {
            self.at += piece.len() as u64;
            self.hash.update(&piece);
            return None;
        }
        let sha256 = std::mem::take(&mut self.hash).finalize().into();
        if !self.blobs.may_be(self.id, &sha256) {
            return Some(Found::Damaged);
        }
        self.blobs.note(self.id, sum_of(&sha256), true);
        Some(Found::Right)
    }

    /// The same, to the end.
    pub fn finish(mut self) -> Found {
        loop {
            if let Some(found) = self.step() {
                return found;
            }
        }
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let file = match &self.file {
            Some(file) => file,
            None => {
                let path = self.blobs.path(self.id.0, self.id.1);
                self.file.insert(self.blobs.disk().open(&path, Open::Read)?)
            }
        };
        if self.from_device {
            file.forget_cached(self.at, CHUNK as u64)?;
        }
        let mut piece = vec![0; CHUNK];
        let n = read_full(&**file, &mut piece, self.at)?;
        piece.truncate(n);
        Ok(piece)
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

    /// Object 1 has this blob at transaction 5.
    fn put(blobs: &BlobDir, bytes: &[u8]) {
        let (upload, staged) = upload(blobs, bytes);
        staged.keep();
        assert!(blobs.place(&blob(1, BlobSource::Upload(upload)), Tid(5)).unwrap());
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
    fn what_could_not_be_made_durable_is_made_so_by_the_next_try() {
        let disk = MemoryDisk::new();
        let blobs = open_checked(&disk);
        put(&blobs, b"some bytes");
        disk.refuse_dirs(true);
        assert!(blobs.sync().is_err());
        disk.refuse_dirs(false);
        blobs.sync().unwrap();
        disk.crash();
        let blobs = open_checked(&disk);
        assert!(blobs.has(Oid(1), Tid(5)).unwrap(), "its name");
        assert!(blobs.should_have((Oid(1), Tid(5))), "its checksum");
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

    const SUMS: &str = "/1.blobs.sums";

    fn open_checked(disk: &MemoryDisk) -> BlobDir {
        let disk = Arc::new(disk.clone());
        BlobDir::open_checked(disk, Path::new("/blobs"), Path::new(SUMS)).unwrap()
    }

    fn overwrite(disk: &MemoryDisk, path: &Path, bytes: &[u8]) {
        disk.open(path, Open::Write).unwrap().write_at(bytes, 0).unwrap();
    }

    #[test]
    fn row_28_damage_to_blobs_is_found_and_mended() {
        let disk = MemoryDisk::new();
        let blobs = open_checked(&disk);
        put(&blobs, b"some bytes");
        blobs.place(&blob(1, BlobSource::Copy(Tid(5))), Tid(6)).unwrap();
        blobs.sync().unwrap();
        disk.crash();

        let blobs = open_checked(&disk);
        let (one, copy) = ((Oid(1), Tid(5)), (Oid(1), Tid(6)));
        assert_eq!(blobs.ids().unwrap(), [one, copy]);
        let path = blobs.path(Oid(1), Tid(5));
        overwrite(&disk, &path, b"s0me");
        assert_eq!(blobs.look_at(one), Found::Damaged, "it was written before the start");
        overwrite(&disk, &path, b"some");
        assert_eq!(blobs.look_at(one), Found::Right);
        overwrite(&disk, &path, b"s0me");
        assert_eq!(blobs.look_at(one), Found::Right, "it is in memory, and nobody writes there");
        assert_eq!(blobs.checking(one).finish(), Found::Damaged);
        assert_eq!(blobs.checking(copy).finish(), Found::Damaged, "it is the same file");
        blobs.note_repairing(one, true);
        assert!(!blobs.is_news(one) && blobs.is_news(copy));
        blobs.note_repairing(one, false);
        assert!(blobs.is_news(one));
        blobs.note_damaged(one);
        assert!(!blobs.is_news(one));
        assert_eq!(blobs.look_at(one), Found::Damaged);
        assert_eq!(blobs.damage().blobs, BTreeSet::from([one]));

        let (wrong, staged) = upload(&blobs, b"other bytes");
        assert!(!blobs.repair(&wrong, one).unwrap());
        drop(staged);
        let (right, _staged) = upload(&blobs, b"some bytes");
        assert!(blobs.repair(&right, one).unwrap());
        assert_eq!(blobs.damage(), BlobDamage { blobs: BTreeSet::new(), repaired: 1 });
        assert_eq!(blobs.checking(one).finish(), Found::Right);

        disk.remove(&blobs.path(Oid(1), Tid(6))).unwrap();
        assert_eq!(blobs.checking(copy).finish(), Found::Damaged);
        blobs.note_damaged(copy);
        blobs.note_gone(copy);
        assert_eq!(blobs.damage().blobs, BTreeSet::new());
        assert_eq!(blobs.ids().unwrap(), [one]);
    }

    #[test]
    fn blobs_of_before_get_their_checksums_when_they_are_read() {
        let disk = MemoryDisk::new();
        let before = open(&disk);
        put(&before, b"some bytes");
        let (one, none) = ((Oid(1), Tid(5)), (Oid(2), Tid(5)));
        assert!(before.look_at(one) == Found::Right && before.damage() == BlobDamage::default());

        let blobs = open_checked(&disk);
        assert_eq!(blobs.look_at(none), Found::Right);
        assert_eq!(blobs.checking(one).finish(), Found::Right);
        blobs.sync().unwrap();
        overwrite(&disk, &blobs.path(Oid(1), Tid(5)), b"s0me");
        assert_eq!(open_checked(&disk).checking(one).finish(), Found::Damaged);
        // A revision of another timeline, which gets the same name, is another one.
        blobs.remove_after(Tid(4)).unwrap();
        put(&blobs, b"others");
        assert_eq!(open_checked(&disk).checking(one).finish(), Found::Right);
    }

    #[test]
    fn without_links_a_blob_is_copied() {
        let disk = MemoryDisk::new();
        let blobs = open(&disk);
        put(&blobs, &vec![7; CHUNK + 5]);
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
