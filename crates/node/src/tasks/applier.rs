//! The thread that applies committed entries and tells the clients.
//!
//! It is the only writer of the data files. What it is asked for is done in order, so a `register`
//! is answered when all that was committed before it is visible, and each session hears of every
//! transaction after the one that `register` named, once, in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use standby_consensus::{AppliedPoint, Committed};
use standby_filestorage::{Hole, Need, Outcome, Packed, Reader, StorageError, TransactionMeta};
use standby_logging::error_text::with_causes;
use standby_primary::{Caller, Input, Reading};
use standby_replica::changed_in_hole::Hidden;
use standby_replica::lineage::Promotion;
use standby_replica::machine::{Applied, ApplyError, Done, Replica};
use standby_replica::state_dir::Checkpoint;
use standby_types::disk::is_full;
use standby_types::time::{tid_at, utc};
use standby_types::{Disk, LogIndex, Mutation, Oid, Tid, mutation};
use standby_zeo::{ClientError, Encoding, History, SessionId, Value};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use crate::cells::apply_task::{ApplyTask, CatchUpItem, CatchUpItems, Cause};
use crate::cells::events::TaskReport;
use crate::cells::reserve::room_for;
use crate::cells::sessions::{Mail, SessionHandle};
use crate::cells::shared::Shared;
use crate::platform::{self, Instant, Job};
use crate::tasks::backfill;
use crate::tasks::packing::{Packs, pack_path, references};

/// Bytes appended after which a checkpoint is made.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Time after which a checkpoint is made if anything was applied.
const CHECKPOINT_EVERY: Duration =
    if cfg!(feature = "simulated") { Duration::from_secs(1) } else { Duration::from_secs(10) };
/// How often a checkpoint that something waits for is tried, once a second.
const CHECKPOINT_ATTEMPTS: u32 = 60;
/// Until what failed for a reason that passes is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Objects in the index's memory above which it is written to its file.
const INDEX_OVERLAY: usize = 200_000;
/// During a catch-up, bytes after which the progress is made durable.
const CATCH_UP_BYTES: u64 = 64 << 20;

/// See the module.
pub struct Applier {
    shared: Arc<Shared>,
    replica: Replica,
    disk: Arc<dyn Disk>,
    histories: BTreeMap<String, History>,
    /// The thread that makes a checkpoint; only one writes the file at a time.
    checkpoint_thread: Option<Job>,
    /// The last checkpoint's entry and moment, and the bytes applied since.
    checkpointed: (LogIndex, Instant, u64),
    packs: Packs,
    /// Of each storage whose data file is within a hole.
    hidden: BTreeMap<String, Hidden>,
    /// What is held back by a mutation.
    late: Vec<(Applied, Option<Caller>)>,
}

impl Applier {
    /// An applier for a replica that was just opened.
    pub fn new(
        shared: Arc<Shared>,
        replica: Replica,
        disk: Arc<dyn Disk>,
    ) -> anyhow::Result<Applier> {
        let mut histories = BTreeMap::new();
        for (name, storage) in replica.storages() {
            let now = shared.wall_clock();
            let hour_ago = tid_at(now.saturating_sub(Duration::from_secs(3600)));
            let mut count = 0;
            let newest = storage.reader().newest_oids(|tid, objects| {
                count += 1;
                (tid < hour_ago && count > 100) || objects > 1 << 20 || count > 20_000
            });
            let newest = newest.unwrap_or_else(|error| {
                // Clients that come again drop their caches then.
                warn!(storage = name, %error, "cannot tell what was changed before this start");
                Vec::new()
            });
            let base = newest.last().map_or(storage.mark().tid, |(first, _)| *first);
            let mut history = History::new(base, shared.retention());
            for (tid, oids) in newest.into_iter().rev().skip(1) {
                history.push(tid, oids.into());
            }
            history.forget(tid_at(now));
            histories.insert(name.clone(), history);
        }
        let checkpointed = (replica.index(), Instant::now(), 0);
        Ok(Applier {
            shared,
            replica,
            disk,
            histories,
            checkpoint_thread: None,
            checkpointed,
            packs: Packs::default(),
            hidden: BTreeMap::new(),
            late: Vec::new(),
        })
    }

