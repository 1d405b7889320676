//! What administrators ask for. Any node takes it; the primary does it, or the node that it is about.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::engine::Event;
use crate::node::{Shared, Standing};
use crate::peers;

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Another node becomes primary.
    Switchover {
        /// Which; `None` for the one that is best placed.
        to: Option<String>,
        /// Seconds for which transactions that have voted, uploads, and packs are waited for.
        grace: f64,
    },
    /// A node may join.
    NodeAdd {
        /// Its name.
        node: String,
        /// Its group; that of the member whose place it takes, if it does.
        group: Option<String>,
        /// It votes, but holds no data.
        witness: bool,
        /// It takes the place of the member with its name.
        replaces: bool,
    },
    /// A node is a member no more.
    NodeRemove {
        /// Its name.
        node: String,
        /// Also if that is dangerous.
        force: bool,
    },
    /// The nodes of a group vote, or do not.
    GroupSet {
        /// Its name.
        group: String,
        /// They vote.
        failover: bool,
        /// Also if that is dangerous.
        force: bool,
    },
    /// The primary and all voters are to be in this group.
    GroupMove {
        /// Its name.
        to: String,
    },
    /// A node fills the holes that fast recoveries left in its history.
    Backfill {
        /// Its name.
        node: String,
    },
    /// A node begins a timeline: its group, or the majority of the voters, is lost for good.
    Promote {
        /// Its name.
        node: String,
        /// The group that votes from now on, with all of its nodes; `None` for those that do already.
        group: Option<String>,
    },
    /// The cluster may use what newer versions can do.
    FeatureLevel {
        /// Up to this level; `None` for the highest that all nodes know.
        level: Option<u32>,
    },
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// In words.
    pub text: String,
    /// What a new node proves to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// What was done, or why not.
pub type Answer = Result<Done, String>;

/// Where an answer goes.
pub type Asker = oneshot::Sender<Answer>;

/// How long a primary is waited for.
const NO_PRIMARY: Duration = Duration::from_secs(3);
/// Longer than anything that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Has the primary do what is asked for, or the node that it is about.
pub async fn route(shared: &Arc<Shared>, ask: Ask) -> Answer {
    if let Ask::Backfill { node } | Ask::Promote { node, .. } = &ask {
        return by(shared, node, &ask).await;
    }
    // A node that has just started has not heard of the primary yet; during a fail-over nobody has.
    let mut standing = shared.standing.subscribe();
    let known = |standing: &Standing| standing.serves || standing.other_primary.is_some();
    let _ = tokio::time::timeout(NO_PRIMARY, standing.wait_for(known)).await;
    let Standing { serves, other_primary, .. } = shared.standing.borrow().clone();
    match other_primary {
        _ if serves => here(shared, ask).await,
        Some(address) => peers::ask(shared, &address, &ask).await.unwrap_or_else(|error| {
            Err(format!(
                "the primary, at peer address {address}, cannot be asked: {error}. If it runs an older \
                 version, stop it: another node takes over"
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
    peers::ask(shared, address, ask).await.unwrap_or_else(|error| {
        Err(format!("{node}, at peer address {address}, cannot be asked: {error}"))
    })
}

/// Does it here, if this node is the one to do it.
pub async fn here(shared: &Arc<Shared>, ask: Ask) -> Answer {
    let (asker, answer) = oneshot::channel();
    shared.tell(Event::Ask(ask, asker)).await;
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err("the primary has changed before it was done; see standby status".into()),
        Err(_) => Err("it is not done yet; see standby status".into()),
    }
}
