//! The clients' sessions, as the primary's machine and the applier see them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use standby_types::lock::lock;
use standby_zeo::{Encoding, SessionId, VoteOutcome};
use tokio::sync::{Notify, mpsc};

use crate::cells::memory::{Memory, Share};
use crate::cells::outbox::Outbox;
use crate::transport::socket::Cutter;

/// Something that the session's own task must know.
#[derive(Debug)]
pub(crate) enum Mail {
    /// `register` was accepted or refused; the client is answered already.
    Registered(bool),
    /// What became of a vote; the session answers.
    Voted(VoteOutcome),
    /// The session is to end when its transaction has, and its calls are answered.
    Leave,
    /// The session is to end as soon as what is queued has been sent.
    LeaveNow,
    /// The session is to end, and its client, which has not registered, to wait on.
    WaitOn,
}

/// A session's handle for others.
pub(crate) struct SessionHandle {
    /// Its name in this process.
    pub id: SessionId,
    pub peer: String,
    /// What is to be sent.
    pub outbox: Outbox,
    /// What was received: a message in part, and the transaction. Its own task says how much.
    pub received: Share,
    /// To its own task.
    pub mailbox: mpsc::UnboundedSender<Mail>,
    encoding: OnceLock<Encoding>,
    label: OnceLock<String>,
    /// It came to the address for reading and writing: it must end when this node is not primary
    /// any more, even before it has registered.
    pub read_write: bool,
    state: Mutex<State>,
    /// Calls that the primary's machine or the applier is to answer.
    pub unanswered: AtomicUsize,
    one_answered: Notify,
    cutter: Option<Arc<Cutter>>,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// `register` is not answered.
    New {
        /// It ends when nothing of it is under way, and its client waits on.
        leaves: bool,
    },
    /// `register` is answered, or is about to be.
    Registered,
    /// It ends when nothing of it is under way.
    Leaving,
    /// It ends as soon as what is queued has been sent.
    Departing,
    /// It ends without its client, which has not registered: that waits on.
    WaitsOn,
}

/// What others know of a session. Its own task, the primary's machine and the applier change it.
struct State {
    stage: Stage,
    /// It wanted to write and took read-only: it must end when a primary appears.
    settled: bool,
    /// Its transaction has uploads.
    uploads: bool,
    /// It waits for a pack to end.
    packs: bool,
}

impl SessionHandle {
    /// A handle for a new session.
    pub(crate) fn new(
        id: SessionId,
        peer: String,
        mailbox: mpsc::UnboundedSender<Mail>,
        cutter: Option<Arc<Cutter>>,
        memory: &Arc<Memory>,
        read_write: bool,
    ) -> SessionHandle {
        let stage = Stage::New { leaves: false };
        let state = State { stage, settled: false, uploads: false, packs: false };
        SessionHandle {
            id,
            peer,
            outbox: Outbox::within(memory),
            received: Share::of(memory),
            mailbox,
            encoding: OnceLock::new(),
            label: OnceLock::new(),
            read_write,
            state: Mutex::new(state),
            unanswered: AtomicUsize::new(0),
            one_answered: Notify::new(),
            cutter,
        }
    }

    /// Queues the answer to a call that was counted as unanswered.
    pub(crate) fn answer(&self, frame: Bytes) {
        self.outbox.push(frame);
        self.answered();
    }

    /// A call that was counted as unanswered is answered.
    pub(crate) fn answered(&self) {
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        self.one_answered.notify_one();
        if self.is_leaving() {
            // Without its own task it is ending.
            let _ = self.mailbox.send(Mail::Leave);
        }
    }

    /// Returns when no more than `most` calls are unanswered, or the session is to end.
    pub(crate) async fn few_unanswered(&self, most: usize) {
        let many = || self.unanswered.load(Ordering::Acquire) > most;
        while many() && !self.is_departing() {
            tokio::select! {
                () = self.one_answered.notified() => {}
                () = self.outbox.closed() => return,
            }
        }
    }

    /// True if it only reads, whatever this node is.
    pub(crate) fn is_reader(&self) -> bool {
        !self.read_write
    }

    /// True if it may write, and is not about to end as soon as its replies are sent.
    pub(crate) fn is_staying_writer(&self) -> bool {
        self.read_write && !self.is_departing()
    }

    fn stage(&self) -> Stage {
        lock(&self.state).stage
    }

    fn is_departing(&self) -> bool {
        matches!(self.stage(), Stage::Departing | Stage::WaitsOn)
    }

