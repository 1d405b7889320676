//! The log on disk, and the view of it that Raft reads.
//!
//! `segment.rs` has the bytes, `recover.rs` reads them at start-up, `writer.rs` appends, `view.rs`
//! answers Raft's questions from memory, `fetch.rs` reads what is not there.

mod fetch;
mod recover;
mod segment;
mod view;
mod writer;

pub(crate) use fetch::For;
pub use fetch::{Fetch, Fetched};
pub use recover::{Recovered, recover};
pub use segment::{LogError, PlacedEntry, SEGMENT_LEN};
pub(crate) use view::{ENTRY_OVERHEAD, LogView, Point};
pub use writer::{Batch, LogWriter, Written};

#[cfg(test)]
mod tests;
