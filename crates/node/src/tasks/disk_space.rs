//! Looks again and again how much room there is on the disks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::cells::apply_task::ApplyTask;
use crate::cells::shared::Shared;
use crate::platform::{self, Instant};

/// How often it is looked at. What can be written meanwhile must fit into the reserve.
const EVERY: Duration = Duration::from_millis(100);

/// How often it is looked whether somebody has removed a data file.
const LOOK_FOR_DATA: Duration = Duration::from_secs(2);

/// Looks at the disks of a node until the process ends.
pub(crate) async fn watch(shared: Arc<Shared>) {
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
            match platform::free_room(at) {
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
                    shared.apply(ApplyTask::Missing(name.clone()));
                }
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}
