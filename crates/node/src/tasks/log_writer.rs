//! The thread that makes the log durable.

use std::time::Duration;

use standby_consensus::{LogError, LogWriter, Written};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::cells::log_work::LogWork;
use crate::platform;

/// Bytes that are written with one sync at most.
const TOGETHER: usize = 8 << 20;

/// Works until the senders are gone. `report` gets what became durable; after an error the process
/// must stop: what a failed sync leaves on disk is unknown. `busy` hears of the beginning and the
/// end of each write.
pub(crate) async fn run(
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
                platform::device().await;
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
