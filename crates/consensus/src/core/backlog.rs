//! Committed entries that the storage has not applied yet. Only so many bytes of them are handed out, and so held in
//! memory; the rest stays in the log, and is read from there when the storage is further.

use std::collections::VecDeque;

use raft::eraftpb::Entry;
use standby_types::LogIndex;

/// Bytes that an entry takes beside its data, about.
const OVERHEAD: u64 = 64;

/// Invariants: `waits` follows what was handed out last, without a gap; `bytes` is the sum of `out`.
pub(super) struct Backlog {
    limit: u64,
    /// What was handed out and is not applied: the last index of each piece, and its bytes.
    out: VecDeque<(u64, u64)>,
    bytes: u64,
    /// The first and the last committed entry that was not handed out.
    waits: Option<(u64, u64)>,
}

impl Backlog {
    /// At most `limit` bytes are handed out, or one piece if that is longer.
    pub fn new(limit: u64) -> Backlog {
        Backlog { limit, out: VecDeque::new(), bytes: 0, waits: None }
    }

    /// The log begins anew; the storage has all that came before.
    pub fn clear(&mut self) {
        *self = Backlog::new(self.limit);
    }

    /// Takes entries that have just been committed: true if they are to be handed out now. Otherwise they wait.
    pub fn committed(&mut self, entries: &[Entry]) -> bool {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return false };
        match &mut self.waits {
            Some((_, end)) => *end = last.index,
            waits if self.bytes > 0 && self.bytes + len(entries) > self.limit => {
                *waits = Some((first.index, last.index));
            }
            _ => {
                self.note(last.index, len(entries));
                return true;
            }
        }
        false
    }

    /// The storage has applied all entries up to `index`.
    pub fn applied(&mut self, index: LogIndex) {
        while let Some((_, bytes)) = self.out.pop_front_if(|(last, _)| *last <= index.0) {
            self.bytes -= bytes;
        }
    }

    /// The next entry that is to be read from the log, if there is room for more.
    pub fn wanted(&self) -> Option<LogIndex> {
        // Few and long pieces instead of many short ones.
        self.waits.filter(|_| self.bytes <= self.limit / 2).map(|(first, _)| LogIndex(first))
    }

    /// That entry was read and is handed out.
    pub fn hand_out(&mut self, entry: &Entry) {
        self.note(entry.index, OVERHEAD + entry.data.len() as u64);
        self.waits = self
            .waits
            .filter(|(_, last)| entry.index < *last)
            .map(|(_, last)| (entry.index + 1, last));
    }

    fn note(&mut self, last: u64, bytes: u64) {
        self.out.push_back((last, bytes));
        self.bytes += bytes;
    }
}

fn len(entries: &[Entry]) -> u64 {
    entries.iter().map(|entry| OVERHEAD + entry.data.len() as u64).sum()
}
