//! A node: everything that touches sockets, threads, clocks or TLS.
//!
//! Rooms, each of which uses only those above it:
//!
//! ```text
//! platform    what a node takes from its machine: time, randomness, threads, sockets, files
//! transport   connections: streams, TLS, frames, the handshake between nodes
//! cells       what tasks share, and what they tell each other
//! peers       conversations between nodes
//! clients     conversations with ZEO clients
//! tasks       what runs: the primary's machine, the applier, packs, scrubs, the log's writer
//! admin       HTTP for people and monitoring
//! start       from a configuration to a running node
//! ```
//!
//! ```text
//!   listener ─▶ connection ──votes, finishes──▶ primary ──batches──▶ log writer
//!                   │  ▲                        ▲  │ committed       │ durable
//!             reads │  │ replies, invalidations │  ▼                 │
//!                   ▼  └───────────────────── applier ◀──────────────┘ (through the primary)
//!               storages ◀──────appends──────────┘
//! ```

pub mod admin;
pub mod cells;
mod clients;
pub mod peers;
pub mod platform;
pub mod start;
mod tasks;
mod transport;
