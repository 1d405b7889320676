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
use std::sync::Arc;
use std::time::Duration;

use standby_consensus::Event as Happened;
use standby_types::{LogIndex, Mutation, mutation};
use standby_zeo::Value;
use tracing::{info, warn};

use crate::cells::apply_task::ApplyTask;
use crate::cells::sessions::SessionHandle;
use crate::platform::Instant;
use crate::primary::engine::Engine;

/// How long a client waits for the primary to say what it must see.
const PATIENCE: Duration = Duration::from_secs(1);
/// Age of the data from which the log speaks of it.
const OLD: Duration = Duration::from_secs(10);

/// A question without an answer for so long is not waited for by those who come after it: it may be
/// lost.
const NEXT: Duration = Duration::from_millis(100);

/// Those who wait until this node has applied what is acknowledged elsewhere.
pub(super) struct Readers {
    /// Questions that were asked, by their number.
    asked: BTreeMap<u64, Question>,
    /// What comes while one is under way.
    next: Option<Question>,
    last_number: u64,
}

struct Question {
    /// What is to be done when this node has applied what the primary says.
    works: Vec<ApplyTask>,
    /// `None` until the primary has said it.
    index: Option<LogIndex>,
    /// Since when somebody waits.
    since: Instant,
    /// When the primary was asked.
    asked: Instant,
}

impl Readers {
    /// Questions are numbered from `first` on: the primary must not take one for one of a former
    /// process.
    pub(super) fn new(first: u64) -> Readers {
        Readers { asked: BTreeMap::new(), next: None, last_number: first }
    }

    /// True if the next question has to wait for an answer.
    fn is_asking(&self) -> bool {
        let under_way =
            |question: &Question| question.index.is_none() && question.asked.elapsed() < NEXT;
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
pub(super) struct Freshness {
    /// All that was acknowledged at this moment is here.
    as_of: Option<Instant>,
    /// It has been said that the data are old.
    told: bool,
    /// Readers are refused.
    pub(super) refuses: bool,
}

impl Engine {
    /// Does `work` when this node has applied all that is acknowledged by now.
    pub(super) fn when_level(&mut self, work: ApplyTask) -> anyhow::Result<()> {
        let asks = !mutation::on(Mutation::ReadWithoutAsking);
        if self.is_surely_primary() || self.role.leader.is_none() || !asks {
            // All that is known to be committed is in the applier's queue already.
            self.shared.apply(work);
            return Ok(());
        }
        self.ask_read_index(Some(work))
    }

    fn is_surely_primary(&self) -> bool {
        self.serves() && self.shared.lease.holds(self.shared.now())
    }

    fn ask_read_index(&mut self, work: Option<ApplyTask>) -> anyhow::Result<()> {
        let now = Instant::now();
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
    fn ask_next(&mut self) -> anyhow::Result<()> {
        if self.readers.is_asking() {
            return Ok(());
        }
        let Some(mut question) = self.readers.next.take() else { return Ok(()) };
        question.asked = Instant::now();
        self.readers.last_number += 1;
        let number = self.readers.last_number;
        self.readers.asked.insert(number, question);
        self.step(Happened::ReadIndex(number))
    }

    /// A client that reads from here begins a transaction.
    pub(super) fn sync(&mut self, session: Arc<SessionHandle>, id: Value) -> anyhow::Result<()> {
        self.when_level(ApplyTask::Answer { session, id })
    }

    /// The primary has answered.
    pub(super) fn read_index(&mut self, number: u64, index: LogIndex) -> anyhow::Result<()> {
        if let Some(question) = self.readers.asked.get_mut(&number) {
            question.index = Some(index);
        }
        self.admit_readers();
        self.ask_next()
    }

    pub(super) fn admit_readers(&mut self) {
        let applied = self.applied;
        let ready = |question: &Question| question.index.is_some_and(|index| index <= applied);
        for question in self.readers.take(ready) {
            self.freshness.as_of = self.freshness.as_of.max(Some(question.asked));
            question.works.into_iter().for_each(|work| self.shared.apply(work));
        }
    }

    /// Readers that have waited in vain get what this node has: the primary is silent, or this node
    /// has no room for what is new.
    pub(super) fn give_up_on_primary(&mut self) -> anyhow::Result<()> {
        let full = self.shared.room.is_low();
        let late = |question: &Question| {
            (question.index.is_none() || full) && question.since.elapsed() > PATIENCE
        };
        for question in self.readers.take(late) {
            question.works.into_iter().for_each(|work| self.shared.apply(work));
        }
        self.ask_next()
    }

    /// How old this node's data may be; `None` if it has never been level with a primary.
    pub(super) fn staleness(&self) -> Option<Duration> {
        if self.is_surely_primary() {
            return Some(Duration::ZERO);
        }
        self.freshness.as_of.map(|at| at.elapsed())
    }

    /// Asks how fresh the data are, and says when they are old.
    pub(super) fn tick_freshness(&mut self) -> anyhow::Result<()> {
        if self.is_surely_primary() {
            self.freshness.as_of = Some(Instant::now());
        } else if self.role.leader.is_some() {
            self.ask_read_index(None)?;
        }
        let Some(standby) = &self.shared.config.standby else { return Ok(()) };
        let age = self.staleness();
        let old = age.is_some_and(|age| age > OLD);
        if old && !self.freshness.told {
            let seconds = age.unwrap_or_default().as_secs();
            warn!(seconds, "this node is cut off: what it serves may be that old");
        } else if self.freshness.told && !old {
            info!("the data are fresh again");
        }
        self.freshness.told = old;
        let Some(most) = standby.max_staleness else { return Ok(()) };
        let refuses = age.is_none_or(|age| age > most);
        if refuses != self.freshness.refuses {
            self.freshness.refuses = refuses;
            self.publish_standing();
            if refuses {
                let readers = |session: &SessionHandle| session.is_reader();
                let closed = self.shared.sessions.send_away("the data here are too old", readers);
                warn!(closed, "the data are older than max-staleness: readers are refused");
            } else {
                info!("the data are fresh enough again: readers are served");
            }
        }
        Ok(())
    }
}
