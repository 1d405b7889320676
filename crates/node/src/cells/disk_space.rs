//! Room on the disks that this node writes to. A node that has little left stops writing before a
//! write fails: it refuses commits and takes no entries of the log, its readers are served, and it
//! goes on by itself when there is room again.

use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use standby_types::lock::lock;
use tracing::{error, info};

use crate::platform::free_room::FreeRoom;

/// Files that are kept in reserve: segments of the log, blobs, temporary files.
const RESERVED_FILES: u64 = 64;

/// Whether there is room, as of the last look.
#[derive(Default)]
pub(crate) struct Room {
    low: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Room {
    /// True if this node must not write.
    pub(crate) fn is_low(&self) -> bool {
        self.low.load(Ordering::Acquire)
    }

    /// Which disk is full, if one is.
    pub(crate) fn reason(&self) -> Option<String> {
        lock(&self.reason).clone()
    }

    /// An error for what would be written.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.reason() {
            Some(reason) => Err(io::Error::new(io::ErrorKind::StorageFull, reason)),
            None => Ok(()),
        }
    }

    /// Notes what is free where; a disk that was full must have a quarter more.
    pub(crate) fn note(&self, node: &str, reserve: u64, free: &[(PathBuf, FreeRoom)]) {
        let needed = |reserve: u64| if self.is_low() { reserve + reserve / 4 } else { reserve };
        let (bytes, files) = (needed(reserve), needed(RESERVED_FILES));
        let full = free.iter().filter(|(_, free)| free.bytes < bytes);
        let full = full.min_by_key(|(_, free)| free.bytes).map(|(path, free)| {
            format!(
                "the disk of node {node} is nearly full: {} MB are free at {}, and {} MB are kept \
                in reserve",
                free.bytes >> 20,
                path.display(),
                reserve >> 20
            )
        });
        let reason = full.or_else(|| {
            let (path, free) = free.iter().find(|(_, free)| free.files < files)?;
            Some(format!(
                "the disk of node {node} has hardly room for more files: {} inodes are free at {}, \
                 and {RESERVED_FILES} are kept in reserve",
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
