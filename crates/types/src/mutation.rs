//! Bugs that can be switched on, to see that the simulator finds them.
//!
//! Without the feature `mutations` none of them exists: [`on`] is `false` when the program is
//! compiled.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A client hears of its commit when it has been proposed.
    AcknowledgeBeforeMajority,
    /// A Raft vote is not written to the disk before it is given.
    ForgetVote,
    /// The log is not synced.
    SkipLogSync,
    /// A primary that hears of no majority goes on to answer.
    StalePrimaryAnswers,
    /// A new primary does not know which oids the former one has handed out.
    ReuseOids,
    /// Invalidations are held back until the next transaction.
    LateInvalidations,
    /// A replica applies entries before they are committed.
    ApplyBeforeCommit,
    /// What stands in the data file behind the last checkpoint is believed.
    SkipTruncation,
    /// Serials are not compared when a client votes.
    LoseConflicts,
    /// Tids are what the clock says.
    TidFromClock,
    /// A replica answers a `ping` with what it has.
    ReadWithoutAsking,
    /// A checkpoint does not wait for the data file to be durable.
    CheckpointBeforeSync,
    /// A client that comes again is not told of what it has missed.
    ForgetMissed,
    /// A blob is not compared with its checksum before a client gets it.
    GiveOutDamagedBlobs,
    /// A client that asks what became of its transaction is answered while it is under way.
    GuessOutcome,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 15] = [
        Mutation::AcknowledgeBeforeMajority,
        Mutation::ForgetVote,
        Mutation::SkipLogSync,
        Mutation::StalePrimaryAnswers,
        Mutation::ReuseOids,
        Mutation::LateInvalidations,
        Mutation::ApplyBeforeCommit,
        Mutation::SkipTruncation,
        Mutation::LoseConflicts,
        Mutation::TidFromClock,
        Mutation::ReadWithoutAsking,
        Mutation::CheckpointBeforeSync,
        Mutation::ForgetMissed,
        Mutation::GiveOutDamagedBlobs,
        Mutation::GuessOutcome,
    ];
}

#[cfg(feature = "mutations")]
thread_local! {
    static ON: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Switches one on for this thread, and all others off.
#[cfg(feature = "mutations")]
pub fn switch(to: Option<Mutation>) {
    ON.set(to);
}

/// True if it is switched on.
#[cfg(feature = "mutations")]
pub fn on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}

/// Never.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn on(_: Mutation) -> bool {
    false
}
