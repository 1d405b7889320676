//! Reading the log at start-up.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::HardState;
use standby_types::disk::{read_all, read_full};
use standby_types::{Disk, LogIndex, Term};

use crate::committed::{Committed, said};
use crate::log::Point;
use crate::log::segment::{
    FRAME_HEADER, HEADER, Item, LogError, Place, PlacedEntry, SegmentHeader, parse_frame,
    segment_number, take_item,
};

/// What the log's files say.
#[derive(Debug, Default)]
pub struct Recovered {
    pub(crate) hard_state: HardState,
    /// The entry before the first one.
    pub(crate) start: Point,
    pub(crate) entries: Vec<PlacedEntry>,
    pub(crate) segments: Vec<SegmentInfo>,
    pub(crate) next_frame: u64,
    /// Bytes of a torn frame at the end, which were ignored.
    pub torn: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentInfo {
    pub number: u64,
    /// The highest index in it.
    pub last: LogIndex,
}

impl Recovered {
    /// The last entry's index.
    pub fn last_index(&self) -> LogIndex {
        self.last().index
    }

    /// The term of the last entry.
    pub fn last_term(&self) -> Term {
        self.last().term
    }

    /// The first entry's index, if there were one: one above the entry before it.
    pub fn first_index(&self) -> LogIndex {
        LogIndex(self.start.index.0 + 1)
    }

    /// True if this entry is in the log, or is the one that the log begins after.
    pub fn holds(&self, index: LogIndex, term: Term) -> bool {
        let point = Point { index, term };
        let at = index.0.checked_sub(self.start.index.0 + 1);
        let entry = at.and_then(|at| self.entries.get(at as usize));
        self.start == point || entry.is_some_and(|e| e.index == index && e.term == term)
    }

    /// True if there is no trace of a log.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The data of the normal entries after `index`, in order.
    pub fn data_after(
        &self,
        disk: &dyn Disk,
        dir: &Path,
        index: LogIndex,
    ) -> Result<Vec<(LogIndex, Bytes)>, LogError> {
        let mut found = Vec::new();
        for placed in self.entries.iter().filter(|placed| placed.index > index) {
            let entry = read_entry(disk, dir, placed.place)?;
            if entry.get_entry_type() == raft::eraftpb::EntryType::EntryNormal
                && !entry.data.is_empty()
            {
                found.push((placed.index, entry.data));
            }
        }
        Ok(found)
    }

    /// The entries after `index`, in order; changes of membership say nothing.
    pub fn entries_after<'a>(
        &'a self,
        disk: &'a dyn Disk,
        dir: &'a Path,
        index: LogIndex,
    ) -> impl Iterator<Item = Result<Committed, LogError>> + 'a {
        let after = self.entries.iter().filter(move |placed| placed.index > index);
        after.map(move |placed| read_entry(disk, dir, placed.place).map(said))
    }

    /// Entries up to this one are known to be committed. More may be.
    pub fn commit_index(&self) -> LogIndex {
        LogIndex(self.hard_state.commit)
    }

    pub(crate) fn last(&self) -> Point {
        self.entries.last().map_or(self.start, |e| Point { index: e.index, term: e.term })
    }
}

