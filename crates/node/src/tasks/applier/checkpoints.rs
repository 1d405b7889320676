//! Checkpoints: up to where the data files are durable.

use std::sync::Arc;

use standby_filestorage::{Need, Reader};
use standby_logging::error_text::with_causes;
use standby_primary::Input;
use standby_replica::state_dir::Checkpoint;
use standby_types::{Mutation, mutation};
use tracing::{debug, warn};

use crate::cells::events::TaskReport;
use crate::cells::reserve::room_for;
use crate::cells::shared::Shared;
use crate::platform::{self, Instant};
use crate::tasks::applier::{
    AGAIN, Applier, CHECKPOINT_ATTEMPTS, CHECKPOINT_BYTES, CHECKPOINT_EVERY, INDEX_OVERLAY,
    is_for_room, is_passing, no_room,
};

impl Applier {
    /// Syncs the data files as they are and says so durably.
    pub(super) async fn write_checkpoint(&mut self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
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
    pub(super) async fn end_running_checkpoint(&mut self) {
        if let Some(thread) = self.checkpoint_thread.take() {
            // It has reported its own errors.
            thread.join().await;
        }
    }

    pub(super) fn try_checkpoint(&self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        for (_, storage) in self.replica.storages() {
            storage.sync()?;
        }
        for blobs in self.replica.blobs() {
            blobs.sync()?;
        }
        self.shared.state.set_checkpoint(&*self.disk, checkpoint).map_err(no_room)
    }

    pub(super) fn merge_indexes(&self) {
        for (name, storage) in self.replica.storages() {
            merge_index(&self.shared, name, &storage.reader(), 1);
        }
    }

    pub(super) fn maybe_checkpoint(&mut self) {
        let (index, at, bytes) = self.checkpointed;
        let due = bytes > CHECKPOINT_BYTES
            || (self.replica.index() > index && at.elapsed() > CHECKPOINT_EVERY);
        if due {
            self.begin_checkpoint();
        }
    }

    /// Makes a checkpoint of this moment beside what comes next, unless one is being made.
    pub(super) fn begin_checkpoint(&mut self) {
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

    pub(super) async fn last_checkpoint(&mut self) -> anyhow::Result<()> {
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
    pub(super) fn write_python_indexes(&self) {
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
pub(super) fn merge_index(shared: &Arc<Shared>, storage: &str, reader: &Reader, least: usize) {
    let room = room_for(shared, &shared.state.index(storage), "the index");
    if let Err(error) = reader.merge_index(least, &room) {
        warn!(storage, %error, "cannot write the index file, and tries again later");
    }
}

/// A restart begins at the checkpoint: what is before will not be changed.
pub(super) fn note_durable(reader: &Reader, storage: &str, checkpoint: &Checkpoint) {
    if let Some(point) = checkpoint.storages.get(storage) {
        reader.note_durable(point.mark);
    }
}
