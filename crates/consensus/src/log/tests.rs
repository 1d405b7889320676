use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use raft::Storage;
use raft::eraftpb::{Entry, HardState};
use standby_types::disk::{Open, read_all};
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, LogIndex, Term};

use super::segment::segment_path;
use super::*;

const DIR: &str = "/state/log";

fn entry(index: u64, term: u64, data: &[u8]) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term, entry.data) = (index, term, Bytes::copy_from_slice(data));
    entry
}

fn batch(number: u64, term: u64, entries: Vec<Entry>) -> Batch {
    let hard_state = Some(HardState { term, vote: 7, commit: 0, ..HardState::default() });
    Batch { number, hard_state, entries, reset: None }
}

fn disk(memory: &MemoryDisk) -> Arc<dyn Disk> {
    Arc::new(memory.clone())
}

fn open(memory: &MemoryDisk) -> (LogWriter, Recovered) {
    let mut recovered = recover(&disk(memory), Path::new(DIR)).unwrap();
    let writer = LogWriter::open(disk(memory), Path::new(DIR), &mut recovered, None).unwrap();
    (writer, recovered)
}

fn contents(memory: &MemoryDisk) -> Vec<(u64, Bytes)> {
    let recovered = recover(&disk(memory), Path::new(DIR)).unwrap();
    let found = recovered.data_after(memory, Path::new(DIR), LogIndex(0)).unwrap();
    found.into_iter().map(|(index, data)| (index.0, data)).collect()
}

#[test]
fn batches_in_another_order_are_refused() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    let (second, third) =
        (batch(2, 1, vec![entry(2, 1, b"2")]), batch(3, 1, vec![entry(3, 1, b"3")]));
    let refused = writer.write(vec![third, second]);
    assert!(matches!(refused, Err(LogError::OutOfOrder { index: LogIndex(3), last: LogIndex(1) })));
    assert_eq!(contents(&memory).len(), 1);
}

#[test]
fn the_next_segment_is_wanted_once() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    let (mut wanted, mut segments) = (0, 1);
    for number in 1..=48 {
        writer.write(vec![batch(number, 1, vec![entry(number, 1, &vec![0; 1 << 20])])]).unwrap();
        wanted += usize::from(writer.wants_next()) + usize::from(writer.wants_next());
        segments = memory.list(Path::new(DIR)).unwrap().len();
    }
    assert!(segments > 1 && wanted.abs_diff(segments) <= 1, "{wanted} {segments}");
}

#[test]
fn what_was_written_survives_power_failures() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one"), entry(2, 1, b"two")])]).unwrap();
    memory.crash();
    let (mut writer, recovered) = open(&memory);
    assert_eq!(recovered.hard_state.vote, 7);
    assert_eq!(recovered.last_index(), LogIndex(2));
    let batches =
        vec![batch(1, 2, vec![entry(2, 2, b"other")]), batch(2, 2, vec![entry(3, 2, b"three")])];
    let written = writer.write(batches).unwrap();
    assert_eq!((written.number, written.entries.len()), (2, 2));
    memory.crash();
    let expected = [(1, "one"), (2, "other"), (3, "three")];
    assert_eq!(contents(&memory), expected.map(|(i, d)| (i, Bytes::from(d))));
}

/// Row 27 of the end cases, for the log: a torn frame is cut to the last good one.
#[test]
fn row_27_torn_frame_is_ignored() {
    let reference = MemoryDisk::new();
    let (mut writer, _) = open(&reference);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    let path = segment_path(Path::new(DIR), 1);
    let durable = read_all(&reference, &path).unwrap().len();
    writer.write(vec![batch(2, 1, vec![entry(2, 1, b"two")])]).unwrap();
    let whole = read_all(&reference, &path).unwrap();
    for cut in durable..=whole.len() {
        let memory = MemoryDisk::new();
        let file = memory.open(&path, Open::Create).unwrap();
        file.write_at(&whole[..cut], 0).unwrap();
        // Zeros follow, as in a prepared segment.
        file.set_len(whole.len() as u64 + 1000).unwrap();
        let expected = if cut == whole.len() { 2 } else { 1 };
        assert_eq!(contents(&memory).len(), expected, "cut at {cut}");
    }
}

