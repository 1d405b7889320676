//! The locks that keep two processes from the same files.

use std::path::Path;

use anyhow::Context;
use standby_config::Config;
use standby_replica::start::open::forget_index_of_link;
use standby_types::Disk;
use tracing::info;

use crate::platform::{self, Lock};

/// Locks each data file as Python's `FileStorage` does (`Data.fs.lock`), or the identity of a
/// witness, which has no data file.
pub(crate) fn lock_files(config: &Config, disk: &dyn Disk) -> anyhow::Result<Vec<Lock>> {
    if config.storages.is_empty() {
        let state_dir = config.state_dir();
        let lock = disk
            .create_private_dir(&state_dir)
            .and_then(|()| platform::lock_file(&state_dir.join("identity")))
            .with_context(|| format!("cannot use state-dir {}", state_dir.display()))?;
        return Ok(vec![lock]);
    }
    let lock = |path: &Path| {
        let cannot = || format!("cannot use {} (from {})", path.display(), config.file.display());
        platform::lock_file(path).with_context(cannot)
    };
    let mut locks = Vec::new();
    // What is only read may be another program's at the same time, as with Python.
    for storage in config.storages.iter().filter(|section| !section.protected) {
        locks.push(lock(&storage.named)?);
        if storage.named != storage.path {
            // Another program may know the file by its own name.
            locks.push(lock(&storage.path)?);
            info!(file = %storage.named.display(), target = %storage.path.display(), "a symbolic \
            link is followed");
            forget_index_of_link(disk, &storage.named)?;
        }
    }
    Ok(locks)
}
