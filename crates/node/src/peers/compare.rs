//! Comparing the contents of two nodes' data files, transaction by transaction.
//!
//! The asking node names the storage and the last transaction that is compared already; the answer,
//! [`Digests`], is about those that follow, about 16 MB of the data file together.
//! None follow if there are no more.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use standby_filestorage::Reader;
use standby_types::Tid;

use crate::cells::shared::Shared;
use crate::cells::wire::{Digest, Digests, Question, receive, send};
use crate::transport::frames::{MAX_FRAME, PeerError, blocking};
use crate::transport::handshake::{Introduction, Purpose, connect};
use crate::transport::stream::Stream;

/// Bytes of the data file that one answer is about.
const BYTES: u64 = 16 << 20;
/// Transactions that one answer is about.
const MOST: usize = 10_000;

#[derive(Debug, Serialize, Deserialize)]
struct Wanted {
    storage: String,
    after: u64,
}

/// The next transactions after `after`, as far as one answer goes, and the bytes that they take.
pub(crate) fn digests(
    reader: &Reader,
    after: Tid,
    through: Tid,
) -> Result<(Vec<Digest>, u64), PeerError> {
    let mut transactions = reader.transactions(after.next(), through)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(stored) = transactions.advance()? {
        let (tid, partial) = (stored.meta.tid, stored.meta.status == b'p');
        found.push(Digest { tid, partial, sum: transactions.checksum(&stored)? });
        bytes += stored.length();
        if bytes > BYTES || found.len() >= MOST {
            break;
        }
    }
    Ok((found, bytes))
}

/// Asks the node at `address` for what follows `after`.
pub(crate) async fn fetch_digests(
    me: &Introduction,
    address: &str,
    storage: &str,
    after: Tid,
) -> Result<Vec<Digest>, PeerError> {
    let (mut stream, _) = connect(me, address, Purpose::Compare).await?;
    let wanted = Wanted { storage: storage.to_owned(), after: after.0 };
    send(&mut stream, &Question(wanted)).await?;
    let Digests(found) = receive(&mut stream, MAX_FRAME).await?;
    Ok(found)
}

/// Serves them.
pub(crate) async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let Question::<Wanted>(wanted) = receive(&mut stream, 4 << 10).await?;
    let reader = shared.storages.get(&wanted.storage).map(|storage| storage.reader());
    let reader = reader.ok_or_else(|| PeerError::Protocol("an unknown storage".into()))?;
    let work = move || digests(&reader, Tid(wanted.after), Tid::MAX);
    let (digests, _) = blocking(work).await?;
    send(&mut stream, &Digests(digests)).await
}

/// The first transaction from which on two files say something else, of those that neither has
/// packed since.
#[derive(Debug, Default)]
pub(crate) struct Comparison(Option<Tid>);

impl Comparison {
    /// Takes the next transactions of both, up to the same one.
    pub(crate) fn add(&mut self, ours: &[Digest], theirs: &[Digest]) {
        let (mut ours, mut theirs) = (ours.iter().peekable(), theirs.iter().peekable());
        while let Some(tid) = ours.peek().into_iter().chain(theirs.peek()).map(|d| d.tid).min() {
            let a = ours.next_if(|digest| digest.tid == tid);
            let b = theirs.next_if(|digest| digest.tid == tid);
            if a.into_iter().chain(b).any(|digest| digest.partial) {
                // What was before may have been removed on one of the two.
                self.0 = None;
            } else if a.map(|digest| digest.sum) != b.map(|digest| digest.sum) {
                self.0.get_or_insert(tid);
            }
        }
    }

    /// That transaction, if there is one.
    pub(crate) fn difference(&self) -> Option<Tid> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_differ_where_neither_was_packed() {
        let digest = |tid, sum| Digest { tid: Tid(tid), partial: false, sum };
        let packed = |tid| Digest { partial: true, ..digest(tid, 0) };
        let compare = |ours: &[Digest], theirs: &[Digest]| {
            let mut comparison = Comparison::default();
            comparison.add(ours, theirs);
            comparison.difference().map(|tid| tid.0)
        };
        let all = [digest(1, 10), digest(2, 20), digest(3, 30)];
        assert_eq!(compare(&all, &all), None);
        assert_eq!(compare(&all, &[digest(1, 10), digest(2, 21), digest(3, 31)]), Some(2));
        assert_eq!(compare(&all, &[digest(1, 10), digest(3, 30)]), Some(2), "one lacks it");
        assert_eq!(compare(&all[..2], &all), Some(3));
        // What a pack has removed on one side is no difference, nor what it has changed.
        assert_eq!(compare(&all, &[packed(2), digest(3, 30)]), None);
        assert_eq!(compare(&all, &[packed(1), digest(2, 20), digest(3, 31)]), Some(3));
    }
}
