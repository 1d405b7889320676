//! Crashes of the process, remembered over its starts: what crashes a node may crash the next
//! primary too.
//!
//! ```text
//! STATE-DIR/crashes    a line for each: when, in seconds since 1970
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use standby_primary::CRASHES_MATTER;
use standby_types::Disk;
use standby_types::disk::{read_all, replace};
use tracing::{error, warn};

use crate::platform;

/// Threads without which a node cannot go on.
const ESSENTIAL: [&str; 3] = ["applier", "log", "lease"];
/// After so many of them a node does not stand for election, as long as another one can be primary.
const MANY: usize = 3;

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("crashes")
}

fn now() -> u64 {
    platform::wall_clock().as_secs()
}

/// From now on a panic of an essential thread is noted and ends the process: without it the node
/// would seem to live.
pub(crate) fn watch(disk: &Arc<dyn Disk>, state_dir: &Path) {
    let (disk, dir, usual) = (disk.clone(), state_dir.to_owned(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if ESSENTIAL.contains(&name) {
            error!(thread = name, %panic, "a thread has crashed, and with it the node");
            note(&*disk, &dir);
            std::process::abort();
        }
    }));
}

pub(crate) fn note(disk: &dyn Disk, state_dir: &Path) {
    let mut lines = lines(disk, state_dir);
    lines.push_str(&format!("{}\n", now()));
    if let Err(error) = replace(disk, &path(state_dir), lines.as_bytes()) {
        error!(%error, "cannot note the crash");
    }
}

fn lines(disk: &dyn Disk, state_dir: &Path) -> String {
    let bytes = read_all(disk, &path(state_dir)).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// True, and told, if the process has crashed so often lately that the node should not be primary.
pub(crate) fn are_many(disk: &dyn Disk, state_dir: &Path) -> bool {
    let recent = |line: &&str| {
        line.parse::<u64>().is_ok_and(|at| now().saturating_sub(at) < CRASHES_MATTER.as_secs())
    };
    let many = lines(disk, state_dir).lines().filter(recent).count() >= MANY;
    if many {
        warn!(
            "this node has crashed again and again: for five minutes it does not stand for \
             election, as long as another node can be primary"
        );
    }
    many
}

#[cfg(test)]
mod tests {
    use standby_types::memory::MemoryDisk;

    use super::*;

    #[test]
    fn row_41_three_crashes_in_five_minutes_are_many() {
        let (disk, dir) = (MemoryDisk::new(), Path::new("/state"));
        assert!(!are_many(&disk, dir));
        let old = format!("{}\n{}\nnonsense\n", now() - 301, now() - 100);
        replace(&disk, &path(dir), old.as_bytes()).unwrap();
        note(&disk, dir);
        assert!(!are_many(&disk, dir));
        note(&disk, dir);
        assert!(are_many(&disk, dir));
    }
}
