//! From a configuration to a running node.

pub mod node;
pub(crate) mod other_nodes;
pub(crate) mod read_only;
