//! What clients are told of the cluster: the key `standby` of ZEO's `info`, and of the answer to
//! `get_info`. Stock clients keep it and do not look at it.
//!
//! ```text
//! {"version": 1, "cluster": str, "cluster_id": str, "timeline": int, "term": int,
//!  "primary": str or None, "tokens": bool,
//!  "nodes": [{"node": str, "group": str, "role": "primary" | "replica",
//!             "state": "up" | "catching-up" | "down" | "cut-off" | "damaged",
//!             "address": str, "read_only_address": str}, ...]}
//! ```
//!
//! `cluster_id` was drawn when the cluster was bootstrapped: it tells two clusters of one name apart.
//! With `tokens` the node takes transaction tokens, and can be asked for the outcome of a transaction.
//! Addresses are `HOST:PORT`. One is empty if the node has none that another machine could use, or if
//! the node that tells has not heard of it since its own start: whoever knows it keeps it. Of two
//! topologies of one timeline the one with the higher term is newer.

use std::collections::BTreeMap;

use bytes::Bytes;
use standby_replica::settings::TOKENS_LEVEL;
use standby_zeo::{Encoding, Value};

use crate::cells::shared::Shared;
use crate::cells::status::{NodeStatus, Status};

/// Grows when what is told changes so that who knows only the former version would misread it.
const VERSION: i64 = 1;

/// The key of the topology within `info`.
pub(crate) const KEY: &str = "standby";

impl Shared {
    /// The cluster as this node sees it, for clients; `None` if the node is in none.
    pub(crate) fn topology(&self) -> Option<Value> {
        let id = self.cluster_id();
        let belongs = self.config.standby.is_some() && !id.is_empty();
        belongs.then(|| topology(&self.reports.status(), &id))
    }

    /// Sends `info` to all sessions of a storage: its size, and the cluster if that has changed.
    pub(crate) fn tell_info(&self, storage: &str, size: &Value, topology: Option<&Value>) {
        let mut info = size.clone();
        if let (Value::Dict(items), Some(topology)) = (&mut info, topology) {
            items.push((Value::str(KEY), topology.clone()));
        }
        let mut frames: BTreeMap<bool, Bytes> = BTreeMap::new();
        for session in self.sessions.of(storage) {
            let encoding = session.encoding();
            let frame = frames
                .entry(encoding == Encoding::Msgpack)
                .or_insert_with(|| encoding.notify("info", vec![info.clone()]));
            session.outbox.push(frame.clone());
        }
    }
}

fn topology(status: &Status, cluster_id: &str) -> Value {
    let data_nodes = status.nodes.iter().filter(|node| node.role != "witness");
    dict([
        ("version", Value::Int(VERSION)),
        ("cluster", Value::str(&status.cluster)),
        ("cluster_id", Value::str(cluster_id)),
        ("timeline", Value::Int(status.timeline as i64)),
        ("term", Value::Int(status.term as i64)),
        ("primary", status.primary.as_deref().map_or(Value::None, Value::str)),
        ("tokens", Value::Bool(status.feature_level >= TOKENS_LEVEL)),
        ("nodes", Value::List(data_nodes.map(node).collect())),
    ])
}

fn node(node: &NodeStatus) -> Value {
    let text = |text: &str| Value::str(text);
    dict([
        ("node", text(&node.node)),
        ("group", text(&node.group)),
        ("role", text(&node.role)),
        ("state", text(&node.state)),
        ("address", Value::Str(reachable(&node.address, &node.peer_address))),
        ("read_only_address", Value::Str(reachable(&node.read_only_address, &node.peer_address))),
    ])
}

fn dict<const N: usize>(items: [(&str, Value); N]) -> Value {
    Value::Dict(items.into_iter().map(|(key, value)| (Value::str(key), value)).collect())
}

/// An address as another machine can use it. A node that listens on all its interfaces is where its
/// peers reach it. A Unix socket is of no use elsewhere.
fn reachable(address: &str, peer_address: &str) -> String {
    let Some((host, port)) = address.rsplit_once(':') else { return String::new() };
    if host.contains('/') {
        return String::new();
    }
    let everywhere = matches!(host, "" | "0.0.0.0" | "[::]");
    match peer_address.rsplit_once(':') {
        Some((peer, _)) if everywhere => format!("{peer}:{port}"),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_that_others_can_use() {
        assert_eq!(reachable("db1:8100", "10.0.0.1:8101"), "db1:8100");
        assert_eq!(reachable("0.0.0.0:8100", "10.0.0.1:8101"), "10.0.0.1:8100");
        assert_eq!(reachable("[::]:8100", "[fd00::1]:8101"), "[fd00::1]:8100");
        assert_eq!(reachable("/run/zeo.sock", "10.0.0.1:8101"), "");
        assert_eq!(reachable("/run/a:b/zeo.sock", "10.0.0.1:8101"), "");
        assert_eq!(reachable("", "10.0.0.1:8101"), "");
    }

    #[test]
    fn witnesses_are_not_for_clients() {
        let named = |name: &str, role: &str| NodeStatus {
            node: name.into(),
            role: role.into(),
            ..NodeStatus::default()
        };
        let status = Status {
            cluster: "c".into(),
            timeline: 1,
            term: 4,
            primary: Some("n1".into()),
            feature_level: 1,
            failover_groups: Vec::new(),
            moving_to: None,
            forks: Vec::new(),
            diverged: Default::default(),
            not_let_in: Default::default(),
            nodes: vec![named("n1", "primary"), named("n2", "witness"), named("n3", "replica")],
        };
        let Value::Dict(items) = topology(&status, "77") else { panic!() };
        let Some((_, Value::List(nodes))) = items.last() else { panic!("{items:?}") };
        assert_eq!(nodes.len(), 2);
        assert!(items.contains(&(Value::str("primary"), Value::str("n1"))));
    }
}
