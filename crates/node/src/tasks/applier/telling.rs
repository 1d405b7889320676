//! What clients and the primary's machine are told of what is applied.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use standby_primary::input::OutcomeQuestion;
use standby_primary::{Caller, Input, Reading};
use standby_replica::machine::Applied;
use standby_replica::outcomes::Outcome;
use standby_types::time::tid_at;
use standby_types::{Mutation, Oid, Tid, mutation};
use standby_zeo::{Encoding, History, SessionId, Value};
use tokio::sync::oneshot;
use tracing::info;

use crate::cells::sessions::{Mail, SessionHandle};
use crate::platform;
use crate::tasks::applier::Applier;

/// Why nobody knows what became of a transaction.
const FORGOTTEN: &str = "the cluster does not know any more what was committed at that time";
/// The same.
const TIMELINE_CHANGED: &str = "the timeline has changed: a forced promotion may have lost the \
    transaction. If it did, the former primary keeps it in a file when it comes back";

impl Applier {
    pub(super) fn report(&self, finished: Vec<SessionId>) {
        self.shared.set_applied(self.replica.index());
        self.shared.report(Input::Applied {
            point: self.replica.point(),
            ceilings: self.replica.ceilings(),
            settings: self.replica.settings().clone(),
            finished,
        });
    }

    /// A transaction can be shown, unless the data file is within a hole: the moment that it shows
    /// never was. What comes then is shown together, as the transaction at the hole's end.
    pub(super) fn reveal(&mut self, applied: Applied) -> Option<Applied> {
        let Applied { storage, tid, oids } = applied;
        let stored = self.replica.storage(&storage)?;
        if !stored.reader().is_whole() {
            self.hidden.entry(storage).or_default().add(&oids);
            return None;
        }
        let Some(mut hidden) = self.hidden.remove(&storage) else {
            return Some(Applied { storage, tid, oids });
        };
        hidden.add(&oids);
        match hidden.oids() {
            Some(hidden) => Some(Applied { storage, tid, oids: hidden.into_iter().collect() }),
            None => {
                // Whoever comes again drops its cache.
                let history = History::new(tid, self.shared.retention());
                for session in self.shared.sessions.of(&storage) {
                    session.cut("too much has changed while this node was away");
                }
                self.histories.insert(storage, history);
                None
            }
        }
    }

