//! What the tasks of a node share, and what they tell each other. Nothing here runs by itself.

pub(crate) mod acknowledged;
pub(crate) mod announcement;
pub(crate) mod apply_task;
pub(crate) mod client_errors;
pub(crate) mod disk_space;
pub(crate) mod events;
pub(crate) mod gate;
pub(crate) mod lease;
pub(crate) mod log_work;
pub(crate) mod memory;
pub(crate) mod moving_address;
pub(crate) mod outbox;
pub(crate) mod peer_links;
pub(crate) mod progress;
pub(crate) mod repair_sources;
pub(crate) mod reserve;
pub(crate) mod sessions;
pub(crate) mod shared;
pub(crate) mod status;
pub(crate) mod storage;
pub(crate) mod topology;
pub(crate) mod wire;
