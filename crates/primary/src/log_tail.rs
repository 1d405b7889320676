//! How much of the log is kept for nodes that are behind.

use std::collections::VecDeque;

use standby_consensus::Committed;
use standby_types::LogIndex;

/// Bytes that an entry takes in the log beside its data, about.
const ENTRY_OVERHEAD: u64 = 64;

/// Checkpoints that the log still reaches back to.
pub(crate) struct LogTail {
    /// Bytes that are kept at least.
    kept: u64,
    /// Each checkpoint, with the bytes committed before it.
    checkpoints: VecDeque<(LogIndex, u64)>,
    /// Bytes committed since the start.
    bytes: u64,
}

impl LogTail {
    pub(crate) fn new(kept: u64) -> LogTail {
        LogTail { kept, checkpoints: VecDeque::new(), bytes: 0 }
    }

    pub(crate) fn committed(&mut self, entry: &Committed) {
        if let Committed::Command(_, _, data) = entry {
            self.bytes += data.len() as u64;
        }
        self.bytes += ENTRY_OVERHEAD;
    }

    /// A checkpoint is durable. Returns the entry up to which the log is not needed any more.
    pub(crate) fn checkpointed(&mut self, index: LogIndex) -> Option<LogIndex> {
        self.checkpoints.push_back((index, self.bytes));
        let mut begin = None;
        while let Some((index, bytes)) = self.checkpoints.front() {
            if self.bytes - bytes < self.kept {
                break;
            }
            begin = Some(*index);
            self.checkpoints.pop_front();
        }
        begin
    }

    /// The log begins anew.
    pub(crate) fn clear(&mut self) {
        self.checkpoints.clear();
    }
}
