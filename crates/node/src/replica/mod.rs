//! What is replicated: what is on the disk of a node, what entries of the log do to it, and how a
//! node begins from it.

pub mod change_timeline;
pub(crate) mod changed_in_hole;
pub(crate) mod crash_notes;
pub(crate) mod damaged_log;
pub mod lineage;
pub mod lost_transactions;
pub(crate) mod machine;
pub(crate) mod prepare;
pub(crate) mod prepared;
pub mod settings;
pub mod state_dir;
