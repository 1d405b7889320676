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

#![cfg_attr(not(feature = "simulated"), warn(unreachable_pub))]
// What only HTTP needs: the simulator asks without it.
#![cfg_attr(feature = "simulated", allow(dead_code))]

mod admin;
mod cells;
mod clients;
mod peers;
mod platform;
mod start;
mod tasks;
mod transport;

#[cfg(not(feature = "simulated"))]
pub use admin::http::{ask, fetch_status};
pub use cells::status::{CatchUp, MissingHistory, NodeReport, NodeStatus, Status};
pub use cells::wire::read_in_all_ways;
pub use platform::free_room;
#[cfg(feature = "simulated")]
pub use platform::simulated;
pub use platform::watchdog::{Pulse, SUPERVISED, Watchdog};
/// Connections, and limits to them, for other processes than a node.
#[cfg(not(feature = "simulated"))]
pub mod sockets {
    pub use crate::admin::http::{OPEN_METRICS, serve as serve_http};
    pub use crate::admin::metrics::{Labels, Page};
    pub use crate::cells::gate::{Gate, Pass, limits};
    pub use crate::platform::{ask_for_signs, end_when_silent};
    pub use crate::transport::stream::{Listener, Stream, listen};
    pub use crate::transport::tls::Tls;
}
pub use start::handle::Handle;
pub use start::node::{Next, Running, start, start_on};
