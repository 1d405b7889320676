//! The commits of one storage: who may vote, who may finish.
//!
//! ```text
//!             vote                locks held           finish             applied
//!   (none) ─────────▶ Waiting ─────────────▶ Voted ───────────▶ Finishing ────────▶ (none)
//!                        │                    │  ▲ vote again
//!                        ▼ abort              ▼  │ (conflict: the place is kept)
//!                      (none)              Conflicted
//! ```
//!
//! Whose locks are complete is examined: by whoever may read the data file, and takes as long as
//! that takes ([`Transactions::examination`]). Nobody can change the objects meanwhile.
//!
//! A transaction holds the locks of its own objects from `Voted` or `Conflicted` until it is
//! applied or aborted. Serials are compared only while they are held, with what is applied; so a
//! transaction that voted without conflict has none when it is applied.
//!
//! `Finishing` cannot be aborted: the entry is in the log, and only the log knows its fate.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use standby_types::{Mutation, Oid, Tid, TransactionToken, mutation};

use crate::SessionId;
use crate::error::ClientError;
use crate::locks::Locks;
use crate::vote::{Expected, Vote, VoteRequest};

/// A vote whose locks are complete: its serials are to be compared with what is applied.
#[derive(Clone, Debug)]
pub struct Examination {
    /// Who votes.
    pub session: SessionId,
    number: u64,
    request: Arc<VoteRequest>,
}

/// What became of a vote.
#[derive(Clone, Debug, PartialEq)]
pub enum VoteAnswer {
    /// No conflict: the transaction may finish.
    Voted,
    /// These objects have other serials (the committed ones are given). The locks are kept; the
    /// client resolves and votes again, or aborts.
    Conflicts(Vec<(Oid, Tid)>),
    /// The transaction cannot be committed, whatever the client does, and is forgotten.
    Refused(ClientError),
}

/// `finish` of a transaction that has not voted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("finish without a successful vote")]
pub struct FinishRefused;

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Voted,
    Conflicted,
    Finishing,
}

/// A vote that waits for another transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct Wait {
    pub waiter: SessionId,
    /// Whose transaction is first in the queue of the object.
    pub holder: SessionId,
    pub oid: Oid,
    /// For how long.
    pub time: Duration,
}

struct Transaction {
    phase: Phase,
    /// When it voted.
    since: Duration,
    /// Of its last vote.
    number: u64,
    request: Arc<VoteRequest>,
    /// When the session is to be closed, if the transaction is then still undecided.
    deadline: Option<Duration>,
}

/// See the module. `now` is a monotonic time.
pub struct Transactions {
    locks: Locks<SessionId>,
    transactions: HashMap<SessionId, Transaction>,
    timeout: Option<Duration>,
    votes: u64,
}

impl Transactions {
    /// `timeout`: how long a transaction may hold its locks (`transaction-timeout`).
    pub fn new(timeout: Option<Duration>) -> Transactions {
        Transactions { locks: Locks::default(), transactions: HashMap::new(), timeout, votes: 0 }
    }

    /// A client votes. Returns the sessions whose locks are complete now; the caller answers each
    /// by way of [`Transactions::examination`].
    pub fn vote(&mut self, now: Duration, session: SessionId, vote: Vote) -> Vec<SessionId> {
        let Vote { request, locks } = vote;
        let request = Arc::new(request);
        self.votes += 1;
        let number = self.votes;
        if let Some(transaction) = self.transactions.get_mut(&session)
            && transaction.phase == Phase::Conflicted
            && self.locks.holds(session, &locks)
        {
            (transaction.request, transaction.number) = (request, number);
            return vec![session];
        }
        let mut complete = self.abort(now, session);
        let transaction =
            Transaction { phase: Phase::Waiting, since: now, number, request, deadline: None };
        self.transactions.insert(session, transaction);
        if self.locks.acquire(session, locks) {
            self.start_clock(now, session);
            complete.push(session);
        }
        complete
    }

    /// The vote of a session whose locks are complete; `None` if the session has no transaction any
    /// more.
    pub fn examination(&self, session: SessionId) -> Option<Examination> {
        let transaction = self.transactions.get(&session)?;
        let (number, request) = (transaction.number, transaction.request.clone());
        Some(Examination { session, number, request })
    }