    /// True if it is to end when nothing of it is under way.
    pub(crate) fn is_leaving(&self) -> bool {
        matches!(self.stage(), Stage::New { leaves: true } | Stage::Leaving)
    }

    /// True if it wanted to write and took read-only.
    pub(crate) fn is_settled(&self) -> bool {
        lock(&self.state).settled
    }

    /// Its client has registered; `settled` if it wanted to write and took read-only.
    pub(crate) fn registered(&self, settled: bool) {
        lock(&self.state).settled = settled;
    }

    /// Its transaction has uploads, or none any more.
    pub(crate) fn set_uploads(&self, uploads: bool) {
        lock(&self.state).uploads = uploads;
    }

    /// It waits for a pack to end, or does so no longer.
    pub(crate) fn set_packs(&self, packs: bool) {
        lock(&self.state).packs = packs;
    }

    /// Its address, and its label (`client-label`) if it has one.
    pub(crate) fn who(&self) -> String {
        match self.label.get().filter(|label| !label.is_empty()) {
            Some(label) => format!("{} ({label})", self.peer),
            None => self.peer.clone(),
        }
    }

    /// Notes the label; the first time counts.
    pub(crate) fn set_label(&self, label: &str) {
        let _ = self.label.set(label.to_owned());
    }

    /// The encoding that the client chose.
    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding.get().copied().unwrap_or(Encoding::Pickle)
    }

    /// Notes the encoding; the first time counts.
    pub(crate) fn set_encoding(&self, encoding: Encoding) {
        let _ = self.encoding.set(encoding);
    }

    /// Bytes of the clients' memory that it holds.
    pub(crate) fn held(&self) -> usize {
        self.outbox.held() + self.received.get()
    }

    /// Why its client counts as gone, if it does.
    fn gone(&self, patience: Duration) -> Option<&'static str> {
        self.cutter.as_ref()?.gone(patience)
    }

    /// The stage of a session that is [`Stage::New`] becomes `to`; returns what it was.
    fn pass(&self, to: impl FnOnce(bool) -> Stage) -> Stage {
        let mut state = lock(&self.state);
        let stage = state.stage;
        if let Stage::New { leaves } = stage {
            state.stage = to(leaves);
        }
        stage
    }

    /// True if `register` may be answered now; false if the client waits on.
    pub(crate) fn may_register(&self) -> bool {
        let before = self.pass(|leaves| if leaves { Stage::Leaving } else { Stage::Registered });
        matches!(before, Stage::New { .. })
    }

    /// True if the session is to end without its client, which has not registered: that waits on.
    pub(crate) fn waits_on(&self) -> bool {
        matches!(self.pass(|_| Stage::WaitsOn), Stage::New { .. } | Stage::WaitsOn)
    }

    /// True if its client waits on without it.
    pub(crate) fn is_waiting_on(&self) -> bool {
        self.stage() == Stage::WaitsOn
    }

    /// The session cannot be served here any more. It is ended at once, unless its client has not
    /// registered: that waits on. True if it was ended.
    pub(crate) fn send_away(&self, reason: &str) -> bool {
        match self.pass(|_| Stage::WaitsOn) {
            Stage::New { .. } => drop(self.mailbox.send(Mail::WaitOn)),
            Stage::WaitsOn => {}
            Stage::Registered | Stage::Leaving | Stage::Departing => {
                self.cut(reason);
                return true;
            }
        }
        false
    }

    /// The session ends when nothing of it is under way.
    fn let_leave(&self) {
        let mut state = lock(&self.state);
        state.stage = match state.stage {
            Stage::New { .. } => Stage::New { leaves: true },
            Stage::Registered => Stage::Leaving,
            other => other,
        };
        drop(state);
        // Without its own task it is ending.
        let _ = self.mailbox.send(Mail::Leave);
    }

    /// The session ends when what is queued has been sent, or at once if its client has not
    /// registered: that waits on.
    fn let_depart(&self) {
        let mail = match self.waits_on() {
            true => Mail::WaitOn,
            false => {
                lock(&self.state).stage = Stage::Departing;
                Mail::LeaveNow
            }
        };
        self.one_answered.notify_one();
        let _ = self.mailbox.send(mail);
    }

    /// Ends the session at once, from any thread; nothing that is queued is sent any more.
    pub(crate) fn cut(&self, reason: &str) {
        self.outbox.close(reason);
        if let Some(cutter) = &self.cutter {
            cutter.cut();
        }
    }
}

