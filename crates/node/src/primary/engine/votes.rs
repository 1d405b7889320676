//! Votes: refused, queued for their locks, examined, answered.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use standby_filestorage::{Access, StorageError};
use standby_zeo::{
    ClientError, Examination, Expected, SessionId, Transactions, Value, Vote, VoteAnswer,
    VoteOutcome, VoteRequest,
};

use crate::cells::client_errors::read_failed;
use crate::cells::events::{MANY, TaskReport};
use crate::cells::sessions::{Mail, SessionHandle};
use crate::platform;
use crate::primary::engine::Engine;

impl Engine {
    pub(super) fn vote(&mut self, session: &Arc<SessionHandle>, storage: &str, vote: Vote) {
        if !self.serves() {
            return session.cut("this node is not primary");
        }
        let refused = self
            .refuse_tid(storage, vote.request.tid)
            .or_else(|| self.no_room())
            .or_else(|| self.refuse_undo(storage, &vote.request))
            .or_else(|| self.over_quota(storage, &vote.request));
        if let Some(error) = refused {
            // Without its own task the session is ending.
            let _ = session.mailbox.send(Mail::Voted(VoteOutcome::Failed(error)));
            return;
        }
        let (now, id) = (self.shared.now(), session.id);
        self.unlocked(storage, |t| t.vote(now, id, vote));
    }

    /// As FileStorage: nothing is stored by a record that would begin beyond the quota.
    fn over_quota(&self, storage: &str, request: &VoteRequest) -> Option<ClientError> {
        let section = self.shared.config.storages.iter().find(|s| s.name == storage)?;
        let quota = section.quota?;
        let size = self.shared.storages.get(storage)?.reader().size();
        let stores = request.writes.iter().any(|(_, expected)| *expected != Expected::Any);
        (stores && size + request.len_before_last > quota).then(|| {
            let name = "ZODB.FileStorage.FileStorage.FileStorageQuotaError";
            ClientError::Other(name, vec![Value::str("The storage quota has been exceeded.")])
        })
    }

    /// Something has freed locks: examines the votes of those who hold all of theirs now.
    pub(super) fn unlocked(
        &mut self,
        storage: &str,
        change: impl FnOnce(&mut Transactions) -> Vec<SessionId>,
    ) {
        let Some(committing) = self.storages.get_mut(storage) else { return };
        let mut complete = VecDeque::from(change(&mut committing.transactions));
        while let Some(session) = complete.pop_front() {
            complete.extend(self.examine(storage, session));
        }
        let Some(committing) = self.storages.get(storage) else { return };
        let Some(stored) = self.shared.storages.get(storage) else { return };
        stored.stats.waiting.store(committing.transactions.waiting(), Ordering::Relaxed);
        stored.stats.active.store(committing.transactions.len(), Ordering::Relaxed);
    }

    /// Compares a vote with what is applied: at once, if its objects are few and in memory. Who
    /// holds all of its locks then is returned.
    fn examine(&mut self, storage: &str, session: SessionId) -> Vec<SessionId> {
        let Some(committing) = self.storages.get(storage) else { return Vec::new() };
        let Some(vote) = committing.transactions.examination(session) else { return Vec::new() };
        let Some(stored) = self.shared.storages.get(storage) else { return Vec::new() };
        let reader = stored.reader();
        if vote.objects() <= MANY {
            match vote.compare(|oid| reader.committed_serial(oid, Access::Cached)) {
                Err(StorageError::NotCached) => {}
                compared => {
                    let answer = compared.map_err(|error| read_failed(&error));
                    return self.answer_vote(storage, &vote, answer);
                }
            }
        }
        // Nobody changes these objects as long as the vote holds its locks, nor does it matter if a
        // pack replaces the file.
        let (shared, storage) = (self.shared.clone(), storage.to_owned());
        tokio::spawn(async move {
            let comparing = platform::spawn_blocking(move || {
                let compared = vote.compare(|oid| reader.committed_serial(oid, Access::Blocking));
                (vote, compared.map_err(|error| read_failed(&error)))
            });
            // It does not panic; if it did, the client's time would run out.
            if let Ok((vote, answer)) = comparing.await {
                shared.report(TaskReport::Examined { storage, vote, answer });
            }
        });
        Vec::new()
    }

    /// A vote was compared beside the engine's task.
    pub(super) fn examined(
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
        if let Some(stored) = self.shared.storages.get(storage).filter(|_| conflict) {
            stored.stats.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        let handle = self.shared.sessions.get(session);
        let told = handle.is_some_and(|handle| handle.mailbox.send(Mail::Voted(outcome)).is_ok());
        if dead || !told {
            return committing.transactions.abort(self.shared.now(), session);
        }
        Vec::new()
    }
}