    /// Works until it is told to stop. An error means that the process must stop.
    pub async fn run(mut self, mut work: mpsc::UnboundedReceiver<ApplyTask>) -> anyhow::Result<()> {
        for name in self.shared.clone().storages.keys() {
            self.start_next(name);
        }
        loop {
            // A packed file waits for the end of a checkpoint.
            match timeout(Duration::from_millis(200), work.recv()).await {
                Ok(Some(ApplyTask::Entries(entries))) => self.entries(entries).await?,
                Ok(Some(ApplyTask::Read(reading))) => self.read(reading),
                Ok(Some(ApplyTask::SendWritersAway)) => {
                    let unfinished = self.shared.sessions.let_writers_depart();
                    if unfinished > 0 {
                        info!(unfinished, "transactions that have not voted are aborted");
                    }
                }
                Ok(Some(ApplyTask::CatchUp { items, target })) => {
                    match self.catch_up(items, &target).await {
                        Err(error) if is_for_room(&error) => {
                            warn!("the catch-up was interrupted: {}", with_causes(&error));
                        }
                        done => done?,
                    }
                }
                Ok(Some(ApplyTask::Backfill(storage))) => self.backfill(&storage).await?,
                Ok(Some(ApplyTask::BeginTimeline { entries, promotion })) => {
                    self.begin_timeline(entries, &promotion).await?;
                }
                Ok(Some(ApplyTask::Packed { storage, cause, packed })) => match (packed, cause) {
                    (Ok(Outcome::Packed(packed)), cause) => {
                        self.packs.ready(&storage, packed, cause);
                    }
                    (Ok(Outcome::Nothing), Cause::Pack(job)) => {
                        info!(storage, "packed: there was nothing to remove");
                        let mut holes = self.replica.holes(&storage);
                        holes.packed(job.time);
                        self.replica.set_holes(&storage, holes)?;
                        self.replica.pack_ended(&storage);
                        self.remove_packed_blobs(&storage, false);
                    }
                    (Ok(Outcome::Nothing), Cause::Backfill { .. }) => {
                        self.backfill_ended(&storage);
                    }
                    (Ok(Outcome::Nothing), Cause::Missing) => self.written_anew(&storage),
                    (Err(error), cause) => self.new_file_failed(&storage, cause, &error),
                },
                Ok(Some(ApplyTask::Missing(storage))) => self.missing(&storage),
                Ok(Some(ApplyTask::BlobsRemoved(storage))) => self.pack_answered(&storage, None),
                Ok(Some(ApplyTask::Stop(done))) => {
                    self.last_checkpoint().await?;
                    let _ = done.send(());
                    return Ok(());
                }
                Err(_) => {}
                Ok(None) => return Ok(()),
            }
            self.put_packed_in_place().await?;
            self.maybe_checkpoint();
        }
    }

    /// Starts the next pack of a storage or, if there is none, fills its holes if that is wanted.
    fn start_next(&mut self, storage: &str) {
        let Some(stored) = self.replica.storage(storage) else { return };
        if let Some(job) = self.replica.next_pack(storage) {
            self.packs.start(&self.shared, storage, stored.reader(), job);
        } else if self.replica.wants_backfill(storage) && self.packs.claim(storage) {
            let (shared, storage) = (self.shared.clone(), storage.to_owned());
            tokio::spawn(async move {
                let filled = backfill::run(&shared, &storage).await;
                let through = filled.as_ref().map_or(Tid::NONE, |(_, through)| *through);
                let (cause, packed) = (Cause::Backfill { through }, filled.map(|(file, _)| file));
                shared.apply(ApplyTask::Packed { storage, cause, packed });
            });
        }
    }

    /// What the storages hold now, with what this node knows of the others.
    fn checkpoint(&self) -> Option<Checkpoint> {
        let acknowledged = self.shared.all_acknowledged();
        self.replica.checkpoint().map(|checkpoint| Checkpoint { acknowledged, ..checkpoint })
    }

