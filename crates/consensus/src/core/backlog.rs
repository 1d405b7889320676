//! Committed entries that the storage has not applied yet. Only so many bytes of them are handed
//! out, and so held in memory; the rest stays in the log, and is read from there when the storage
//! is further.

use std::collections::VecDeque;

use raft::eraftpb::Entry;
use standby_types::LogIndex;

use super::{Consensus, Output};
use crate::log::{ENTRY_OVERHEAD, Fetched, For, LogError};

/// Invariants: `waits` follows what was handed out last, without a gap; `bytes` is the sum of
/// `out`.
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

    /// Takes entries that have just been committed: true if they are to be handed out now.
    /// Otherwise they wait.
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

    /// The first and the last entry that wait in the log, and for how many bytes of them there is
    /// room, if it is for many.
    pub fn wanted(&self) -> Option<((LogIndex, LogIndex), u64)> {
        // Few and long pieces instead of many short ones.
        let (first, last) = self.waits.filter(|_| self.bytes <= self.limit / 2)?;
        Some(((LogIndex(first), LogIndex(last)), self.limit - self.bytes))
    }

    /// The first of them is handed out.
    pub fn hand_out(&mut self, entry: &Entry) {
        self.note(entry.index, ENTRY_OVERHEAD + entry.data.len() as u64);
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

impl Consensus {
    /// Entries have been committed.
    pub(super) fn hand_out(&mut self, entries: Vec<Entry>, outputs: &mut Vec<Output>) {
        if self.backlog.committed(&entries) {
            self.hand_out_taken(entries, outputs);
        }
    }

    /// What has waited for the storage comes from the log, as far as there is room for it.
    pub(super) fn hand_out_more(&mut self, outputs: &mut Vec<Output>) -> Result<(), LogError> {
        let mut entries = Vec::new();
        while let Some((between, room)) = self.backlog.wanted() {
            let store = self.raft.store();
            let Some(entry) = store.in_memory(between.0) else {
                if !self.fetching {
                    outputs.push(Output::Fetch(store.fetch_for_storage(between, room)?));
                    self.fetching = true;
                }
                break;
            };
            self.backlog.hand_out(entry);
            entries.push(entry.clone());
        }
        self.hand_out_taken(entries, outputs);
        Ok(())
    }

    fn hand_out_taken(&mut self, entries: Vec<Entry>, outputs: &mut Vec<Output>) {
        if !entries.is_empty() {
            let committed = self.take_committed(entries);
            outputs.push(Output::Commit(committed));
        }
    }

    /// Entries were read from the log, for whoever waits for them.
    pub(super) fn fetched(
        &mut self,
        fetched: Fetched,
        outputs: &mut Vec<Output>,
    ) -> Result<(), LogError> {
        let Fetched { first, entries, reader } = fetched;
        match reader {
            For::Follower(context) => {
                self.raft.mut_store().fetched(first, entries);
                self.raft.on_entries_fetched(context);
                self.raft.mut_store().forget_fetched();
            }
            For::Storage => {
                self.fetching = false;
                // Otherwise a catch-up has replaced them, and may have removed what was to be read.
                if self.backlog.wanted().is_some_and(|((wanted, _), _)| wanted == first) {
                    let (entries, log) = (entries?, &self.raft.raft.raft_log);
                    let is_ours = |e: &Entry| log.term(e.index).is_ok_and(|term| term == e.term);
                    if entries.iter().all(is_ours) {
                        entries.iter().for_each(|entry| self.backlog.hand_out(entry));
                        self.hand_out_taken(entries, outputs);
                    }
                }
                self.hand_out_more(outputs)?;
            }
        }
        Ok(())
    }
}

fn len(entries: &[Entry]) -> u64 {
    entries.iter().map(|entry| ENTRY_OVERHEAD + entry.data.len() as u64).sum()
}
