//! What is replicated: what entries of the log do to the storages, what is on the disk of a node,
//! and how a node begins from it. Files are reached through [`standby_types::Disk`] only; there is
//! no task, no socket and no clock here.

pub mod changed_in_hole;
pub mod lineage;
pub mod lost_transactions;
pub mod machine;
pub mod outcomes;
pub mod settings;
pub mod start;
pub mod state_dir;
