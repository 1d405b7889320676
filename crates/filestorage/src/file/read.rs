//! Reading objects. Source of the rules: `FileStorage.loadBefore`, `loadSerial` and
//! `_loadBack_impl` in `ZODB/FileStorage`.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_types::disk::read_full;
use standby_types::{File, Oid, Position, Tid};

use crate::StorageError;
use crate::checksums::blocks::Damage;
use crate::file::format::{DATA_HEADER, DataHeader, REFERENCE_LIMIT, number};
use crate::file::holes::{Hole, Holes};
use crate::file::mark::Mark;
use crate::file::shared::Shared;
use crate::index::{Sorted, write_python_index};
use crate::room::{Need, Room};

/// Whether a call may wait for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Fails with [`StorageError::NotCached`] instead of waiting.
    Cached,
    /// Waits.
    Blocking,
}

/// A revision of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// The record's data: two pickles, for ZODB.
    pub data: Bytes,
    /// The transaction that wrote it.
    pub serial: Tid,
    /// The transaction that replaced it; `None` if it is current.
    pub end: Option<Tid>,
}

/// Looks into a file while it is being appended to. Each call sees the transactions that were
/// complete when it began.
#[derive(Clone)]
pub struct Reader {
    pub(crate) shared: Arc<Shared>,
}

/// Bytes read beyond a record's header in the hope that its data are among them.
const READ_AHEAD: usize = 4096;

impl Reader {
    /// The last transaction, [`Tid::NONE`] if there is none.
    pub fn last_tid(&self) -> Tid {
        self.shared.read().mark.tid
    }

    /// The end of the last transaction.
    pub fn mark(&self) -> Mark {
        self.shared.read().mark
    }

    /// What the file lacks.
    pub fn holes(&self) -> Holes {
        self.shared.read().holes.clone()
    }

    /// The hole that the transaction is in.
    pub fn hole_of(&self, tid: Tid) -> Option<Hole> {
        self.shared.read().holes.of(tid)
    }

    /// True if the file shows a moment that was: its last transaction is not within a hole.
    pub fn is_whole(&self) -> bool {
        let state = self.shared.read();
        state.holes.are_filled_up_to(state.mark.tid)
    }

    /// Number of objects; deleted ones count until a pack.
    pub fn len(&self) -> u64 {
        self.shared.read().index.len()
    }

