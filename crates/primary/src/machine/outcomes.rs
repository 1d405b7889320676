//! What has become of a transaction whose client lost its connection before it was told (Raft thesis
//! §6.3).
//!
//! The client asks on another connection. What its former session has begun may still be on its
//! way, and must not be committed after the client was told that it is not: a transaction that has
//! voted is aborted, and one that has finished is waited for. What is not under way is in the
//! replicated state, or never will be, as long as this node surely is primary.

use standby_types::{Mutation, mutation};
use standby_zeo::SessionId;
use tracing::info;

use crate::action::{Action, Reading};
use crate::input::OutcomeQuestion;
use crate::machine::Machine;
use crate::machine::requests::IS_NOT_PRIMARY;

impl Machine {
    pub(crate) fn outcome(&mut self, question: OutcomeQuestion) {
        if !self.serves() {
            return self.act(Action::Cut(question.caller.session, IS_NOT_PRIMARY));
        }
        if let Some((session, false)) = self.under_way(&question) {
            info!(token = %question.token, "a client asks what became of its transaction: aborted");
            let reason = "its client asks on another connection what became of its transaction";
            self.end_transaction(&question.storage, session, reason);
        }
        self.outcomes.push(question);
    }

    /// Answers those whose transaction is not under way.
    pub(crate) fn answer_outcomes(&mut self) {
        if self.outcomes.is_empty() || !self.is_surely_primary() {
            return;
        }
        for question in std::mem::take(&mut self.outcomes) {
            if self.under_way(&question).is_some() {
                self.outcomes.push(question);
            } else {
                self.act(Action::Read(Reading::Outcome(question)));
            }
        }
    }

    /// The session whose transaction is asked for, if it has one still, and whether it has finished.
    fn under_way(&self, question: &OutcomeQuestion) -> Option<(SessionId, bool)> {
        let transactions = &self.storages.get(&question.storage)?.transactions;
        transactions.with_token(question.token).filter(|_| !mutation::on(Mutation::GuessOutcome))
    }
}
