//! Segment files: `STATE-DIR/log/NNNNNNNNNNNNNNNN.log`, numbered from 1.
//!
//! ```text
//! header   0  "SBYLOG01"                                   8
//!          8  number of the segment                        8
//!         16  number of its first frame                    8
//!         24  index and term of the entry before it        8 8
//!         40  1: nothing before this segment counts        1
//!         41  CRC-32C of bytes 0..41                       4
//!         45  zero                                         19
//!         64  frames, back to back; then zeros
//!
//! frame    0  length of the content                        4
//!          4  CRC-32C of the number and the content        4
//!          8  number: that of the frame before, plus 1     8
//!         16  content: items
//!
//! item     'h' term 8 · vote 8 · commit 8
//!          'e' index 8 · term 8 · type 1 · length of context 4 · length of data 4 ·
//!              CRC-32C of all the rest of the item 4 · context · data
//! ```
//!
//! A frame is written by one call and followed by one sync, before the next frame is written. So at
//! most the last frame can be torn: if a frame is bad and a later one is good, the disk has
//! lost something that was durable. That is told by the frames' numbers, which only grow.
//!
//! An entry whose index is not above the last one's replaces that one and all after it.

use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::{Entry, HardState};
use standby_types::{LogIndex, Term};

use crate::codec::{Malformed, Reader};
use crate::log::Point;
use crate::message::{entry_code, entry_type};

/// A segment's length; one is begun when the last is full. They are filled with zeros before they
/// are used: overwriting is synced about twice as fast as growing a file.
pub const SEGMENT_LEN: u64 = if cfg!(feature = "simulated") { 64 << 10 } else { 16 << 20 };

pub(crate) const HEADER: usize = 64;
pub(crate) const FRAME_HEADER: usize = 16;
/// The fixed part of an entry's item, its tag included.
pub(crate) const ENTRY_HEADER: usize = 30;
const MAGIC: &[u8; 8] = b"SBYLOG01";

/// Why the log cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum LogError {
    /// The operating system refused. After a failed write or sync the process must stop.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        /// The reason it gave.
        source: std::io::Error,
    },
    /// Something that was durable is not there any more.
    #[error("{}: the log is damaged at byte {offset}: {reason}", path.display())]
    Damaged { path: PathBuf, offset: u64, reason: String },
    /// The caller has lost or swapped a batch. Nothing was written.
    #[error("entry {index} was to be written to the log after entry {last}")]
    OutOfOrder {
        index: LogIndex,
        /// The one that is or would be the last.
        last: LogIndex,
    },
}

impl LogError {
    /// True if something that was durable is lost: it is not what was written, or the device cannot
    /// read it.
    pub fn is_damage(&self) -> bool {
        const EIO: i32 = 5;
        match self {
            LogError::Io { action, source, .. } => {
                *action == "read" && source.raw_os_error() == Some(EIO)
            }
            LogError::Damaged { .. } => true,
            LogError::OutOfOrder { .. } => false,
        }
    }

    pub(crate) fn io(
        path: &Path,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> LogError + use<> {
        let path = path.to_owned();
        move |source| LogError::Io { path, action, source }
    }
}

/// Where an entry's item stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub segment: u64,
    pub offset: u64,
    pub len: u32,
}

/// An entry that is on disk now. Only the log's view looks inside.
#[derive(Clone, Copy, Debug)]
pub struct PlacedEntry {
    pub(crate) index: LogIndex,
    pub(crate) term: Term,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub number: u64,
    pub first_frame: u64,
    pub before: Point,
    pub reset: bool,
}

impl SegmentHeader {
    pub fn to_bytes(self) -> BytesMut {
        let mut out = BytesMut::with_capacity(HEADER);
        out.put_slice(MAGIC);
        out.put_u64(self.number);
        out.put_u64(self.first_frame);
        out.put_u64(self.before.index.0);
        out.put_u64(self.before.term.0);
        out.put_u8(u8::from(self.reset));
        out.put_u32(crc32c::crc32c(&out));
        out.resize(HEADER, 0);
        out
    }