/// All sessions of the node, and those registered for each storage.
#[derive(Default)]
pub(crate) struct Sessions {
    next: AtomicU64,
    all: Mutex<BTreeMap<SessionId, Arc<SessionHandle>>>,
    registered: Mutex<BTreeMap<String, BTreeMap<SessionId, Arc<SessionHandle>>>>,
}

impl Sessions {
    /// A fresh name.
    pub(crate) fn next_id(&self) -> SessionId {
        SessionId(self.next.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn add(&self, session: Arc<SessionHandle>) {
        lock(&self.all).insert(session.id, session);
    }

    /// Registers a session for a storage: from now on it gets invalidations.
    pub(crate) fn register(&self, storage: &str, session: Arc<SessionHandle>) {
        lock(&self.registered).entry(storage.into()).or_default().insert(session.id, session);
    }

    /// Removes a session from everywhere.
    pub(crate) fn remove(&self, id: SessionId) {
        lock(&self.all).remove(&id);
        for sessions in lock(&self.registered).values_mut() {
            sessions.remove(&id);
        }
    }

    /// The sessions registered for a storage.
    pub(crate) fn of(&self, storage: &str) -> Vec<Arc<SessionHandle>> {
        lock(&self.registered).get(storage).map_or_else(Vec::new, |s| s.values().cloned().collect())
    }

    /// Number of sessions registered for a storage.
    pub(crate) fn count(&self, storage: &str) -> usize {
        lock(&self.registered).get(storage).map_or(0, BTreeMap::len)
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionHandle>> {
        lock(&self.all).get(&id).cloned()
    }

    /// Cuts off the sessions that `which` says; their number.
    pub(crate) fn cut(&self, reason: &str, which: impl Fn(&SessionHandle) -> bool) -> usize {
        let chosen: Vec<_> =
            lock(&self.all).values().filter(|session| which(session)).cloned().collect();
        chosen.iter().for_each(|session| session.cut(reason));
        chosen.len()
    }

    /// The session that holds most of the clients' memory, of those that are not ending; `None` if
    /// none holds any.
    pub(crate) fn largest(&self) -> Option<Arc<SessionHandle>> {
        let all = lock(&self.all);
        let holding = all.values().filter(|session| !session.outbox.is_closed());
        let largest = holding.max_by_key(|session| session.held());
        largest.filter(|session| session.held() > 0).cloned()
    }

    /// Ends the sessions whose clients have been silent for so long.
    pub(crate) fn end_silent(&self, patience: Duration) {
        let all: Vec<_> = lock(&self.all).values().cloned().collect();
        for session in all {
            if let Some(reason) = session.gone(patience) {
                session.send_away(reason);
            }
        }
    }

    /// True if an upload is under way, or its transaction, or a pack that its client waits for.
    pub(crate) fn any_long_call(&self) -> bool {
        let long = |session: &SessionHandle| {
            let state = lock(&session.state);
            state.uploads || state.packs
        };
        lock(&self.all).values().any(|session| long(session))
    }

    /// Sends the clients away that `which` says: see [`SessionHandle::send_away`]. The number of
    /// sessions that were ended.
    pub(crate) fn send_away(&self, reason: &str, which: impl Fn(&SessionHandle) -> bool) -> usize {
        let mut chosen: Vec<_> = lock(&self.all).values().cloned().collect();
        chosen.retain(|session| which(session));
        chosen.iter().filter(|session| session.send_away(reason)).count()
    }

    /// Sends all clients that may write away, but those that are departing.
    pub(crate) fn send_all_writers_away(&self, reason: &str) -> usize {
        self.send_away(reason, SessionHandle::is_staying_writer)
    }

    /// The sessions that may write.
    fn writers(&self) -> Vec<Arc<SessionHandle>> {
        lock(&self.all).values().filter(|session| !session.is_reader()).cloned().collect()
    }

    /// Ends all sessions that may write, each as soon as nothing of it is under way.
    pub(crate) fn let_writers_leave(&self) {
        self.writers().iter().for_each(|session| session.let_leave());
    }

    /// Ends all sessions that may write when what is queued for them has been sent; their number.
    pub(crate) fn let_writers_depart(&self) -> usize {
        let writers = self.writers();
        writers.iter().for_each(|session| session.let_depart());
        writers.len()
    }

    /// True if there are sessions that may write.
    pub(crate) fn any_writer(&self) -> bool {
        lock(&self.all).values().any(|session| !session.is_reader())
    }
}
