//! What administrators ask for. Any node takes it; the primary does it, or the node that it is
//! about.

use std::sync::Arc;
use std::time::Duration;

use standby_primary::ServingState;
use standby_primary::command::{Answer, Ask};

use crate::cells::shared::Shared;
use crate::peers::command::{self, here};

/// How long a primary is waited for.
const NO_PRIMARY: Duration = Duration::from_secs(3);

/// Has the primary do what is asked for, or the node that it is about.
pub(crate) async fn route(shared: &Arc<Shared>, ask: Ask) -> Answer {
    if let Ask::Backfill { node } | Ask::Promote { node, .. } = &ask {
        return by(shared, node, &ask).await;
    }
    // A node that has just started has not heard of the primary yet; during a fail-over nobody has.
    let mut standing = shared.standing.subscribe();
    let known = |standing: &ServingState| standing.serves || standing.other_primary.is_some();
    let _ = tokio::time::timeout(NO_PRIMARY, standing.wait_for(known)).await;
    let ServingState { serves, other_primary, .. } = shared.standing.borrow().clone();
    match other_primary {
        _ if serves => here(shared, ask).await,
        Some(address) => command::ask(shared, &address, &ask).await.unwrap_or_else(|error| {
            Err(format!(
                "the primary, at peer address {address}, cannot be asked: {error}. If it runs an \
                 older version, stop it: another node takes over"
            ))
        }),
        None => Err("there is no primary, and so nobody who could do that; standby status shows \
                     which nodes are there"
            .into()),
    }
}

/// Has a node do it.
async fn by(shared: &Arc<Shared>, node: &str, ask: &Ask) -> Answer {
    if node == shared.member.name {
        return here(shared, ask.clone()).await;
    }
    let nodes = shared.reports.status().nodes;
    let Some(found) = nodes.iter().find(|other| other.node == node) else {
        let names: Vec<_> = nodes.iter().map(|other| other.node.as_str()).collect();
        let names = names.join(", ");
        return Err(format!("{node} is no node of this cluster; its nodes: {names}"));
    };
    if found.state == "down" {
        return Err(format!("{node} is down"));
    }
    let address = &found.peer_address;
    command::ask(shared, address, ask).await.unwrap_or_else(|error| {
        Err(format!("{node}, at peer address {address}, cannot be asked: {error}"))
    })
}
