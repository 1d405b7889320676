//! Packs. Each node packs by itself, when it applies the log's entry for it: a thread writes the
//! packed file beside commits, then the applier puts it in place. A pack that was cut short
//! begins anew at the next start: what is to be done stands in the checkpoint.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use standby_filestorage::{
    BlobDir, FileStorage, Job, Need, Outcome, Packed, Reader, StorageError, copy_most, pack,
};
use standby_logging::error_text::with_causes;
use standby_primary::Caller;
use standby_types::disk::remove_tree;
use standby_types::time::time_of;
use standby_types::{Oid, Tid};
use tracing::{error, info, warn};

use crate::cells::apply_task::{ApplyTask, Cause};
use crate::cells::reserve::room_for;
use crate::cells::shared::Shared;
use crate::cells::status::ctime;
use crate::platform;

/// The packs that the applier has to do with.
#[derive(Default)]
pub(crate) struct Packs {
    running: BTreeMap<String, Stage>,
    waiting: BTreeMap<String, Vec<Caller>>,
}

enum Stage {
    Working,
    Ready(Box<Packed>, Cause),
    /// The packed file is in place; the blobs that it does not need are being removed.
    Blobs,
}

impl Packs {
    /// Somebody wants to know when the storage is packed.
    pub(crate) fn wait(&mut self, storage: &str, caller: Caller) {
        self.waiting.entry(storage.into()).or_default().push(caller);
    }

    /// True if nothing else was being done to the storage; from now on something is.
    pub(crate) fn claim(&mut self, storage: &str) -> bool {
        if self.running.contains_key(storage) {
            return false;
        }
        self.running.insert(storage.into(), Stage::Working);
        true
    }

    /// Starts a pack, unless one of this storage is running.
    pub(crate) fn start(&mut self, shared: &Arc<Shared>, storage: &str, reader: Reader, job: Job) {
        if !self.claim(storage) {
            return;
        }
        if let Some(storage) = shared.storages.get(storage) {
            // Before anything else is applied: from now on nothing may be undone.
            storage.packing.set(Some(0));
        }
        let (shared, name) = (shared.clone(), storage.to_owned());
        let started = platform::background("pack", move || {
            let packed = run(&shared, &name, &reader, job);
            shared.apply(ApplyTask::Packed { storage: name, cause: Cause::Pack(job), packed });
        });
        if let Err(error) = started {
            // The job stays in the checkpoint: the next start of this node tries again.
            warn!(storage, %error, "cannot start a pack");
            self.running.remove(storage);
        }
    }

    /// Starts to write a data file anew that somebody has removed, from the file that is open;
    /// unless a new one is being made already.
    pub(crate) fn start_anew(&mut self, shared: &Arc<Shared>, storage: &str, reader: Reader) {
        let Some(path) = shared.storages.get(storage).map(|storage| storage.path.clone()) else {
            return;
        };
        if !self.claim(storage) {
            return;
        }
        error!(
            storage,
            "somebody has removed {}; it is written anew from what this process has open",
            path.display()
        );
        let (shared, name) = (shared.clone(), storage.to_owned());
        let started = platform::background("anew", move || {
            let packed = write_anew(&shared, &path, &reader).map_err(anyhow::Error::from);
            shared.apply(ApplyTask::Packed { storage: name, cause: Cause::Missing, packed });
        });
        if let Err(error) = started {
            warn!(storage, %error, "cannot write the data file anew now");
            self.running.remove(storage);
        }
    }

    /// The thread has ended.
    pub(crate) fn ready(&mut self, storage: &str, packed: Packed, cause: Cause) {
        self.running.insert(storage.into(), Stage::Ready(Box::new(packed), cause));
    }

    /// True if a packed file is to be put in place.
    pub(crate) fn any_ready(&self) -> bool {
        self.running.values().any(|stage| matches!(stage, Stage::Ready(..)))
    }

    /// A new file that is to be put in place, and its cause.
    pub(crate) fn take_ready(&mut self) -> Option<(String, Packed, Cause)> {
        let ready = |stage: &Stage| matches!(stage, Stage::Ready(..));
        let name = self.running.iter().find(|(_, stage)| ready(stage))?.0.clone();
        match self.running.remove(&name)? {
            Stage::Ready(packed, cause) => Some((name, *packed, cause)),
            Stage::Working | Stage::Blobs => None,
        }
    }

