//! Opening, cutting and rewinding a file.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use standby_types::disk::{Open, parent, read_full};
use standby_types::{Disk, File, Position, Tid};

use crate::StorageError;
use crate::checksums::blocks::{ChecksummedFile, Repair};
use crate::file::format::{DataHeader, Magic, TXN_HEADER};
use crate::file::holes::Holes;
use crate::file::mark::Mark;
use crate::file::read::Reader;
use crate::file::scan::{Found, Scanner, Window};
use crate::file::shared::{Shared, State};
use crate::index::{Index, Sorted, python_index_path};

/// How much of a file counts when it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it, less a torn tail, which is kept as `PATH.tr0`, `.tr1`, ….
    Whole,
    /// It is known to be good up to `mark`.
    UpTo {
        /// The last transaction that counts.
        mark: Mark,
        /// Transactions after `mark` that the caller is about to append again (see [`Tail`]). They
        /// stay in the file, invisible, until each is overwritten by the same bytes: whoever opens
        /// the file after this process was killed finds them. What follows them is cut off, and
        /// all of them as soon as something else is appended.
        again: Vec<Mark>,
    },
}

/// Where readers come from: the file as it is now. A pack replaces it by another one; readers of
/// before go on with the old one.
#[derive(Clone)]
pub struct Source {
    current: Arc<RwLock<Arc<Shared>>>,
}

impl Source {
    /// A handle for reading; any number may be used at the same time.
    pub fn reader(&self) -> Reader {
        let current = self.current.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Reader { shared: current.clone() }
    }
}

/// The one writer of a `Data.fs`. Dropping it loses nothing.
pub struct FileStorage {
    pub(crate) shared: Arc<Shared>,
    source: Source,
    /// What stands in the file after the last transaction: see [`Extent::UpTo`].
    pub(crate) again: VecDeque<Mark>,
}

/// What opening a file found out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The file was made.
    pub created: bool,
    /// Bytes of a torn tail that were cut off, and the file that keeps them.
    pub torn: Option<(u64, PathBuf)>,
    /// Transactions that had to be scanned because no index file told of them.
    pub scanned: u64,
}

