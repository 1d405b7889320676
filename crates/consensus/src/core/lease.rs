//! How long a leader may count on its followers, and how patient they are with it.
//!
//! A heartbeat carries the time at which it was sent, and its answer brings that back. A follower
//! elects nobody else for an election timeout after it; the leader counts on that from when it
//! *asked*.
//!
//! Where [`Config::most_patience_ticks`](super::Config) says so, the leader measures how long
//! answers take, and its heartbeats ask for more patience where the network is slow. A follower
//! that knows that promises it in its answer, and only what was promised counts: a node of an older
//! version promises nothing.
//!
//! What is added to a context (what Raft has in there is a multiple of 8 bytes long):
//!
//! ```text
//! heartbeat   [patience, milliseconds, 2] · time, microseconds, 8
//! answer      the same · [patience, milliseconds, 2], if it is promised
//! ```

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::{Message, MessageType};
use standby_types::NodeId;

use super::Consensus;

/// A leader asks for patience in steps of this.
const STEP: u64 = 100;
/// No more than this is promised, in milliseconds.
const MOST: u64 = 10_000;

/// What a follower has answered last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// When the heartbeat was sent.
    pub asked: Duration,
    /// For so long after that it elects nobody else, if that is more than an election timeout.
    promise: Duration,
}

/// See the module.
#[derive(Default)]
pub(super) struct Patience {
    /// Ticks for which this node elects nobody.
    promised: usize,
    /// What the last heartbeat has asked for.
    asked: Duration,
    /// How long the answers of each follower take.
    answers: BTreeMap<NodeId, Duration>,
}

impl Patience {
    pub(super) fn is_promised(&self) -> bool {
        self.promised > 0
    }

    pub(super) fn tick(&mut self) {
        self.promised = self.promised.saturating_sub(1);
    }

    /// There is no leader any more to whom it was promised.
    pub(super) fn leader_lost(&mut self) {
        self.promised = 0;
    }
}

impl Consensus {
    /// Until when this node, if it leads, can be sure that nobody else does: a majority has
    /// answered heartbeats so young that it does not elect another. `None` if it does not lead.
    ///
    /// It counts from when a heartbeat was sent, on this node's clock: its answer may have been on
    /// its way for any time. Followers count from when it came, in ticks of which the first may be
    /// short, on clocks that may be faster; two heartbeats, and some of a long time, are taken off
    /// for that. Nothing is acknowledged on the strength of this: it only limits reads.
    pub fn lease(&self, now: Duration) -> Option<Duration> {
        if !self.role.leads {
            return None;
        }
        let until = |heard: &Heard| heard.asked + self.counts_on(heard.promise);
        let mut times: Vec<(Duration, u64)> =
            self.heard.iter().map(|(id, heard)| (until(heard), id.0)).collect();
        times.push((now + self.lease_length(), self.config.id.0));
        times.sort_unstable_by(|a, b| b.cmp(a));
        Some(self.at_majority(times))
    }

    /// The time of the node with which those before it, in this order, are a majority; zero if they
    /// never are.
    fn at_majority(&self, times: Vec<(Duration, u64)>) -> Duration {
        // Raft's own set type, with another hasher.
        let mut nodes: HashSet<u64, _> = HashSet::default();
        let found = times.into_iter().find(|(_, id)| {
            nodes.insert(*id);
            self.raft.raft.prs().has_quorum(&nodes)
        });
        found.map_or(Duration::ZERO, |(time, _)| time)
    }

    /// How old the heartbeat may be that a majority has answered.
    pub fn lease_length(&self) -> Duration {
        self.counts_on(self.patience())
    }

    fn counts_on(&self, promise: Duration) -> Duration {
        let two_heartbeats = self.config.tick * 2 * self.config.heartbeat_ticks as u32;
        let ordinary = self.ordinary_patience();
        let longer = promise.saturating_sub(ordinary);
        (ordinary + longer - longer / 16).saturating_sub(two_heartbeats)
    }

    fn ordinary_patience(&self) -> Duration {
        self.config.tick * self.config.election_ticks as u32
    }

    /// Time without a word of the leader, or for the leader of its followers, before anything
    /// follows from it.
    pub(super) fn patience(&self) -> Duration {
        let ordinary = self.ordinary_patience();
        if !self.role.leads {
            return self.patience.asked.max(ordinary);
        }
        if !self.asks_for_patience() {
            return ordinary;
        }
        let answers = &self.patience.answers;
        let mut times: Vec<(Duration, u64)> = answers.iter().map(|(id, t)| (*t, id.0)).collect();
        times.push((Duration::ZERO, self.config.id.0));
        times.sort_unstable();
        let took = self.at_majority(times);
        if took < ordinary / 8 {
            return ordinary;
        }
        let wanted = (ordinary + 2 * took).as_millis() as u64;
        let most = self.config.tick * self.config.most_patience_ticks as u32;
        Duration::from_millis(wanted.next_multiple_of(STEP)).min(most)
    }

