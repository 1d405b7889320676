//! What a node decides.

pub(crate) mod consensus_config;
pub(crate) mod engine;
pub(crate) mod oids;
