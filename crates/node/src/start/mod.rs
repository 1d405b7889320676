//! From a configuration to a running node.

pub(crate) mod handle;
pub(crate) mod listeners;
pub(crate) mod locks;
pub(crate) mod node;
pub(crate) mod other_nodes;
pub(crate) mod read_only;