    /// Ticks without a leader before an election, at least. The longer there is none, the more
    /// patient are the candidates: their questions may need that long.
    pub(super) fn patience_ticks(&self) -> usize {
        let asked = self.ticks_in(self.patience.asked);
        let most = self.config.election_ticks.max(self.config.most_patience_ticks);
        (self.leader_silence / 4).min(most).max(asked).max(self.config.election_ticks)
    }

    /// Whole ticks in a time.
    pub(super) fn ticks_in(&self, time: Duration) -> usize {
        (time.as_micros() / self.config.tick.as_micros().max(1)) as usize
    }

    /// A term begins, or this node leads in it now, or does not any more.
    pub(super) fn begin_patience(&mut self, leads: bool) {
        self.patience.answers.clear();
        if leads && self.asks_for_patience() {
            // Raft gives a leader up whom nobody has answered within an election timeout. They have
            // just elected it.
            for (_, progress) in self.raft.raft.mut_prs().iter_mut() {
                progress.recent_active = true;
            }
        }
    }

    fn asks_for_patience(&self) -> bool {
        self.config.most_patience_ticks > self.config.election_ticks
    }

    /// A follower has answered a heartbeat, or said something else in this term.
    pub(super) fn note_heard(&mut self, from: NodeId, answer: Option<Heard>) {
        // Whatever it answers otherwise was sent in this term.
        let promise = Duration::ZERO;
        let answer = answer.unwrap_or(Heard { asked: self.witnesses.since, promise });
        let until = |heard: &Heard| heard.asked + heard.promise.max(self.ordinary_patience());
        match self.heard.get(&from) {
            Some(heard) if until(heard) >= until(&answer) => {}
            _ => drop(self.heard.insert(from, answer)),
        }
    }

    /// Takes off what was added to the context of a heartbeat's answer; see the module.
    pub(super) fn take_answer(&mut self, message: &mut Message) -> Option<Heard> {
        let context = &mut message.context;
        let promise = match context.len() % 8 {
            4 => Duration::from_millis(take(context, 2)?.min(MOST)),
            _ => Duration::ZERO,
        };
        let asked = Duration::from_micros(take(context, 8)?);
        if context.len() % 8 == 2 {
            take(context, 2)?;
        }
        if asked > self.last_step {
            return None;
        }
        let took = self.last_step - asked;
        let known = self.patience.answers.entry(NodeId(message.from)).or_default();
        // At once to the longer one, slowly to a shorter one.
        *known = took.max(*known - *known / 64);
        Some(Heard { asked, promise })
    }

    /// The leader's heartbeat may ask for patience: it is promised.
    pub(super) fn promise(&mut self, heartbeat: &Message) {
        let asked = wanted_patience(&heartbeat.context).map_or(0, u16::from_be_bytes);
        let asked = u64::from(asked).min(MOST);
        self.patience.asked = Duration::from_millis(asked);
        if asked > 0 {
            let ticks = self.ticks_in(self.patience.asked) + 1;
            self.patience.promised = self.patience.promised.max(ticks);
        }
    }

    /// Adds to the context of a heartbeat, or of an answer to one, what is said in the module.
    pub(super) fn put_context(&self, message: &mut Message) {
        let context = &message.context;
        match message.get_msg_type() {
            MessageType::MsgHeartbeat => {
                let patience = (self.patience().as_millis() as u16).to_be_bytes();
                let patience: &[u8] = if self.asks_for_patience() { &patience } else { &[] };
                let time = (self.last_step.as_micros() as u64).to_be_bytes();
                message.context = [context, patience, &time].concat().into();
            }
            MessageType::MsgHeartbeatResponse => {
                if let Some(promise) = wanted_patience(context) {
                    message.context = [context, &promise[..]].concat().into();
                }
            }
            _ => {}
        }
    }
}

/// The patience that a heartbeat asks for, if it does.
fn wanted_patience(context: &[u8]) -> Option<[u8; 2]> {
    let (before_time, _) = context.split_last_chunk::<8>()?;
    before_time.last_chunk().copied().filter(|_| context.len() % 8 == 2)
}

/// Takes the last bytes off, as a number. There are none in the answer to what was no heartbeat on
/// the wire.
fn take(context: &mut Bytes, len: usize) -> Option<u64> {
    let last = context.split_off(context.len().checked_sub(len)?);
    Some(last.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
