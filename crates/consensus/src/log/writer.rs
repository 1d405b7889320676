//! Appending to the log. One thread does it; it blocks.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use raft::eraftpb::{Entry, HardState};
use standby_types::disk::{Open, when_room};
use standby_types::{Disk, File, LogIndex, Mutation, Term, mutation};

use crate::log::Point;
use crate::log::recover::{Recovered, SegmentInfo};
use crate::log::segment::{
    FRAME_HEADER, HEADER, LogError, Place, PlacedEntry, SEGMENT_LEN, SegmentHeader, put_entry,
    put_hard_state, seal_frame, segment_path,
};

/// What is to be made durable together.
#[derive(Debug, Default)]
pub struct Batch {
    pub(crate) number: u64,
    pub(crate) reset: Option<Point>,
    pub(crate) hard_state: Option<HardState>,
    pub(crate) entries: Vec<Entry>,
}

impl Batch {
    /// True if the log begins anew after this index and term: a catch-up has replaced what
    /// the log would have said. The storage's checkpoint must be durable before.
    pub fn reset(&self) -> Option<(LogIndex, Term)> {
        self.reset.map(|point| (point.index, point.term))
    }

    /// One entry that nobody has proposed: for tools and tests that write to the log of a node that
    /// is stopped.
    pub fn of_entry(index: LogIndex, term: Term, data: Bytes) -> Batch {
        let (index, term) = (index.0, term.0);
        let entry = Entry { index, term, data, ..Entry::default() };
        Batch { entries: vec![entry], ..Batch::default() }
    }

    /// Bytes of data.
    pub fn len(&self) -> usize {
        self.entries.iter().map(|entry| entry.data.len() + 64).sum()
    }

    /// True if there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// What is durable now; goes back to the machine as [`crate::Event::Persisted`].
#[derive(Debug)]
pub struct Written {
    pub(crate) number: u64,
    pub(crate) entries: Vec<PlacedEntry>,
}

impl Written {
    /// True if this ends with what makes the log begin anew (see [`crate::Consensus::anew`]).
    pub fn begins_log(&self) -> bool {
        // Those of a machine in use are numbered from 1 on.
        self.number == 0
    }
}

/// The one writer of a log. Without room on the disk it waits for some.
pub struct LogWriter {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    file: Arc<dyn File>,
    offset: u64,
    next_frame: u64,
    hard_state: HardState,
    last: Point,
    segments: VecDeque<SegmentInfo>,
    /// The segment for which [`LogWriter::wants_next`] has been true.
    prepared_after: u64,
}

impl LogWriter {
    /// Continues a recovered log, in a new segment. `reset` makes the log begin after that entry
    /// and forget what it holds: at bootstrap, and after a catch-up.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        recovered: &mut Recovered,
        reset: Option<(LogIndex, Term)>,
    ) -> Result<LogWriter, LogError> {
        if let Some(last) = recovered.segments.last() {
            // What was read back may be in the system's memory only.
            let path = segment_path(dir, last.number);
            let file = disk.open(&path, Open::Write).map_err(LogError::io(&path, "open"))?;
            file.sync().map_err(LogError::io(&path, "sync"))?;
        }
        if let Some((index, term)) = reset {
            recovered.entries.clear();
            recovered.segments.iter_mut().for_each(|segment| segment.last = LogIndex(0));
            recovered.start = Point { index, term };
            // Raft does not accept a commit index that the log does not have.
            recovered.hard_state.commit = index.0;
            recovered.hard_state.term = recovered.hard_state.term.max(term.0);
        }
        let number = recovered.segments.last().map_or(1, |s| s.number + 1);
        let file = disk
            .open(&segment_path(dir, number), Open::Create)
            .map_err(LogError::io(dir, "make a segment in"))?;
        let mut writer = LogWriter {
            disk,
            dir: dir.to_owned(),
            file,
            offset: 0,
            next_frame: recovered.next_frame,
            prepared_after: 0,
            hard_state: recovered.hard_state.clone(),
            last: recovered.last(),
            segments: recovered.segments.drain(..).collect(),
        };
        writer.begin_segment(number, reset.is_some())?;
        Ok(writer)
    }

    /// Writes batches, in order, with as few syncs as possible.
    pub fn write(&mut self, batches: Vec<Batch>) -> Result<Written, LogError> {
        let mut written = Written { number: 0, entries: Vec::new() };
        let mut frame = empty_frame();
        let mut placed = Vec::new();
        self.check_order(&batches)?;
        for batch in batches {
            if let Some(point) = batch.reset {
                self.write_frame(&mut frame, &mut placed, &mut written)?;
                if let Some(state) = batch.hard_state {
                    self.hard_state = state;
                }
                self.last = point;
                let number = self.segments.back().map_or(1, |s| s.number + 1);
                self.begin_segment(number, true)?;
                self.remove_segments(self.segments.len() - 1)?;
                written.entries.clear();
            } else if let Some(state) = batch.hard_state {
                put_hard_state(&mut frame, &state);
                self.hard_state = state;
            }
            for entry in &batch.entries {
                let at = frame.len();
                put_entry(&mut frame, entry);
                let (index, term) = (LogIndex(entry.index), Term(entry.term));
                placed.push((index, term, at, frame.len() - at));
            }
            written.number = batch.number;
        }
        self.write_frame(&mut frame, &mut placed, &mut written)?;
        Ok(written)
    }

