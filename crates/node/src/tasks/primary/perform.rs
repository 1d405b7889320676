//! How each action of the machine is performed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use standby_consensus::{AppliedPoint, Consensus, Fetch};
use standby_filestorage::Access;
use standby_primary::action::{Wanted, Which};
use standby_primary::consensus_config::raft_config;
use standby_primary::input::Obtained;
use standby_primary::{Action, Caller, Input};
use standby_replica::state_dir::Note;
use standby_types::{NodeId, Term, Transfer};
use standby_zeo::{ClientError, Examination, SessionId, Value};
use tracing::{error, info, warn};

use crate::cells::announcement::Announcement;
use crate::cells::apply_task::{ApplyTask, CatchUpItems};
use crate::cells::client_errors::read_failed;
use crate::cells::log_work::LogWork;
use crate::cells::sessions::{Mail, SessionHandle};
use crate::cells::shared::Shared;
use crate::cells::wire::LinkFrame;
use crate::peers::blob::obtain;
use crate::peers::catch_up::fetch;
use crate::peers::link::learn;
use crate::platform;
use crate::tasks::primary::Primary;
use crate::transport::frames::PeerError;

/// Time after a failed fetch of a blob before anybody tries again.
const PAUSE: Duration = Duration::from_millis(500);

impl Primary {
    #[expect(clippy::too_many_lines, reason = "a table of actions")]
    pub(super) fn perform(&mut self, action: Action) -> anyhow::Result<()> {
        let shared = &self.shared;
        match action {
            Action::Send(to, message) => shared.peers.send(to, message),
            Action::Persist(batch) => return self.to_log(LogWork::Persist(batch)),
            Action::Purge(index) => return self.to_log(LogWork::Purge(index)),
            Action::Fetch(entries) => fetch_entries(shared.clone(), entries),

            Action::Apply(entries) => shared.apply(ApplyTask::Entries(entries)),
            Action::Read(reading) => shared.apply(ApplyTask::Read(reading)),
            Action::SendWritersAwayWhenApplied => shared.apply(ApplyTask::SendWritersAway),
            Action::CatchUp { from, address, target } => self.catch_up(from, address, target),
            Action::CatchUpWithoutData(target) => {
                shared.apply(ApplyTask::CatchUp { items: CatchUpItems::nothing(), target });
            }
            Action::Backfill(storage) => shared.apply(ApplyTask::Backfill(storage)),
            Action::BeginTimeline { entries, promotion } => {
                shared.apply(ApplyTask::BeginTimeline { entries, promotion });
            }
            Action::Examine { storage, vote } => examine(shared, storage, vote),

            Action::Answer(caller, answer) => self.answer(&caller, answer),
            Action::AnswerTooEarly(caller, value) => {
                if let Some(session) = shared.sessions.get(caller.session) {
                    session.outbox.push(session.encoding().reply(&caller.call, value));
                }
            }
            Action::RefuseStorage(caller, error) => {
                self.mail(caller.session, Mail::Registered(false));
                self.answer(&caller, Err(error));
            }
            Action::Voted(session, outcome) => self.mail(session, Mail::Voted(outcome)),
            Action::CountConflict(storage) => {
                if let Some(storage) = shared.storages.get(&storage) {
                    storage.stats.conflicts.fetch_add(1, Ordering::Relaxed);
                }
            }
            Action::Cut(session, reason) => {
                if let Some(session) = shared.sessions.get(session) {
                    session.cut(reason);
                }
            }
            Action::SendOneAway(session, reason) => {
                if let Some(session) = shared.sessions.get(session) {
                    session.send_away(reason);
                }
            }
            Action::CutAll(which, reason) => {
                told(shared.sessions.cut(reason, |session| is(session, which)), reason);
            }
            Action::SendAway(which, reason) => {
                told(shared.sessions.send_away(reason, |session| is(session, which)), reason);
            }
            Action::LetWritersLeave => shared.sessions.let_writers_leave(),
            Action::Forget(session) => shared.sessions.remove(session),
            Action::PackBegins(storage, waits) => {
                if let Some(storage) = shared.storages.get(&storage) {
                    storage.packing.set(Some(0));
                }
                if let Some(session) = waits.and_then(|session| shared.sessions.get(session)) {
                    session.set_packs(true);
                }
            }
            Action::PacksEnd => {
                shared.storages.values().for_each(|storage| storage.packing.set(None));
            }

            Action::Announce { storage, upload } => {
                let announcement = Announcement::of(&storage, upload);
                shared.peers.tell_all(&LinkFrame::Announced(announcement));
            }
            Action::Arrived(to, transfer) => shared.peers.arrived(to, transfer),
            Action::Obtain { from, address, wanted } => {
                // Each of its steps has a deadline, and it reports how it ended.
                tokio::spawn(obtain_blob(shared.clone(), from, address, wanted));
            }
            Action::Discard { storage, transfer } => discard(shared, &storage, transfer),

            Action::EndLinks => shared.peers.end_links(),
            Action::Learn(addresses) => learn(shared, addresses, true),
            Action::Refuse { id, node, reason } => shared.peers.refuse(id, node, reason),
            Action::LetIn(id) => shared.peers.let_in(id),
            Action::Acknowledged(known) => shared.acknowledged.add(known),
            Action::RetainAcknowledged(members) => {
                shared.acknowledged.retain(|id| members.contains(&id));
            }

            Action::Serve(state) => {
                shared.standing.send_if_modified(|old| {
                    let changed = *old != state;
                    *old = state;
                    changed
                });
            }
            Action::Lease(until) => shared.lease.set(until),
            Action::Report => self.report(),
            Action::NoteSuperseded(text) => {
                let noted = shared.state.set_note(&*shared.disk, Note::Superseded, &text);
                if let Err(error) = noted {
                    error!(%error, "cannot note durably that this node does not serve");
                }
            }
            Action::Reply(asker, answer) => {
                // Who asked may have gone.
                let _ = self.askers.remove(&asker).map(|asker| asker.send(answer));
            }
            Action::Drop(asker) => drop(self.askers.remove(&asker)),
            // These make inputs: whoever steps the machine performs them.
            Action::BeginLog { .. } | Action::End(_) => {}
        }
        Ok(())
    }