    /// False if what comes of an examination does not count any more: the transaction is gone, or
    /// has voted again.
    pub fn awaits(&self, examination: &Examination) -> bool {
        let transaction = self.transactions.get(&examination.session);
        transaction.is_some_and(|transaction| transaction.number == examination.number)
    }

    /// A vote was examined, and the transaction still awaits that.
    pub fn examined(&mut self, examination: &Examination, answer: &VoteAnswer) {
        let phase = match answer {
            VoteAnswer::Voted => Phase::Voted,
            VoteAnswer::Conflicts(_) => Phase::Conflicted,
            VoteAnswer::Refused(_) => return,
        };
        if let Some(transaction) = self.transactions.get_mut(&examination.session) {
            transaction.phase = phase;
        }
    }

    /// A client finishes. After this only [`Transactions::applied`] or [`Transactions::clear`]
    /// ends the transaction.
    pub fn finish(&mut self, session: SessionId) -> Result<(), FinishRefused> {
        match self.transactions.get_mut(&session) {
            Some(transaction) if transaction.phase == Phase::Voted => {
                transaction.phase = Phase::Finishing;
                transaction.deadline = None;
                Ok(())
            }
            _ => Err(FinishRefused),
        }
    }

    /// A client aborts, or is gone. Returns the sessions whose locks are complete now.
    pub fn abort(&mut self, now: Duration, session: SessionId) -> Vec<SessionId> {
        match self.transactions.get(&session) {
            Some(transaction) if transaction.phase != Phase::Finishing => self.end(now, session),
            _ => Vec::new(),
        }
    }

    /// A finished transaction is applied. Returns the sessions whose locks are complete now.
    pub fn applied(&mut self, now: Duration, session: SessionId) -> Vec<SessionId> {
        match self.transactions.get(&session) {
            Some(transaction) if transaction.phase == Phase::Finishing => self.end(now, session),
            _ => Vec::new(),
        }
    }

    /// This node is not primary any more: forgets everything.
    pub fn clear(&mut self) {
        self.locks = Locks::default();
        self.transactions.clear();
    }

    /// Fails if an invariant does not hold: each transaction has asked for its locks, and nobody
    /// else has; one that was examined holds them all; one that finishes cannot be timed out.
    pub fn invariants(&self) {
        self.locks.invariants();
        assert!(self.locks.owners().all(|owner| self.transactions.contains_key(&owner)));
        for (session, transaction) in &self.transactions {
            let examined = transaction.phase != Phase::Waiting;
            assert!(!examined || self.locks.holds(*session, &[]), "{session:?} has voted");
            let finishing = transaction.phase == Phase::Finishing;
            assert!(!finishing || transaction.deadline.is_none(), "{session:?} finishes");
        }
    }

    /// Sessions that have held their locks for too long. The caller closes them and then calls
    /// [`Transactions::abort`].
    pub fn expired(&self, now: Duration) -> Vec<SessionId> {
        let late = |t: &Transaction| t.deadline.is_some_and(|deadline| deadline <= now);
        self.transactions.iter().filter(|(_, t)| late(t)).map(|(session, _)| *session).collect()
    }

    /// Sessions that have voted and not finished.
    pub fn undecided(&self) -> Vec<SessionId> {
        let undecided = |t: &Transaction| t.phase != Phase::Finishing;
        self.transactions.iter().filter(|(_, t)| undecided(t)).map(|(id, _)| *id).collect()
    }

    /// The session whose transaction has this token, and whether it has finished: then only the log
    /// knows its fate.
    pub fn with_token(&self, token: TransactionToken) -> Option<(SessionId, bool)> {
        let (session, transaction) =
            self.transactions.iter().find(|(_, t)| t.request.token == Some(token))?;
        Some((*session, transaction.phase == Phase::Finishing))
    }

    /// True if a transaction that undoes another one is between vote and the end.
    pub fn any_undo(&self) -> bool {
        self.transactions.values().any(|t| !t.request.undos.is_empty())
    }

