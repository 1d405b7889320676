//! Reads on a node that is not primary: what they must see (Raft thesis §6.4, read index), and how
//! old what they see may be.
//!
//! The primary says up to which entry a read must see to see all that is acknowledged by now. A
//! read-only `register` waits until that entry is applied, and so does the `ping` by which a client
//! with `server_sync` begins each transaction. The node asks for itself too, twice a second: when
//! the answer is applied, its data are at most as old as the question.
//!
//! Each question makes the primary ask a majority whether it still leads. So one is under way at a
//! time, and whoever comes meanwhile shares the next one: readers cannot keep the primary busy.

use std::collections::BTreeMap;
use std::time::Duration;

use standby_consensus::Event as Happened;
use standby_types::{LogIndex, Mutation, mutation};
use tracing::{info, warn};

use crate::Result;
use crate::action::{Action, Reading, Which};
use crate::machine::Machine;

/// How long a client waits for the primary to say what it must see.
const PATIENCE: Duration = Duration::from_secs(1);
/// Age of the data from which the log speaks of it.
const OLD: Duration = Duration::from_secs(10);

/// A question without an answer for so long is not waited for by those who come after it: it may be
/// lost.
const NEXT: Duration = Duration::from_millis(100);

/// Those who wait until this node has applied what is acknowledged elsewhere.
pub(crate) struct Readers {
    /// Questions that were asked, by their number.
    asked: BTreeMap<u64, Question>,
    /// What comes while one is under way.
    next: Option<Question>,
    last_number: u64,
}

struct Question {
    /// What is to be done when this node has applied what the primary says.
    works: Vec<Reading>,
    /// `None` until the primary has said it.
    index: Option<LogIndex>,
    /// Since when somebody waits.
    since: Duration,
    /// When the primary was asked.
    asked: Duration,
}

impl Readers {
    /// Fails if an invariant does not hold.
    pub(crate) fn invariants(&self) {
        assert!(self.asked.keys().all(|number| *number <= self.last_number), "a later question");
    }

    /// Questions are numbered from `first` on: the primary must not take one for one of a former
    /// process.
    pub(crate) fn new(first: u64) -> Readers {
        Readers { asked: BTreeMap::new(), next: None, last_number: first }
    }

    /// True if the next question has to wait for an answer.
    fn is_asking(&self, now: Duration) -> bool {
        let under_way =
            |question: &Question| question.index.is_none() && now < question.asked + NEXT;
        self.asked.values().any(under_way)
    }

    /// Takes out the questions of which `which` is true.
    fn take(&mut self, which: impl Fn(&Question) -> bool) -> Vec<Question> {
        self.asked
            .extract_if(.., |_, question| which(question))
            .map(|(_, question)| question)
            .collect()
    }
}

/// How old this node's data may be.
#[derive(Default)]
pub(crate) struct Freshness {
    /// All that was acknowledged at this moment is here.
    as_of: Option<Duration>,
    /// It has been said that the data are old.
    told: bool,
    /// Readers are refused.
    pub(crate) refuses: bool,
}

impl Machine {
    /// Does `work` when this node has applied all that is acknowledged by now.
    pub(crate) fn when_level(&mut self, work: Reading) -> Result<()> {
        let asks = !mutation::on(Mutation::ReadWithoutAsking);
        if self.is_surely_primary() || self.role.leader.is_none() || !asks {
            // All that is known to be committed is in the applier's queue already.
            self.act(Action::Read(work));
            return Ok(());
        }
        self.ask_read_index(Some(work))
    }

    fn ask_read_index(&mut self, work: Option<Reading>) -> Result<()> {
        let now = self.now;
        let next = self.readers.next.get_or_insert_with(|| Question {
            works: Vec::new(),
            index: None,
            since: now,
            asked: now,
        });
        next.works.extend(work);
        self.ask_next()
    }

    /// Asks what has come while another question was under way, if that has been answered or is
    /// late.
    fn ask_next(&mut self) -> Result<()> {
        if self.readers.is_asking(self.now) {
            return Ok(());
        }
        let Some(mut question) = self.readers.next.take() else { return Ok(()) };
        question.asked = self.now;
        self.readers.last_number += 1;
        let number = self.readers.last_number;
        self.readers.asked.insert(number, question);
        self.consensus_step(Happened::ReadIndex(number))
    }

    /// The primary has answered.
    pub(crate) fn read_index(&mut self, number: u64, index: LogIndex) -> Result<()> {
        if let Some(question) = self.readers.asked.get_mut(&number) {
            question.index = Some(index);
        }
        self.admit_readers();
        self.ask_next()
    }

    pub(crate) fn admit_readers(&mut self) {
        let applied = self.applied;
        let ready = |question: &Question| question.index.is_some_and(|index| index <= applied);
        for question in self.readers.take(ready) {
            self.freshness.as_of = self.freshness.as_of.max(Some(question.asked));
            question.works.into_iter().for_each(|work| self.act(Action::Read(work)));
        }
    }

    /// Readers that have waited in vain get what this node has: the primary is silent, or this node
    /// has no room for what is new.
    pub(crate) fn give_up_on_primary(&mut self) -> Result<()> {
        let full = self.facts.lacks_room();
        let now = self.now;
        let late = |question: &Question| {
            (question.index.is_none() || full) && now > question.since + PATIENCE
        };
        for question in self.readers.take(late) {
            question.works.into_iter().for_each(|work| self.act(Action::Read(work)));
        }
        self.ask_next()
    }

    /// How old this node's data may be; `None` if it has never been level with a primary.
    pub(crate) fn staleness(&self) -> Option<Duration> {
        if self.is_surely_primary() {
            return Some(Duration::ZERO);
        }
        self.freshness.as_of.map(|at| self.now.saturating_sub(at))
    }

    /// Asks how fresh the data are, and says when they are old.
    pub(crate) fn tick_freshness(&mut self) -> Result<()> {
        if self.is_surely_primary() {
            self.freshness.as_of = Some(self.now);
        } else if self.role.leader.is_some() {
            self.ask_read_index(None)?;
        }
        let Some(standby) = &self.config.standby else { return Ok(()) };
        let most = standby.max_staleness;
        let age = self.staleness();
        let old = age.is_some_and(|age| age > OLD);
        if old && !self.freshness.told {
            let seconds = age.unwrap_or_default().as_secs();
            warn!(seconds, "this node is cut off: what it serves may be that old");
        } else if self.freshness.told && !old {
            info!("the data are fresh again");
        }
        self.freshness.told = old;
        let Some(most) = most else { return Ok(()) };
        let refuses = age.is_none_or(|age| age > most);
        if refuses != self.freshness.refuses {
            self.freshness.refuses = refuses;
            self.publish_serving();
            if refuses {
                self.act(Action::SendAway(Which::Readers, "the data here are too old"));
                warn!("the data are older than max-staleness: readers are refused");
            } else {
                info!("the data are fresh enough again: readers are served");
            }
        }
        Ok(())
    }
}
