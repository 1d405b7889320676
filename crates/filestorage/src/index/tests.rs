use std::path::Path;

use proptest::prelude::*;
use standby_types::memory::MemoryDisk;
use standby_types::{Disk, Tid};

use super::*;
use crate::file::mark::Mark;
use crate::room::Need;

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, u64),
    Remove(u64),
    Many(BTreeMap<u64, u64>),
    Freeze,
    Thaw,
    ThawFailed,
}

fn step() -> impl Strategy<Value = Step> {
    let (oid, position) = (0u64..20, 1u64..1000);
    prop_oneof![
        4 => (oid.clone(), position.clone()).prop_map(|(oid, at)| Step::Insert(oid, at)),
        2 => oid.clone().prop_map(Step::Remove),
        2 => prop::collection::btree_map(oid, position, 1..10).prop_map(Step::Many),
        1 => Just(Step::Freeze),
        1 => Just(Step::Thaw),
        1 => Just(Step::ThawFailed),
    ]
}

proptest! {
    /// Whatever the layers are, the index says what a tree says.
    #[test]
    fn layers_agree_with_a_tree(steps in prop::collection::vec(step(), 1..60)) {
        let (disk, path) = (MemoryDisk::new(), Path::new("/index"));
        let (mut index, mut expected) = (Index::default(), BTreeMap::new());
        let mut merge: Option<Merge> = None;
        for step in steps {
            match step {
                Step::Insert(oid, at) => {
                    index.insert(Oid(oid), Position(at));
                    expected.insert(Oid(oid), Position(at));
                }
                Step::Remove(oid) => {
                    index.remove(Oid(oid));
                    expected.remove(&Oid(oid));
                }
                Step::Many(entries) => {
                    let entries: Vec<_> = entries.into_iter().map(|(oid, at)| (Oid(oid), Position(at))).collect();
                    let new = entries.iter().filter(|(oid, _)| index.get(*oid).is_none()).count();
                    expected.extend(entries.iter().copied());
                    index.insert_many(entries, new as u64);
                }
                Step::Freeze => merge = index.freeze().or(merge),
                Step::Thaw => if let Some(merge) = merge.take() {
                    let mark = Mark { position: Position(9), tid: Tid(9) };
                    index.thaw(Sorted::write(&disk, path, mark, merge.entries(), &|_| Ok(())).unwrap());
                },
                Step::ThawFailed => if let Some(merge) = merge.take() {
                    index.thaw_failed(merge.one_layer());
                },
            }
            prop_assert_eq!(index.len(), expected.len() as u64);
            for oid in (0..21).map(Oid) {
                prop_assert_eq!(index.get(oid), expected.get(&oid).copied());
                let above = expected.range(oid..).next().map(|(oid, at)| (*oid, *at));
                prop_assert_eq!(index.at_or_above(oid), above);
            }
            prop_assert!(index.highest() >= expected.keys().next_back().copied());
        }
        if let Some(merge) = merge.take() {
            index.thaw_failed(merge.one_layer());
        }
        let merge = index.freeze().unwrap();
        prop_assert!(merge.entries().eq(expected));
    }
}

#[test]
fn merges_that_fail_again_and_again_leave_one_layer() {
    let mut index = Index::default();
    for oid in 1..100 {
        index.insert(Oid(oid), Position(oid));
        index.remove(Oid(oid / 2));
        let merge = index.freeze().unwrap();
        assert!(index.freeze().is_none(), "one at a time");
        index.thaw_failed(merge.one_layer());
        assert_eq!(index.layers.len(), 1);
    }
    assert_eq!(
        (index.len(), index.get(Oid(49)), index.get(Oid(99))),
        (50, None, Some(Position(99)))
    );
}

#[test]
fn an_index_file_without_room_leaves_nothing() {
    let (disk, path) = (MemoryDisk::new(), Path::new("/index"));
    let entries = || (0..200_000).map(|oid| (Oid(oid), Position(oid + 4)));
    let mark = Mark { position: Position(9), tid: Tid(9) };
    Sorted::write(&disk, path, mark, entries().take(7), &|_| Ok(())).unwrap();
    // The first megabyte still fits.
    let asked = std::cell::Cell::new(0);
    let room = |need| {
        assert_eq!(need, Need::Next);
        asked.set(asked.get() + 1);
        if asked.get() > 1 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    };
    let refused = Sorted::write(&disk, path, mark, entries(), &room).err().unwrap();
    assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
    assert_eq!(disk.list(Path::new("/")).unwrap(), [path]);
    assert_eq!(Sorted::open(&disk, path).unwrap().len(), 7);
}
