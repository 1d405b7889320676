//! What a client has stored since `tpc_begin`.
//!
//! Data beyond [`SPILL_ABOVE`] go to a temporary file, so that a transaction of any size costs
//! bounded memory.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;

use bytes::Bytes;
use standby_types::{Blob, BlobSource, Oid, Tid, TransactionToken};

use crate::error::ClientError;
use crate::spill::{MakeSpill, Slot, Spill};
use crate::vote::{Expected, VoteRequest};

/// What each object of a transaction takes in memory beside its data, about.
const ENTRY_HELD: usize = 200;
/// Bytes of a transaction that are kept in memory.
pub const SPILL_ABOVE: usize = 4 << 20;

/// What a transaction says about itself. Each text has at most 65 535 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Meta {
    /// The tid that it must get (a copy of another storage's transaction).
    pub tid: Option<Tid>,
    /// `b' '`, or `b'p'` for a copy of a packed one.
    pub status: u8,
    pub user: Bytes,
    pub description: Bytes,
    /// A pickled dict, or nothing.
    pub extension: Bytes,
    /// By which the client may ask what became of it.
    pub token: Option<TransactionToken>,
}

impl Default for Meta {
    fn default() -> Self {
        let empty = Bytes::new;
        Meta {
            tid: None,
            status: b' ',
            user: empty(),
            description: empty(),
            extension: empty(),
            token: None,
        }
    }
}

/// What an object becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// These data.
    Data(Bytes),
    /// The same as its revision with this tid: its data, `None` if it was gone then.
    Back(Tid, Option<Bytes>),
    /// It is gone.
    Gone,
}

#[derive(Clone, Debug)]
enum Kept {
    Data(Slot),
    Back(Tid, Option<Slot>),
    Gone,
}

/// A change of one object.
#[derive(Clone, Debug)]
pub struct Write {
    /// The object.
    pub oid: Oid,
    /// On what the change relies.
    pub expected: Expected,
    /// Bytes that its record takes in the data file.
    len: u64,
    kept: Kept,
}

impl Write {
    /// Bytes that its record takes in the data file.
    pub fn record_len(&self) -> u64 {
        self.len
    }

    /// The serial that the change relies on.
    pub fn read(&self) -> Tid {
        match self.expected {
            Expected::Serial(read) | Expected::Existing(read) => read,
            Expected::Any => Tid::NONE,
        }
    }
}

/// Bytes of a transaction and of a record in the data file, beside texts and data; and those of a
/// pointer in place of data.
const TRANSACTION_LEN: u64 = 23;
const RECORD_LEN: u64 = 42;
const POINTER_LEN: u64 = 8;

/// What can be worked out only when the transaction holds its locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeferredWrite {
    /// Undo a transaction.
    Undo(Tid),
    /// Write this revision; a back pointer if the one that is hinted at has the same data.
    Restore(Oid, Option<Bytes>, Option<Tid>),
}

#[derive(Clone, Debug)]
enum KeptWrite {
    Undo(Tid),
    Restore(Oid, Option<Slot>, Option<Tid>),
}

/// What one transaction may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Objects that it changes, checks or restores, and transactions that it undoes.
    pub objects: usize,
    /// Bytes that its records take in the data file.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { objects: 10_000_000, bytes: 64 << 30 }
    }
}

impl Limits {
    /// An error for a transaction with so many objects and bytes.
    pub fn check(&self, objects: usize, bytes: u64) -> Result<(), ClientError> {
        let Limits { objects: most, bytes: most_bytes } = *self;
        let (what, option) = if objects > most {
            (format!("{most} objects"), "transaction-objects")
        } else if bytes > most_bytes {
            (format!("{most_bytes} bytes"), "transaction-size")
        } else {
            return Ok(());
        };
        Err(ClientError::storage(format!(
            "a transaction may have at most {what}, and this one has more: commit in smaller \
             steps, or raise {option} in <standby>"
        )))
    }
}

/// Keeps an upload on disk as long as it lives.
pub trait StagedFile: Send + Sync {
    /// The file stays: the log is to name it.
    fn keep(self: Box<Self>);
}

/// The blobs of a transaction. Uploads are on disk as long as this lives, or for good if they are
/// to be kept.
#[derive(Default)]
pub struct Blobs {
    /// All of them.
    pub all: Vec<Blob>,
    staged: Vec<Box<dyn StagedFile>>,
}

