//! A node that no checkpoint knows: it bootstraps a cluster, or joins one.

use std::collections::BTreeMap;

use standby_consensus::{LogWriter, Membership, recover};
use standby_filestorage::Mark;
use standby_types::{LogIndex, Term};
use tracing::info;

use crate::settings::Settings;
use crate::start::open::{open_blobs, open_whole};
use crate::start::prepared::{Beginning, Prepared};
use crate::start::{Place, check_identity, self_as_member};
use crate::state_dir::{Checkpoint, Identity, StoragePoint};

/// Begins with what no checkpoint knows.
pub fn begin(
    place: &Place<'_>,
    identity: Option<Identity>,
    beginning: Beginning,
) -> anyhow::Result<Prepared> {
    let Place { config, disk, state, platform, .. } = *place;
    let identity = match identity {
        Some(identity) => identity,
        None => Identity {
            id: platform.random_hex(8)?,
            node: config.standby.as_ref().map_or("alone".into(), |s| s.node.clone()),
            cluster: config.standby.as_ref().map_or("alone".into(), |s| s.cluster.clone()),
        },
    };
    check_identity(place, &identity)?;
    state.set_identity(&**disk, &identity)?;
    // A log without a checkpoint is what an interrupted beginning left.
    for path in disk.list(&state.log())? {
        disk.remove(&path)?;
    }
    let id = identity.node_id()?;
    let mut storages = BTreeMap::new();
    let mut points = BTreeMap::new();
    let mut unconfirmed = false;
    for section in &config.storages {
        let (storage, ceiling) = open_whole(place, section)?;
        unconfirmed |= storage.mark() != Mark::START;
        let mark = storage.mark();
        points.insert(section.name.clone(), StoragePoint::of(mark, ceiling));
        storages.insert(section.name.clone(), storage);
    }
    let found = beginning == Beginning::Bootstrap;
    let now = (platform.wall_clock)().as_secs();
    let mut recovered = recover(disk, &state.log())?;
    // A new cluster's log begins after an entry that never was, so that every other node gets
    // what this one has by catching up.
    let start = if found { (LogIndex(1), Term(1)) } else { (LogIndex(0), Term(0)) };
    let writer = LogWriter::open(disk.clone(), &state.log(), &mut recovered, Some(start))?;
    let me = self_as_member(config, id);
    let checkpoint = Checkpoint {
        settings: match found {
            true => Settings { bootstrapped: now, ..Settings::bootstrapped_in(&me.group) },
            false => Settings::default(),
        },
        acknowledged: BTreeMap::new(),
        cluster_id: if found { platform.random_hex(16)? } else { String::new() },
        index: start.0,
        term: start.1,
        log_begins_here: false,
        membership: if found { Membership::founded_by(me) } else { Membership::default() },
        storages: points,
    };
    state.set_checkpoint(&**disk, &checkpoint)?;
    if found {
        info!(node = %id, cluster = %checkpoint.cluster_id, "bootstrapped a cluster");
    }
    let unconfirmed = unconfirmed && !found;
    let blobs = open_blobs(place, &recovered, checkpoint.index)?;
    Ok(Prepared { id, checkpoint, storages, blobs, recovered, writer, unconfirmed })
}
