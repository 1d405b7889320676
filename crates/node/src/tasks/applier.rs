//! The thread that applies committed entries and tells the clients.
//!
//! It is the only writer of the data files, but for the repair of a damaged block, which writes the
//! bytes that were there before. What it is asked for is done in order, so a `register`
//! is answered when all that was committed before it is visible, and each session hears of every
//! transaction after the one that `register` named, once, in order.

mod checkpoints;
mod new_files;
mod telling;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use standby_consensus::{AppliedPoint, Committed};
use standby_filestorage::{Hole, Outcome, StorageError, TransactionMeta};
use standby_logging::error_text::with_causes;
use standby_primary::{Caller, Input};
use standby_replica::changed_in_hole::Hidden;
use standby_replica::lineage::Promotion;
use standby_replica::machine::{Applied, ApplyError, Done, Replica};
use standby_replica::state_dir::Checkpoint;
use standby_types::disk::is_full;
use standby_types::time::{tid_at, utc};
use standby_types::{Disk, LogIndex, Mutation, mutation};
use standby_zeo::History;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::cells::apply_task::{ApplyTask, CatchUpItem, CatchUpItems, Cause};
use crate::cells::shared::Shared;
use crate::platform::{Instant, Job};
use crate::tasks::packing::Packs;

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
pub(crate) struct Applier {
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
    pub(crate) fn new(
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
    pub(crate) async fn run(
        mut self,
        mut work: mpsc::UnboundedReceiver<ApplyTask>,
    ) -> anyhow::Result<()> {
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

    /// What the storages hold now, with what this node knows of the others.
    fn checkpoint(&self) -> Option<Checkpoint> {
        let acknowledged = self.shared.acknowledged.all();
        self.replica.checkpoint().map(|checkpoint| Checkpoint { acknowledged, ..checkpoint })
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
        self.shared.acknowledged.begin(&self.replica.settings().lineage);
        let checkpoint = self.checkpoint().context("parts are open in a new timeline")?;
        self.write_checkpoint(&checkpoint).await?;
        self.report(Vec::new());
        self.shared.report(Input::TimelineBegun(self.replica.point()));
        Ok(())
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
                Some(CatchUpItem::Outcomes(storage, outcomes)) => {
                    self.replica.set_outcomes(&storage, outcomes)?;
                }
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
