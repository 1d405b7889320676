//! Damage to data files and blobs: found by their checksums, repaired with what other nodes have.
//!
//! A thread takes the checksums of what has become durable, and goes through each data file and its
//! blobs, again and again and slowly, comparing what the device gives with them. Whatever is
//! damaged, found here or when it is read, is fetched from another node before the reader gets an
//! answer. A node that has damage which nobody can repair neither leads nor votes.
//!
//! When it has been through all, the thread of a replica compares it with the primary's,
//! transaction by transaction: a difference is told, for nobody can say which of the two is right.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use standby_filestorage::{BLOCK, BlobDamage, BlobDir, BlobId, Checking, Damage, Found, Reader};
use standby_types::Tid;
use standby_types::lock::lock;
use standby_types::time::utc;
use tracing::{error, info, warn};

use crate::cells::shared::Shared;
use crate::cells::wire::Digest;
use crate::peers::blob_repair;
use crate::peers::compare::{Comparison, digests, fetch_digests};
use crate::platform::Instant;

/// Time between two looks for work.
const PAUSE: Duration = Duration::from_millis(500);
/// Blocks whose checksums are taken in one go: a large file that has none yet is read at 32 MB/s.
const TOGETHER: usize = 1024;
/// Blocks that are compared in one go.
const STEP: usize = 16;
/// A data file is gone through once in this time, if the rate allows it.
const ROUND: Duration = Duration::from_secs(24 * 3600);
/// Time between two attempts to repair what could not be repaired.
const AGAIN: Duration = Duration::from_secs(5);
/// The same for blobs, which are fetched whole.
const BLOBS_AGAIN: Duration = Duration::from_secs(10);

/// Works on a storage's data file until the process ends.
pub(crate) async fn run(shared: &Arc<Shared>, storage: &str) {
    let Some(stored) = shared.storages.get(storage) else { return };
    let rate = shared.scrub_rate();
    let (mut next, mut begun) = (0, Instant::now());
    let (mut tried, mut tried_blobs) = (Instant::now(), Instant::now());
    let mut taken: Option<Instant> = None;
    let (mut going, mut comparing) = (BlobRound::default(), Comparing::default());
    let (mut told, mut told_blobs) = (Damage::default(), BlobDamage::default());
    loop {
        let reader = stored.reader();
        if taken.is_none_or(|at| at.elapsed() >= PAUSE) {
            taken = Some(Instant::now());
            shared.tell_helpers();
            if let Err(error) = reader.take_sums(TOGETHER) {
                warn!(storage, %error, "cannot take checksums");
            }
        }
        let blocks = reader.summed_blocks();
        if next >= blocks && begun.elapsed() > ROUND {
            (next, begun) = (0, Instant::now());
            (going, comparing) = (BlobRound::default(), Comparing::default());
        }
        let step = next..(next + STEP).min(blocks);
        let pause = match rate {
            Some(rate) if !step.is_empty() => {
                next = step.end;
                let bytes = step.len() as u64 * BLOCK;
                compare(&reader, step);
                at_rate(bytes, rate).min(PAUSE)
            }
            Some(rate) if let Some(blobs) = stored.blobs.as_ref().filter(|_| !going.done) => {
                at_rate(going.go_on(shared, storage, blobs).await, rate).min(PAUSE)
            }
            Some(rate) if !comparing.done => {
                at_rate(comparing.go_on(shared, storage, &reader).await, rate).max(PAUSE)
            }
            _ => PAUSE,
        };
        let damage = reader.damage();
        let damaged_blobs = stored.blobs.as_ref().map(BlobDir::damage).unwrap_or_default();
        if tried.elapsed() > AGAIN {
            tried = Instant::now();
            for offset in &damage.blocks {
                let block = (offset / BLOCK) as usize;
                compare(&reader, block..block + 1);
            }
        }
        if let Some(blobs) = &stored.blobs
            && tried_blobs.elapsed() > BLOBS_AGAIN
        {
            tried_blobs = Instant::now();
            for id in &damaged_blobs.blobs {
                // Somebody may have put it back.
                if blobs.checking(*id).finish() == Found::Damaged {
                    blob_repair::repair(shared, storage, *id).await;
                }
            }
        }
        tell(storage, &told, &damage);
        tell_blobs(storage, &told_blobs, &damaged_blobs);
        (told, told_blobs) = (damage, damaged_blobs);
        tokio::time::sleep(pause).await;
    }
}

