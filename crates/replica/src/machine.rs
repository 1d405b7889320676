//! The replicated state machine: what the log's entries do to the storages. Deterministic: the same
//! entries make the same state on every node.
//!
//! Applying an entry again, or one whose transaction has already come from a peer, changes nothing:
//! a transaction that is not above the storage's last one is there already.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_consensus::{AppliedPoint, ClosingEntry, Command, Committed, Membership};
use standby_filestorage::{
    Appender, BlobDir, FileStorage, Holes, Job, Packed, Record, References, StorageError,
    TransactionMeta, copy_rest, record_len, take_meta, take_record,
};
use standby_types::disk::is_full;
use standby_types::lock::lock;
use standby_types::{Blob, BlobSource, LogIndex, Oid, Term, Tid, TransactionToken};
use standby_zeo::{MakeSpill, Slot, Spill};
use tracing::{error, warn};

use crate::lineage::{Departure, Fork, Promotion};
use crate::outcomes::{Outcome, Outcomes, SharedOutcomes};
use crate::settings::{Setting, Settings};
use crate::state_dir::{Checkpoint, StoragePoint, decode_shared, encode_shared};

/// Oids that a new timeline leaves out.
const SKIPPED_OIDS: u64 = 1 << 20;

/// Why an entry cannot be applied. The node must stop: it would differ from the others.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum ApplyError {
    /// No node can apply it.
    #[error(
        "log entry {index} of term {term} cannot be applied, by no node: {reason}. If it is from a \
         newer version of Standby, install that. Otherwise leave it out, which loses what it says \
         and nothing else: stop all nodes, and run on each of them: standby skip-entry -C zeo.conf \
         --index {index} --term {term}"
    )]
    Unfit { index: LogIndex, term: Term, reason: Box<ApplyError> },
    /// The data file cannot be written, or contradicts the log.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The entry means nothing.
    #[error("log entry {0} cannot be understood; was it written by a newer version of Standby?")]
    Malformed(LogIndex),
    /// The entry names a storage that this node does not have.
    #[error(
        "the log has a transaction of the storage {0:?}, which this node's configuration lacks"
    )]
    UnknownStorage(String),
    /// A long transaction's part cannot be kept or found.
    #[error("a part of a long transaction is not at hand: {0}")]
    Part(io::Error),
    /// A blob has no place.
    #[error(
        "the log has a blob of the storage {0:?}, for which this node's configuration has no \
        blob-dir"
    )]
    NoBlobDir(String),
}

impl ApplyError {
    /// True if there was no room: the same can be applied again.
    pub fn is_full(&self) -> bool {
        match self {
            ApplyError::Storage(error) => error.is_full(),
            ApplyError::Part(error) => is_full(error),
            _ => false,
        }
    }

    /// True if every node fails alike: because of what the entry says, not of what this machine
    /// lacks.
    fn is_of_the_entry(&self) -> bool {
        let storage = |error: &StorageError| {
            matches!(error, StorageError::OutOfOrder { .. } | StorageError::MetaTooLong(_))
        };
        match self {
            ApplyError::Malformed(_) => true,
            ApplyError::Storage(error) => storage(error),
            _ => false,
        }
    }
}

/// A transaction that has just become visible.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Applied {
    pub storage: String,
    pub tid: Tid,
    /// The objects that it changed.
    pub oids: Arc<[Oid]>,
}

/// See the module.
pub struct Replica {
    cluster_id: String,
    index: LogIndex,
    term: Term,
    membership: Membership,
    settings: Arc<Settings>,
    storages: BTreeMap<String, Stored>,
    parts: Parts,
    /// The log is to begin anew after this entry. Once an entry after it is applied, it has.
    log_begins_after: Option<LogIndex>,
    /// Entries that are left out if they cannot be applied.
    skipped: BTreeSet<(LogIndex, Term)>,
}

struct Stored {
    storage: FileStorage,
    blobs: Option<BlobDir>,
    ceiling: Oid,
    /// Packs to do, in order; the first may be under way.
    packs: VecDeque<Job>,
    /// The holes of the data file are to be filled.
    backfill: bool,
    /// What has become of transactions with a token.
    outcomes: SharedOutcomes,
    /// A catch-up has brought them.
    outcomes_came: bool,
}