    pub fn parse(bytes: &[u8]) -> Option<SegmentHeader> {
        let header = bytes.get(..45)?;
        let sum = u32::from_be_bytes(header[41..45].try_into().ok()?);
        if &header[..8] != MAGIC || crc32c::crc32c(&header[..41]) != sum {
            return None;
        }
        let mut reader = Reader::new(Bytes::copy_from_slice(&header[8..41]), "segment header");
        Some(SegmentHeader {
            number: reader.u64().ok()?,
            first_frame: reader.u64().ok()?,
            before: Point { index: LogIndex(reader.u64().ok()?), term: Term(reader.u64().ok()?) },
            reset: reader.bool().ok()?,
        })
    }
}

pub(crate) fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.log"))
}

/// The number in a segment file's name.
pub(crate) fn segment_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".log")?;
    (name.len() == 16).then(|| u64::from_str_radix(name, 16).ok())?
}

/// Writes a frame's header over the [`FRAME_HEADER`] bytes that `frame` begins with.
pub(crate) fn seal_frame(frame: &mut BytesMut, number: u64) {
    let len = (frame.len() - FRAME_HEADER) as u32;
    frame[8..16].copy_from_slice(&number.to_be_bytes());
    let sum = crc32c::crc32c(&frame[8..]);
    frame[0..4].copy_from_slice(&len.to_be_bytes());
    frame[4..8].copy_from_slice(&sum.to_be_bytes());
}

/// The number and the content of the frame that `bytes` begin with, if it is whole.
pub(crate) fn parse_frame(bytes: &Bytes) -> Option<(u64, Bytes)> {
    let header = bytes.get(..FRAME_HEADER)?;
    let len = u32::from_be_bytes(header[0..4].try_into().ok()?) as usize;
    let end = FRAME_HEADER.checked_add(len)?;
    if len == 0 || end > bytes.len() {
        return None;
    }
    let sum = u32::from_be_bytes(header[4..8].try_into().ok()?);
    if crc32c::crc32c(&bytes[8..end]) != sum {
        return None;
    }
    Some((u64::from_be_bytes(header[8..16].try_into().ok()?), bytes.slice(FRAME_HEADER..end)))
}

pub(crate) fn put_hard_state(out: &mut BytesMut, state: &HardState) {
    out.put_u8(b'h');
    out.put_u64(state.term);
    out.put_u64(state.vote);
    out.put_u64(state.commit);
}

pub(crate) fn put_entry(out: &mut BytesMut, entry: &Entry) {
    let start = out.len();
    out.put_u8(b'e');
    out.put_u64(entry.index);
    out.put_u64(entry.term);
    out.put_u8(entry_code(entry.get_entry_type()));
    out.put_u32(entry.context.len() as u32);
    out.put_u32(entry.data.len() as u32);
    let sum = crc32c::crc32c(&out[start..]);
    let sum = crc32c::crc32c_append(sum, &entry.context);
    out.put_u32(crc32c::crc32c_append(sum, &entry.data));
    out.put_slice(&entry.context);
    out.put_slice(&entry.data);
}

pub(crate) enum Item {
    HardState(HardState),
    Entry(Entry),
}

/// Takes the item that `bytes` begin with; also returns its length.
pub(crate) fn take_item(bytes: &Bytes) -> Result<(Item, usize), Malformed> {
    let mut reader = Reader::new(bytes.clone(), "log item");
    match reader.u8()? {
        b'h' => {
            let state = HardState {
                term: reader.u64()?,
                vote: reader.u64()?,
                commit: reader.u64()?,
                ..HardState::default()
            };
            Ok((Item::HardState(state), 25))
        }
        b'e' => {
            let mut entry = Entry::default();
            entry.index = reader.u64()?;
            entry.term = reader.u64()?;
            entry.set_entry_type(entry_type(reader.u8()?).ok_or(reader.malformed())?);
            let context_len = reader.u32()? as usize;
            let data_len = reader.u32()? as usize;
            let sum = reader.u32()?;
            let data_at = ENTRY_HEADER + context_len;
            let end = data_at + data_len;
            if bytes.len() < end {
                return Err(reader.malformed());
            }
            let head = crc32c::crc32c(&bytes[..ENTRY_HEADER - 4]);
            if crc32c::crc32c_append(head, &bytes[ENTRY_HEADER..end]) != sum {
                return Err(reader.malformed());
            }
            entry.context = bytes.slice(ENTRY_HEADER..data_at);
            entry.data = bytes.slice(data_at..end);
            Ok((Item::Entry(entry), end))
        }
        _ => Err(reader.malformed()),
    }
}
