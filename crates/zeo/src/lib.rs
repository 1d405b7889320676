//! The ZEO 5 protocol, from the server's side: what the bytes mean, and what a client may do when.
//!
//! Pure: no socket, no clock, no thread. [`Session`] is the machine of one connection: frames go
//! in, effects come out. [`Transactions`] is the machine of one storage's commits: it hands out
//! locks per object in order of arrival. [`History`] remembers which objects recent
//! transactions changed, for clients that come back with a cache.
//!
//! Reading order: `frame.rs`, `message.rs` (with `msgpack.rs`), `error.rs`, `session.rs`,
//! `spill.rs`, `buffer.rs`, `locks.rs`, `vote.rs`, `transactions.rs`, `history.rs`.
//!
//! Source of the protocol: `ZEO/asyncio/server.py`, `ZEO/StorageServer.py`,
//! `ZEO/asyncio/client.py`.

mod buffer;
mod error;
mod frame;
mod history;
mod locks;
mod message;
mod msgpack;
mod session;
mod spill;
mod transactions;
mod vote;

pub use buffer::{
    Blobs, Content, DeferredWrite, Limits, Meta, PendingTransaction, SPILL_ABOVE, StagedFile, Write,
};
pub use error::ClientError;
pub use frame::{FrameReader, FrameTooLong, MAX_FRAME, MAX_FRAME_BEFORE_REGISTER, frame};
pub use history::{History, Retention};
pub use message::{Call, Encoding, Incoming, Reply, WireError};
pub use session::{
    CloseReason, Effect, HistoryCall, Options, Read, ResolvedWrite, Session, VoteOutcome,
};
pub use spill::{MakeSpill, Slot, Spill};
pub use standby_pickle::{Value, references};
pub use transactions::{Examination, FinishRefused, Transactions, VoteAnswer, Wait};
pub use vote::{Expected, Vote, VoteRequest};

/// Reads a transaction's extension; `None` if it is empty, or no pickle of plain data. Nothing in
/// it is executed.
pub fn decode_extension(extension: &bytes::Bytes) -> Option<Value> {
    standby_pickle::decode_with_texts(extension, |_, _| true).ok()
}

/// Names a connection within a node, for as long as the node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);