impl FileStorage {
    /// Opens `path`, making it (with `magic`) if it does not exist.
    ///
    /// `progress(done, total)` is called now and then, in bytes.
    pub fn open(
        disk: Arc<dyn Disk>,
        path: &Path,
        index_path: &Path,
        magic: Magic,
        extent: Extent,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(FileStorage, Opened), StorageError> {
        FileStorage::open_repairing(disk, path, index_path, magic, extent, None, progress)
    }

    /// The same, for a file whose damaged blocks can be repaired: this one's, and those of the
    /// files that take its place.
    pub fn open_repairing(
        disk: Arc<dyn Disk>,
        path: &Path,
        index_path: &Path,
        magic: Magic,
        extent: Extent,
        repair: Option<Repair>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(FileStorage, Opened), StorageError> {
        let io = |action| StorageError::io(path, action);
        let mut opened = Opened::default();
        let extent_is_whole = extent == Extent::Whole;
        opened.created = create_if_new(&*disk, path, magic, extent_is_whole)?;
        let file = disk.open(path, Open::Write).map_err(io("open"))?;
        let magic = read_magic(path, &*file)?;
        let len = file.len().map_err(io("read the length of"))?;
        let (limit, again) = match extent {
            Extent::Whole => (len, Vec::new()),
            Extent::UpTo { mark, again } => {
                check_mark(path, file.clone(), mark)?;
                let end = again.last().unwrap_or(&mark).position.0;
                if end < len {
                    cut(&*disk, path, &*file, end)?;
                }
                (mark.position.0, again)
            }
        };
        let sums_path = sums_path(index_path);
        if extent_is_whole && disk.exists(&sums_path).map_err(io("look for the checksums of"))? {
            // Who made this file is not known: they need not be of it.
            disk.remove(&sums_path).map_err(io("remove the checksums of"))?;
        }
        let checked = ChecksummedFile::open(file, disk.clone(), &sums_path, limit, repair);
        let file = Arc::new(checked.map_err(io("read the checksums of"))?);
        let sorted = Sorted::open(&*disk, index_path).filter(|sorted| {
            sorted.mark.position.0 <= limit && check_mark(path, file.clone(), sorted.mark).is_ok()
        });
        let (mut index, start) = match sorted {
            Some(sorted) => {
                let mark = sorted.mark;
                (Index::from_sorted(sorted), mark)
            }
            None => (Index::default(), Mark::START),
        };

        let mut scanner = Scanner::new(path, file.clone(), start.position, start.tid, limit);
        loop {
            let found = scanner.next(&mut |record, position| index.insert(record.oid, position))?;
            match found {
                Found::Transaction { end, .. } => {
                    opened.scanned += 1;
                    if opened.scanned % 1024 == 0 {
                        progress(end.0, limit);
                    }
                }
                Found::End => break,
                Found::TornTail => {
                    let kept = save_tail(&*disk, path, &*file, scanner.position.0, limit)?;
                    opened.torn = Some((limit - scanner.position.0, kept));
                    break;
                }
            }
        }
        let mark = Mark { position: scanner.position, tid: scanner.last_tid };
        let shared = Shared {
            path: path.to_owned(),
            file,
            disk,
            index_path: index_path.to_owned(),
            magic,
            state: RwLock::new(State { index, mark, holes: Holes::default() }),
        };
        Ok((FileStorage::of(shared, again.into()), opened))
    }

    fn of(shared: Shared, again: VecDeque<Mark>) -> FileStorage {
        let shared = Arc::new(shared);
        let source = Source { current: Arc::new(RwLock::new(shared.clone())) };
        FileStorage { shared, source, again }
    }

    /// Begins an empty file at `path` that will take the place of this one; it has the same holes.
    pub fn successor(reader: &Reader, path: &Path) -> Result<FileStorage, StorageError> {
        let (old, holes) = (&reader.shared, reader.holes());
        let file = old.disk.open(path, Open::Create).map_err(StorageError::io(path, "create"))?;
        file.set_len(0).map_err(StorageError::io(path, "cut"))?;
        file.write_at(old.magic.bytes(), 0).map_err(StorageError::io(path, "write"))?;
        let (disk, repairer) = (old.disk.clone(), old.file.repairer().clone());
        let file =
            Arc::new(ChecksummedFile::anew(file, disk, &sums_path(&old.index_path), repairer));
        let shared = Shared {
            path: old.path.clone(),
            file,
            disk: old.disk.clone(),
            index_path: old.index_path.clone(),
            magic: old.magic,
            state: RwLock::new(State { index: Index::default(), mark: Mark::START, holes }),
        };
        Ok(FileStorage::of(shared, VecDeque::new()))
    }

    /// Puts `packed` (see [`crate::pack`]), which is in the file `from` and durable, in the place
    /// of this file. The old file is kept as `PATH.old` if `keep` says so. No other call of this
    /// storage, nor of its readers' [`Reader::sync`] and [`Reader::merge_index`], may be running.
    pub fn replace_with(
        &mut self,
        packed: FileStorage,
        from: &Path,
        keep: bool,
    ) -> Result<(), StorageError> {
        let Shared { path, disk, index_path, .. } = &*self.shared;
        let io = |action| StorageError::io(path, action);
        // The index names positions in the old file.
        if disk.exists(index_path).map_err(io("look for the index of"))? {
            disk.remove(index_path).map_err(io("remove the index of"))?;
            disk.sync_dir(parent(index_path)).map_err(io("sync the directory of the index of"))?;
        }
        forget_python_index(&**disk, path)?;
        self.shared.file.retire().map_err(io("remove the checksums of"))?;
        if keep {
            let old = PathBuf::from(format!("{}.old", path.display()));
            if disk.exists(&old).map_err(io("look for the copy of"))? {
                disk.remove(&old).map_err(io("remove the old copy of"))?;
            }
            disk.hard_link(path, &old).map_err(io("keep a copy of"))?;
        }
        disk.rename(from, path).map_err(io("replace"))?;
        disk.sync_dir(parent(path)).map_err(io("sync the directory of"))?;
        let mut current =
            self.source.current.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        *current = packed.shared.clone();
        drop(current);
        self.shared = packed.shared;
        self.again.clear();
        Ok(())
    }

    /// A handle for reading the file as it is now.
    pub fn reader(&self) -> Reader {
        Reader { shared: self.shared.clone() }
    }

    /// Where others get their readers from.
    pub fn source(&self) -> Source {
        self.source.clone()
    }

    /// The end of the last transaction.
    pub fn mark(&self) -> Mark {
        self.shared.read().mark
    }

    /// The file's first four bytes.
    pub fn magic(&self) -> Magic {
        self.shared.magic
    }

    /// Says what the file lacks. It is the caller's business to remember that.
    pub fn set_holes(&mut self, holes: Holes) {
        self.shared.write().holes = holes;
    }

    /// Makes all that was appended durable; returns how far that reaches.
    pub fn sync(&self) -> Result<Mark, StorageError> {
        self.reader().sync()
    }

    /// Cuts off every transaction above `tid`. No reader may be in use meanwhile.
    pub fn rewind(&mut self, tid: Tid) -> Result<Mark, StorageError> {
        let shared = &self.shared;
        let io = |action| StorageError::io(&shared.path, action);
        // The index file may name positions that are about to go.
        if shared.disk.exists(&shared.index_path).map_err(io("look for the index of"))? {
            shared.disk.remove(&shared.index_path).map_err(io("remove the index of"))?;
        }
        self.again.clear();
        let mut state = shared.write();
        let mut window = Window::new(&shared.path, shared.file.clone());
        let mut mark = state.mark;
        while mark.tid > tid {
            let (start, _) = transaction_before(&mut window, mark.position)?;
            // The predecessors of a transaction's records are all older than it.
            let mut scanner =
                Scanner::new(&shared.path, shared.file.clone(), start, Tid::NONE, mark.position.0);
            let index = &mut state.index;
            scanner.next(&mut |record: &DataHeader, _| match record.previous {
                Position(0) => index.remove(record.oid),
                previous => index.insert(record.oid, previous),
            })?;
            mark = mark_at(&mut window, start)?;
        }
        forget_python_index(&*shared.disk, &shared.path)?;
        shared.file.set_len(mark.position.0).map_err(io("cut"))?;
        shared.file.sync().map_err(io("sync"))?;
        state.mark = mark;
        Ok(mark)
    }
}

/// Python's index (`PATH.index`) does not describe the data file any more: it names positions that
/// another one had.
fn forget_python_index(disk: &dyn Disk, path: &Path) -> Result<(), StorageError> {
    let io = |action| StorageError::io(path, action);
    let index = python_index_path(path);
    if disk.exists(&index).map_err(io("look for Python's index of"))? {
        disk.remove(&index).map_err(io("remove Python's index of"))?;
        disk.sync_dir(parent(path)).map_err(io("sync the directory of"))?;
    }
    Ok(())
}

/// Where the checksums are of the data file that has this index.
fn sums_path(index_path: &Path) -> PathBuf {
    index_path.with_extension("sums")
}

/// What stands in a file after a known transaction; tells whether somebody else wrote to it.
#[derive(Debug, PartialEq, Eq)]
pub enum Tail {
    /// The known transaction is in its place, followed by these, and perhaps by a torn one.
    Follows(Vec<Mark>),
    /// The file is another one: packed, replaced, or cut.
    Different(String),
}

impl Tail {
    /// Looks at what follows `mark` in the file `path`, without changing anything. It ends where
    /// the bytes stop making sense: what follows `mark` was perhaps never synced, and will be cut.
    pub fn read(disk: &dyn Disk, path: &Path, mark: Mark) -> Result<Tail, StorageError> {
        let io = |action| StorageError::io(path, action);
        if !disk.exists(path).map_err(io("look for it"))? {
            return Ok(Tail::Different("it is gone".into()));
        }
        let file = disk.open(path, Open::Read).map_err(io("open"))?;
        let len = file.len().map_err(io("read the length of"))?;
        read_magic(path, &*file)?;
        if let Err(error) = check_mark(path, file.clone(), mark) {
            return match error {
                StorageError::Damaged { reason, .. } => Ok(Tail::Different(reason)),
                other => Err(other),
            };
        }
        let mut scanner = Scanner::new(path, file, mark.position, mark.tid, len);
        let mut after = Vec::new();
        loop {
            match scanner.next(&mut |_, _| ()) {
                Ok(Found::Transaction { header, end, .. }) => {
                    after.push(Mark { position: end, tid: header.tid });
                }
                Ok(Found::End | Found::TornTail)
                | Err(StorageError::Damaged { .. } | StorageError::TimeWentBack { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Tail::Follows(after))
    }
}

pub(crate) fn read_magic(path: &Path, file: &dyn File) -> Result<Magic, StorageError> {
    let mut bytes = [0; 4];
    let n = read_full(file, &mut bytes, 0).map_err(StorageError::io(path, "read"))?;
    Magic::parse(&bytes[..n]).ok_or_else(|| StorageError::NotFileStorage {
        path: path.to_owned(),
        found: bytes[..n].escape_ascii().to_string(),
    })
}

/// Fails unless the transaction `mark.tid` ends at `mark.position`.
fn check_mark(path: &Path, file: Arc<dyn File>, mark: Mark) -> Result<(), StorageError> {
    let mut window = Window::new(path, file);
    let found = if mark.position == Mark::START.position {
        Mark::START
    } else {
        mark_at(&mut window, mark.position)?
    };
    if found != mark {
        return window.damaged(
            mark.position.0,
            format!("expected the end of transaction {}, found that of {}", mark.tid, found.tid),
        );
    }
    Ok(())
}

/// The mark of the transaction that ends at `end`.
fn mark_at(window: &mut Window<'_>, end: Position) -> Result<Mark, StorageError> {
    if end == Mark::START.position {
        return Ok(Mark::START);
    }
    let (_, tid) = transaction_before(window, end)?;
    Ok(Mark { position: end, tid })
}

/// Where the transaction that ends at `end` begins, and its tid.
pub(crate) fn transaction_before(
    window: &mut Window<'_>,
    end: Position,
) -> Result<(Position, Tid), StorageError> {
    let length = match end.0.checked_sub(8) {
        Some(at) => window.number(at)?,
        None => None,
    };
    let start = length.and_then(|length| end.0.checked_sub(8)?.checked_sub(length));
    let start =
        start.filter(|start| *start >= Mark::START.position.0 && end.0 - start >= TXN_HEADER + 8);
    let Some(start) = start else {
        return window.damaged(end.0, "no transaction ends here");
    };
    match window.txn_header(start)? {
        Some(header) if Some(header.length) == length => Ok((Position(start), header.tid)),
        _ => window.damaged(start, "no transaction begins here, though one ends where it should"),
    }
}

/// Creates a data file if there is none. Without a byte a file is a new one, unless it is known to
/// have had some. Returns whether it was created.
fn create_if_new(
    disk: &dyn Disk,
    path: &Path,
    magic: Magic,
    may_be_empty: bool,
) -> Result<bool, StorageError> {
    let io = |action| StorageError::io(path, action);
    if disk.exists(path).map_err(io("look for it"))? {
        if !may_be_empty {
            return Ok(false);
        }
        let file = disk.open(path, Open::Read).map_err(io("open"))?;
        if file.len().map_err(io("read the length of"))? > 0 {
            return Ok(false);
        }
    }
    forget_python_index(disk, path)?;
    let file = disk.open(path, Open::Create).map_err(io("create"))?;
    file.write_at(magic.bytes(), 0).map_err(io("write"))?;
    file.sync().map_err(io("sync"))?;
    disk.sync_dir(parent(path)).map_err(io("sync the directory of"))?;
    Ok(true)
}

/// Cuts off what a data file has beyond `end`.
fn cut(disk: &dyn Disk, path: &Path, file: &dyn File, end: u64) -> Result<(), StorageError> {
    let io = |action| StorageError::io(path, action);
    forget_python_index(disk, path)?;
    file.set_len(end).map_err(io("cut"))?;
    file.sync().map_err(io("sync"))
}

/// Moves the bytes `from..to` into the first free `PATH.trN`.
fn save_tail(
    disk: &dyn Disk,
    path: &Path,
    file: &dyn File,
    from: u64,
    to: u64,
) -> Result<PathBuf, StorageError> {
    let io = |action| StorageError::io(path, action);
    let mut n = 0;
    let kept = loop {
        let candidate = PathBuf::from(format!("{}.tr{n}", path.display()));
        if !disk.exists(&candidate).map_err(io("keep the torn tail of"))? {
            break candidate;
        }
        n += 1;
    };
    let copy = disk.open(&kept, Open::Create).map_err(StorageError::io(&kept, "create"))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let want = (to - at).min(buffer.len() as u64) as usize;
        let n = read_full(file, &mut buffer[..want], at).map_err(io("read"))?;
        if n == 0 {
            break;
        }
        copy.write_at(&buffer[..n], at - from).map_err(StorageError::io(&kept, "write"))?;
        at += n as u64;
    }
    copy.sync().map_err(StorageError::io(&kept, "sync"))?;
    disk.sync_dir(parent(path)).map_err(io("sync the directory of"))?;
    file.set_len(from).map_err(io("cut the torn tail of"))?;
    file.sync().map_err(io("sync"))?;
    Ok(kept)
}
