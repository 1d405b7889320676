//! Room on the disks that this node writes to. A node that has little left stops writing before a write fails:
//! it refuses commits and takes no entries of the log, its readers are served, and it goes on by itself when
//! there is room again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use standby_types::File;
use standby_zeo::MakeSpill;
use tracing::{error, info, warn};

use crate::machine;
use crate::node::Shared;
use crate::sync::lock;

/// How often it is looked at. What can be written meanwhile must fit into the reserve.
const EVERY: Duration = Duration::from_millis(100);

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

    /// Notes how many bytes are free where; a disk that was full must have a quarter more.
    fn note(&self, node: &str, reserve: u64, free: &[(PathBuf, u64)]) {
        let needed = if self.is_low() { reserve + reserve / 4 } else { reserve };
        let full = free.iter().filter(|(_, free)| *free < needed).min_by_key(|(_, free)| *free);
        let reason = full.map(|(path, free)| {
            format!(
                "the disk of node {node} is nearly full: {} MB are free at {}, and {} MB are kept in reserve",
                free >> 20,
                path.display(),
                reserve >> 20
            )
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
    let mut paths = vec![shared.state.0.clone()];
    for storage in shared.storages.values() {
        paths.extend(storage.path.parent().map(Path::to_owned));
        paths.extend(storage.blobs.as_ref().map(|blobs| blobs.dir().to_owned()));
    }
    let mut told = false;
    loop {
        let mut free = Vec::new();
        for path in &paths {
            // A relative name without a directory.
            let at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            match machine::free_bytes(at) {
                Ok(bytes) => free.push((path.clone(), bytes)),
                Err(error) if !std::mem::replace(&mut told, true) => {
                    warn!(path = %at.display(), %error, "cannot see how much room there is");
                }
                Err(_) => {}
            }
        }
        shared.room.note(&shared.member.name, shared.reserve(), &free);
        tokio::time::sleep(EVERY).await;
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
        let note = |a: u64, b: u64| {
            room.note("n1", 64 << 20, &[("/a".into(), a << 20), ("/b".into(), b << 20)]);
            room.is_low()
        };
        assert!(!note(64, 500));
        assert!(note(500, 63));
        let reason = room.check().unwrap_err().to_string();
        assert!(reason.contains("63 MB are free at /b"), "{reason}");
        assert!(note(500, 79));
        assert!(!note(500, 80));
        assert!(room.check().is_ok());
    }
}