impl Blobs {
    /// The log is to name the uploads: they stay on disk.
    pub fn keep(self) {
        self.staged.into_iter().for_each(|staged| staged.keep());
    }
}

/// A transaction before it is finished. Of several changes of one object the last one counts.
pub struct PendingTransaction {
    /// Its head.
    pub meta: Meta,
    writes: Vec<Write>,
    by_oid: HashMap<Oid, usize>,
    /// Objects that must not have changed since they were read.
    checks: Vec<(Oid, Tid)>,
    deferred: VecDeque<KeptWrite>,
    /// Something was to be worked out, or is.
    has_deferred: bool,
    /// Bytes of all changes so far, also of those that do not count any more.
    bytes: u64,
    blobs: BTreeMap<Oid, (BlobSource, Option<Box<dyn StagedFile>>)>,
    spill: Spill,
}

impl std::fmt::Debug for PendingTransaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingTransaction")
            .field("writes", &self.writes.len())
            .finish_non_exhaustive()
    }
}

impl PendingTransaction {
    /// An empty transaction.
    pub fn new(meta: Meta, make_spill: MakeSpill) -> PendingTransaction {
        PendingTransaction {
            meta,
            writes: Vec::new(),
            by_oid: HashMap::new(),
            checks: Vec::new(),
            deferred: VecDeque::new(),
            has_deferred: false,
            bytes: 0,
            blobs: BTreeMap::new(),
            spill: Spill::new(SPILL_ABOVE, make_spill),
        }
    }

    /// Bytes of memory that it takes, about.
    pub fn held(&self) -> usize {
        let entries =
            self.writes.len() + self.checks.len() + self.deferred.len() + self.blobs.len();
        self.spill.held() + entries * ENTRY_HELD
    }

    /// Adds a store.
    pub fn store(&mut self, oid: Oid, serial: Tid, data: Bytes) -> io::Result<()> {
        self.put(oid, Expected::Serial(serial), Content::Data(data))
    }

    /// Adds a change.
    pub fn put(&mut self, oid: Oid, expected: Expected, content: Content) -> io::Result<()> {
        let data_len = match &content {
            Content::Data(data) => data.len() as u64,
            Content::Back(..) | Content::Gone => POINTER_LEN,
        };
        let kept = match content {
            Content::Data(data) => Kept::Data(self.spill.put(data)?),
            Content::Back(tid, Some(data)) => Kept::Back(tid, Some(self.spill.put(data)?)),
            Content::Back(tid, None) => Kept::Back(tid, None),
            Content::Gone => Kept::Gone,
        };
        let write = Write { oid, expected, len: RECORD_LEN + data_len, kept };
        self.bytes += write.len;
        match self.by_oid.get(&oid) {
            Some(at) => self.writes[*at] = write,
            None => {
                self.by_oid.insert(oid, self.writes.len());
                self.writes.push(write);
            }
        }
        Ok(())
    }

    /// The object's new revision has a blob.
    pub fn put_blob(&mut self, oid: Oid, source: BlobSource, staged: Option<Box<dyn StagedFile>>) {
        self.blobs.insert(oid, (source, staged));
    }

    /// Takes the blobs of all revisions that have one.
    pub fn take_blobs(&mut self) -> Blobs {
        let mut blobs = Blobs::default();
        for (oid, (source, staged)) in std::mem::take(&mut self.blobs) {
            let written = self.write_of(oid).is_some_and(|w| !matches!(w.kept, Kept::Gone));
            if written {
                blobs.all.push(Blob { oid, source });
                blobs.staged.extend(staged);
            }
        }
        blobs
    }

    /// Adds a check.
    pub fn check(&mut self, oid: Oid, serial: Tid) {
        self.checks.push((oid, serial));
    }

    /// Adds what can be worked out only when the transaction holds its locks.
    pub fn defer(&mut self, write: DeferredWrite) -> io::Result<()> {
        self.has_deferred = true;
        self.deferred.push_back(match write {
            DeferredWrite::Undo(tid) => KeptWrite::Undo(tid),
            DeferredWrite::Restore(oid, data, hint) => {
                self.bytes +=
                    RECORD_LEN + data.as_ref().map_or(POINTER_LEN, |data| data.len() as u64);
                let slot = data.map(|data| self.spill.put(data)).transpose()?;
                KeptWrite::Restore(oid, slot, hint)
            }
        });
        Ok(())
    }

    /// True if something is to be worked out: what comes after it must wait, to stay in order.
    pub fn has_deferred(&self) -> bool {
        self.has_deferred
    }

