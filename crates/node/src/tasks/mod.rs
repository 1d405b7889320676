//! What runs beside the primary's machine.

pub(crate) mod accept_peers;
pub(crate) mod applier;
pub(crate) mod backfill;
pub(crate) mod bootstrap;
pub(crate) mod certificates;
pub(crate) mod client_memory;
pub(crate) mod disk_space;
pub(crate) mod log_writer;
pub(crate) mod packing;
pub(crate) mod primary;
#[cfg(not(feature = "simulated"))]
pub(crate) mod role_command;
pub(crate) mod scrub;
pub(crate) mod topology;