/// Row 27: what is lost below the durable point is damage, not a torn tail.
#[test]
fn row_27_lost_frame_before_a_good_one_is_damage() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    let path = segment_path(Path::new(DIR), 1);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    let at = read_all(&memory, &path).unwrap().len() as u64;
    writer.write(vec![batch(2, 1, vec![entry(2, 1, b"two")])]).unwrap();
    writer.write(vec![batch(3, 1, vec![entry(3, 1, b"three")])]).unwrap();
    memory.open(&path, Open::Write).unwrap().write_at(b"\xff", at + 30).unwrap();
    let error = recover(&disk(&memory), Path::new(DIR)).unwrap_err();
    let LogError::Damaged { offset, .. } = &error else { panic!("{error}") };
    assert_eq!(*offset, at);
    assert!(error.to_string().contains("0000000000000001.log: the log is damaged"), "{error}");

    // The same loss at the end of a segment that has a successor.
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    let at = read_all(&memory, &path).unwrap().len() as u64;
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    open(&memory);
    memory.open(&path, Open::Write).unwrap().write_at(b"\xff", at + 30).unwrap();
    assert!(matches!(recover(&disk(&memory), Path::new(DIR)), Err(LogError::Damaged { .. })));
}

#[test]
fn segments_roll_and_are_purged() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    LogWriter::prepare(&memory, Path::new(DIR)).unwrap();
    let megabyte = vec![7; 1 << 20];
    for index in 1..=40 {
        writer.write(vec![batch(index, 1, vec![entry(index, 1, &megabyte)])]).unwrap();
    }
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 3);
    writer.purge(LogIndex(20)).unwrap();
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 2);
    memory.crash();
    let recovered = recover(&disk(&memory), Path::new(DIR)).unwrap();
    assert!(recovered.first_index() > LogIndex(1));
    assert!(recovered.first_index() <= LogIndex(21));
    assert_eq!(recovered.last_index(), LogIndex(40));
    assert_eq!(recovered.hard_state.vote, 7);
}

/// A purge may leave a segment that begins by replacing entries of one that is gone.
#[test]
fn replaced_entries_do_not_outlive_their_segment() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    let entries = (1..=10).map(|index| entry(index, 1, b"old")).collect();
    writer.write(vec![batch(1, 1, entries)]).unwrap();
    let (mut writer, _) = open(&memory);
    let entries = (8..=12).map(|index| entry(index, 2, b"new")).collect();
    writer.write(vec![batch(1, 2, entries)]).unwrap();
    writer.purge(LogIndex(11)).unwrap();
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 1);
    let recovered = recover(&disk(&memory), Path::new(DIR)).unwrap();
    assert_eq!(recovered.start, Point { index: LogIndex(8), term: Term(2) });
    assert_eq!(recovered.last_index(), LogIndex(12));
}

#[test]
fn a_reset_forgets_what_was_before() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"old")])]).unwrap();
    let reset = Batch {
        reset: Some(Point { index: LogIndex(100), term: Term(4) }),
        ..batch(2, 5, vec![entry(101, 5, b"new")])
    };
    writer.write(vec![reset]).unwrap();
    memory.crash();
    let recovered = recover(&disk(&memory), Path::new(DIR)).unwrap();
    assert_eq!(recovered.first_index(), LogIndex(101));
    assert_eq!(recovered.hard_state.term, 5);
    assert_eq!(contents(&memory), [(101, Bytes::from_static(b"new"))]);
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 1);
}

/// A kill while old segments are removed after a reset leaves some of them.
#[test]
fn segments_left_from_before_a_reset_are_purged_later() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"old")])]).unwrap();
    let mut recovered = recover(&disk(&memory), Path::new(DIR)).unwrap();
    let reset = Some((LogIndex(100), Term(4)));
    let mut writer = LogWriter::open(disk(&memory), Path::new(DIR), &mut recovered, reset).unwrap();
    writer.write(vec![batch(1, 4, vec![entry(101, 4, b"new")])]).unwrap();
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 2);
    let (mut writer, recovered) = open(&memory);
    assert!(recovered.holds(LogIndex(100), Term(4)) && recovered.holds(LogIndex(101), Term(4)));
    assert!(!recovered.holds(LogIndex(101), Term(5)) && !recovered.holds(LogIndex(1), Term(1)));
    writer.purge(LogIndex(100)).unwrap();
    assert_eq!(memory.list(Path::new(DIR)).unwrap().len(), 2);
    assert_eq!(contents(&memory), [(101, Bytes::from_static(b"new"))]);
}

