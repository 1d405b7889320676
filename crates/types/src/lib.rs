//! The words that every other crate uses: identifiers, positions, and the interface to the disk.
//!
//! Reading order: [`id`] (what the numbers mean), [`blob`], [`time`] (how a tid relates to the
//! clock), [`disk`] (the only way the pure crates reach a file), [`memory`] (a disk in memory that
//! loses what was not synced, for tests and simulation).
//!
//! This crate performs no I/O, reads no clock and draws no random number.

pub mod blob;
pub mod disk;
pub mod hex;
pub mod id;
pub mod lock;
pub mod memory;
pub mod mutation;
pub mod time;
pub mod token;

pub use blob::{Blob, BlobSource, Transfer, Upload};
pub use disk::{Disk, File};
pub use id::{LogIndex, NodeId, Oid, Position, Term, Tid};
pub use mutation::Mutation;
pub use token::TransactionToken;
