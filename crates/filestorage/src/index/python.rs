//! The index file that Python's FileStorage keeps beside a data file, `Data.fs.index`. Source:
//! `fsIndex.save` in `ZODB/fsIndex.py`, and `FileStorage._restore_index`, which scans only what
//! follows the position.
//!
//! Pickles, one after the other:
//!
//! ```text
//! position up to which the data file is indexed
//! (first 6 bytes of oids, last 2 bytes of each + 6 bytes of each position)   ascending; one for each first 6 bytes
//! None
//! ```

use std::io;
use std::path::{Path, PathBuf};

use standby_types::{Disk, Oid, Position};

use super::{Growing, write_in_place};

/// Protocol 3, as ZODB writes.
const PROTO: &[u8] = b"\x80\x03";
const STOP: &[u8] = b".";

/// Where Python looks for the index of a data file.
pub(crate) fn python_index_path(data: &Path) -> PathBuf {
    PathBuf::from(format!("{}.index", data.display()))
}

/// Writes the index of the data file `data`, of which `position` is the end; `entries` ascend.
pub(crate) fn write_python_index(
    disk: &dyn Disk,
    data: &Path,
    position: Position,
    entries: impl Iterator<Item = (Oid, Position)>,
) -> io::Result<()> {
    let path = python_index_path(data);
    // As Python names it.
    let temporary = PathBuf::from(format!("{}.index_tmp", path.display()));
    write_in_place(disk, &temporary, &path, |file| {
        let mut file = Growing::new(file, 0);
        file.put(&[PROTO, &long(position.0), STOP].concat())?;
        let (mut prefix, mut suffixes, mut positions) = (None, Vec::new(), Vec::new());
        for (oid, at) in entries {
            if let Some(full) = prefix.replace(oid.0 >> 16).filter(|known| *known != oid.0 >> 16) {
                file.put(&bucket(full, &mut suffixes, &mut positions))?;
            }
            suffixes.extend_from_slice(&oid.to_bytes()[6..]);
            positions.extend_from_slice(&at.to_bytes()[2..]);
        }
        if let Some(last) = prefix {
            file.put(&bucket(last, &mut suffixes, &mut positions))?;
        }
        file.put(&[PROTO, b"N", STOP].concat())?;
        file.flush()
    })
}

/// A pair of byte strings; the vectors are empty then.
fn bucket(prefix: u64, suffixes: &mut Vec<u8>, positions: &mut Vec<u8>) -> Vec<u8> {
    let mut out = PROTO.to_vec();
    // SHORT_BINBYTES, BINBYTES, TUPLE2
    out.extend_from_slice(b"C\x06");
    out.extend_from_slice(&prefix.to_be_bytes()[2..]);
    out.push(b'B');
    // At most 65536 oids have the same first bytes.
    out.extend_from_slice(&((suffixes.len() + positions.len()) as u32).to_le_bytes());
    out.append(suffixes);
    out.append(positions);
    out.extend_from_slice(b"\x86.");
    out
}

/// LONG1: a length, and so many bytes of a little-endian number with a sign.
fn long(number: u64) -> Vec<u8> {
    [&b"\x8a\x09"[..], &number.to_le_bytes(), &[0]].concat()
}
