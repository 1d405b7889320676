//! What a node tells of its cluster: see `node/src/cells/topology.rs`.

use std::collections::HashMap;

use standby_zeo::Value;

/// The version of what nodes tell that this program understands.
const VERSION: i64 = 1;
/// Where it stands within the answer to `get_info`, and within `info`.
pub(crate) const KEY: &str = "standby";

/// Why what a node tells is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("it is of version {0}; this program knows {VERSION}: is it older than the nodes?")]
    Newer(i64),
    #[error("it has not the form that is expected: {0:?} is missing, or no {1}")]
    Form(&'static str, &'static str),
}

/// A cluster at a moment, as one of its nodes sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    pub(crate) cluster: String,
    pub(crate) cluster_id: String,
    pub(crate) timeline: i64,
    pub(crate) term: i64,
    pub(crate) primary: Option<String>,
    pub(crate) nodes: Vec<Node>,
}

/// A node that holds data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) group: String,
    pub(crate) role: String,
    pub(crate) state: String,
    /// Empty if it has none that is known.
    pub(crate) address: String,
    /// Empty if it has none that is known.
    pub(crate) read_only_address: String,
}

impl Topology {
    /// Reads what a node tells.
    pub(crate) fn read(told: &Value) -> Result<Topology, Unreadable> {
        let fields = Fields::of(told)?;
        let version = fields.int("version")?;
        if version > VERSION {
            return Err(Unreadable::Newer(version));
        }
        let primary = match fields.get("primary") {
            Some(Value::None) => None,
            _ => Some(fields.text("primary")?),
        };
        let nodes = fields.get("nodes").and_then(Value::items);
        let nodes = nodes.ok_or(Unreadable::Form("nodes", "list"))?;
        Ok(Topology {
            cluster: fields.text("cluster")?,
            cluster_id: fields.text("cluster_id")?,
            timeline: fields.int("timeline")?,
            term: fields.int("term")?,
            primary,
            nodes: nodes.iter().map(Node::read).collect::<Result<_, _>>()?,
        })
    }

    /// Of two topologies of one cluster the greater one is newer.
    pub(crate) fn age(&self) -> (i64, i64) {
        (self.timeline, self.term)
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Takes from a former topology the addresses that this one lacks: a node that has just started
    /// knows the members, and has not heard yet where clients reach them.
    pub(crate) fn complete_by(&mut self, former: &Topology) {
        for node in &mut self.nodes {
            let Some(known) = former.node(&node.name) else { continue };
            if node.address.is_empty() {
                node.address.clone_from(&known.address);
            }
            if node.read_only_address.is_empty() {
                node.read_only_address.clone_from(&known.read_only_address);
            }
        }
    }
}

impl Node {
    fn read(told: &Value) -> Result<Node, Unreadable> {
        let fields = Fields::of(told)?;
        Ok(Node {
            name: fields.text("node")?,
            group: fields.text("group")?,
            role: fields.text("role")?,
            state: fields.text("state")?,
            address: fields.text("address")?,
            read_only_address: fields.text("read_only_address")?,
        })
    }

    /// Where the router asks it for signs of life. A replica answers at its read-only address only:
    /// at the other one its primary does.
    pub(crate) fn watched_at(&self) -> &str {
        if self.read_only_address.is_empty() { &self.address } else { &self.read_only_address }
    }
}

/// The value of a key of a dictionary.
pub(crate) fn value_of<'a>(dict: &'a Value, key: &str) -> Option<&'a Value> {
    let Value::Dict(items) = dict else { return None };
    let named = |(name, _): &&(Value, Value)| matches!(name, Value::Str(name) if name == key);
    items.iter().find(named).map(|(_, value)| value)
}

struct Fields<'a>(HashMap<&'a str, &'a Value>);

impl<'a> Fields<'a> {
    fn of(told: &'a Value) -> Result<Fields<'a>, Unreadable> {
        let Value::Dict(items) = told else { return Err(Unreadable::Form("it", "dictionary")) };
        let named = |(name, value): &'a (Value, Value)| match name {
            Value::Str(name) => Some((name.as_str(), value)),
            _ => None,
        };
        Ok(Fields(items.iter().filter_map(named).collect()))
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).copied()
    }

    fn text(&self, name: &'static str) -> Result<String, Unreadable> {
        match self.get(name) {
            Some(Value::Str(text)) => Ok(text.clone()),
            _ => Err(Unreadable::Form(name, "text")),
        }
    }

    fn int(&self, name: &'static str) -> Result<i64, Unreadable> {
        match self.get(name) {
            Some(Value::Int(int)) => Ok(*int),
            _ => Err(Unreadable::Form(name, "number")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(version: i64) -> Value {
        let text = |name: &str, value: &str| (Value::str(name), Value::str(value));
        let node = Value::Dict(vec![
            text("node", "n1"),
            text("group", "london"),
            text("role", "primary"),
            text("state", "up"),
            text("address", "db1:8100"),
            text("read_only_address", ""),
            text("added later", "is left out"),
        ]);
        Value::Dict(vec![
            (Value::str("version"), Value::Int(version)),
            text("cluster", "archive"),
            text("cluster_id", "77"),
            (Value::str("timeline"), Value::Int(1)),
            (Value::str("term"), Value::Int(4)),
            (Value::str("primary"), Value::None),
            (Value::str("nodes"), Value::List(vec![node])),
        ])
    }

    #[test]
    fn what_a_node_tells_is_read() {
        let topology = Topology::read(&told(1)).unwrap();
        assert_eq!(topology.age(), (1, 4));
        assert_eq!(topology.nodes[0].watched_at(), "db1:8100");
        assert_eq!(Topology::read(&told(2)), Err(Unreadable::Newer(2)));
        assert_eq!(Topology::read(&Value::None), Err(Unreadable::Form("it", "dictionary")));
        let Value::Dict(mut items) = told(1) else { panic!() };
        items.remove(2);
        let without = Topology::read(&Value::Dict(items));
        assert_eq!(without, Err(Unreadable::Form("cluster_id", "text")));
    }

    #[test]
    fn an_address_that_the_teller_does_not_know_is_kept() {
        let former = Topology::read(&told(1)).unwrap();
        let mut now = former.clone();
        now.nodes[0].address.clear();
        now.complete_by(&former);
        assert_eq!(now, former);
    }
}
