//! What the applier is asked to do.

use standby_consensus::{AppliedPoint, Committed};
use standby_filestorage::{Hole, Job, Outcome, Record, Staged, TransactionMeta};
use standby_primary::{Caller, Reading};
use standby_replica::lineage::Promotion;
use standby_replica::outcomes::Outcomes;
use standby_types::{Blob, Tid};
use tokio::sync::{mpsc, oneshot};

/// What the thread is asked to do.
pub(crate) enum ApplyTask {
    /// Apply; reply to the callers.
    Entries(Vec<(Committed, Option<Caller>)>),
    /// Answer after what was applied before.
    Read(Reading),
    /// End the sessions that may write, after what was applied before has been sent.
    SendWritersAway,
    /// Append what comes from a peer, until the state is `target`.
    CatchUp {
        /// What comes.
        items: CatchUpItems,
        /// Where it leads.
        target: AppliedPoint,
    },
    /// Fill the holes of a storage.
    Backfill(String),
    /// Apply these entries as the last ones of a timeline, and begin another one.
    BeginTimeline {
        /// What was in the log.
        entries: Vec<Committed>,
        /// What the new timeline is to be.
        promotion: Box<Promotion>,
    },
    /// A new data file has been made, or not.
    Packed {
        storage: String,
        /// Why it was made.
        cause: Cause,
        packed: anyhow::Result<Outcome>,
    },
    /// The data file of a storage is not where it was.
    Missing(String),
    /// The blobs that a pack has made needless are gone.
    BlobsRemoved(String),
    /// Make a last checkpoint and end.
    Stop(oneshot::Sender<()>),
}

/// A piece of a catch-up.
pub(crate) enum CatchUpItem {
    /// These transactions of a storage come only as far as they are current at the hole's end.
    Hole(String, Hole),
    /// What has become of transactions with a token.
    Outcomes(String, Outcomes),
    /// A transaction begins.
    Begin(String, TransactionMeta),
    /// The blob of the next record.
    Blob(Blob, Staged),
    /// One of its records.
    Record(Record),
    /// It ends.
    End,
    Done,
}

/// The pieces of a catch-up, one after the other. They come in batches.
pub(crate) struct CatchUpItems {
    batches: mpsc::Receiver<Vec<CatchUpItem>>,
    batch: std::vec::IntoIter<CatchUpItem>,
}

impl CatchUpItems {
    /// What will come.
    pub(crate) fn new(batches: mpsc::Receiver<Vec<CatchUpItem>>) -> CatchUpItems {
        CatchUpItems { batches, batch: Vec::new().into_iter() }
    }

    /// A catch-up that brings nothing.
    pub(crate) fn nothing() -> CatchUpItems {
        let (_, batches) = mpsc::channel(1);
        CatchUpItems { batches, batch: vec![CatchUpItem::Done].into_iter() }
    }

    /// The next piece; `None` if there are no more.
    pub(crate) async fn next(&mut self) -> Option<CatchUpItem> {
        loop {
            match self.batch.next() {
                Some(item) => return Some(item),
                None => self.batch = self.batches.recv().await?.into_iter(),
            }
        }
    }
}

/// Why a new data file is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// To remove what is not needed.
    Pack(Job),
    /// To fill the holes in the history.
    Backfill {
        /// Up to here, what was missing is in the new file.
        through: Tid,
    },
    /// Somebody has removed it; this process has it open still.
    Missing,
}