    pub(super) fn remember(&mut self, applied: &Applied) {
        let now = tid_at(self.shared.wall_clock());
        if let Some(history) = self.histories.get_mut(&applied.storage) {
            history.push(applied.tid, applied.oids.clone());
            history.forget(now);
        }
        if let Some(storage) = self.shared.storages.get(&applied.storage) {
            storage.stats.commits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells the sessions of a transaction: the others by an invalidation, its own by the reply.
    pub(super) fn publish(&self, applied: &Applied, caller: Option<Caller>) {
        let mut frames: [Option<Bytes>; 2] = [None, None];
        let mut invalidation = |encoding: Encoding| {
            let slot = &mut frames[usize::from(encoding == Encoding::Msgpack)];
            slot.get_or_insert_with(|| {
                let oids = applied.oids.iter().map(|oid| oid.to_bytes().into()).collect();
                let tid = applied.tid.to_bytes().into();
                encoding.notify("invalidateTransaction", vec![tid, Value::List(oids)])
            })
            .clone()
        };
        let own = caller.as_ref().map(|caller| caller.session);
        let (told, all_told) = oneshot::channel();
        let told = Arc::new(told);
        for session in self.shared.sessions.of(&applied.storage) {
            if Some(session.id) != own {
                let frame = invalidation(session.encoding());
                session.outbox.push_invalidation(applied.tid, frame, &told);
            }
        }
        drop(told);
        if let Some(Caller { session, call }) = caller
            && let Some(session) = self.shared.sessions.get(session)
        {
            let encoding = session.encoding();
            let info = encoding.notify("info", vec![self.shared.short_info(&applied.storage)]);
            let reply = encoding.reply(&call, applied.tid.to_bytes().into());
            let both = [info, reply].concat().into();
            session.outbox.push_committed(applied.tid, both, all_told);
            session.answered();
        }
    }

    pub(super) fn read(&self, reading: Reading) {
        let (Reading::Register { caller, .. }
        | Reading::Invalidations { caller, .. }
        | Reading::Outcome(OutcomeQuestion { caller, .. })
        | Reading::Sync(caller)) = &reading;
        // Without its session nobody waits.
        let Some(session) = self.shared.sessions.get(caller.session) else { return };
        match reading {
            Reading::Register { storage, caller } => {
                self.register(&storage, session, &caller.call);
            }
            Reading::Sync(caller) => {
                session.answer(session.encoding().reply(&caller.call, Value::None));
            }
            Reading::Outcome(question) => self.outcome(&question, &session),
            Reading::Invalidations { storage, caller, since } => {
                self.invalidations(&storage, session, caller.call, since);
            }
        }
    }

    /// What became of a transaction of which nothing is under way any more.
    fn outcome(&self, question: &OutcomeQuestion, session: &SessionHandle) {
        let OutcomeQuestion { caller, storage, token, since } = question;
        let Some(shared) = self.shared.storages.get(storage) else { return };
        let outcome = self.replica.outcome(storage, *token, *since);
        info!(storage, %token, ?outcome, "a client asks what became of its transaction");
        let stats = &shared.stats;
        let (counter, answer) = match outcome {
            Outcome::Committed(tid) => (&stats.outcomes_committed, tid.to_bytes().into()),
            Outcome::NotCommitted => (&stats.outcomes_not_committed, Value::None),
            Outcome::Forgotten => (&stats.outcomes_unknown, Value::str(FORGOTTEN)),
            Outcome::TimelineChanged => (&stats.outcomes_unknown, Value::str(TIMELINE_CHANGED)),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        session.answer(session.encoding().reply(&caller.call, answer));
    }

    pub(super) fn register(&self, storage: &str, session: Arc<SessionHandle>, id: &Value) {
        let Some(stored) = self.replica.storage(storage) else { return };
        if !stored.reader().is_whole() {
            session.send_away("this node is being brought up to date");
            return;
        }
        if !session.may_register() {
            return;
        }
        let tid = stored.mark().tid;
        let reply = session.encoding().reply(id, tid.to_bytes().into());
        // Its own task first, so that it knows before the client can say anything more.
        let _ = session.mailbox.send(Mail::Registered(true));
        self.shared.sessions.register(storage, session.clone());
        session.outbox.push_transaction(tid, reply);
        session.answered();
    }

    /// The answer has its place among the invalidations now, and is made beside this thread: it may
    /// name millions of objects.
    pub(super) fn invalidations(
        &self,
        storage: &str,
        session: Arc<SessionHandle>,
        id: Value,
        since: Tid,
    ) {
        let forget = mutation::on(Mutation::ForgetMissed);
        let doubtful = self.replica.settings().lineage.is_doubtful(storage, since);
        let history = self.histories.get(storage).filter(|_| !doubtful);
        let changes = history.and_then(|history| history.since(since));
        let place = session.outbox.push_later();
        let make = move || {
            let value = changes.map_or(Value::None, |changes| {
                let oids = if forget { Vec::new() } else { changes.oids() };
                let oids = oids.iter().map(|oid: &Oid| oid.to_bytes().into()).collect();
                Value::Tuple(vec![changes.last.to_bytes().into(), Value::List(oids)])
            });
            session.outbox.made(place, session.encoding().reply(&id, value));
            session.answered();
        };
        let memory = self.shared.memory.clone();
        // It ends when the answer is made; its turn bounds how many are.
        tokio::spawn(async move {
            let _turn = memory.invalidations_turn().await;
            // If it fails, its place ends the connection.
            let _ = platform::spawn_blocking(make).await;
        });
    }
}
