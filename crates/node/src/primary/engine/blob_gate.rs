//! Blobs and the log: an entry is persisted only where all of its blobs are durable, so the
//! majority that has the entry has the blobs.
//!
//! The primary announces an upload as soon as it is complete, and proposes the transaction when a
//! majority has said that the upload has arrived: so others need not wait for it behind the entry.
//! A node that gets an entry without its blobs holds the message back, and those that follow it,
//! until it has fetched them. It may also drop them: Raft sends again. If a pack has removed one of
//! them meanwhile, nobody has it: the node then catches up from the data file, as one for which the
//! log does not reach back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use standby_consensus::{Committed, Event as Happened, PeerMessage, ending_with_blobs};
use standby_filestorage::take_meta;
use standby_replica::machine::ApplyError;
use standby_types::{BlobSource, NodeId, Tid, Transfer, Upload};
use tracing::{debug, info, warn};

use crate::cells::announcement::Announcement;
use crate::cells::events::{Fetched, TaskReport};
use crate::cells::storage::StorageShared;
use crate::cells::wire::LinkFrame;
use crate::peers::blob::{Wanted, WantedBlob, obtain};
use crate::platform;
use crate::primary::engine::{Engine, Outgoing};
use crate::transport::frames::PeerError;

/// Messages that are held back; more are dropped.
const HELD: usize = 256;
/// Uploads that are remembered; what is forgotten is looked for on disk.
const REMEMBERED: usize = 10_000;
/// Time after a failed fetch before anybody tries again.
const PAUSE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Default)]
pub(super) struct Blobs {
    /// Uploads that are durable here and not applied yet.
    here: BTreeSet<Transfer>,
    fetching: BTreeSet<Transfer>,
    /// Uploads that were given up while they were being fetched.
    forgotten: BTreeSet<Transfer>,
    /// Messages with entries that must wait, in order.
    held: VecDeque<PeerMessage>,
    /// Where uploads have arrived.
    arrived: BTreeMap<Transfer, BTreeSet<NodeId>>,
    /// Transactions whose blobs have not arrived at a majority.
    waiting: Vec<Outgoing>,
}

impl Blobs {
    /// This node is not primary any more.
    pub(super) fn demoted(&mut self) {
        self.waiting.clear();
        self.arrived.clear();
    }

    /// Another node leads: it sends again what was held.
    pub(super) fn leader_changed(&mut self) {
        self.held.clear();
    }

    /// Entries are being applied: their blobs are uploads no more.
    pub(super) fn committed(&mut self, entry: &Committed) {
        if let Committed::Command(_, _, data) = entry
            && let Some(ending) = ending_with_blobs(data)
        {
            for upload in ending.uploads() {
                self.here.remove(&upload.transfer);
                self.arrived.remove(&upload.transfer);
            }
            if let Ok(meta) = take_meta(&mut ending.head.clone()) {
                for blob in ending.blobs {
                    self.here.remove(&Transfer::of_revision(blob.oid, meta.tid));
                }
            }
        }
    }
}

/// True if the file of a storage lacks the revision that has this tid.
fn lies_in_hole(storage: Option<&StorageShared>, tid: Tid) -> bool {
    storage.is_some_and(|storage| storage.reader().hole_of(tid).is_some())
}

impl Engine {
    /// A message of consensus has come.
    pub(super) fn received(&mut self, message: PeerMessage) -> anyhow::Result<()> {
        if !message.is_append() {
            return self.step(Happened::Received(message));
        }
        // Raft sends it again. But a leader must be able to begin: it tells clients why nothing can
        // be committed.
        if self.shared.room.is_low() && !message.is_without_data() {
            return Ok(());
        }
        let missing = self.missing(&message)?;
        if missing.is_empty() && self.blobs.held.is_empty() {
            return self.step(Happened::Received(message));
        }
        if self.blobs.held.len() < HELD {
            let from = message.from();
            self.blobs.held.push_back(message);
            missing.into_iter().for_each(|wanted| self.obtain(from, wanted));
        }
        Ok(())
    }

    /// The blobs of a message's entries that are not known to be here.
    fn missing(&self, message: &PeerMessage) -> anyhow::Result<Vec<Wanted>> {
        let mut missing = Vec::new();
        for ending in message.endings_with_blobs() {
            let storage = self.shared.storages.get(&ending.storage);
            if storage.is_some_and(|storage| storage.blobs.is_none()) {
                return Err(ApplyError::NoBlobDir(ending.storage).into());
            }
            // What means nothing is refused when it is applied.
            let Ok(meta) = take_meta(&mut ending.head.clone()) else { continue };
            for blob in &ending.blobs {
                let (oid, by) = (blob.oid, meta.tid);
                let blob = match blob.source {
                    BlobSource::Upload(upload) => WantedBlob::Upload(upload, Some((oid, by))),
                    BlobSource::Copy(of) if lies_in_hole(storage, of) => {
                        WantedBlob::Copy { oid, of, by }
                    }
                    BlobSource::Copy(_) => continue,
                };
                if !self.blobs.here.contains(&blob.transfer()) {
                    missing.push(Wanted { storage: ending.storage.clone(), blob });
                }
            }
        }
        Ok(missing)
    }

