//! Votes that wait long for another client's: told, for nobody else knows who holds whom.

use std::time::Duration;

use standby_zeo::SessionId;
use tracing::warn;

use crate::machine::Machine;

/// A vote that waits for so long is told.
const LONG: Duration = Duration::from_secs(5);
/// Ticks between two looks: one at a transaction of a million objects takes a moment.
const EVERY: u64 = 20;
/// Time between two log lines about that.
const QUIET: Duration = Duration::from_secs(60);

/// What was told.
#[derive(Default)]
pub(crate) struct HeldVote {
    /// Who waits longest for whom, if somebody waits long.
    pub text: Option<String>,
    told_at: Option<Duration>,
}

impl Machine {
    /// Looks for votes that wait.
    pub(crate) fn tick_held_votes(&mut self) {
        if !self.ticks.is_multiple_of(EVERY) {
            return;
        }
        let now = self.now;
        let waits = self.storages.iter().filter_map(|(name, committing)| {
            Some((name, committing.transactions.longest_wait(now, LONG)?))
        });
        let longest = waits.max_by_key(|(_, wait)| wait.time);
        let text = longest.map(|(name, wait)| {
            format!(
                "the vote of client {} has waited {} s for object {} of storage {name}, which \
                 client {} holds: its transaction has voted and has not finished",
                self.who(wait.waiter),
                wait.time.as_secs(),
                wait.oid,
                self.who(wait.holder),
            )
        });
        let told = self.held_vote.told_at.is_some_and(|at| now < at + QUIET);
        if let Some(text) = text.as_ref().filter(|_| !told) {
            self.held_vote.told_at = Some(now);
            warn!("{text}");
        }
        self.held_vote.text = text;
    }

    fn who(&self, session: SessionId) -> String {
        self.facts.who(session)
    }
}