    async fn backfill(&mut self, storage: &str) -> anyhow::Result<()> {
        self.replica.set_backfill(storage, true);
        // A restart goes on with it.
        if let Some(checkpoint) = self.checkpoint() {
            self.write_checkpoint(&checkpoint).await?;
        }
        self.start_next(storage);
        Ok(())
    }

    /// The last step of a pack, the only one for which commits wait.
    async fn put_packed_in_place(&mut self) -> anyhow::Result<()> {
        if !self.packs.any_ready() {
            return Ok(());
        }
        if self.checkpoint_thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Ok(());
        }
        // Without a checkpoint now there is one later.
        if self.checkpoint().is_none() {
            return Ok(());
        }
        let Some((name, mut packed, cause)) = self.packs.take_ready() else {
            return Ok(());
        };
        let started = Instant::now();
        let shared = self.shared.clone();
        let Some(storage) = shared.storages.get(&name) else { return Ok(()) };
        let before = storage.reader().size();
        let complete = |packed: &mut Packed| -> anyhow::Result<()> {
            self.replica.copy_rest(&name, packed, &references)?;
            if let Cause::Backfill { through } = cause {
                let mut holes = self.replica.holes(&name);
                holes.filled(through);
                packed.target.set_holes(holes);
            }
            packed.target.sync()?;
            Ok(())
        };
        if let Err(error) = complete(&mut packed) {
            // Nobody reads the new file yet: it is given up, and the old one stays in place.
            drop(packed);
            let _ = self.disk.remove(&pack_path(&storage.path));
            self.new_file_failed(&name, cause, &error);
            return Ok(());
        }
        let packed = packed.target;
        let mut checkpoint = self.checkpoint().context("no checkpoint for a pack")?;
        if let Some(point) = checkpoint.storages.get_mut(&name) {
            point.packed = Some(packed.mark());
        }
        // After a crash, this checkpoint fits whichever file is in place.
        self.write_checkpoint(&checkpoint).await?;
        let section = shared.config.storages.iter().find(|section| section.name == name);
        let keep_old = section.is_some_and(|section| section.pack_keep_old);
        let keep_old = keep_old && matches!(cause, Cause::Pack(_));
        // Somebody may have removed it meanwhile.
        let keep_old = keep_old && self.disk.exists(&storage.path).unwrap_or(false);
        self.replica.replace(&name, packed, &pack_path(&storage.path), keep_old)?;
        if let Cause::Pack(_) = cause {
            self.replica.pack_ended(&name);
        }
        let checkpoint = self.checkpoint().context("no checkpoint after a pack")?;
        self.write_checkpoint(&checkpoint).await?;
        let after = storage.reader().size();
        let commits_waited_ms = started.elapsed().as_millis();
        let done = match cause {
            Cause::Pack(_) => "packed",
            Cause::Backfill { .. } => "the hole in the history is filled",
            Cause::Missing => "the data file is in its place again",
        };
        info!(storage = name, before, after, commits_waited_ms, "{done}");
        for session in shared.sessions.of(&name) {
            session.outbox.push(session.encoding().notify("info", vec![shared.short_info(&name)]));
        }
        match cause {
            Cause::Pack(_) => {
                let keep_old = section.is_some_and(|section| section.blob_keep_old);
                self.remove_packed_blobs(&name, keep_old);
            }
            Cause::Backfill { .. } => self.backfill_ended(&name),
            Cause::Missing => self.written_anew(&name),
        }
        // The packed file has no index file yet; commits do not wait for it.
        let reader = storage.reader();
        self.checkpoint_thread =
            Some(platform::background("index", move || merge_index(&shared, &name, &reader, 1))?);
        Ok(())
    }

    /// A new data file was not completed: everything else goes on.
    fn new_file_failed(&mut self, storage: &str, cause: Cause, error: &anyhow::Error) {
        let reason = with_causes(error);
        match cause {
            Cause::Pack(_) => {
                error!(storage, "the pack failed: {reason}");
                self.replica.pack_ended(storage);
                self.pack_answered(storage, Some(reason));
            }
            Cause::Backfill { .. } => {
                error!(storage, "the hole in the history cannot be filled: {reason}");
                self.backfill_ended(storage);
            }
            Cause::Missing => {
                error!(storage, "the data file that was removed cannot be written anew: {reason}");
                self.written_anew(storage);
            }
        }
    }

    /// The data file is packed: the blobs follow, then whoever waits is answered.
    fn remove_packed_blobs(&mut self, storage: &str, keep_old: bool) {
        let shared = self.shared.clone();
        match shared.storages.get(storage).map(|s| (s.blobs.clone(), s.reader())) {
            Some((Some(blobs), reader)) => {
                self.packs.remove_blobs(&shared, storage, blobs, reader, keep_old);
            }
            _ => self.pack_answered(storage, None),
        }
    }

    fn pack_answered(&mut self, storage: &str, failed: Option<String>) {
        if let Some(shared) = self.shared.storages.get(storage) {
            shared.packing.set(None);
        }
        for Caller { session, call } in self.packs.ended(storage) {
            let Some(session) = self.shared.sessions.get(session) else { continue };
            let encoding = session.encoding();
            session.packs.store(false, Ordering::Release);
            session.answer(match &failed {
                None => encoding.reply(&call, Value::None),
                Some(reason) => encoding.error(&call, &ClientError::file_storage(reason.clone())),
            });
        }
        self.start_next(storage);
    }

    /// Whoever removed the data file has not removed what this process has open.
    fn missing(&mut self, storage: &str) {
        let Some(stored) = self.replica.storage(storage) else { return };
        let Some(shared) = self.shared.storages.get(storage) else { return };
        if self.shared.config.protects(storage) {
            return;
        }
        // It may have been put in place since.
        if let Ok(false) = self.disk.exists(&shared.path) {
            self.packs.start_anew(&self.shared, storage, stored.reader());
        }
    }

    fn written_anew(&mut self, storage: &str) {
        self.packs.release(storage);
        self.start_next(storage);
    }

    fn backfill_ended(&mut self, storage: &str) {
        self.replica.set_backfill(storage, false);
        if let Some(shared) = self.shared.storages.get(storage) {
            shared.backfilling.set(None);
        }
        self.packs.release(storage);
        self.start_next(storage);
    }

    async fn entries(&mut self, entries: Vec<(Committed, Option<Caller>)>) -> anyhow::Result<()> {
        let mut visible = Vec::new();
        let mut finished = Vec::new();
        for (entry, caller) in entries {
            if let Committed::Command(_, _, data) = &entry {
                self.checkpointed.2 += data.len() as u64;
            }
            let done = loop {
                match self.replica.apply(&entry) {
                    // It is committed: there is nobody to refuse it to. It ends with the room's
                    // return, or with the process.
                    Err(error) if error.is_full() => {
                        warn!(%error, "a committed transaction waits for room on the disk");
                        tokio::time::sleep(AGAIN).await;
                    }
                    done => break done?,
                }
            };
            if let (Done::Applied(_), Some(caller)) = (&done, &caller) {
                finished.push(caller.session);
            }
            match done {
                Done::Applied(applied) => {
                    if let Some(applied) = self.reveal(applied) {
                        self.remember(&applied);
                        visible.push((applied, caller));
                    }
                }
                Done::Pack(storage) => {
                    if let Some(caller) = caller {
                        self.packs.wait(&storage, caller);
                    }
                    self.start_next(&storage);
                }
                Done::Nothing => {
                    debug_assert!(caller.is_none(), "an entry of ours was there before");
                }
            }
        }
        // First the primary's machine, then the clients: a client's next vote finds its locks free.
        self.report(finished);
        if mutation::on(Mutation::LateInvalidations) {
            visible = std::mem::replace(&mut self.late, visible);
        }
        for (applied, caller) in visible {
            self.publish(&applied, caller);
        }
        Ok(())
    }

    async fn begin_timeline(
        &mut self,
        entries: Vec<Committed>,
        promotion: &Promotion,
    ) -> anyhow::Result<()> {
        let certain = self.replica.last_tids();
        self.entries(entries.into_iter().map(|entry| (entry, None)).collect()).await?;
        self.replica.begin_timeline(promotion, &certain)?;
        // What was acknowledged of the former timeline's log says nothing of this one's.
        self.shared.forget_acknowledged();
        let checkpoint = self.checkpoint().context("parts are open in a new timeline")?;
        self.write_checkpoint(&checkpoint).await?;
        self.report(Vec::new());
        self.shared.report(Input::TimelineBegun(self.replica.point()));
        Ok(())
    }

    fn report(&self, finished: Vec<SessionId>) {
        self.shared.set_applied(self.replica.index());
        self.shared.report(Input::Applied {
            point: self.replica.point(),
            ceilings: self.replica.ceilings(),
            settings: self.replica.settings().clone(),
            finished,
        });
    }

    /// A transaction can be shown, unless the data file is within a hole: the moment that it shows
    /// never was. What comes then is shown together, as the transaction at the hole's end.
    fn reveal(&mut self, applied: Applied) -> Option<Applied> {
        let Applied { storage, tid, oids } = applied;
        let stored = self.replica.storage(&storage)?;
        if !stored.reader().is_whole() {
            self.hidden.entry(storage).or_default().add(&oids);
            return None;
        }
        let Some(mut hidden) = self.hidden.remove(&storage) else {
            return Some(Applied { storage, tid, oids });
        };
        hidden.add(&oids);
        match hidden.oids() {
            Some(hidden) => Some(Applied { storage, tid, oids: hidden.into_iter().collect() }),
            None => {
                // Whoever comes again drops its cache.
                let history = History::new(tid, self.shared.retention());
                for session in self.shared.sessions.of(&storage) {
                    session.cut("too much has changed while this node was away");
                }
                self.histories.insert(storage, history);
                None
            }
        }
    }

    fn remember(&mut self, applied: &Applied) {
        let now = tid_at(self.shared.wall_clock());
        if let Some(history) = self.histories.get_mut(&applied.storage) {
            history.push(applied.tid, applied.oids.clone());
            history.forget(now);
        }
        if let Some(storage) = self.shared.storages.get(&applied.storage) {
            storage.stats.commits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells the sessions of a transaction: the others by an invalidation, its own by the reply.
    fn publish(&self, applied: &Applied, caller: Option<Caller>) {
        let mut frames: [Option<Bytes>; 2] = [None, None];
        let mut invalidation = |encoding: Encoding| {
            let slot = &mut frames[usize::from(encoding == Encoding::Msgpack)];
            slot.get_or_insert_with(|| {
                let oids = applied.oids.iter().map(|oid| oid.to_bytes().into()).collect();
                let tid = applied.tid.to_bytes().into();
                encoding.notify("invalidateTransaction", vec![tid, Value::List(oids)])
            })
            .clone()
        };
        let own = caller.as_ref().map(|caller| caller.session);
        let (told, all_told) = oneshot::channel();
        let told = Arc::new(told);
        for session in self.shared.sessions.of(&applied.storage) {
            if Some(session.id) != own {
                let frame = invalidation(session.encoding());
                session.outbox.push_invalidation(applied.tid, frame, &told);
            }
        }
        drop(told);
        if let Some(Caller { session, call }) = caller
            && let Some(session) = self.shared.sessions.get(session)
        {
            let encoding = session.encoding();
            let info = encoding.notify("info", vec![self.shared.short_info(&applied.storage)]);
            let reply = encoding.reply(&call, applied.tid.to_bytes().into());
            let both = [info, reply].concat().into();
            session.outbox.push_committed(applied.tid, both, all_told);
            session.answered();
        }
    }

    fn read(&self, reading: Reading) {
        let (Reading::Register { caller, .. }
        | Reading::Invalidations { caller, .. }
        | Reading::Sync(caller)) = &reading;
        // Without its session nobody waits.
        let Some(session) = self.shared.sessions.get(caller.session) else { return };
        match reading {
            Reading::Register { storage, caller } => {
                self.register(&storage, session, &caller.call);
            }
            Reading::Sync(caller) => {
                session.answer(session.encoding().reply(&caller.call, Value::None));
            }
            Reading::Invalidations { storage, caller, since } => {
                self.invalidations(&storage, session, caller.call, since);
            }
        }
    }

    fn register(&self, storage: &str, session: Arc<SessionHandle>, id: &Value) {
        let Some(stored) = self.replica.storage(storage) else { return };
        if !stored.reader().is_whole() {
            session.send_away("this node is being brought up to date");
            return;
        }
        if !session.may_register() {
            return;
        }
        let tid = stored.mark().tid;
        let reply = session.encoding().reply(id, tid.to_bytes().into());
        // Its own task first, so that it knows before the client can say anything more.
        let _ = session.mailbox.send(Mail::Registered(true));
        self.shared.sessions.register(storage, session.clone());
        session.outbox.push_transaction(tid, reply);
        session.answered();
    }

    /// The answer has its place among the invalidations now, and is made beside this thread: it may
    /// name millions of objects.
    fn invalidations(&self, storage: &str, session: Arc<SessionHandle>, id: Value, since: Tid) {
        let forget = mutation::on(Mutation::ForgetMissed);
        let doubtful = self.replica.settings().lineage.is_doubtful(storage, since);
        let history = self.histories.get(storage).filter(|_| !doubtful);
        let changes = history.and_then(|history| history.since(since));
        let place = session.outbox.push_later();
        let make = move || {
            let value = changes.map_or(Value::None, |changes| {
                let oids = if forget { Vec::new() } else { changes.oids() };
                let oids = oids.iter().map(|oid: &Oid| oid.to_bytes().into()).collect();
                Value::Tuple(vec![changes.last.to_bytes().into(), Value::List(oids)])
            });
            session.outbox.made(place, session.encoding().reply(&id, value));
            session.answered();
        };
        let memory = self.shared.memory.clone();
        tokio::spawn(async move {
            let _turn = memory.invalidations_turn().await;
            // If it fails, its place ends the connection.
            let _ = platform::spawn_blocking(make).await;
        });
    }

    async fn catch_up(
        &mut self,
        mut items: CatchUpItems,
        target: &AppliedPoint,
    ) -> anyhow::Result<()> {
        let state = &self.shared.state;
        state.set_catching_up(&*self.disk, &self.replica.all_holes()).map_err(no_room)?;
        let mut since_sync = 0;
        loop {
            // The sender is gone if the connection broke: what has come so far stays.
            match items.next().await {
                None => {
                    warn!(target = %target.index, "the catch-up was interrupted");
                    return Ok(());
                }
                Some(CatchUpItem::Begin(storage, meta)) => {
                    match self.copy(&storage, &meta, &mut items, &mut since_sync).await {
                        Ok(Some(applied)) => {
                            if let Some(applied) = self.reveal(applied) {
                                self.remember(&applied);
                                self.publish(&applied, None);
                            }
                        }
                        Ok(None) => {}
                        Err(error) if matches!(error, ApplyError::Part(_)) || error.is_full() => {
                            warn!(tid = %meta.tid, %error, "the catch-up was interrupted");
                            return Ok(());
                        }
                        Err(error) => return Err(error.into()),
                    }
                    if since_sync > CATCH_UP_BYTES {
                        since_sync = 0;
                        // The disk works while more comes.
                        self.begin_checkpoint();
                    }
                }
                Some(CatchUpItem::Hole(storage, hole)) => self.dig(&storage, hole)?,
                Some(CatchUpItem::Done) => break,
                Some(CatchUpItem::Blob(..) | CatchUpItem::Record(_) | CatchUpItem::End) => {}
            }
        }
        self.replica.caught_up(target)?;
        self.shared.set_cluster_id(self.replica.cluster_id());
        let checkpoint = self.checkpoint().context("parts are open after a catch-up")?;
        self.write_checkpoint(&checkpoint).await?;
        self.shared.state.end_catching_up(&*self.disk)?;
        self.merge_indexes();
        info!(applied = %self.replica.index(), "caught up");
        self.report(Vec::new());
        self.shared.report(Input::CaughtUp(target.index));
        Ok(())
    }

    /// What comes next leaves this out. That is durable before anything of it is written.
    fn dig(&mut self, storage: &str, hole: Hole) -> anyhow::Result<()> {
        let mut all = self.replica.all_holes();
        let holes = all.entry(storage.to_owned()).or_default();
        holes.add(hole);
        let holes = holes.clone();
        self.shared.state.set_catching_up(&*self.disk, &all).map_err(no_room)?;
        self.replica.set_holes(storage, holes)?;
        let (after, through) = (utc(hole.after), utc(hole.through));
        info!(
            storage,
            after,
            through,
            "fast recovery, or a pack meanwhile: only what is current comes; standby node backfill \
            gets the rest later"
        );
        Ok(())
    }

    async fn copy(
        &mut self,
        storage: &str,
        meta: &TransactionMeta,
        items: &mut CatchUpItems,
        bytes: &mut u64,
    ) -> Result<Option<Applied>, ApplyError> {
        let (mut held, mut blobs) = (Vec::new(), Vec::new());
        let mut copying = self.replica.begin_copy(storage, meta)?;
        loop {
            match items.next().await {
                Some(CatchUpItem::Blob(blob, staged)) => {
                    held.push(staged);
                    blobs.push(blob);
                }
                Some(CatchUpItem::Record(record)) => {
                    if let standby_filestorage::RecordData::Data(data) = &record.data {
                        *bytes += data.len() as u64;
                    }
                    copying.record(&record, &std::mem::take(&mut blobs))?;
                }
                Some(CatchUpItem::End) => return copying.finish(),
                _ => return Err(ApplyError::Part(std::io::ErrorKind::ConnectionAborted.into())),
            }
        }
    }

    /// Syncs the data files as they are and says so durably.
    async fn write_checkpoint(&mut self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        self.end_running_checkpoint().await;
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.try_checkpoint(checkpoint) {
                Err(error)
                    if is_passing(&error)
                        && (attempts < CHECKPOINT_ATTEMPTS || is_for_room(&error)) =>
                {
                    warn!("cannot make a checkpoint now, and tries again: {}", with_causes(&error));
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        for (name, storage) in self.replica.storages() {
            note_durable(&storage.reader(), name, checkpoint);
        }
        Ok(())
    }

    /// Only one writes the file at a time.
    async fn end_running_checkpoint(&mut self) {
        if let Some(thread) = self.checkpoint_thread.take() {
            // It has reported its own errors.
            thread.join().await;
        }
    }

    fn try_checkpoint(&self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        for (_, storage) in self.replica.storages() {
            storage.sync()?;
        }
        for blobs in self.replica.blobs() {
            blobs.sync()?;
        }
        self.shared.state.set_checkpoint(&*self.disk, checkpoint).map_err(no_room)
    }

    fn merge_indexes(&self) {
        for (name, storage) in self.replica.storages() {
            merge_index(&self.shared, name, &storage.reader(), 1);
        }
    }

    fn maybe_checkpoint(&mut self) {
        let (index, at, bytes) = self.checkpointed;
        let due = bytes > CHECKPOINT_BYTES
            || (self.replica.index() > index && at.elapsed() > CHECKPOINT_EVERY);
        if due {
            self.begin_checkpoint();
        }
    }

    /// Makes a checkpoint of this moment beside what comes next, unless one is being made.
    fn begin_checkpoint(&mut self) {
        if self.checkpoint_thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let Some(checkpoint) = self.checkpoint() else { return };
        self.checkpointed = (checkpoint.index, Instant::now(), 0);
        let (shared, disk) = (self.shared.clone(), self.disk.clone());
        let readers: Vec<_> =
            self.replica.storages().map(|(name, s)| (name.clone(), s.reader())).collect();
        let blobs: Vec<_> = self.replica.blobs().cloned().collect();
        let thread = platform::background("checkpoint", move || {
            let made = || -> anyhow::Result<()> {
                let sync = !mutation::on(Mutation::CheckpointBeforeSync);
                for (_, reader) in readers.iter().filter(|_| sync) {
                    reader.sync()?;
                }
                for dir in &blobs {
                    dir.sync()?;
                }
                shared.state.set_checkpoint(&*disk, &checkpoint).map_err(no_room)
            };
            match made() {
                Err(error) if is_passing(&error) => {
                    warn!("cannot make a checkpoint now, and tries again: {}", with_causes(&error));
                }
                Err(error) => shared.report(TaskReport::Fatal(error.context("checkpoint"))),
                Ok(()) => {
                    debug!(applied = %checkpoint.index, "checkpoint");
                    for (name, reader) in &readers {
                        note_durable(reader, name, &checkpoint);
                        let least = INDEX_OVERLAY.max(reader.len() as usize / 8);
                        merge_index(&shared, name, reader, least);
                    }
                    shared.report(Input::Checkpointed(checkpoint.index));
                }
            }
        });
        match thread {
            Ok(job) => self.checkpoint_thread = Some(job),
            Err(error) => warn!(%error, "cannot begin a checkpoint"),
        }
    }

    async fn last_checkpoint(&mut self) -> anyhow::Result<()> {
        if let Some(checkpoint) = self.checkpoint() {
            self.end_running_checkpoint().await;
            match self.try_checkpoint(&checkpoint) {
                Err(error) if is_passing(&error) => {
                    warn!("the next start applies more of the log again: {}", with_causes(&error));
                }
                done => done?,
            }
        }
        self.merge_indexes();
        self.write_python_indexes();
        Ok(())
    }

    /// Whoever opens a data file with Python next need not read all of it.
    fn write_python_indexes(&self) {
        let written = |(name, _): &(&String, _)| !self.shared.config.protects(name);
        for (name, storage) in self.replica.storages().filter(written) {
            let Some(path) = self.shared.storages.get(name).map(|shared| &shared.path) else {
                continue;
            };
            let (reader, room) = (storage.reader(), room_for(&self.shared, path, "Python's index"));
            // It has eight bytes for each object.
            let room = room(Need::All(8 * reader.len())).map_err(anyhow::Error::from);
            if let Err(error) = room.and_then(|()| Ok(reader.write_python_index()?)) {
                warn!(
                    storage = name,
                    "Python will have to read the data file anew: {}",
                    with_causes(&error)
                );
            }
        }
    }
}

/// Writes the index file anew, if so many entries are not in it. It can be made anew from the data
/// file: it is not worth stopping for, nor worth the reserve.
fn merge_index(shared: &Arc<Shared>, storage: &str, reader: &Reader, least: usize) {
    let room = room_for(shared, &shared.state.index(storage), "the index");
    if let Err(error) = reader.merge_index(least, &room) {
        warn!(storage, %error, "cannot write the index file, and tries again later");
    }
}

/// A small file of the state directory could not be written for want of room. It is written as a
/// whole, so that it can be tried again.
#[derive(Debug, thiserror::Error)]
#[error("there is no room for a file of the state directory")]
struct NoRoom(#[source] std::io::Error);

fn no_room(error: std::io::Error) -> anyhow::Error {
    if is_full(&error) { NoRoom(error).into() } else { error.into() }
}

fn is_for_room(error: &anyhow::Error) -> bool {
    error.is::<NoRoom>() || error.downcast_ref::<StorageError>().is_some_and(StorageError::is_full)
}

/// True if it failed for a reason that passes. A sync that has failed is never tried again.
fn is_passing(error: &anyhow::Error) -> bool {
    use rustix::io::Errno;
    let passing = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
    if is_for_room(error) {
        return true;
    }
    let io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io_errors.into_iter().any(|error| passing.contains(&error.raw_os_error()))
}

/// A restart begins at the checkpoint: what is before will not be changed.
fn note_durable(reader: &Reader, storage: &str, checkpoint: &Checkpoint) {
    if let Some(point) = checkpoint.storages.get(storage) {
        reader.note_durable(point.mark);
    }
}
