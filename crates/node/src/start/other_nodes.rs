//! The other nodes, which a node asks before it takes part in anything.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use standby_config::{Config, Standby};
use standby_replica::lineage::{Lineage, Relation};
use standby_replica::start::change_timeline::describe_fork;
use standby_replica::start::self_as_member;
use standby_replica::state_dir::{Checkpoint, StateDir};
use standby_types::disk::read_all;
use standby_types::{Disk, NodeId};
use tokio::task::JoinSet;
use tracing::warn;

use crate::cells::repair_sources::RepairSources;
use crate::cells::shared::{is_unsealed, silence_at};
use crate::transport::frames::PeerError;
use crate::transport::handshake::{Introduction, Purpose, Wire, connect};

/// How long a starting node waits for each of the others to say which timeline it is of.
const ASKED: Duration = Duration::from_secs(2);

/// The other nodes, if this one was a member before: finds out whether it has been left behind by a
/// forced promotion, and who can help out if its data file is damaged.
pub(crate) async fn find(
    config: &Config,
    disk: &dyn Disk,
    state: &StateDir,
    wire: Wire,
) -> anyhow::Result<Arc<RepairSources>> {
    let helpers = Arc::<RepairSources>::default();
    let Some(standby) = &config.standby else { return Ok(helpers) };
    let (identity, checkpoint) = (state.identity(disk)?, state.checkpoint(disk)?);
    let (Some(identity), Some(checkpoint)) = (identity, checkpoint) else { return Ok(helpers) };
    let me = Introduction {
        cluster_id: checkpoint.cluster_id.clone(),
        lineage: checkpoint.settings.lineage.clone(),
        bootstrapped: Some(checkpoint.settings.bootstrapped),
        unsealed: is_unsealed(&checkpoint),
        ..asker(config, standby, identity.node_id()?, wire)
    };
    let lines = standby.named_addresses().map(ToString::to_string);
    let members = checkpoint.membership.members.values();
    let members = members.map(|member| member.peer_address.clone()).chain(state.peers(disk));
    let mut addresses: BTreeSet<String> = lines.chain(members).collect();
    addresses.remove(&standby.peer_address.to_string());
    ask_around(disk, state, &checkpoint, me.clone(), addresses.clone()).await?;
    helpers.set(me, addresses.into_iter().collect());
    Ok(helpers)
}

/// How a node introduces itself before it takes part in anything.
fn asker(config: &Config, standby: &Standby, id: NodeId, wire: Wire) -> Introduction {
    Introduction {
        member: self_as_member(config, id),
        cluster: standby.cluster.clone(),
        cluster_id: String::new(),
        secrets: standby.secrets.clone(),
        wire,
        unsealed: false,
        join_token: String::new(),
        lineage: Lineage::default(),
        run: String::new(),
        bootstrapped: None,
        log_end: None,
        silence: silence_at(standby.profile.tick()),
    }
}

/// Asks the other nodes which timeline they are of, before this one takes part in anything: a node
/// that was away while another was promoted must not go on where it was. An order to rejoin on
/// another timeline is written if it has to.
async fn ask_around(
    disk: &dyn Disk,
    state: &StateDir,
    checkpoint: &Checkpoint,
    introduction: Introduction,
    addresses: impl IntoIterator<Item = String>,
) -> anyhow::Result<()> {
    let accepted = match read_all(disk, &state.accepted()) {
        Ok(text) => Some(String::from_utf8_lossy(&text).trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).context("cannot read which timeline is accepted"),
    };
    let introduction = Arc::new(introduction);
    let asking: JoinSet<_> = (addresses.into_iter())
        .map(|address| {
            let me = introduction.clone();
            async move { tokio::time::timeout(ASKED, connect(&me, &address, Purpose::Probe)).await }
        })
        .collect();
    let mut newer: Vec<Lineage> = Vec::new();
    for answer in asking.join_all().await {
        match answer {
            Ok(Err(PeerError::Outdated(lineage))) => newer.push(lineage),
            Ok(Err(PeerError::Diverged { node, lineage })) => match &accepted {
                Some(name) if lineage.contains(name) => newer.push(lineage),
                _ => warn!("{}", PeerError::Diverged { node, lineage }),
            },
            _ => {}
        }
    }
    if let Some(name) = &accepted {
        newer.retain(|lineage| lineage.contains(name));
    }
    newer.sort_by_key(Lineage::timeline);
    let Some(longest) = newer.pop() else { return Ok(()) };
    if let Some(other) = newer.iter().find(|one| one.relation(&longest) == Relation::Diverged) {
        bail!(
            "there were two forced promotions while this node was away: {}; and {}. Decide which \
             of them is the cluster, and say so here: standby lineage accept NAME -C FILE",
            describe(&longest),
            describe(other)
        );
    }
    warn!(
        timeline = longest.timeline(),
        own = checkpoint.settings.lineage.timeline(),
        "another node was promoted by force while this one was away: it rejoins on the new \
        timeline"
    );
    state.set_rejoining(disk, &longest)?;
    Ok(())
}

fn describe(lineage: &Lineage) -> String {
    let last = lineage.forks().last();
    last.map_or_else(|| "timeline 1".into(), |fork| describe_fork(lineage.timeline(), fork))
}
