//! Data files that are made beside the commits: packs, filled holes, and those that somebody has
//! removed.

use anyhow::Context;
use standby_filestorage::Packed;
use standby_logging::error_text::with_causes;
use standby_primary::Caller;
use standby_types::Tid;
use standby_zeo::{ClientError, Value};
use tracing::{error, info};

use crate::cells::apply_task::{ApplyTask, Cause};
use crate::platform::{self, Instant};
use crate::tasks::applier::Applier;
use crate::tasks::applier::checkpoints::merge_index;
use crate::tasks::backfill;
use crate::tasks::packing::{pack_path, references};

impl Applier {
    /// Starts the next pack of a storage or, if there is none, fills its holes if that is wanted.
    pub(super) fn start_next(&mut self, storage: &str) {
        let Some(stored) = self.replica.storage(storage) else { return };
        if let Some(job) = self.replica.next_pack(storage) {
            self.packs.start(&self.shared, storage, stored.reader(), job);
        } else if self.replica.wants_backfill(storage) && self.packs.claim(storage) {
            let (shared, storage) = (self.shared.clone(), storage.to_owned());
            // It reports how it ended; `claim` lets one at a time begin.
            tokio::spawn(async move {
                let filled = backfill::run(&shared, &storage).await;
                let through = filled.as_ref().map_or(Tid::NONE, |(_, through)| *through);
                let (cause, packed) = (Cause::Backfill { through }, filled.map(|(file, _)| file));
                shared.apply(ApplyTask::Packed { storage, cause, packed });
            });
        }
    }

    pub(super) async fn backfill(&mut self, storage: &str) -> anyhow::Result<()> {
        self.replica.set_backfill(storage, true);
        // A restart goes on with it.
        if let Some(checkpoint) = self.checkpoint() {
            self.write_checkpoint(&checkpoint).await?;
        }
        self.start_next(storage);
        Ok(())
    }

    /// The last step of a pack, the only one for which commits wait.
    pub(super) async fn put_packed_in_place(&mut self) -> anyhow::Result<()> {
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
        if let Err(error) = self.complete(&name, &mut packed, cause) {
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
        // Somebody may have removed it meanwhile.
        let keep_old = matches!(cause, Cause::Pack(_))
            && section.is_some_and(|section| section.pack_keep_old)
            && self.disk.exists(&storage.path).unwrap_or(false);
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
        shared.tell_info(&name, &shared.short_info(&name), None);
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

    /// Copies what was committed since most of the file was copied.
    fn complete(&self, name: &str, packed: &mut Packed, cause: Cause) -> anyhow::Result<()> {
        self.replica.copy_rest(name, packed, &references)?;
        if let Cause::Backfill { through } = cause {
            let mut holes = self.replica.holes(name);
            holes.filled(through);
            packed.target.set_holes(holes);
        }
        packed.target.sync()?;
        Ok(())
    }

    /// A new data file was not completed: everything else goes on.
    pub(super) fn new_file_failed(&mut self, storage: &str, cause: Cause, error: &anyhow::Error) {
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
    pub(super) fn remove_packed_blobs(&mut self, storage: &str, keep_old: bool) {
        let shared = self.shared.clone();
        match shared.storages.get(storage).map(|s| (s.blobs.clone(), s.reader())) {
            Some((Some(blobs), reader)) => {
                self.packs.remove_blobs(&shared, storage, blobs, reader, keep_old);
            }
            _ => self.pack_answered(storage, None),
        }
    }

    pub(super) fn pack_answered(&mut self, storage: &str, failed: Option<String>) {
        if let Some(shared) = self.shared.storages.get(storage) {
            shared.packing.set(None);
        }
        for Caller { session, call } in self.packs.ended(storage) {
            let Some(session) = self.shared.sessions.get(session) else { continue };
            let encoding = session.encoding();
            session.set_packs(false);
            session.answer(match &failed {
                None => encoding.reply(&call, Value::None),
                Some(reason) => encoding.error(&call, &ClientError::file_storage(reason.clone())),
            });
        }
        self.start_next(storage);
    }

    /// Whoever removed the data file has not removed what this process has open.
    pub(super) fn missing(&mut self, storage: &str) {
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

    pub(super) fn written_anew(&mut self, storage: &str) {
        self.packs.release(storage);
        self.start_next(storage);
    }

    pub(super) fn backfill_ended(&mut self, storage: &str) {
        self.replica.set_backfill(storage, false);
        if let Some(shared) = self.shared.storages.get(storage) {
            shared.backfilling.set(None);
        }
        self.packs.release(storage);
        self.start_next(storage);
    }
}