    /// True if there is no object.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.shared.read().mark.position.0
    }

    /// The newest revision of `oid` that is older than `tid`; `Ok(None)` if the object exists, but
    /// all its revisions are as new or newer; [`StorageError::NoKey`] if there is no such object,
    /// or it was gone at that time; [`StorageError::Hole`] if the file lacks the time before `tid`.
    /// Of a revision that was replaced in a hole, `end` is the beginning of the hole.
    pub fn load_before(
        &self,
        oid: Oid,
        tid: Tid,
        access: Access,
    ) -> Result<Option<Revision>, StorageError> {
        let mut position = self.find(oid)?;
        let mut end = None;
        loop {
            let (header, head) = self.record(oid, position, access)?;
            if header.serial < tid {
                let data = self.data(oid, position, &header, head, access)?;
                return Ok(Some(Revision { data, serial: header.serial, end }));
            }
            end = Some(header.serial);
            if let Some(hole) = self.hole_of(header.serial) {
                if tid > hole.after.next() {
                    return Err(StorageError::Hole(hole));
                }
                end = Some(hole.after.next());
            }
            match header.previous {
                Position(0) => return Ok(None),
                previous if previous >= position => {
                    return self.damaged(position, "a record's predecessor comes after it");
                }
                previous => position = previous,
            }
        }
    }

    /// The data of exactly the revision `serial`.
    pub fn load_serial(
        &self,
        oid: Oid,
        serial: Tid,
        access: Access,
    ) -> Result<Bytes, StorageError> {
        match self.load_before(oid, serial.next(), access)? {
            Some(revision) if revision.serial == serial => Ok(revision.data),
            _ => Err(StorageError::NoKey(oid)),
        }
    }

    /// The serial of the current revision, deleted or not; `None` if the object never was. This
    /// is what a commit's conflict check compares with.
    pub fn committed_serial(&self, oid: Oid, access: Access) -> Result<Option<Tid>, StorageError> {
        let position = self.shared.read().index.get(oid);
        position.map(|at| Ok(self.record(oid, at, access)?.0.serial)).transpose()
    }

    /// The serial of the current revision; [`StorageError::NoKey`] if the object is gone.
    pub fn serial(&self, oid: Oid, access: Access) -> Result<Tid, StorageError> {
        let position = self.find(oid)?;
        let (header, head) = self.record(oid, position, access)?;
        if header.data_len == 0 && self.back_pointer(position, &head, access)? == Position(0) {
            return Err(StorageError::NoKey(oid));
        }
        Ok(header.serial)
    }

    /// True if the record of `oid` at `position` is the newest one of all that begin before `end`.
    pub(crate) fn is_newest(
        &self,
        oid: Oid,
        position: Position,
        end: Position,
    ) -> Result<bool, StorageError> {
        let mut at = self.find(oid)?;
        while at >= end {
            match self.record(oid, at, Access::Blocking)?.0.previous {
                previous if previous >= at => {
                    return self.damaged(at, "a record's predecessor comes after it");
                }
                previous => at = previous,
            }
        }
        Ok(at == position)
    }

    /// The highest oid in the file.
    pub fn highest_oid(&self) -> Option<Oid> {
        self.shared.read().index.highest()
    }

    /// The first object at or above `oid`, deleted ones included.
    pub fn object_at_or_above(&self, oid: Oid) -> Option<Oid> {
        self.shared.read().index.at_or_above(oid).map(|(oid, _)| oid)
    }

    /// Makes durable all that was appended before the call; returns how far that reaches.
    pub fn sync(&self) -> Result<Mark, StorageError> {
        let mark = self.mark();
        self.shared.file.sync().map_err(StorageError::io(&self.shared.path, "sync"))?;
        Ok(mark)
    }

    /// Writes the index file anew if at least `least` entries are not in it; true if it did.
    /// Reads and appends go on meanwhile. Call after a checkpoint: the index file must not know
    /// more than what is durable. `room` is asked first, and then for every megabyte.
    pub fn merge_index(&self, least: usize, room: Room<'_>) -> Result<bool, StorageError> {
        let failed = StorageError::io(&self.shared.index_path, "write the index");
        if self.shared.read().index.overlay_len() < least.max(1) {
            return Ok(false);
        }
        room(Need::All(Sorted::size_of(self.len()))).map_err(&failed)?;
        let (merge, mark) = {
            let mut state = self.shared.write();
            match state.index.freeze() {
                Some(merge) => (merge, state.mark),
                None => return Ok(false),
            }
        };
        let (disk, path) = (&*self.shared.disk, &self.shared.index_path);
        match Sorted::write(disk, path, mark, merge.entries(), room) {
            Ok(sorted) => {
                self.shared.write().index.thaw(sorted);
                Ok(true)
            }
            Err(error) => {
                let frozen = merge.one_layer();
                self.shared.write().index.thaw_failed(frozen);
                Err(failed(error))
            }
        }
    }

    /// Writes the index that Python's FileStorage keeps, if all is in the index file
    /// ([`Reader::merge_index`]); true if it did. Without it, or with one of an earlier moment,
    /// Python reads the data file.
    pub fn write_python_index(&self) -> Result<bool, StorageError> {
        let (sorted, end) = {
            let state = self.shared.read();
            let Some(sorted) = state.index.merged() else { return Ok(false) };
            (sorted, state.mark.position)
        };
        let path = &self.shared.path;
        write_python_index(&*self.shared.disk, path, end, sorted.iter())
            .map_err(StorageError::io(path, "write Python's index of"))?;
        Ok(true)
    }

    /// All up to `mark` is durable, and a restart does not cut it off: it may get checksums.
    pub fn note_durable(&self, mark: Mark) {
        self.shared.file.note_durable(mark.position.0);
    }

    /// Takes checksums of at most so many blocks ([`crate::BLOCK`]); true if more are to be taken.
    pub fn take_sums(&self, most: usize) -> Result<bool, StorageError> {
        let failed = StorageError::io(&self.shared.path, "take checksums of");
        self.shared.file.take_sums(most).map_err(failed)
    }

    /// Blocks that have checksums.
    pub fn summed_blocks(&self) -> usize {
        self.shared.file.blocks()
    }

    /// Compares these blocks, as the device gives them, with their checksums; repairs what is
    /// damaged.
    pub fn scrub(&self, blocks: std::ops::Range<usize>) -> Result<(), StorageError> {
        self.shared.file.scrub(blocks).map_err(StorageError::io(&self.shared.path, "scrub"))
    }

    /// What has been found of damage.
    pub fn damage(&self) -> Damage {
        self.shared.file.damage()
    }

    /// The bytes of a block for a node where they are damaged, if they are here.
    pub fn block(&self, offset: u64) -> Result<Option<Vec<u8>>, StorageError> {
        let failed = StorageError::io(&self.shared.path, "read");
        self.shared.file.block(offset).map_err(failed)
    }

    pub(crate) fn find(&self, oid: Oid) -> Result<Position, StorageError> {
        self.shared.read().index.get(oid).ok_or(StorageError::NoKey(oid))
    }

    /// Reads the record of `oid` at `position`: its header, and its first bytes.
    pub(crate) fn record(
        &self,
        oid: Oid,
        position: Position,
        access: Access,
    ) -> Result<(DataHeader, BytesMut), StorageError> {
        let mut head = BytesMut::zeroed(DATA_HEADER as usize + READ_AHEAD);
        let n = self.read(&mut head, position.0, access)?;
        head.truncate(n);
        let Some(bytes) = head.first_chunk() else {
            return self.damaged(position, "a data record should begin here, but the file ends");
        };
        let header = DataHeader::parse(bytes);
        if header.oid != oid {
            let reason = format!("expected a record of object {oid}, found one of {}", header.oid);
            return self.damaged(position, reason);
        }
        Ok((header, head))
    }

    /// The data of a record of which `head` are the first bytes; follows back pointers.
    pub(crate) fn data(
        &self,
        oid: Oid,
        mut position: Position,
        header: &DataHeader,
        mut head: BytesMut,
        access: Access,
    ) -> Result<Bytes, StorageError> {
        let mut header = *header;
        for _ in 0..REFERENCE_LIMIT {
            if header.data_len > 0 {
                return self.own_data(position, &header, head, access);
            }
            match self.back_pointer(position, &head, access)? {
                Position(0) => return Err(StorageError::NoKey(oid)),
                back if back >= position => {
                    return self.damaged(position, "a back pointer leads forward");
                }
                back => position = back,
            }
            (header, head) = self.record(oid, position, access)?;
        }
        self.damaged(position, "too many back pointers")
    }

    fn own_data(
        &self,
        position: Position,
        header: &DataHeader,
        mut head: BytesMut,
        access: Access,
    ) -> Result<Bytes, StorageError> {
        let _ = head.split_to(DATA_HEADER as usize);
        let end = position.0.checked_add(header.full_len());
        let Some(len) = usize::try_from(header.data_len)
            .ok()
            .filter(|_| end.is_some_and(|end| end <= self.size()))
        else {
            return self.damaged(position, "a data record is longer than the file");
        };
        let have = head.len().min(len);
        head.resize(len, 0);
        if have < len {
            let at = position.0 + DATA_HEADER + have as u64;
            if self.read(&mut head[have..], at, access)? < len - have {
                return self.damaged(position, "a data record is longer than the file");
            }
        }
        Ok(head.freeze())
    }

    pub(crate) fn back_pointer(
        &self,
        position: Position,
        head: &BytesMut,
        access: Access,
    ) -> Result<Position, StorageError> {
        const END: usize = DATA_HEADER as usize + 8;
        if let Some(bytes) = head.get(DATA_HEADER as usize..END) {
            return Ok(Position(number(bytes, 0)));
        }
        let mut bytes = [0; 8];
        if self.read(&mut bytes, position.0 + DATA_HEADER, access)? < 8 {
            return self.damaged(position, "a back pointer is cut off");
        }
        Ok(Position(number(&bytes, 0)))
    }

    fn read(&self, buf: &mut [u8], at: u64, access: Access) -> Result<usize, StorageError> {
        let file = &*self.shared.file;
        // What is in memory was compared with its checksum when it came from the device.
        let n = match (file.read_cached_at(buf, at), access) {
            (Ok(n), _) if n == buf.len() => return Ok(n),
            (_, Access::Blocking) => {
                return read_full(file, buf, at)
                    .map_err(StorageError::io(&self.shared.path, "read"));
            }
            (cached, Access::Cached) => {
                cached.map_err(StorageError::io(&self.shared.path, "read"))?
            }
        };
        // A cached read stops where the cache does.
        if n < buf.len() && at + (n as u64) < self.size() {
            Err(StorageError::NotCached)
        } else {
            Ok(n)
        }
    }

    pub(crate) fn damaged<T>(
        &self,
        position: Position,
        reason: impl Into<String>,
    ) -> Result<T, StorageError> {
        Err(StorageError::Damaged {
            path: self.shared.path.clone(),
            position,
            reason: reason.into(),
        })
    }

    /// The record of `oid` that transaction `tid` wrote.
    pub(crate) fn position_of(&self, oid: Oid, tid: Tid) -> Result<Option<Position>, StorageError> {
        let Some(mut position) = self.shared.read().index.get(oid) else {
            return Ok(None);
        };
        loop {
            let (header, _) = self.record(oid, position, Access::Blocking)?;
            if header.serial == tid {
                return Ok(Some(position));
            }
            if header.serial < tid || header.previous == Position(0) {
                return Ok(None);
            }
            if header.previous >= position {
                return self.damaged(position, "a record's predecessor comes after it");
            }
            position = header.previous;
        }
    }
}
