//! What a node decides, as a machine without effects: what is committed and under which tid, who
//! gets which oids, who is a member and who votes, when the primary changes, and when this node had
//! better not be primary.
//!
//! [`Machine::step`] takes one [`Input`] and returns [`Action`]s. The machine reads no clock and no
//! socket, and of files only the log, where [`standby_consensus`] says that it does. What it may
//! know beside its inputs it asks of [`Facts`].
//!
//! What the caller must do:
//!
//! - It owns the machine in one task, and performs the actions of a step in their order, all of
//!   them, before the next step.
//! - Inputs of this process's own tasks come before those of clients and of other nodes that wait
//!   at the same time: whoever was told of a commit finds its locks free.
//! - [`Action::Persist`] is durable before [`Input::Persisted`] says so: an entry counts from then
//!   on. [`Action::Send`] may be lost.
//! - [`Action::Apply`] and [`Action::Read`] go to one task that does them in their order. It tells
//!   the machine what it has applied ([`Input::Applied`]) before it tells a client.
//! - [`Machine::persisted_index`] is published before the actions of the step are performed: what
//!   this node acknowledges, it knows to have acknowledged.
//! - After [`Action::End`] there is no further step.
//!
//! ```text
//!   vote ──▶ locks ──▶ examination ──▶ voted        finish ──▶ commits ──▶ entry of the log
//!                                                                             │ durable on a majority
//!   locks are free ◀── Input::Applied ◀── the applier ◀── Action::Apply ◀─────┘
//! ```

pub mod action;
mod caller;
pub mod client_errors;
pub mod command;
pub mod consensus_config;
pub mod facts;
pub mod input;
mod log_tail;
mod machine;
mod oids;

pub use action::{Action, Ended, Reading, ServingState};
pub use caller::{Asker, Caller};
pub use facts::Facts;
pub use input::{Input, Request};
pub use machine::candidacy::CRASHES_MATTER;
pub use machine::{Beginning, Machine, OwnState};

/// A vote on more objects is examined beside the machine, and a transaction of more is encoded
/// beside it.
pub const MANY: usize = if cfg!(feature = "simulated") { 2 } else { 1000 };

/// Why a node cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] standby_consensus::LogError),
    /// An entry of the log cannot be applied by this node.
    #[error(transparent)]
    Apply(#[from] standby_replica::machine::ApplyError),
}

type Result<T, E = Fault> = std::result::Result<T, E>;