    /// Takes what is to be worked out, in order, some megabytes of it; nothing if that was all.
    pub fn take_deferred(&mut self) -> io::Result<Vec<DeferredWrite>> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while bytes < SPILL_ABOVE
            && let Some(write) = self.deferred.pop_front()
        {
            taken.push(match write {
                KeptWrite::Undo(tid) => DeferredWrite::Undo(tid),
                KeptWrite::Restore(oid, slot, hint) => {
                    let data = slot.as_ref().map(|slot| self.spill.get(slot)).transpose()?;
                    slot.into_iter().for_each(|slot| self.spill.release(slot));
                    bytes += data.as_ref().map_or(0, Bytes::len);
                    DeferredWrite::Restore(oid, data, hint)
                }
            });
            bytes += RECORD_LEN as usize;
        }
        Ok(taken)
    }

    /// An error if the transaction has more than it may.
    pub fn check_limits(&self, limits: &Limits) -> Result<(), ClientError> {
        let objects = self.writes.len() + self.checks.len() + self.deferred.len();
        limits.check(objects, self.bytes)
    }

    /// The transaction will not be committed: nothing of it need be kept.
    pub fn forget(&mut self) {
        (self.writes, self.by_oid, self.checks) = Default::default();
        self.deferred.clear();
        self.blobs.clear();
        self.spill.clear();
    }

    /// What a vote needs to know.
    pub fn request(&self) -> VoteRequest {
        let mut request = VoteRequest {
            tid: self.meta.tid,
            token: self.meta.token,
            writes: self.writes.iter().map(|write| (write.oid, write.expected)).collect(),
            checks: self.checks.clone(),
            undos: Vec::new(),
            len_before_last: self.len_before_last(),
        };
        for later in &self.deferred {
            match later {
                KeptWrite::Undo(tid) => request.undos.push(*tid),
                KeptWrite::Restore(oid, ..) => request.writes.push((*oid, Expected::Any)),
            }
        }
        request
    }

    /// Bytes that the transaction takes in the data file before its last record begins.
    fn len_before_last(&self) -> u64 {
        let Meta { user, description, extension, .. } = &self.meta;
        let texts = user.len() + description.len() + extension.len();
        let before = self.writes.iter().rev().skip(1).map(|write| write.len).sum::<u64>();
        TRANSACTION_LEN + texts as u64 + before
    }

    /// The changes, in the order in which the objects first came.
    pub fn writes(&self) -> &[Write] {
        &self.writes
    }

    /// What a change makes of its object.
    pub fn content(&self, write: &Write) -> io::Result<Content> {
        Ok(match &write.kept {
            Kept::Data(slot) => Content::Data(self.spill.get(slot)?),
            Kept::Back(tid, slot) => {
                let data = slot.as_ref().map(|slot| self.spill.get(slot)).transpose()?;
                Content::Back(*tid, data)
            }
            Kept::Gone => Content::Gone,
        })
    }

    /// The change of `oid`.
    pub fn write_of(&self, oid: Oid) -> Option<&Write> {
        self.by_oid.get(&oid).map(|at| &self.writes[*at])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use standby_types::Disk;
    use standby_types::disk::Open;
    use standby_types::memory::MemoryDisk;

    use super::*;

    #[test]
    fn large_transactions_spill_and_come_back() {
        let disk = MemoryDisk::new();
        let spill_disk = disk.clone();
        let make: MakeSpill = Arc::new(move || spill_disk.open(Path::new("/spill"), Open::Create));
        let mut buffer = PendingTransaction::new(Meta::default(), make);
        let data = |i: u64| Bytes::from(vec![i as u8; 1 << 20]);
        for i in 0..8 {
            buffer.store(Oid(i), Tid(0), data(i)).unwrap();
        }
        buffer.store(Oid(2), Tid(9), Bytes::from_static(b"resolved")).unwrap();
        assert_eq!(disk.list(Path::new("/")).unwrap().len(), 1);
        assert_eq!(buffer.writes().len(), 8);
        for write in buffer.writes() {
            let expected = match write.oid {
                Oid(2) => Bytes::from_static(b"resolved"),
                oid => data(oid.0),
            };
            assert_eq!(buffer.content(write).unwrap(), Content::Data(expected));
        }
        assert_eq!(buffer.write_of(Oid(2)).unwrap().expected, Expected::Serial(Tid(9)));
    }
}
