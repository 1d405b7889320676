//! Votes: refused, queued for their locks, examined, answered.

use std::collections::VecDeque;

use standby_zeo::{
    ClientError, Examination, Expected, SessionId, Transactions, Value, Vote, VoteAnswer,
    VoteOutcome, VoteRequest,
};

use crate::action::Action;
use crate::machine::Machine;
use crate::machine::requests::IS_NOT_PRIMARY;
use crate::{MANY, Result};

impl Machine {
    pub(crate) fn vote(&mut self, session: SessionId, storage: &str, vote: Vote) {
        if !self.serves() {
            return self.act(Action::Cut(session, IS_NOT_PRIMARY));
        }
        let refused = self
            .refuse_tid(storage, vote.request.tid)
            .or_else(|| self.no_room())
            .or_else(|| self.refuse_undo(storage, &vote.request))
            .or_else(|| self.over_quota(storage, &vote.request));
        if let Some(error) = refused {
            return self.act(Action::Voted(session, VoteOutcome::Failed(error)));
        }
        let now = self.now;
        self.unlocked(storage, |t| t.vote(now, session, vote));
    }

    /// As FileStorage: nothing is stored by a record that would begin beyond the quota.
    fn over_quota(&self, storage: &str, request: &VoteRequest) -> Option<ClientError> {
        let section = self.config.storages.iter().find(|s| s.name == storage)?;
        let quota = section.quota?;
        let size = self.facts.size(storage);
        let stores = request.writes.iter().any(|(_, expected)| *expected != Expected::Any);
        (stores && size + request.len_before_last > quota).then(|| {
            let name = "ZODB.FileStorage.FileStorage.FileStorageQuotaError";
            ClientError::Other(name, vec![Value::str("The storage quota has been exceeded.")])
        })
    }

    /// Something has freed locks: examines the votes of those who hold all of theirs now.
    pub(crate) fn unlocked(
        &mut self,
        storage: &str,
        change: impl FnOnce(&mut Transactions) -> Vec<SessionId>,
    ) {
        let Some(committing) = self.storages.get_mut(storage) else { return };
        self.transactions_changed = true;
        let mut complete = VecDeque::from(change(&mut committing.transactions));
        while let Some(session) = complete.pop_front() {
            complete.extend(self.examine(storage, session));
        }
    }

    /// Compares a vote with what is applied: at once, if its objects are few and in memory. Who
    /// holds all of its locks then is returned.
    fn examine(&mut self, storage: &str, session: SessionId) -> Vec<SessionId> {
        let Some(committing) = self.storages.get(storage) else { return Vec::new() };
        let Some(vote) = committing.transactions.examination(session) else { return Vec::new() };
        if vote.objects() <= MANY
            && let Some(answer) = self.facts.compare(storage, &vote)
        {
            return self.answer_vote(storage, &vote, answer);
        }
        // Nobody changes these objects as long as the vote holds its locks, nor does it matter if a
        // pack replaces the file.
        self.act(Action::Examine { storage: storage.to_owned(), vote });
        Vec::new()
    }

    /// A vote was compared beside the machine.
    pub(crate) fn examined(
        &mut self,
        storage: &str,
        vote: &Examination,
        answer: Result<VoteAnswer, ClientError>,
    ) {
        let freed = self.answer_vote(storage, vote, answer);
        self.unlocked(storage, |_| freed);
    }

    /// Tells a client what came of its vote, unless that does not count any more. Returns who holds
    /// all of its locks then.
    fn answer_vote(
        &mut self,
        storage: &str,
        vote: &Examination,
        answer: Result<VoteAnswer, ClientError>,
    ) -> Vec<SessionId> {
        let Some(committing) = self.storages.get_mut(storage) else { return Vec::new() };
        if !committing.transactions.awaits(vote) {
            return Vec::new();
        }
        let session = vote.session;
        let outcome = match answer {
            Ok(answer) => {
                committing.transactions.examined(vote, &answer);
                VoteOutcome::Answer(answer)
            }
            Err(error) => VoteOutcome::Failed(error),
        };
        let (conflict, dead) = match &outcome {
            VoteOutcome::Answer(VoteAnswer::Voted) => (false, false),
            VoteOutcome::Answer(VoteAnswer::Conflicts(_)) => (true, false),
            VoteOutcome::Answer(VoteAnswer::Refused(error)) => {
                let conflict = matches!(
                    error,
                    ClientError::Conflict { .. } | ClientError::ReadConflict { .. }
                );
                (conflict, true)
            }
            VoteOutcome::Failed(_) => (false, true),
        };
        let freed = match dead {
            true => committing.transactions.abort(self.now, session),
            false => Vec::new(),
        };
        if conflict {
            self.act(Action::CountConflict(storage.to_owned()));
        }
        self.act(Action::Voted(session, outcome));
        freed
    }
}