/// A new segment begins with the hard state of the frame that is to follow it.
#[test]
fn a_commit_index_beyond_the_entries_is_not_believed() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    let state = HardState { term: 1, vote: 7, commit: 9, ..HardState::default() };
    let ahead = Batch { hard_state: Some(state), ..batch(1, 1, vec![entry(1, 1, b"one")]) };
    writer.write(vec![ahead]).unwrap();
    let recovered = recover(&disk(&memory), Path::new(DIR)).unwrap();
    assert_eq!((recovered.hard_state.commit, recovered.hard_state.vote), (1, 7));
}

/// Row 28: a damaged header does not make the frames behind it vanish.
#[test]
fn a_damaged_header_before_whole_frames_is_damage() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    let path = segment_path(Path::new(DIR), 1);
    memory.open(&path, Open::Write).unwrap().write_at(b"?", 9).unwrap();
    assert!(matches!(recover(&disk(&memory), Path::new(DIR)), Err(LogError::Damaged { .. })));
}

#[test]
fn what_was_read_back_at_start_is_synced_before_it_counts() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap();
    // Written, not synced, when the process was killed.
    let path = segment_path(Path::new(DIR), 1);
    let bytes = read_all(&memory, &path).unwrap();
    let unsynced = MemoryDisk::new();
    unsynced.open(&path, Open::Create).unwrap().write_at(&bytes, 0).unwrap();
    let (_, recovered) = open(&unsynced);
    assert_eq!(recovered.last_index(), LogIndex(1));
    unsynced.crash();
    assert_eq!(contents(&unsynced).len(), 1);
}

#[test]
fn a_failed_sync_is_an_error() {
    let memory = MemoryDisk::new();
    let (mut writer, _) = open(&memory);
    memory.fail_sync(&segment_path(Path::new(DIR), 1));
    let error = writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one")])]).unwrap_err();
    assert!(error.to_string().contains("cannot sync"), "{error}");
}

#[test]
fn the_view_reads_what_memory_no_longer_holds() {
    let memory = MemoryDisk::new();
    let (mut writer, recovered) = open(&memory);
    let mut view = LogView::new(disk(&memory), DIR.into(), &recovered, Default::default());
    let data = |index: u64| vec![index as u8; 5 << 20];
    for index in 1..=20 {
        let entries = vec![entry(index, 1, &data(index))];
        view.append(&entries);
        let written = writer.write(vec![batch(index, 1, entries)]).unwrap();
        view.placed(&written.entries);
    }
    for index in [1, 2, 20] {
        let found = view.entry(LogIndex(index)).unwrap().unwrap();
        assert_eq!(found.data, data(index));
    }
    let some = view.entries(3, 21, Some(6 << 20), raft::GetEntriesContext::empty(false)).unwrap();
    assert_eq!(some.len(), 1);
    view.append(&[entry(10, 2, b"replaced")]);
    assert_eq!(view.last_index().unwrap(), 10);
    assert_eq!(view.term(10).unwrap(), 2);
    view.compact(LogIndex(5));
    assert_eq!((view.first_index().unwrap(), view.term(5).unwrap()), (6, 1));
    assert!(view.term(4).is_err());
}

proptest::proptest! {
    /// Any bytes instead of a segment are read or refused, never a panic.
    #[test]
    fn damaged_segments_are_read_or_refused(at: usize, byte: u8) {
        let memory = MemoryDisk::new();
        let (mut writer, _) = open(&memory);
        writer.write(vec![batch(1, 1, vec![entry(1, 1, b"one"), entry(2, 1, b"two")])]).unwrap();
        writer.write(vec![batch(2, 1, vec![entry(3, 1, b"three")])]).unwrap();
        let path = segment_path(Path::new(DIR), 1);
        let len = read_all(&memory, &path).unwrap().len();
        memory.open(&path, Open::Write).unwrap().write_at(&[byte], (at % len) as u64).unwrap();
        let _ = recover(&disk(&memory), Path::new(DIR));
    }
}
