//! Tells the clients that are connected how the cluster changes, and how large the storages are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use standby_zeo::Value;

use crate::cells::shared::Shared;
use crate::platform::Instant;

/// How often it is looked whether the cluster has changed.
const LOOK: Duration = Duration::from_millis(250);
/// The least time between two messages about a storage's size. The client that commits is told at
/// once.
const SIZES: Duration = Duration::from_secs(10);

/// Sends `info` to all sessions when there is something new, for as long as the node runs.
pub(crate) async fn tell_clients(shared: Arc<Shared>) {
    let mut standing = shared.standing.subscribe();
    let mut told = shared.topology();
    let size = |name: &String| (name.clone(), shared.short_info(name));
    let mut sizes: BTreeMap<String, Value> = shared.storages.keys().map(size).collect();
    let mut sizes_told = Instant::now();
    loop {
        tokio::select! {
            _ = standing.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        // One change comes seldom alone.
        tokio::time::sleep(LOOK / 5).await;
        let topology = shared.topology();
        let changed = topology != told;
        let sizes_due = sizes_told.elapsed() >= SIZES;
        if !changed && !sizes_due {
            continue;
        }
        if sizes_due {
            sizes_told = Instant::now();
        }
        for name in shared.storages.keys() {
            let size = shared.short_info(name);
            let size_changed = sizes_due && sizes.get(name) != Some(&size);
            if changed || size_changed {
                shared.tell_info(name, &size, topology.as_ref().filter(|_| changed));
                sizes.insert(name.clone(), size);
            }
        }
        told = topology;
    }
}