    /// The vote that has waited longest for its locks, if that is at least so long.
    pub fn longest_wait(&self, now: Duration, least: Duration) -> Option<Wait> {
        let waits = |t: &Transaction| t.phase == Phase::Waiting && t.since + least <= now;
        let mut waiting: Vec<_> = self.transactions.iter().filter(|(_, t)| waits(t)).collect();
        waiting.sort_by_key(|(_, t)| t.since);
        waiting.into_iter().find_map(|(waiter, transaction)| {
            // None of one whose locks are complete, and whose serials are about to be compared.
            let (oid, holder) = self.locks.blocker(*waiter)?;
            let time = now.saturating_sub(transaction.since);
            Some(Wait { waiter: *waiter, holder, oid, time })
        })
    }

    /// Transactions that wait for locks.
    pub fn waiting(&self) -> usize {
        self.transactions.values().filter(|t| t.phase == Phase::Waiting).count()
    }

    /// Transactions between vote and the end.
    pub fn len(&self) -> usize {
        self.transactions.len()
    }

    /// True if no transaction is between vote and the end.
    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    fn end(&mut self, now: Duration, session: SessionId) -> Vec<SessionId> {
        self.transactions.remove(&session);
        let complete = self.locks.release(session);
        for session in &complete {
            self.start_clock(now, *session);
        }
        complete
    }

    fn start_clock(&mut self, now: Duration, session: SessionId) {
        if let Some(transaction) = self.transactions.get_mut(&session) {
            transaction.deadline = self.timeout.map(|timeout| now + timeout);
        }
    }
}

impl Examination {
    /// Objects whose serials are compared.
    pub fn objects(&self) -> usize {
        self.request.objects()
    }

