//! Catching up: a node that the log cannot serve any more gets the transactions themselves.
//!
//! The follower says what it has of each storage ([`Request`]); the source answers with
//! [`CatchUpFrame`](crate::cells::wire::CatchUpFrame)s: about how many bytes come, and for each
//! storage the holes in what comes, what has become of its transactions with a token, and the
//! transactions. A record that has a blob comes after it.
//!
//! Everything sent is committed. It may go beyond the state that was asked for; what the log brings
//! again later is recognised by its tid.
//!
//! A fast recovery makes a hole (see [`Hole`](standby_filestorage::Hole)): of the transactions
//! between the follower's last one and the source's, only the records come that are current at the
//! source's, which itself always comes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use standby_config::Recovery;
use standby_filestorage::Mark;
use standby_types::Disk;
use standby_types::disk::{Open, read_full};
use standby_types::hex::hex;

mod follower;
mod source;

pub(crate) use follower::{fetch, fetch_history};
pub(crate) use source::serve;

/// Batches between socket and applier, and between data file and socket.
const QUEUE: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    storages: BTreeMap<String, Have>,
    /// It understands 'p'.
    #[serde(default)]
    progress: bool,
    /// It understands 'f'.
    #[serde(default)]
    holes: bool,
    /// It understands 'o'.
    #[serde(default)]
    outcomes: bool,
    #[serde(default)]
    recovery: Recovery,
    /// Records come without their blobs.
    #[serde(default)]
    without_blobs: bool,
    /// Of this storage only.
    #[serde(default)]
    only: Option<String>,
    /// A source that has not applied this entry of the log is of no use: it was restarted, and does
    /// not know yet that the last entries of its log are committed. 0 from a node of an older
    /// version.
    #[serde(default)]
    index: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Have {
    tid: u64,
    position: u64,
    sha256: Option<String>,
    /// A source that has not come so far is of no use: the follower is within a hole that ends
    /// there.
    #[serde(default)]
    least: u64,
}

/// The hash of a data file up to a mark.
fn hash_of(disk: &dyn Disk, path: &Path, mark: Mark) -> std::io::Result<String> {
    let file = disk.open(path, Open::Read)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    // The magic may differ: it tells only which Python made the file.
    let mut at = Mark::START.position.0;
    while at < mark.position.0 {
        let want = (mark.position.0 - at).min(buffer.len() as u64) as usize;
        let n = read_full(&*file, &mut buffer[..want], at)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        hash.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(hex(&hash.finalize()))
}
