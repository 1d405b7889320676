//! Crashes of the process, remembered over its starts: what crashes a node may crash the next primary too.
//!
//! ```text
//! STATE-DIR/crashes    a line for each: when, in seconds since 1970
//! ```

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::error;

/// Threads without which a node cannot go on.
const ESSENTIAL: [&str; 3] = ["applier", "log", "lease"];
/// For how long a crash matters.
pub const REMEMBERED: Duration = Duration::from_secs(300);
/// After so many of them a node does not stand for election.
const MANY: usize = 3;

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("crashes")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// From now on a panic of an essential thread is noted and ends the process: without it the node would seem to live.
pub fn watch(state_dir: &Path) {
    let (dir, usual) = (state_dir.to_owned(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if ESSENTIAL.contains(&name) {
            error!(thread = name, %panic, "a thread has crashed, and with it the node");
            note(&dir);
            std::process::abort();
        }
    }));
}

/// Notes a crash.
pub fn note(state_dir: &Path) {
    let file = OpenOptions::new().create(true).append(true).open(path(state_dir));
    if let Err(error) = file.and_then(|mut file| writeln!(file, "{}", now())) {
        error!(%error, "cannot note the crash");
    }
}

/// True if the process has crashed so often lately that the node should not be primary.
pub fn are_many(state_dir: &Path) -> bool {
    let text = std::fs::read_to_string(path(state_dir)).unwrap_or_default();
    let recent = |line: &&str| {
        line.parse::<u64>().is_ok_and(|at| now().saturating_sub(at) < REMEMBERED.as_secs())
    };
    text.lines().filter(recent).count() >= MANY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_41_three_crashes_in_five_minutes_are_many() {
        let dir = tempfile::tempdir().unwrap();
        let old = format!("{}\n{}\nnonsense\n", now() - 301, now() - 100);
        std::fs::write(path(dir.path()), old).unwrap();
        note(dir.path());
        assert!(!are_many(dir.path()));
        note(dir.path());
        assert!(are_many(dir.path()));
        assert!(!are_many(Path::new("/nowhere")));
    }
}