/// What an entry did.
#[derive(Debug, Clone)]
pub enum Done {
    /// Nothing that anybody must be told of.
    Nothing,
    /// A transaction is visible.
    Applied(Applied),
    /// This storage is to be packed.
    Pack(String),
}

impl Replica {
    /// Continues from a checkpoint; the storages stand at its marks.
    pub fn new(
        checkpoint: &Checkpoint,
        storages: BTreeMap<String, FileStorage>,
        blobs: BTreeMap<String, BlobDir>,
        make_spill: MakeSpill,
    ) -> Replica {
        let stored = |name: &str, storage| {
            let point = checkpoint.storages.get(name);
            let ceiling = point.map_or(Oid(0), |point| point.ceiling);
            let packs = point.map_or_else(VecDeque::new, |point| point.packs.clone().into());
            let backfill = point.is_some_and(|point| point.backfill);
            let outcomes = point.map_or_else(Outcomes::default, |point| point.outcomes.clone());
            Stored {
                storage,
                blobs: blobs.get(name).cloned(),
                ceiling,
                packs,
                backfill,
                outcomes: SharedOutcomes::new(outcomes.into()),
                outcomes_came: false,
            }
        };
        Replica {
            cluster_id: checkpoint.cluster_id.clone(),
            index: checkpoint.index,
            term: checkpoint.term,
            membership: checkpoint.membership.clone(),
            settings: Arc::new(checkpoint.settings.clone()),
            storages: storages
                .into_iter()
                .map(|(name, storage)| {
                    let stored = stored(&name, storage);
                    (name, stored)
                })
                .collect(),
            parts: Parts::new(make_spill),
            log_begins_after: None,
            skipped: BTreeSet::new(),
        }
    }

    /// These entries are left out if no node can apply them: an administrator has decided so, on
    /// every node.
    pub fn skipping(self, skipped: BTreeSet<(LogIndex, Term)>) -> Replica {
        Replica { skipped, ..self }
    }

    /// What has become of transactions with a token is kept where others see it.
    pub fn sharing(
        mut self,
        outcomes: impl IntoIterator<Item = (String, SharedOutcomes)>,
    ) -> Replica {
        for (name, shared) in outcomes {
            if let Some(stored) = self.storages.get_mut(&name) {
                *lock(&shared) = lock(&stored.outcomes).clone();
                stored.outcomes = shared;
            }
        }
        self
    }

    /// The last entry applied.
    pub fn index(&self) -> LogIndex {
        self.index
    }

    /// The cluster's identity; empty if this node has not joined one.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// What administrators have decided.
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// A storage.
    pub fn storage(&self, name: &str) -> Option<&FileStorage> {
        self.storages.get(name).map(|stored| &stored.storage)
    }

    /// The storages, by name.
    pub fn storages(&self) -> impl Iterator<Item = (&String, &FileStorage)> {
        self.storages.iter().map(|(name, stored)| (name, &stored.storage))
    }

    /// What became of a transaction that is not in the log after what is applied. Its client knew
    /// `since` before it finished it.
    pub fn outcome(&self, name: &str, token: TransactionToken, since: Tid) -> Outcome {
        let Some(stored) = self.storages.get(name) else { return Outcome::Forgotten };
        match lock(&stored.outcomes).outcome(token, since) {
            // A forced promotion may have lost it.
            Outcome::NotCommitted | Outcome::Forgotten
                if since < self.settings.lineage.first(name) =>
            {
                Outcome::TimelineChanged
            }
            outcome => outcome,
        }
    }

