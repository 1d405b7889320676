//! The replicated log: who may append to it, what is in it, where it is kept.
//!
//! The algorithm is Raft, from the `raft` crate; nothing of that crate's types leaves this one.
//! [`Consensus`] is a machine: events go in, outputs come out; it reads neither clock nor network.
//! It waits for the disk in two cases only. Committed entries that are not in memory any more are
//! read as Raft hands them out: those of before a start, and those beyond the 64 MB that are kept
//! in memory. A forced promotion reads what is not applied. What followers lack is read beside the
//! machine ([`Output::Fetch`]). [`LogWriter`] puts on disk what the machine asks to be persisted;
//! it blocks, and is called on a thread of its own. [`Command`] is what an entry means.
//!
//! Reading order: `membership.rs`, `command.rs`, `message.rs`, `log/` (segments, writer, the view
//! that Raft reads), `core/`.
//!
//! What must be on disk before what is sent: an output [`Output::Persist`] carries entries and hard
//! state; messages that depend on it are held back inside the machine until
//! [`Event::Persisted`]. A leader's messages to followers do not wait (Raft thesis, 10.2.1).

mod codec;
mod command;
mod committed;
mod core;
mod log;
mod membership;
mod message;

pub use codec::Malformed;
pub use command::{ClosingEntry, Command, PART_LEN, closing_with_blobs};
pub use committed::{AppliedPoint, Committed};
pub use core::{Broken, Candidacy, Config, Consensus, Event, NotLeader, Output, Progress, Role};
pub use log::{
    Batch, Fetch, Fetched, LogError, LogWriter, PlacedEntry, Recovered, SEGMENT_LEN, Written,
    recover,
};
pub use membership::{Change, Member, Membership};
pub use message::{PeerMessage, decode_message};
