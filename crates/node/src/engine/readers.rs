//! Reads on a node that is not primary: what they must see (Raft thesis §6.4, read index), and how old
//! what they see may be.
//!
//! The primary says up to which entry a read must see to see all that is acknowledged by now. A
//! read-only `register` waits until that entry is applied, and so does the `ping` by which a client
//! with `server_sync` begins each transaction. The node asks for itself too, twice a second: when the
//! answer is applied, its data are at most as old as the question.

use std::sync::Arc;
use std::time::Duration;

use standby_consensus::Event as Happened;
use standby_types::{LogIndex, Mutation, mutation};
use standby_zeo::Value;
use tracing::{info, warn};

use super::Engine;
use crate::applier::Work;
use crate::machine::Instant;
use crate::sessions::SessionHandle;

/// How long a client waits for the primary to say what it must see.
const PATIENCE: Duration = Duration::from_secs(1);
/// Age of the data from which the log speaks of it.
const OLD: Duration = Duration::from_secs(10);

/// Something that waits until this node has applied what is acknowledged elsewhere.
pub(super) struct Reader {
    /// What is to be done then; nothing if the node asks for itself.
    work: Option<Work>,
    /// `None` until the primary has said it.
    index: Option<LogIndex>,
    asked: Instant,
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
    pub(super) fn when_level(&mut self, work: Work) -> anyhow::Result<()> {
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

    fn ask_read_index(&mut self, work: Option<Work>) -> anyhow::Result<()> {
        self.next_reader += 1;
        let reader = Reader { work, index: None, asked: Instant::now() };
        self.readers.insert(self.next_reader, reader);
        self.step(Happened::ReadIndex(self.next_reader))
    }

    /// A client that reads from here begins a transaction.
    pub(super) fn sync(&mut self, session: Arc<SessionHandle>, id: Value) -> anyhow::Result<()> {
        self.when_level(Work::Answer { session, id })
    }

    /// The primary has answered.
    pub(super) fn read_index(&mut self, key: u64, index: LogIndex) {
        if let Some(reader) = self.readers.get_mut(&key) {
            reader.index = Some(index);
        }
        self.admit_readers();
    }

    pub(super) fn admit_readers(&mut self) {
        let applied = self.applied;
        let ready = |reader: &Reader| reader.index.is_some_and(|index| index <= applied);
        for (_, reader) in self.readers.extract_if(.., |_, reader| ready(reader)) {
            match reader.work {
                Some(work) => self.shared.apply(work),
                None => self.freshness.as_of = self.freshness.as_of.max(Some(reader.asked)),
            }
        }
    }

    /// Readers that have waited in vain get what this node has: the primary is silent, or this node has no
    /// room for what is new.
    pub(super) fn give_up_on_primary(&mut self) {
        let full = self.shared.room.is_low();
        let late =
            |reader: &Reader| (reader.index.is_none() || full) && reader.asked.elapsed() > PATIENCE;
        for (_, reader) in self.readers.extract_if(.., |_, reader| late(reader)) {
            if let Some(work) = reader.work {
                self.shared.apply(work);
            }
        }
    }

    /// How old this node's data may be; `None` if it has never been level with a primary.
    pub(super) fn staleness(&self) -> Option<Duration> {
        if self.is_surely_primary() {
            return Some(Duration::ZERO);
        }
        self.freshness.as_of.map(|at| at.elapsed())
    }

    /// Asks how fresh the data are, and says when they are old.
    pub(super) fn tend_freshness(&mut self) -> anyhow::Result<()> {
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
                let closed = self.shared.sessions.cut("the data here are too old", readers);
                warn!(closed, "the data are older than max-staleness: readers are refused");
            } else {
                info!("the data are fresh enough again: readers are served");
            }
        }
        Ok(())
    }
}