    /// The directories of blobs.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobDir> {
        self.storages.values().filter_map(|stored| stored.blobs.as_ref())
    }

    /// Oids up to these may have been handed out.
    pub fn ceilings(&self) -> BTreeMap<String, Oid> {
        self.storages.iter().map(|(name, stored)| (name.clone(), stored.ceiling)).collect()
    }

    /// The state as others need it to start from there.
    pub fn point(&self) -> AppliedPoint {
        AppliedPoint {
            index: self.index,
            term: self.term,
            membership: self.membership.clone(),
            state: encode_shared(&self.cluster_id, &self.ceilings(), &self.settings).into(),
            open_parts: !self.parts.is_empty(),
        }
    }

    /// The state as a checkpoint; `None` while a long transaction's parts are open, for its
    /// closing entry needs them. True only once the data files are synced.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        self.parts.is_empty().then(|| Checkpoint {
            acknowledged: BTreeMap::new(),
            cluster_id: self.cluster_id.clone(),
            index: self.index,
            term: self.term,
            log_begins_here: self.log_begins_after == Some(self.index),
            membership: self.membership.clone(),
            settings: (*self.settings).clone(),
            storages: self
                .storages
                .iter()
                .map(|(name, stored)| {
                    let point = StoragePoint {
                        mark: stored.storage.mark(),
                        ceiling: stored.ceiling,
                        packed: None,
                        packs: stored.packs.iter().copied().collect(),
                        holes: stored.storage.reader().holes(),
                        backfill: stored.backfill,
                        outcomes: lock(&stored.outcomes).clone(),
                    };
                    (name.clone(), point)
                })
                .collect(),
        })
    }

    /// Applies the next entry.
    pub fn apply(&mut self, entry: &Committed) -> Result<Done, ApplyError> {
        let (index, term) = entry.point();
        if index <= self.index {
            return Ok(Done::Nothing);
        }
        if term > self.term {
            // The parts' proposer leads no more; nobody else closes them.
            self.parts.clear();
        }
        let applied = match entry {
            Committed::Empty(..) => Done::Nothing,
            Committed::Membership(_, _, membership) => {
                self.membership = membership.clone();
                Done::Nothing
            }
            Committed::Command(_, _, data) => match self.decoded(index, data.clone()) {
                Err(error) if error.is_of_the_entry() => {
                    self.unfit(index, term, error)?;
                    Done::Nothing
                }
                done => done?,
            },
        };
        (self.index, self.term) = (index, term);
        if cfg!(debug_assertions) {
            self.invariants();
        }
        Ok(applied)
    }

    /// Fails if an invariant does not hold.
    fn invariants(&self) {
        self.membership.invariants();
        let begins = self.log_begins_after;
        assert!(begins.is_none_or(|after| after <= self.index), "the log begins in the future");
        self.storages.values().for_each(|stored| lock(&stored.outcomes).invariants());
    }

    fn decoded(&mut self, index: LogIndex, data: Bytes) -> Result<Done, ApplyError> {
        let command = Command::decode(data).map_err(|_| ApplyError::Malformed(index))?;
        self.command(index, command)
    }

    /// An entry that no node can apply: left out, if that was decided.
    fn unfit(&mut self, index: LogIndex, term: Term, reason: ApplyError) -> Result<(), ApplyError> {
        if !self.skipped.contains(&(index, term)) {
            return Err(ApplyError::Unfit { index, term, reason: Box::new(reason) });
        }
        error!(%index, %term, %reason, "an entry of the log was left out, as an administrator has \
        decided");
        Ok(())
    }

    fn command(&mut self, index: LogIndex, command: Command) -> Result<Done, ApplyError> {
        match command {
            Command::Part(bytes) => {
                self.parts.put(index, bytes).map_err(ApplyError::Part)?;
                Ok(Done::Nothing)
            }
            Command::OidCeiling { storage, ceiling } => {
                let stored = self.stored(&storage)?;
                stored.ceiling = stored.ceiling.max(ceiling);
                Ok(Done::Nothing)
            }
            Command::Pack { storage, time, gc } => {
                self.stored(&storage)?.packs.push_back(Job { time, gc });
                Ok(Done::Pack(storage))
            }
            Command::Setting(bytes) => {
                let setting = Setting::decode(&bytes).ok_or(ApplyError::Malformed(index))?;
                Arc::make_mut(&mut self.settings).apply(setting);
                Ok(Done::Nothing)
            }
            Command::Transaction(closing) => {
                let parts = closing.parts.clone();
                let applied = self.transaction(index, closing);
                if !matches!(&applied, Err(error) if error.is_full()) {
                    // Whatever came of it, nobody asks for them again.
                    self.parts.remove(&parts);
                }
                Ok(applied?.map_or(Done::Nothing, Done::Applied))
            }
        }
    }

    fn transaction(
        &mut self,
        index: LogIndex,
        closing: ClosingEntry,
    ) -> Result<Option<Applied>, ApplyError> {
        let malformed = |_| ApplyError::Malformed(index);
        let meta = take_meta(&mut closing.head.clone()).map_err(malformed)?;
        let unknown = || ApplyError::UnknownStorage(closing.storage.clone());
        let stored = self.storages.get_mut(&closing.storage).ok_or_else(unknown)?;
        let parts = &self.parts;
        if meta.tid <= stored.storage.mark().tid {
            note_outcome(&stored.outcomes, closing.token, meta.tid);
            discard(stored.blobs.as_ref(), &closing.blobs)?;
            return Ok(None);
        }
        let Stored { storage, blobs, ceiling, outcomes, .. } = stored;
        let mut appender = match storage.begin(&meta) {
            Ok(appender) => appender,
            Err(error) => {
                discard(blobs.as_ref(), &closing.blobs)?;
                return Err(error.into());
            }
        };
        // A blob is there before the record that tells of it can be read.
        place(blobs.as_ref(), &closing.storage, &closing.blobs, meta.tid)?;
        let mut oids = Vec::new();
        let mut pending = BytesMut::new();
        let mut take = |bytes: Bytes| -> Result<(), ApplyError> {
            pending.extend_from_slice(&bytes);
            while let Some(len) = record_len(&pending).map_err(malformed)? {
                if pending.len() < len {
                    break;
                }
                let mut bytes = pending.split_to(len).freeze();
                let record = take_record(&mut bytes).map_err(malformed)?;
                appender.record(&record)?;
                oids.push(record.oid);
            }
            Ok(())
        };
        for part in &closing.parts {
            take(parts.get(*part).map_err(ApplyError::Part)?)?;
        }
        take(closing.rest)?;
        if !pending.is_empty() {
            return Err(ApplyError::Malformed(index));
        }
        appender.finish()?;
        note_oids(ceiling, &oids);
        note_outcome(outcomes, closing.token, meta.tid);
        Ok(Some(Applied { storage: closing.storage, tid: meta.tid, oids: oids.into() }))
    }

    /// Begins a transaction that comes from a peer instead of the log.
    pub fn begin_copy(
        &mut self,
        name: &str,
        meta: &TransactionMeta,
    ) -> Result<Copying<'_>, ApplyError> {
        let Stored { storage, blobs, ceiling, .. } = self.stored(name)?;
        let mut meta = meta.clone();
        if storage.reader().hole_of(meta.tid).is_some() {
            // What is left of it cannot be undone: every program that reads the file must see that.
            meta.status = b'p';
        }
        let is_there = meta.tid <= storage.mark().tid;
        let appender = if is_there { None } else { Some(storage.begin(&meta)?) };
        let (name, oids) = (name.to_owned(), Vec::new());
        Ok(Copying { name, tid: meta.tid, appender, blobs: blobs.as_ref(), ceiling, oids })
    }

    /// A catch-up brings what the other node knows of the outcomes of transactions, not less than
    /// this node is to know when it has caught up.
    pub fn set_outcomes(&mut self, name: &str, outcomes: Outcomes) -> Result<(), ApplyError> {
        let stored = self.stored(name)?;
        *lock(&stored.outcomes) = outcomes;
        stored.outcomes_came = true;
        Ok(())
    }

    /// A catch-up has brought the storages to `target` or beyond.
    pub fn caught_up(&mut self, target: &AppliedPoint) -> anyhow::Result<()> {
        let (cluster_id, ceilings, settings) = decode_shared(&target.state)?;
        self.cluster_id = cluster_id;
        // A witness has no storages.
        if !self.storages.is_empty() {
            for (name, ceiling) in ceilings {
                let stored = self.stored(&name)?;
                stored.ceiling = stored.ceiling.max(ceiling);
            }
        }
        for stored in self.storages.values_mut() {
            if !std::mem::take(&mut stored.outcomes_came) {
                // The other node is of an older version.
                *lock(&stored.outcomes) = Outcomes::unknown_until(stored.storage.mark().tid);
            }
        }
        if target.index > self.index {
            self.settings = Arc::new(settings);
            self.index = target.index;
            self.term = target.term;
            self.membership = target.membership.clone();
            self.parts.clear();
            self.log_begins_after = Some(self.index);
        }
        Ok(())
    }

    /// Where the history of each storage ends.
    pub fn last_tids(&self) -> BTreeMap<String, Tid> {
        let last = |(name, storage): (&String, &FileStorage)| (name.clone(), storage.mark().tid);
        self.storages().map(last).collect()
    }

    /// Begins a timeline with what is applied: a forced promotion. What came after `certain` may
    /// never have been committed.
    pub fn begin_timeline(
        &mut self,
        promotion: &Promotion,
        certain: &BTreeMap<String, Tid>,
    ) -> Result<(), StorageError> {
        self.parts.clear();
        let mut departures = Vec::new();
        for (name, stored) in &mut self.storages {
            let reader = stored.storage.reader();
            let certain = certain.get(name).copied().unwrap_or(Tid::NONE);
            let first = promotion.first(name, reader.last_tid());
            departures.push((name.clone(), Departure::new(&reader, certain, first)?));
            // The former primary may have handed out oids that this node has not heard of.
            stored.ceiling = Oid(stored.ceiling.0.saturating_add(SKIPPED_OIDS));
        }
        let (id, node) = (promotion.id.clone(), promotion.node.clone());
        let settings = Arc::make_mut(&mut self.settings);
        settings.lineage.begin(Fork::new(id, node, promotion.now.as_secs(), departures));
        settings.moving_to = None;
        if let Some(failover) = &promotion.failover {
            settings.failover = failover.clone();
        }
        self.membership = promotion.membership.clone();
        self.log_begins_after = Some(self.index);
        Ok(())
    }

    /// The next pack of a storage.
    pub fn next_pack(&self, name: &str) -> Option<Job> {
        self.storages.get(name)?.packs.front().copied()
    }

    /// What the data file of a storage lacks.
    pub fn holes(&self, name: &str) -> Holes {
        self.storage(name).map(|storage| storage.reader().holes()).unwrap_or_default()
    }

    /// What the data files lack.
    pub fn all_holes(&self) -> BTreeMap<String, Holes> {
        self.storages.keys().map(|name| (name.clone(), self.holes(name))).collect()
    }

    /// Says what the data file of a storage lacks.
    pub fn set_holes(&mut self, name: &str, holes: Holes) -> Result<(), ApplyError> {
        self.stored(name)?.storage.set_holes(holes);
        Ok(())
    }

    /// The holes of a storage are to be filled, or not.
    pub fn set_backfill(&mut self, name: &str, wanted: bool) {
        if let Some(stored) = self.storages.get_mut(name) {
            stored.backfill = wanted;
        }
    }

    /// True if the holes of a storage are to be filled, and there are any.
    pub fn wants_backfill(&self, name: &str) -> bool {
        self.storages
            .get(name)
            .is_some_and(|stored| stored.backfill && !stored.storage.reader().holes().is_empty())
    }

    /// That pack is done, or given up.
    pub fn pack_ended(&mut self, name: &str) {
        if let Some(stored) = self.storages.get_mut(name) {
            stored.packs.pop_front();
        }
    }

    /// Copies to a packed file what has come since it was made; nothing of that may refer to what
    /// the pack removed.
    pub fn copy_rest(
        &self,
        name: &str,
        packed: &mut Packed,
        references: References<'_>,
    ) -> Result<(), StorageError> {
        if let Some(stored) = self.storages.get(name) {
            let seen = packed.last;
            packed.last = copy_rest(&stored.storage.reader(), &mut packed.target, seen)?;
            packed.removed.check(&packed.target.reader(), seen, references)?;
        }
        Ok(())
    }

    /// Puts a packed file in the place of a storage's data file.
    pub fn replace(
        &mut self,
        name: &str,
        packed: FileStorage,
        from: &Path,
        keep_old: bool,
    ) -> Result<(), ApplyError> {
        Ok(self.stored(name)?.storage.replace_with(packed, from, keep_old)?)
    }

    fn stored(&mut self, name: &str) -> Result<&mut Stored, ApplyError> {
        self.storages.get_mut(name).ok_or_else(|| ApplyError::UnknownStorage(name.into()))
    }
}