    fn obtain(&mut self, from: NodeId, wanted: Wanted) {
        let members = &self.consensus.membership().members;
        let address = members.get(&from).map(|member| member.peer_address.clone());
        let address = address.or_else(|| self.present.get(&from).map(|p| p.peer_address.clone()));
        let Some(address) = address else { return };
        let transfer = wanted.blob.transfer();
        if !self.blobs.fetching.insert(transfer) {
            return;
        }
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let how = match obtain(&shared, &wanted, &address).await {
                Ok(()) => Fetched::Here,
                Err(PeerError::PackedAway) => Fetched::PackedAway,
                Err(error) => {
                    warn!(address, storage = wanted.storage, %error, "cannot fetch a blob; it is \
                    tried again");
                    tokio::time::sleep(PAUSE).await;
                    Fetched::Failed
                }
            };
            let storage = wanted.storage;
            shared.report(TaskReport::Obtained { from, storage, transfer, how });
        });
    }

    /// A fetch has ended.
    pub(super) fn obtained(
        &mut self,
        from: NodeId,
        storage: &str,
        transfer: Transfer,
        how: Fetched,
    ) -> anyhow::Result<()> {
        self.blobs.fetching.remove(&transfer);
        if self.blobs.forgotten.remove(&transfer) {
            self.discard(storage, transfer);
            return self.release_held_messages();
        }
        match how {
            Fetched::Here => {
                debug!(%transfer, "a blob has arrived");
                if self.blobs.here.len() >= REMEMBERED {
                    self.blobs.here.clear();
                }
                self.blobs.here.insert(transfer);
                self.shared.peers.arrived(from, transfer);
            }
            Fetched::Failed => self.blobs.held.clear(),
            Fetched::PackedAway => {
                info!(storage, "a blob that the log names was packed away: catching up instead");
                self.blobs.held.clear();
                self.step(Happened::CannotFollow)?;
            }
        }
        self.release_held_messages()
    }

    /// Takes up the messages whose blobs are here, in order; sees to it that the others' come.
    fn release_held_messages(&mut self) -> anyhow::Result<()> {
        while let Some(message) = self.blobs.held.front().cloned() {
            let missing = self.missing(&message)?;
            if !missing.is_empty() {
                let from = message.from();
                missing.into_iter().for_each(|wanted| self.obtain(from, wanted));
                break;
            }
            self.blobs.held.pop_front();
            self.step(Happened::Received(message))?;
        }
        Ok(())
    }

    /// Another node has an upload that this one will need.
    pub(super) fn announced(&mut self, from: NodeId, announcement: &Announcement) {
        let Some(upload) = announcement.upload() else { return };
        let storage = announcement.storage();
        let has_dir = self.shared.storages.get(storage).is_some_and(|s| s.blobs.is_some());
        if self.blobs.here.contains(&upload.transfer) {
            self.shared.peers.arrived(from, upload.transfer);
        } else if has_dir {
            let blob = WantedBlob::Upload(upload, None);
            self.obtain(from, Wanted { storage: storage.into(), blob });
        }
    }

    /// The transaction of an upload was aborted.
    pub(super) fn forgotten(&mut self, announcement: &Announcement) {
        let Some(Upload { transfer, .. }) = announcement.upload() else { return };
        self.blobs.here.remove(&transfer);
        if self.blobs.fetching.contains(&transfer) {
            self.blobs.forgotten.insert(transfer);
        } else {
            self.discard(announcement.storage(), transfer);
        }
    }

    fn discard(&self, storage: &str, transfer: Transfer) {
        let blobs = self.shared.storages.get(storage).and_then(|s| s.blobs.clone());
        drop(platform::spawn_blocking(move || {
            // What cannot be removed now goes at the next start.
            let _ = blobs.map(|blobs| blobs.discard(transfer));
        }));
    }

    /// A node has fetched an upload.
    pub(super) fn arrived(&mut self, at: NodeId, transfer: Transfer) {
        if self.blobs.arrived.len() >= REMEMBERED {
            // Who waits announces again.
            self.blobs.arrived.clear();
        }
        self.blobs.arrived.entry(transfer).or_default().insert(at);
        self.release_ready_transactions();
    }

    /// Lets a transaction go into the log, or holds it until its blobs are on a majority.
    pub(super) fn with_blobs(&mut self, outgoing: Outgoing) -> Option<Outgoing> {
        if outgoing.blobs.all.is_empty() || self.at_majority(&outgoing) {
            return Some(outgoing);
        }
        self.blobs.waiting.push(outgoing);
        None
    }

    /// Some time has passed: what has been said may have been lost.
    pub(super) fn tick_blobs(&mut self) -> anyhow::Result<()> {
        for outgoing in &self.blobs.waiting {
            for blob in &outgoing.blobs.all {
                if let BlobSource::Upload(upload) = blob.source {
                    let announcement = Announcement::of(&outgoing.storage, upload);
                    self.shared.peers.tell_all(&LinkFrame::Announced(announcement));
                }
            }
        }
        self.release_ready_transactions();
        self.release_held_messages()
    }

    fn release_ready_transactions(&mut self) {
        for outgoing in std::mem::take(&mut self.blobs.waiting) {
            if self.at_majority(&outgoing) {
                self.outgoing.push_back(outgoing);
            } else {
                self.blobs.waiting.push(outgoing);
            }
        }
    }

    fn at_majority(&self, outgoing: &Outgoing) -> bool {
        outgoing.blobs.all.iter().all(|blob| {
            let BlobSource::Upload(upload) = blob.source else { return true };
            let nowhere = BTreeSet::new();
            let arrived = self.blobs.arrived.get(&upload.transfer).unwrap_or(&nowhere);
            self.consensus.is_safe_on(arrived)
        })
    }
}