    /// What is read back must be without a gap: who wrote one would find its log damaged at its
    /// next start.
    fn check_order(&self, batches: &[Batch]) -> Result<(), LogError> {
        let mut last = self.last.index;
        for batch in batches {
            last = batch.reset.map_or(last, |point| point.index);
            for index in batch.entries.iter().map(|entry| LogIndex(entry.index)) {
                if index.0 > last.0 + 1 {
                    return Err(LogError::OutOfOrder { index, last });
                }
                last = index;
            }
        }
        Ok(())
    }

    /// Removes segments that hold nothing above `index`.
    pub fn purge(&mut self, index: LogIndex) -> Result<(), LogError> {
        let current = self.segments.len().saturating_sub(1);
        let old = self.segments.iter().take(current).take_while(|s| s.last <= index).count();
        self.remove_segments(old)
    }

    /// Makes the file of a next segment, so that its zeros need not be written between two commits.
    pub fn prepare(disk: &dyn Disk, dir: &Path) -> Result<(), LogError> {
        let path = dir.join(PREPARED);
        if disk.exists(&path).map_err(LogError::io(&path, "look for"))? {
            return Ok(());
        }
        let temporary = dir.join("next.making");
        let made = LogWriter::zeros(disk, &temporary)
            .and_then(|()| disk.rename(&temporary, &path).map_err(LogError::io(&path, "rename")));
        if made.is_err() {
            // It may have taken the last room.
            let _ = disk.remove(&temporary);
        }
        made
    }

    fn zeros(disk: &dyn Disk, path: &Path) -> Result<(), LogError> {
        let file = disk.open(path, Open::Create).map_err(LogError::io(path, "create"))?;
        let zeros = vec![0; SEGMENT_LEN.min(1 << 20) as usize];
        for at in (0..SEGMENT_LEN).step_by(zeros.len()) {
            file.write_at(&zeros, at).map_err(LogError::io(path, "write"))?;
        }
        file.sync().map_err(LogError::io(path, "sync"))
    }

    /// True once for each segment, when it is more than half full: time to prepare the next one. (A
    /// next one that is not there is made when it is needed.)
    pub fn wants_next(&mut self) -> bool {
        let current = self.segments.back().map_or(0, |segment| segment.number);
        let wants = self.offset > SEGMENT_LEN / 2 && self.prepared_after != current;
        if wants {
            self.prepared_after = current;
        }
        wants
    }

    fn write_frame(
        &mut self,
        frame: &mut BytesMut,
        placed: &mut Vec<(LogIndex, Term, usize, usize)>,
        written: &mut Written,
    ) -> Result<(), LogError> {
        if frame.len() == FRAME_HEADER {
            return Ok(());
        }
        if self.offset > HEADER as u64 && self.offset + frame.len() as u64 > SEGMENT_LEN {
            let number = self.segments.back().map_or(1, |s| s.number + 1);
            self.begin_segment(number, false)?;
        }
        let Some(segment) = self.segments.back_mut() else { return Ok(()) };
        let path = segment_path(&self.dir, segment.number);
        seal_frame(frame, self.next_frame);
        when_room(&*self.disk, || self.file.write_at(frame, self.offset))
            .map_err(LogError::io(&path, "write"))?;
        if !mutation::on(Mutation::SkipLogSync) {
            self.file.sync().map_err(LogError::io(&path, "sync"))?;
        }
        for (index, term, at, len) in placed.drain(..) {
            let offset = self.offset + at as u64;
            let place = Place { segment: segment.number, offset, len: len as u32 };
            written.entries.push(PlacedEntry { index, term, place });
            segment.last = segment.last.max(index);
            self.last = Point { index, term };
        }
        self.next_frame += 1;
        self.offset += frame.len() as u64;
        *frame = empty_frame();
        Ok(())
    }

    /// Begins a segment with the hard state, durably.
    fn begin_segment(&mut self, number: u64, reset: bool) -> Result<(), LogError> {
        let path = segment_path(&self.dir, number);
        let prepared = self.dir.join(PREPARED);
        if self.disk.exists(&prepared).map_err(LogError::io(&prepared, "look for"))? {
            when_room(&*self.disk, || self.disk.rename(&prepared, &path))
                .map_err(LogError::io(&path, "rename"))?;
        }
        let file = when_room(&*self.disk, || self.disk.open(&path, Open::Create))
            .map_err(LogError::io(&path, "create"))?;
        let header =
            SegmentHeader { number, first_frame: self.next_frame, before: self.last, reset };
        let mut bytes = header.to_bytes();
        let mut frame = empty_frame();
        put_hard_state(&mut frame, &self.hard_state);
        seal_frame(&mut frame, self.next_frame);
        bytes.extend_from_slice(&frame);
        when_room(&*self.disk, || file.write_at(&bytes, 0))
            .map_err(LogError::io(&path, "write"))?;
        file.sync().map_err(LogError::io(&path, "sync"))?;
        self.disk.sync_dir(&self.dir).map_err(LogError::io(&self.dir, "sync"))?;
        self.file = file;
        self.offset = bytes.len() as u64;
        self.next_frame += 1;
        self.segments.push_back(SegmentInfo { number, last: LogIndex(0) });
        Ok(())
    }

    fn remove_segments(&mut self, count: usize) -> Result<(), LogError> {
        for segment in self.segments.drain(..count) {
            let path = segment_path(&self.dir, segment.number);
            self.disk.remove(&path).map_err(LogError::io(&path, "remove"))?;
            // One by one: after a power failure no segment may be missing between two others.
            self.disk.sync_dir(&self.dir).map_err(LogError::io(&self.dir, "sync"))?;
        }
        Ok(())
    }
}

const PREPARED: &str = "next.segment";

fn empty_frame() -> BytesMut {
    BytesMut::zeroed(FRAME_HEADER)
}
