//! The thread that makes the log durable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use standby_consensus::{Batch, LogError, LogWriter, Written};
use standby_types::LogIndex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::machine;

/// Bytes that are written with one sync at most.
const TOGETHER: usize = 8 << 20;

/// What the thread is asked to do.
pub enum LogWork {
    /// Make durable.
    Persist(Batch),
    /// Remove what is not needed any more.
    Purge(LogIndex),
}

/// Since when the disk has been busy with one write of the log; a monotonic time in nanoseconds, 0 if it is not.
#[derive(Default)]
pub struct Busy(AtomicU64);

impl Busy {
    /// A write begins, or has ended.
    pub fn set(&self, since: Option<Duration>) {
        let nanos = since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0).max(1));
        self.0.store(nanos, Ordering::Relaxed);
    }

    /// How long the write takes already.
    pub fn for_how_long(&self, now: Duration) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => now.saturating_sub(Duration::from_nanos(since)),
        }
    }
}

/// Works until the senders are gone. `report` gets what became durable; after an error the process
/// must stop: what a failed sync leaves on disk is unknown. `busy` hears of the beginning and the end of each write.
pub async fn run(
    mut writer: LogWriter,
    mut work: mpsc::UnboundedReceiver<LogWork>,
    mut busy: impl FnMut(bool),
    mut prepare: impl FnMut(),
    mut report: impl FnMut(Result<Written, LogError>),
) {
    let mut next = None;
    loop {
        let first = match next.take() {
            Some(work) => work,
            None => match timeout(Duration::from_millis(100), work.recv()).await {
                Ok(Some(work)) => work,
                Err(_) => {
                    if writer.wants_next() {
                        prepare();
                    }
                    continue;
                }
                Ok(None) => return,
            },
        };
        match first {
            LogWork::Purge(index) => {
                if let Err(error) = writer.purge(index) {
                    return report(Err(error));
                }
            }
            LogWork::Persist(batch) => {
                let mut len = batch.len();
                let mut batches = vec![batch];
                while len < TOGETHER {
                    match work.try_recv() {
                        Ok(LogWork::Persist(batch)) => {
                            len += batch.len();
                            batches.push(batch);
                        }
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                busy(true);
                machine::device().await;
                let written = writer.write(batches);
                busy(false);
                let failed = written.is_err();
                report(written);
                if failed {
                    return;
                }
                if writer.wants_next() {
                    prepare();
                }
            }
        }
    }
}