    /// Removes the blobs of revisions that the data file has no more; then tells the applier.
    pub(crate) fn remove_blobs(
        &mut self,
        shared: &Arc<Shared>,
        storage: &str,
        blobs: BlobDir,
        reader: Reader,
        keep: bool,
    ) {
        self.running.insert(storage.into(), Stage::Blobs);
        let last = reader.last_tid();
        let (to_tell, name) = (shared.clone(), storage.to_owned());
        let work = move || {
            let old = keep.then(|| PathBuf::from(format!("{}.old", blobs.dir().display())));
            let former = old.as_deref().map_or(Ok(()), |old| remove_tree(&**blobs.disk(), old));
            let removed = former
                .map_err(anyhow::Error::from)
                .and_then(|()| Ok(blobs.remove_packed(&reader, last, old.as_deref())?));
            match removed {
                Ok(removed) => info!(storage = name, removed, "removed blobs that are packed away"),
                // They are found again by the next pack.
                Err(error) => {
                    let error = with_causes(&error);
                    warn!(storage = name, "cannot remove all blobs that are packed away: {error}")
                }
            }
            to_tell.apply(ApplyTask::BlobsRemoved(name));
        };
        if let Err(error) = platform::background("pack-blobs", work) {
            warn!(storage, %error, "cannot remove blobs that are packed away");
            shared.apply(ApplyTask::BlobsRemoved(storage.into()));
        }
    }

    /// What was done to the storage is done.
    pub(crate) fn release(&mut self, storage: &str) {
        self.running.remove(storage);
    }

    /// A pack is over; returns who waited for it.
    pub(crate) fn ended(&mut self, storage: &str) -> Vec<Caller> {
        self.release(storage);
        self.waiting.remove(storage).unwrap_or_default()
    }
}

/// Where the packed file is written.
pub(crate) fn pack_path(data: &Path) -> PathBuf {
    PathBuf::from(format!("{}.pack", data.display()))
}

fn run(shared: &Arc<Shared>, name: &str, reader: &Reader, job: Job) -> anyhow::Result<Outcome> {
    let Some(storage) = shared.storages.get(name) else { return Ok(Outcome::Nothing) };
    info!(storage = name, to = ctime(time_of(job.time)), gc = job.gc, "packing");
    let mut told = 0;
    let mut progress = |done: u64, total: u64| {
        let percent = (done * 100 / total.max(1)) as u32;
        storage.packing.set(Some(percent.min(99)));
        if percent >= told + 10 {
            told = percent;
            info!(storage = name, percent, "packing");
        }
    };
    let to = pack_path(&storage.path);
    let room = room_for(shared, &storage.path, "a pack");
    let packed = pack(reader, job, &to, &references, &room, &mut progress);
    match &packed {
        // The disk may be full: what has been written so far must not keep it so.
        Err(_) => drop(shared.disk.remove(&to)),
        Ok(Outcome::Packed(packed)) => {
            for record in &packed.unreadable {
                warn!(storage = name, "{record}. Nothing refers to that object");
            }
        }
        Ok(Outcome::Nothing) => {}
    }
    Ok(packed?)
}

fn write_anew(shared: &Arc<Shared>, path: &Path, reader: &Reader) -> Result<Outcome, StorageError> {
    let to = pack_path(path);
    let room = room_for(shared, path, "the data file, written anew,");
    let write = || {
        room(Need::All(reader.size())).map_err(|source| StorageError::Io {
            path: to.clone(),
            action: "write",
            source,
        })?;
        let mut target = FileStorage::successor(reader, &to)?;
        let last = copy_most(reader, &mut target, Tid::NONE, &room)?;
        Ok(Outcome::Packed(Packed::whole(target, last)))
    };
    write().inspect_err(|_| drop(shared.disk.remove(&to)))
}

/// A compressed record is read up to this size.
const INFLATED_LIMIT: u64 = 1 << 30;

/// What the record of an object refers to, for a pack. A record that begins with `.z` was
/// compressed by a client, with `zc.zlibstorage`.
pub(crate) fn references(data: &[u8], each: &mut dyn FnMut(Oid)) -> Result<(), String> {
    let mut inflated = Vec::new();
    let data = match data.strip_prefix(b".z") {
        None => data,
        Some(compressed) => {
            flate2::read::ZlibDecoder::new(compressed)
                .take(INFLATED_LIMIT + 1)
                .read_to_end(&mut inflated)
                .map_err(|error| format!("it begins with .z and cannot be inflated: {error}"))?;
            if inflated.len() as u64 > INFLATED_LIMIT {
                return Err(format!("it inflates to more than {INFLATED_LIMIT} bytes"));
            }
            &inflated
        }
    };
    standby_zeo::references(data, |oid| each(Oid(u64::from_be_bytes(oid))))
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn compressed_records_are_read() {
        let record = b"cm\nC\n.C\x08\0\0\0\0\0\0\x01\x02Q.".as_slice();
        let mut compressed = flate2::write::ZlibEncoder::new(b".z".to_vec(), Default::default());
        compressed.write_all(record).unwrap();
        let compressed = compressed.finish().unwrap();
        let found = |data: &[u8]| {
            let mut oids = Vec::new();
            references(data, &mut |oid| oids.push(oid)).map(|()| oids)
        };
        assert_eq!(found(record), Ok(vec![Oid(0x102)]));
        assert_eq!(found(&compressed), Ok(vec![Oid(0x102)]));
        assert!(found(&compressed[..compressed.len() - 6]).is_err());
        assert!(found(b".z").is_err());
    }
}