/// Gives the blobs of a transaction their names.
fn place(dir: Option<&BlobDir>, storage: &str, blobs: &[Blob], tid: Tid) -> Result<(), ApplyError> {
    for blob in blobs {
        let dir = dir.ok_or_else(|| ApplyError::NoBlobDir(storage.into()))?;
        if !dir.place(blob, tid)? {
            warn!(storage, oid = %blob.oid, %tid, "the blob that an undo brings back is missing");
        }
    }
    Ok(())
}

/// A transaction that comes from a peer, record by record.
pub struct Copying<'a> {
    name: String,
    tid: Tid,
    /// `None` if the transaction is there already.
    appender: Option<Appender<'a>>,
    blobs: Option<&'a BlobDir>,
    ceiling: &'a mut Oid,
    oids: Vec<Oid>,
}

impl Copying<'_> {
    /// Appends a record; `blobs` has its blob, if it has one.
    pub fn record(&mut self, record: &Record, blobs: &[Blob]) -> Result<(), ApplyError> {
        match &mut self.appender {
            None => discard(self.blobs, blobs)?,
            Some(appender) => {
                place(self.blobs, &self.name, blobs, self.tid)?;
                appender.record(record)?;
                self.oids.push(record.oid);
            }
        }
        Ok(())
    }

    /// Makes the transaction visible; `None` if it was there already.
    pub fn finish(self) -> Result<Option<Applied>, ApplyError> {
        let Some(appender) = self.appender else { return Ok(None) };
        appender.finish()?;
        note_oids(self.ceiling, &self.oids);
        Ok(Some(Applied { storage: self.name, tid: self.tid, oids: self.oids.into() }))
    }
}

