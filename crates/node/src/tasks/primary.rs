//! The task that owns the machine which decides ([`standby_primary::Machine`]): it waits for
//! something to happen, steps, and performs what comes out, in order.
//!
//! It never waits for a disk, a peer or a client: what takes time runs beside it and reports. What
//! this process's own tasks report comes before events of others: whoever was told of a commit
//! finds its locks free.

mod facts;
mod perform;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use standby_consensus::Consensus;
use standby_logging::error_text::with_causes;
use standby_primary::Asker;
use standby_primary::command::Answer;
use standby_primary::input::Arrival;
use standby_primary::{Action, Beginning, Ended, Input, Machine};
use standby_replica::machine::Replica;
use standby_replica::state_dir::Note;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::error;

use crate::cells::events::{Event, TaskReport};
use crate::cells::log_work::LogWork;
use crate::cells::shared::Shared;
use crate::platform::crash_notes;
use crate::tasks::primary::facts::NodeFacts;

/// See the module.
pub(crate) struct Primary {
    shared: Arc<Shared>,
    machine: Machine,
    /// What the machine's beginning wants to be done.
    first: Vec<Action>,
    log: mpsc::UnboundedSender<LogWork>,
    /// Administrators who wait for an answer.
    askers: BTreeMap<Asker, oneshot::Sender<Answer>>,
    asked: u64,
    /// The task that fetches what this node lacks.
    catch_up: Option<JoinHandle<()>>,
}

impl Primary {
    /// The task of a node that was just opened.
    pub(crate) fn new(
        shared: Arc<Shared>,
        consensus: Consensus,
        log: mpsc::UnboundedSender<LogWork>,
        replica: &Replica,
    ) -> Primary {
        let superseded =
            shared.state.note(&*shared.disk, Note::Superseded).unwrap_or_else(|error| {
                error!("cannot read whether this node serves: {}", with_causes(&error));
                None
            });
        let beginning = Beginning {
            config: shared.config.clone(),
            me: shared.member.clone(),
            storages: shared.storages.keys().cloned().collect(),
            log_tail: shared.log_tail(),
            applied: replica.index(),
            ceilings: replica.ceilings(),
            settings: shared.settings(),
            superseded,
            crash_looping: crash_notes::are_many(&*shared.disk, &shared.state.0),
        };
        let facts = Box::new(NodeFacts(shared.clone()));
        let (machine, first) = Machine::new(facts, beginning, consensus, shared.now());
        let (askers, asked, catch_up) = (BTreeMap::new(), 0, None);
        Primary { shared, machine, first, log, askers, asked, catch_up }
    }

    /// Runs until the node is to end.
    pub(crate) async fn run(
        mut self,
        mut internal: mpsc::UnboundedReceiver<TaskReport>,
        mut events: mpsc::Receiver<Event>,
    ) -> anyhow::Result<Ended> {
        let mut ticker = tokio::time::interval(self.shared.tick());
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let first = std::mem::take(&mut self.first);
        let mut ended = self.perform_all(first)?;
        while ended.is_none() {
            ended = tokio::select! {
                biased;
                Some(told) = internal.recv() => self.reported(told)?,
                _ = ticker.tick() => {
                    self.shared.pulse.beat();
                    self.step(Input::Tick)?
                }
                Some(event) = events.recv() => {
                    let mut ended = None;
                    while let (None, Ok(told)) = (&ended, internal.try_recv()) {
                        ended = self.reported(told)?;
                    }
                    match ended {
                        None => self.event(event)?,
                        ended => ended,
                    }
                }
            };
        }
        Ok(ended.unwrap_or(Ended::Stopped))
    }

    fn reported(&mut self, told: TaskReport) -> anyhow::Result<Option<Ended>> {
        match told {
            TaskReport::Input(input) => {
                if let Input::Applied { settings, .. } = &*input
                    && !Arc::ptr_eq(settings, self.machine.settings())
                {
                    self.shared.set_settings(settings.clone());
                }
                self.step(*input)
            }
            TaskReport::Persisted(written) => self.step(Input::Persisted(written?)),
            TaskReport::Fatal(error) => Err(error),
        }
    }

    fn event(&mut self, event: Event) -> anyhow::Result<Option<Ended>> {
        match event {
            Event::Input(input) => self.step(*input),
            Event::Peer(message, epoch) if epoch == self.shared.peers.epoch() => {
                self.step(Input::Peer(message))
            }
            // It was meant for this node's former timeline.
            Event::Peer(..) => Ok(None),
            Event::PeerUp(info) => {
                let member = info.member();
                let knows = Box::new(move |token: &str| info.is_invited_by(token));
                self.step(Input::PeerUp(Arrival { member, knows }))
            }
            Event::PeerLost(peer) => {
                self.shared.peers.let_in(peer);
                self.shared.reports.lost(peer);
                self.step(Input::PeerLost(peer))
            }
            Event::Ask(ask, answer) => {
                self.asked += 1;
                let asker = Asker(self.asked);
                self.askers.insert(asker, answer);
                self.step(Input::Ask(ask, asker))
            }
            Event::Settled(waits) => {
                // Who waits may have gone.
                let _ = waits.send(());
                Ok(None)
            }
        }
    }

    /// One step, and those that follow from it at once.
    fn step(&mut self, input: Input) -> anyhow::Result<Option<Ended>> {
        let actions = self.machine.step(self.shared.now(), input)?;
        self.perform_all(actions)
    }

    fn perform_all(&mut self, actions: Vec<Action>) -> anyhow::Result<Option<Ended>> {
        // Before anything is acknowledged.
        self.shared.set_log_end(self.machine.persisted_index());
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::End(ended) => return Ok(Some(ended)),
                Action::BeginLog { point, term } => {
                    let begins = self.begin_log(point, term)?;
                    actions.extend(self.machine.step(self.shared.now(), begins)?);
                }
                action => self.perform(action)?,
            }
        }
        if self.machine.take_transactions_changed() {
            self.count_transactions();
        }
        Ok(None)
    }

    fn count_transactions(&self) {
        for (name, waiting, active) in self.machine.transactions() {
            if let Some(storage) = self.shared.storages.get(name) {
                storage.stats.waiting.store(waiting, Ordering::Relaxed);
                storage.stats.active.store(active, Ordering::Relaxed);
            }
        }
    }
}