/// Reads the log in `dir`. An empty or missing directory gives an empty log.
pub fn recover(disk: &Arc<dyn Disk>, dir: &Path) -> Result<Recovered, LogError> {
    let mut recovered = Recovered { next_frame: 1, ..Recovered::default() };
    let mut paths: Vec<_> = disk.list(dir).map_err(LogError::io(dir, "list"))?;
    paths.retain(|path| segment_number(path).is_some());
    for (nth, path) in paths.iter().enumerate() {
        let is_last = nth + 1 == paths.len();
        let bytes = Bytes::from(read_all(&**disk, path).map_err(LogError::io(path, "read"))?);
        let damaged = |offset: usize, reason: String| LogError::Damaged {
            path: path.clone(),
            offset: offset as u64,
            reason,
        };
        let Some(header) = SegmentHeader::parse(&bytes) else {
            if is_last && later_frame(&bytes, HEADER, recovered.next_frame).is_none() {
                // Power failed while the segment was being made; nothing was in it yet.
                recovered.torn += bytes.len() as u64;
                break;
            }
            return Err(damaged(0, "the header of a segment is not whole".into()));
        };
        if recovered.segments.is_empty() || header.reset {
            // What is before does not count; a purge that was interrupted goes on with it.
            recovered.segments.iter_mut().for_each(|segment| segment.last = LogIndex(0));
            recovered.entries.clear();
            recovered.start = header.before;
            recovered.next_frame = header.first_frame;
        } else if header.first_frame != recovered.next_frame {
            let reason = format!(
                "the segment begins with frame {}, the one before ended before frame {}",
                header.first_frame, recovered.next_frame
            );
            return Err(damaged(0, reason));
        }
        let mut at = HEADER;
        let mut last = LogIndex(0);
        while let Some((number, content)) = parse_frame(&bytes.slice(at.min(bytes.len())..)) {
            if number != recovered.next_frame {
                break;
            }
            last = last.max(
                take_frame(&mut recovered, header.number, at, &content)
                    .map_err(|reason| damaged(at, reason))?,
            );
            recovered.next_frame += 1;
            at += FRAME_HEADER + content.len();
        }
        if let Some(offset) = later_frame(&bytes, at, recovered.next_frame) {
            let reason = format!(
                "frame {} is not whole, but frames written after it are (at byte {offset}): \
                 something that was durable is lost",
                recovered.next_frame
            );
            return Err(damaged(at, reason));
        }
        let garbage = bytes[at.min(bytes.len())..].iter().rposition(|b| *b != 0);
        recovered.torn += garbage.map_or(0, |n| n as u64 + 1);
        recovered.segments.push(SegmentInfo { number: header.number, last });
    }
    // A new segment begins with the hard state of the frame that was to follow it, which may be
    // gone.
    let last = recovered.last_index().0;
    recovered.hard_state.commit = recovered.hard_state.commit.min(last);
    Ok(recovered)
}

/// Adds a frame's items; the highest index among them.
fn take_frame(
    recovered: &mut Recovered,
    segment: u64,
    frame_at: usize,
    content: &Bytes,
) -> Result<LogIndex, String> {
    let mut offset = 0;
    let mut last = LogIndex(0);
    while offset < content.len() {
        let (item, len) = take_item(&content.slice(offset..)).map_err(|e| e.to_string())?;
        match item {
            Item::HardState(state) => recovered.hard_state = state,
            Item::Entry(entry) => {
                let (index, term) = (LogIndex(entry.index), Term(entry.term));
                if index <= recovered.start.index {
                    // Entries of a purged segment are replaced; they were not committed.
                    recovered.start = Point { index, term };
                    recovered.entries.clear();
                    offset += len;
                    continue;
                }
                let before = recovered.start.index;
                if index.0 > recovered.last().index.0 + 1 {
                    return Err(format!(
                        "entry {index} does not follow {}",
                        recovered.last().index
                    ));
                }
                recovered.entries.truncate((index.0 - before.0 - 1) as usize);
                let at = (frame_at + FRAME_HEADER + offset) as u64;
                let place = Place { segment, offset: at, len: len as u32 };
                recovered.entries.push(PlacedEntry { index, term, place });
                last = last.max(index);
            }
        }
        offset += len;
    }
    Ok(last)
}

/// Where a whole frame with a number above `expected` stands after `from`.
fn later_frame(bytes: &Bytes, from: usize, expected: u64) -> Option<usize> {
    let end = from + bytes.get(from..)?.iter().rposition(|b| *b != 0)? + 1;
    (from..end.saturating_sub(FRAME_HEADER)).find(|at| {
        let number = bytes.get(at + 8..at + 16).and_then(|b| b.try_into().ok());
        let number = number.map_or(0, u64::from_be_bytes);
        // The cheap test first: few places hold a plausible number.
        number > expected
            && number - expected < 1 << 32
            && parse_frame(&bytes.slice(*at..)).is_some()
    })
}

pub(crate) fn read_entry(
    disk: &dyn Disk,
    dir: &Path,
    place: Place,
) -> Result<raft::eraftpb::Entry, LogError> {
    let path = super::segment::segment_path(dir, place.segment);
    let file =
        disk.open(&path, standby_types::disk::Open::Read).map_err(LogError::io(&path, "open"))?;
    let mut bytes = vec![0; place.len as usize];
    let n = read_full(&*file, &mut bytes, place.offset).map_err(LogError::io(&path, "read"))?;
    bytes.truncate(n);
    match take_item(&Bytes::from(bytes)) {
        Ok((Item::Entry(entry), _)) => Ok(entry),
        _ => Err(LogError::Damaged {
            path,
            offset: place.offset,
            reason: "the entry that was written here cannot be read back".into(),
        }),
    }
}