    /// Compares the serials. `committed` gives the serial of an object's newest revision, `None` if
    /// there is none.
    pub fn compare<E>(
        &self,
        mut committed: impl FnMut(Oid) -> Result<Option<Tid>, E>,
    ) -> Result<VoteAnswer, E> {
        for (oid, read) in &self.request.checks {
            match committed(*oid)? {
                Some(serial) if serial != *read => {
                    let conflict =
                        ClientError::ReadConflict { oid: *oid, serials: (serial, *read) };
                    return Ok(VoteAnswer::Refused(conflict));
                }
                _ => {}
            }
        }
        let mut conflicts = Vec::new();
        for (oid, expected) in &self.request.writes {
            let refused = match expected {
                Expected::Any => continue,
                Expected::Serial(based_on) => {
                    match committed(*oid)? {
                        Some(serial) if serial != *based_on => conflicts.push((*oid, serial)),
                        _ => {}
                    }
                    continue;
                }
                Expected::Existing(based_on) => match committed(*oid)? {
                    Some(serial) if serial == *based_on => continue,
                    Some(serial) => ClientError::Conflict {
                        oid: *oid,
                        serials: (serial, *based_on),
                        class_name: None,
                    },
                    None => ClientError::PosKey(oid.to_bytes().into()),
                },
            };
            return Ok(VoteAnswer::Refused(refused));
        }
        Ok(match conflicts.is_empty() || mutation::on(Mutation::LoseConflicts) {
            true => VoteAnswer::Voted,
            false => VoteAnswer::Conflicts(conflicts),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::locks::Mode;

    const NOW: Duration = Duration::from_secs(100);

    fn writes(list: &[(u64, u64)]) -> VoteRequest {
        let writes =
            list.iter().map(|(oid, tid)| (Oid(*oid), Expected::Serial(Tid(*tid)))).collect();
        VoteRequest { writes, ..VoteRequest::default() }
    }

    fn vote(
        t: &mut Transactions,
        now: Duration,
        session: u64,
        request: VoteRequest,
    ) -> Vec<SessionId> {
        t.vote(now, SessionId(session), request.into())
    }

    fn examine(t: &mut Transactions, session: u64, serial: Option<u64>) -> VoteAnswer {
        let examination = t.examination(SessionId(session)).unwrap();
        let answer = examination.compare(|_| Ok::<_, Infallible>(serial.map(Tid)));
        let answer = answer.unwrap_or_else(|never| match never {});
        assert!(t.awaits(&examination));
        t.examined(&examination, &answer);
        answer
    }

    #[test]
    fn disjoint_transactions_vote_at_the_same_time() {
        let mut t = Transactions::new(None);
        assert_eq!(vote(&mut t, NOW, 1, writes(&[(1, 5)])), [SessionId(1)]);
        assert_eq!(vote(&mut t, NOW, 2, writes(&[(2, 5)])), [SessionId(2)]);
        assert_eq!(examine(&mut t, 1, Some(5)), VoteAnswer::Voted);
        assert_eq!(examine(&mut t, 2, Some(5)), VoteAnswer::Voted);
        assert_eq!(t.finish(SessionId(1)), Ok(()));
        assert_eq!(t.finish(SessionId(2)), Ok(()));
    }

    #[test]
    fn a_conflict_keeps_the_place() {
        let mut t = Transactions::new(None);
        vote(&mut t, NOW, 1, writes(&[(1, 4)]));
        let conflict = VoteAnswer::Conflicts(vec![(Oid(1), Tid(5))]);
        assert_eq!(examine(&mut t, 1, Some(5)), conflict);
        assert_eq!(vote(&mut t, NOW, 2, writes(&[(1, 5)])), []);
        assert_eq!(t.finish(SessionId(1)), Err(FinishRefused));
        assert_eq!(vote(&mut t, NOW, 1, writes(&[(1, 5)])), [SessionId(1)]);
        assert_eq!(examine(&mut t, 1, Some(5)), VoteAnswer::Voted);
        assert_eq!(t.finish(SessionId(1)), Ok(()));
        assert_eq!(t.applied(NOW, SessionId(1)), [SessionId(2)]);
    }

    #[test]
    fn a_second_vote_with_more_objects_goes_to_the_end_of_the_queue() {
        let mut t = Transactions::new(None);
        vote(&mut t, NOW, 1, writes(&[(1, 4)]));
        examine(&mut t, 1, Some(5));
        assert_eq!(vote(&mut t, NOW, 2, writes(&[(1, 5), (2, 5)])), []);
        assert_eq!(vote(&mut t, NOW, 1, writes(&[(1, 5), (2, 5)])), [SessionId(2)]);
        examine(&mut t, 2, Some(5));
        assert_eq!(t.waiting(), 1);
    }

    #[test]
    fn who_has_waited_longest_is_known() {
        let mut t = Transactions::new(None);
        let at = Duration::from_secs;
        vote(&mut t, at(1), 1, writes(&[(1, 4), (2, 4)]));
        assert_eq!(t.longest_wait(at(9), at(0)), None);
        vote(&mut t, at(3), 2, writes(&[(2, 4), (3, 4)]));
        vote(&mut t, at(5), 3, writes(&[(3, 4)]));
        let wait = |waiter, holder, oid, seconds| {
            let (waiter, holder) = (SessionId(waiter), SessionId(holder));
            Some(Wait { waiter, holder, oid: Oid(oid), time: at(seconds) })
        };
        assert_eq!(t.longest_wait(at(9), at(6)), wait(2, 1, 2, 6));
        assert_eq!(t.longest_wait(at(9), at(7)), None);
        t.abort(at(9), SessionId(1));
        assert_eq!(t.longest_wait(at(10), at(0)), wait(3, 2, 3, 5));
    }

    #[test]
    fn new_objects_and_checks() {
        let mut t = Transactions::new(None);
        let request = VoteRequest { checks: vec![(Oid(2), Tid(3))], ..writes(&[(1, 0)]) };
        vote(&mut t, NOW, 1, request.clone());
        assert_eq!(examine(&mut t, 1, None), VoteAnswer::Voted);
        t.abort(NOW, SessionId(1));
        vote(&mut t, NOW, 1, request);
        let conflict = ClientError::ReadConflict { oid: Oid(2), serials: (Tid(7), Tid(3)) };
        assert_eq!(examine(&mut t, 1, Some(7)), VoteAnswer::Refused(conflict));
    }

    #[test]
    fn undos_are_known_until_they_are_applied() {
        let mut t = Transactions::new(None);
        let undo = VoteRequest { undos: vec![Tid(3)], ..writes(&[(1, 5)]) };
        vote(&mut t, NOW, 1, undo);
        examine(&mut t, 1, Some(5));
        t.finish(SessionId(1)).unwrap();
        assert!(t.any_undo());
        t.applied(NOW, SessionId(1));
        assert!(!t.any_undo());
    }

    #[test]
    fn deletions_need_the_object_and_undos_nothing() {
        let mut t = Transactions::new(None);
        let request =
            |expected| VoteRequest { writes: vec![(Oid(1), expected)], ..VoteRequest::default() };
        vote(&mut t, NOW, 1, request(Expected::Any));
        assert_eq!(examine(&mut t, 1, Some(5)), VoteAnswer::Voted);
        vote(&mut t, NOW, 1, request(Expected::Existing(Tid(5))));
        assert_eq!(examine(&mut t, 1, Some(5)), VoteAnswer::Voted);
        let missing = ClientError::PosKey(Oid(1).to_bytes().into());
        assert_eq!(examine(&mut t, 1, None), VoteAnswer::Refused(missing));
        let conflict =
            ClientError::Conflict { oid: Oid(1), serials: (Tid(6), Tid(5)), class_name: None };
        assert_eq!(examine(&mut t, 1, Some(6)), VoteAnswer::Refused(conflict));
    }

    /// Row 11 of the end cases: a client that votes and then hangs delays only those who want the
    /// same objects, and only until its time is over.
    #[test]
    fn row_11_a_hanging_client_loses_its_locks() {
        let mut t = Transactions::new(Some(Duration::from_secs(10)));
        vote(&mut t, NOW, 1, writes(&[(1, 0)]));
        examine(&mut t, 1, None);
        assert_eq!(vote(&mut t, NOW, 2, writes(&[(1, 0)])), []);
        assert_eq!(vote(&mut t, NOW, 3, writes(&[(2, 0)])), [SessionId(3)]);
        t.abort(NOW, SessionId(3));
        assert_eq!(t.expired(NOW + Duration::from_secs(9)), []);
        let late = NOW + Duration::from_secs(10);
        assert_eq!(t.expired(late), [SessionId(1)]);
        assert_eq!(t.abort(late, SessionId(1)), [SessionId(2)]);
        // The clock of the next one starts when it gets its locks.
        assert_eq!(t.expired(late + Duration::from_secs(9)), []);
        assert_eq!(t.expired(late + Duration::from_secs(10)), [SessionId(2)]);
    }

    #[test]
    fn what_is_finishing_cannot_be_aborted() {
        let mut t = Transactions::new(Some(Duration::from_secs(10)));
        vote(&mut t, NOW, 1, writes(&[(1, 0)]));
        examine(&mut t, 1, None);
        t.finish(SessionId(1)).unwrap();
        vote(&mut t, NOW, 2, writes(&[(1, 0)]));
        assert_eq!(t.abort(NOW, SessionId(1)), []);
        assert_eq!(t.expired(NOW + Duration::from_secs(99)), []);
        assert_eq!(t.applied(NOW, SessionId(1)), [SessionId(2)]);
    }

    #[test]
    fn an_examination_counts_for_its_own_vote_only() {
        let mut t = Transactions::new(None);
        vote(&mut t, NOW, 1, writes(&[(1, 5)]));
        let first = t.examination(SessionId(1)).unwrap();
        vote(&mut t, NOW, 1, writes(&[(1, 4)]));
        assert!(!t.awaits(&first));
        let second = t.examination(SessionId(1)).unwrap();
        t.clear();
        vote(&mut t, NOW, 1, writes(&[(1, 4)]));
        assert!(!t.awaits(&second));
        let conflict = VoteAnswer::Conflicts(vec![(Oid(1), Tid(5))]);
        assert_eq!(examine(&mut t, 1, Some(5)), conflict);
    }

    #[test]
    fn the_stronger_of_two_locks_counts() {
        let request =
            VoteRequest { checks: vec![(Oid(2), Tid(3))], ..writes(&[(2, 3), (1, 0), (2, 3)]) };
        let locks = Vote::from(request).locks;
        assert_eq!(locks, [(Oid(1), Mode::Exclusive), (Oid(2), Mode::Exclusive)]);
    }
}