/// The blobs' transaction is there already.
fn discard(dir: Option<&BlobDir>, blobs: &[Blob]) -> Result<(), ApplyError> {
    let Some(dir) = dir else { return Ok(()) };
    for blob in blobs {
        if let BlobSource::Upload(upload) = blob.source {
            dir.discard(upload.transfer)?;
        }
    }
    Ok(())
}

/// A transaction is in the data file.
fn note_outcome(outcomes: &SharedOutcomes, token: Option<TransactionToken>, tid: Tid) {
    if let Some(token) = token {
        lock(outcomes).committed(token, tid);
    }
}

/// An oid in use was handed out, whoever did it.
fn note_oids(ceiling: &mut Oid, oids: &[Oid]) {
    let highest = oids.iter().max().copied().unwrap_or(Oid(0));
    *ceiling = (*ceiling).max(highest);
}

/// Parts of long transactions that are not closed yet.
struct Parts {
    slots: HashMap<LogIndex, Slot>,
    spill: Spill,
}

/// Bytes of parts that are kept in memory.
const PARTS_IN_MEMORY: usize = 16 << 20;

impl Parts {
    fn new(make_spill: MakeSpill) -> Parts {
        Parts { slots: HashMap::new(), spill: Spill::new(PARTS_IN_MEMORY, make_spill) }
    }

    fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn clear(&mut self) {
        self.slots.clear();
        self.spill.clear();
    }

    fn put(&mut self, index: LogIndex, bytes: Bytes) -> io::Result<()> {
        let slot = self.spill.put(bytes)?;
        self.slots.insert(index, slot);
        Ok(())
    }

    fn get(&self, index: LogIndex) -> io::Result<Bytes> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("log entry {index}"));
        self.spill.get(self.slots.get(&index).ok_or_else(missing)?)
    }

    fn remove(&mut self, indexes: &[LogIndex]) {
        for slot in indexes.iter().filter_map(|index| self.slots.remove(index)) {
            self.spill.release(slot);
        }
        if self.slots.is_empty() {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests;