fn at_rate(bytes: u64, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / rate as f64)
}

/// How far the scrub of the blobs is.
#[derive(Default)]
struct BlobRound {
    /// Those that are to be looked at; `None` until it is known which.
    left: Option<VecDeque<BlobId>>,
    checking: Option<Checking>,
    done: bool,
}

impl BlobRound {
    /// Reads some more of the blobs; how many bytes.
    async fn go_on(&mut self, shared: &Arc<Shared>, storage: &str, blobs: &BlobDir) -> u64 {
        let left = match &mut self.left {
            Some(left) => left,
            None => match blobs.ids() {
                Ok(ids) => self.left.insert(ids.into()),
                Err(error) => {
                    warn!(storage, %error, "cannot compare the blobs with their checksums");
                    self.done = true;
                    return 0;
                }
            },
        };
        let next = || left.pop_front().map(|id| blobs.checking(id));
        let Some(mut checking) = self.checking.take().or_else(next) else {
            self.done = true;
            return 0;
        };
        let before = checking.bytes();
        let found = checking.step();
        let bytes = checking.bytes() - before;
        match found {
            Some(Found::Right) => {}
            Some(Found::Damaged) => {
                blob_repair::repair(shared, storage, checking.id()).await;
            }
            None => self.checking = Some(checking),
        }
        bytes
    }
}

/// How far the comparison with the primary's data file is.
#[derive(Default)]
struct Comparing {
    compared: Tid,
    comparison: Comparison,
    done: bool,
}

impl Comparing {
    /// Compares some more; the bytes of the data file that it took.
    async fn go_on(&mut self, shared: &Arc<Shared>, storage: &str, reader: &Reader) -> u64 {
        let primary = shared.standing.borrow().other_primary.clone();
        let (Some(address), true) = (primary, reader.is_whole()) else { return 0 };
        let me = shared.introduction();
        let theirs = fetch_digests(&me, &address, storage, self.compared);
        let theirs = match theirs.await {
            Ok(theirs) => theirs,
            Err(error) => {
                info!(address, %error, "cannot compare the data file with the primary's");
                // Another round tries again.
                self.done = true;
                return 0;
            }
        };
        // What one of the two has not applied yet is no difference.
        let last = reader.last_tid();
        let known: Vec<Digest> = theirs.iter().copied().take_while(|d| d.tid <= last).collect();
        let mut bytes = 0;
        if let Some(through) = known.last().map(|digest| digest.tid) {
            match digests(reader, self.compared, through) {
                Ok((ours, len)) => {
                    bytes = len;
                    // Ours may be cut short, if they take more room here.
                    let end = ours.last().map_or(through, |digest| digest.tid);
                    let cut = known.iter().take_while(|digest| digest.tid <= end).count();
                    self.comparison.add(&ours, &known[..cut]);
                    self.compared = end;
                }
                Err(error) => {
                    warn!(storage, %error, "cannot compare the data file with the primary's");
                    self.done = true;
                    return 0;
                }
            }
        }
        if known.len() < theirs.len() || theirs.is_empty() {
            self.done = true;
            let difference = self.comparison.difference();
            if let Some(tid) = difference {
                error!(
                    storage, %tid, time = utc(tid),
                    "the data file is not that of the primary, from this transaction on"
                );
            }
            if let Some(stored) = shared.storages.get(storage) {
                *lock(&stored.differs) = difference;
            }
        }
        bytes
    }
}

fn compare(reader: &Reader, blocks: std::ops::Range<usize>) {
    if let Err(error) = reader.scrub(blocks) {
        warn!(%error, "cannot compare a data file with its checksums");
    }
}

fn tell(storage: &str, before: &Damage, now: &Damage) {
    for offset in now.blocks.difference(&before.blocks) {
        error!(
            storage,
            offset,
            "the data file is damaged here, and no node that can be reached has these bytes"
        );
    }
    if now.blocks.is_empty() && !before.blocks.is_empty() {
        info!(storage, "all damage is repaired");
    }
}

fn tell_blobs(storage: &str, before: &BlobDamage, now: &BlobDamage) {
    for (oid, tid) in now.blobs.difference(&before.blobs) {
        error!(
            storage, %oid, %tid,
            "this blob is damaged or missing, and no node that can be reached has it"
        );
    }
    if now.blobs.is_empty() && !before.blobs.is_empty() {
        info!(storage, "all damaged blobs are repaired");
    }
}
