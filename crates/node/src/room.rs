//! Room on the disks that this node writes to. A node that has little left stops writing before a write fails:
//! it refuses commits and takes no entries of the log, its readers are served, and it goes on by itself when
//! there is room again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use standby_filestorage::Need;
use standby_types::File;
use standby_zeo::MakeSpill;
use tracing::{error, info, warn};

use crate::applier::Work;
use crate::machine::{self, FreeRoom, Instant};
use crate::node::Shared;
use crate::sync::lock;

/// How often it is looked at. What can be written meanwhile must fit into the reserve.
const EVERY: Duration = Duration::from_millis(100);
/// How often it is looked whether somebody has removed a data file.
const LOOK_FOR_DATA: Duration = Duration::from_secs(2);

/// Files that are kept in reserve: segments of the log, blobs, temporary files.
const RESERVED_FILES: u64 = 64;

/// Whether there is room, as of the last look.
#[derive(Default)]
pub struct Room {
    low: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Room {
    /// True if this node must not write.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Acquire)
    }

    /// Which disk is full, if one is.
    pub fn reason(&self) -> Option<String> {
        lock(&self.reason).clone()
    }

    /// An error for what would be written.
    pub fn check(&self) -> io::Result<()> {
        match self.reason() {
            Some(reason) => Err(io::Error::new(io::ErrorKind::StorageFull, reason)),
            None => Ok(()),
        }
    }

    /// Notes what is free where; a disk that was full must have a quarter more.
    fn note(&self, node: &str, reserve: u64, free: &[(PathBuf, FreeRoom)]) {
        let needed = |reserve: u64| if self.is_low() { reserve + reserve / 4 } else { reserve };
        let (bytes, files) = (needed(reserve), needed(RESERVED_FILES));
        let full = free.iter().filter(|(_, free)| free.bytes < bytes);
        let full = full.min_by_key(|(_, free)| free.bytes).map(|(path, free)| {
            format!(
                "the disk of node {node} is nearly full: {} MB are free at {}, and {} MB are kept in reserve",
                free.bytes >> 20,
                path.display(),
                reserve >> 20
            )
        });
        let reason = full.or_else(|| {
            let (path, free) = free.iter().find(|(_, free)| free.files < files)?;
            Some(format!(
                "the disk of node {node} has hardly room for more files: {} inodes are free at {}, and {RESERVED_FILES} \
                 are kept in reserve",
                free.files,
                path.display()
            ))
        });
        let was = self.low.swap(reason.is_some(), Ordering::AcqRel);
        match (&reason, was) {
            (Some(reason), false) => {
                error!("{reason}; nothing is committed on it until there is room again");
            }
            (None, true) => info!("there is room on the disk again"),
            _ => {}
        }
        *lock(&self.reason) = reason;
    }
}

/// Looks at the disks of a node until the process ends.
pub async fn watch(shared: Arc<Shared>) {
    let mut paths = Vec::new();
    if !shared.config.is_read_only() {
        paths.push(shared.state.0.clone());
    }
    let written = |(name, _): &(&String, _)| !shared.config.protects(name);
    for (_, storage) in shared.storages.iter().filter(written) {
        paths.extend(storage.path.parent().map(Path::to_owned));
        paths.extend(storage.blobs.as_ref().map(|blobs| blobs.dir().to_owned()));
    }
    let (mut told, mut looked) = (false, Instant::now());
    loop {
        let mut free = Vec::new();
        for path in &paths {
            // A relative name without a directory.
            let at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            match machine::free_room(at) {
                Ok(room) => free.push((path.clone(), room)),
                Err(error) if !std::mem::replace(&mut told, true) => {
                    warn!(path = %at.display(), %error, "cannot see how much room there is");
                }
                Err(_) => {}
            }
        }
        shared.room.note(&shared.member.name, shared.reserve(), &free);
        if looked.elapsed() > LOOK_FOR_DATA {
            looked = Instant::now();
            for (name, storage) in &shared.storages {
                if let Ok(false) = shared.disk.exists(&storage.path) {
                    shared.apply(Work::Missing(name.clone()));
                }
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Asks for room for a second file beside a data file: all of it at first, and none of the reserve while it is written.
pub fn room_for(
    shared: &Arc<Shared>,
    data: &Path,
    what: &'static str,
) -> impl Fn(Need) -> io::Result<()> + Send + use<> {
    let (shared, dir) = (shared.clone(), standby_types::disk::parent(data).to_owned());
    move |need| {
        let Need::All(bytes) = need else { return shared.room.check() };
        let (free, reserve) = (machine::free_room(&dir)?.bytes, shared.reserve());
        if free >= bytes.saturating_add(reserve) {
            return Ok(());
        }
        let (node, megabytes) = (&shared.member.name, |bytes: u64| bytes.div_ceil(1 << 20));
        let reason = format!(
            "{what} takes a second file of {} MB on node {node}, and {} MB are kept in reserve, but only {} MB are free at {}",
            megabytes(bytes),
            megabytes(reserve),
            free >> 20,
            dir.display()
        );
        Err(io::Error::new(io::ErrorKind::StorageFull, reason))
    }
}

/// Makes the temporary files of clients' large transactions, which do not eat up the reserve.
pub fn guarded(shared: Arc<Shared>) -> MakeSpill {
    Arc::new(move || {
        let file = (shared.make_spill)()?;
        Ok(Arc::new(Guarded { file, shared: shared.clone() }))
    })
}

/// A file that takes nothing while there is little room.
struct Guarded {
    file: Arc<dyn File>,
    shared: Arc<Shared>,
}

impl File for Guarded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_cached_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.shared.room.check()?;
        self.file.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_needs_more_room_to_go_on() {
        let room = Room::default();
        let free = |megabytes: u64, files| FreeRoom { bytes: megabytes << 20, files };
        let note = |a: u64, b: u64| {
            let free = [("/a".into(), free(a, 1000)), ("/b".into(), free(b, u64::MAX))];
            room.note("n1", 64 << 20, &free);
            room.is_low()
        };
        assert!(!note(64, 500));
        assert!(note(500, 63));
        let reason = room.check().unwrap_err().to_string();
        assert!(reason.contains("63 MB are free at /b"), "{reason}");
        assert!(note(500, 79));
        assert!(!note(500, 80));
        assert!(room.check().is_ok());
        room.note("n1", 64 << 20, &[("/a".into(), free(500, 63))]);
        let reason = room.check().unwrap_err().to_string();
        assert!(reason.contains("63 inodes are free at /a"), "{reason}");
        room.note("n1", 64 << 20, &[("/a".into(), free(500, 79))]);
        assert!(room.is_low());
        room.note("n1", 64 << 20, &[("/a".into(), free(500, 80))]);
        assert!(!room.is_low());
    }
}