    fn to_log(&self, work: LogWork) -> anyhow::Result<()> {
        self.log.send(work).map_err(|_| anyhow::anyhow!("the log's thread has ended"))
    }

    fn answer(&self, caller: &Caller, answer: Result<Value, ClientError>) {
        // Without its session nobody waits.
        let Some(session) = self.shared.sessions.get(caller.session) else { return };
        let encoding = session.encoding();
        session.answer(match answer {
            Ok(value) => encoding.reply(&caller.call, value),
            Err(error) => encoding.error(&caller.call, &error),
        });
    }

    fn mail(&self, session: SessionId, mail: Mail) {
        if let Some(session) = self.shared.sessions.get(session) {
            // Without its own task the session is ending.
            let _ = session.mailbox.send(mail);
        }
    }

    fn catch_up(&mut self, from: NodeId, address: String, target: AppliedPoint) {
        if let Some(running) = self.catch_up.take() {
            running.abort();
        }
        let task = fetch(self.shared.clone(), from, address, target);
        // The next catch-up ends it.
        self.catch_up = Some(tokio::spawn(task));
    }

    /// The empty log of a new timeline.
    pub(super) fn begin_log(&self, point: AppliedPoint, term: Term) -> anyhow::Result<Input> {
        let shared = &self.shared;
        let config = raft_config(shared.id, shared.member.witness, shared.profile());
        let (disk, dir) = (shared.disk.clone(), shared.state.log());
        let (consensus, batch) = Consensus::anew(config, disk, dir, point, term)?;
        Ok(Input::LogBegins(Box::new(consensus), batch))
    }

    fn report(&self) {
        let (shared, state) = (&self.shared, self.machine.own_state());
        shared.reports.note_own(shared.own_report(&state));
        shared.reports.forget_removed(&state.settings.removed);
        let own = Box::new(shared.reports.own());
        shared.peers.tell_all(&LinkFrame::Report(own));
    }
}

fn told(closed: usize, reason: &str) {
    if closed > 0 {
        info!(closed, reason, "clients are sent away");
    }
}

fn is(session: &SessionHandle, which: Which) -> bool {
    match which {
        Which::All => true,
        Which::Readers => session.is_reader(),
        Which::Writers => session.is_staying_writer(),
        Which::Settled => session.is_settled(),
    }
}

fn fetch_entries(shared: Arc<Shared>, entries: Fetch) {
    drop(platform::spawn_blocking(move || {
        shared.report(Input::EntriesFetched(entries.read()));
    }));
}

fn examine(shared: &Arc<Shared>, storage: String, vote: Examination) {
    let Some(reader) = shared.storages.get(&storage).map(|storage| storage.reader()) else {
        return;
    };
    let shared = shared.clone();
    // It ends when it has compared; the machine has one for each vote that waits.
    tokio::spawn(async move {
        let comparing = platform::spawn_blocking(move || {
            let compared = vote.compare(|oid| reader.committed_serial(oid, Access::Blocking));
            (vote, compared.map_err(|error| read_failed(&error)))
        });
        // It does not panic; if it did, the client's time would run out.
        if let Ok((vote, answer)) = comparing.await {
            shared.report(Input::Examined { storage, vote, answer });
        }
    });
}

async fn obtain_blob(shared: Arc<Shared>, from: NodeId, address: String, wanted: Wanted) {
    let transfer = wanted.blob.transfer();
    let how = match obtain(&shared, &wanted, &address).await {
        Ok(()) => Obtained::Here,
        Err(PeerError::PackedAway) => Obtained::PackedAway,
        Err(error) => {
            let storage = &wanted.storage;
            warn!(address, storage, %error, "cannot fetch a blob; it is tried again");
            tokio::time::sleep(PAUSE).await;
            Obtained::Failed
        }
    };
    shared.report(Input::Obtained { from, storage: wanted.storage, transfer, how });
}

fn discard(shared: &Shared, storage: &str, transfer: Transfer) {
    let blobs = shared.storages.get(storage).and_then(|storage| storage.blobs.clone());
    drop(platform::spawn_blocking(move || {
        // What cannot be removed now goes at the next start.
        let _ = blobs.map(|blobs| blobs.discard(transfer));
    }));
}
