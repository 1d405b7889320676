//! A node: everything that touches sockets, threads, clocks, TLS or the configuration.
//!
//! The pure machines meet in `engine.rs`; `replica.rs` is what the log's entries do to the
//! storages. Around them:
//!
//! ```text
//!   listener ─▶ connection ──votes, finishes──▶ engine ──batches──▶ log thread
//!                   │  ▲                        ▲  │ committed       │ durable
//!             reads │  │ replies, invalidations │  ▼                 │
//!                   ▼  └───────────────────── applier ◀──────────────┘ (through the engine)
//!               storages ◀──────appends──────────┘
//! ```
//!
//! Reading order: `config/`, `state.rs`, `startup.rs`, `replica.rs`, `applier.rs`, `engine.rs`,
//! `connection.rs`, `listener.rs`, `peers/`, `status.rs`, `admin.rs`. `client.rs` is a small
//! ZEO client for the demo and the benchmark.

pub mod admin;
mod applier;
pub mod ask;
mod backfill;
mod blobs;
mod causes;
mod certificate;
pub mod client;
pub mod config;
mod connection;
mod crashes;
pub mod disk;
mod engine;
mod founding;
mod gate;
mod hex;
mod hidden;
pub mod lineage;
mod listener;
mod log_thread;
pub mod logging;
mod look;
mod lost_log;
pub mod machine;
mod memory;
mod metrics;
mod node;
mod oids;
mod outbox;
mod packing;
mod peers;
mod read_only;
mod replica;
pub mod rewind;
mod room;
mod scrub;
mod sessions;
pub mod settings;
#[cfg(not(feature = "simulated"))]
mod silence;
#[cfg(not(feature = "simulated"))]
mod socket;
#[cfg(feature = "simulated")]
#[path = "machine/simulated/socket.rs"]
mod socket;
mod startup;
mod state;
pub mod status;
mod stream;
mod sync;
mod tls;
pub mod watchdog;

pub use causes::with_causes;
#[cfg(feature = "simulated")]
pub use node::Shared;
pub use node::{Next, Running, start, start_on};
pub use state::skip_entry;
