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

use standby_consensus::{Committed, Event as Happened, PeerMessage, closing_with_blobs};
use standby_filestorage::take_meta;
use standby_replica::machine::ApplyError;
use standby_types::{BlobSource, NodeId, Transfer, Upload};
use tracing::{debug, info};

use crate::Result;
use crate::action::{Action, Wanted, WantedBlob};
use crate::input::Obtained;
use crate::machine::Machine;
use crate::machine::commits::FinishedTransaction;

/// Messages that are held back; more are dropped.
const HELD: usize = 256;
/// Uploads that are remembered; what is forgotten is looked for on disk.
const REMEMBERED: usize = 10_000;

/// See the module.
#[derive(Default)]
pub(crate) struct Blobs {
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
    waiting: Vec<FinishedTransaction>,
}

impl Blobs {
    /// Fails if an invariant does not hold.
    pub(crate) fn invariants(&self) {
        assert!(self.forgotten.is_subset(&self.fetching), "what is forgotten was not fetched");
        assert!(self.held.len() <= HELD, "messages that are held back");
        assert!(self.here.len() <= REMEMBERED && self.arrived.len() <= REMEMBERED, "uploads");
    }

    /// This node is not primary any more.
    pub(crate) fn demoted(&mut self) {
        self.waiting.clear();
        self.arrived.clear();
    }

    /// Another node leads: it sends again what was held.
    pub(crate) fn leader_changed(&mut self) {
        self.held.clear();
    }

    /// Entries are being applied: their blobs are uploads no more.
    pub(crate) fn committed(&mut self, entry: &Committed) {
        if let Committed::Command(_, _, data) = entry
            && let Some(closing) = closing_with_blobs(data)
        {
            for upload in closing.uploads() {
                self.here.remove(&upload.transfer);
                self.arrived.remove(&upload.transfer);
            }
            if let Ok(meta) = take_meta(&mut closing.head.clone()) {
                for blob in closing.blobs {
                    self.here.remove(&Transfer::of_revision(blob.oid, meta.tid));
                }
            }
        }
    }
}

impl Machine {
    /// A message of consensus has come.
    pub(crate) fn received(&mut self, message: PeerMessage) -> Result<()> {
        if !message.is_append() {
            return self.consensus_step(Happened::Received(message));
        }
        // Raft sends it again. But a leader must be able to begin: it tells clients why nothing can
        // be committed.
        if self.facts.lacks_room() && !message.is_without_data() {
            return Ok(());
        }
        let missing = self.missing(&message)?;
        if missing.is_empty() && self.blobs.held.is_empty() {
            return self.consensus_step(Happened::Received(message));
        }
        if self.blobs.held.len() < HELD {
            let from = message.from();
            self.blobs.held.push_back(message);
            missing.into_iter().for_each(|wanted| self.obtain(from, wanted));
        }
        Ok(())
    }

    /// The blobs of a message's entries that are not known to be here.
    fn missing(&self, message: &PeerMessage) -> Result<Vec<Wanted>> {
        let mut missing = Vec::new();
        for closing in message.closings_with_blobs() {
            let storage = &closing.storage;
            if self.storages.contains_key(storage) && !self.facts.has_blobs(storage) {
                return Err(ApplyError::NoBlobDir(closing.storage).into());
            }
            // What means nothing is refused when it is applied.
            let Ok(meta) = take_meta(&mut closing.head.clone()) else { continue };
            for blob in &closing.blobs {
                let (oid, by) = (blob.oid, meta.tid);
                let blob = match blob.source {
                    BlobSource::Upload(upload) => WantedBlob::Upload(upload, Some((oid, by))),
                    BlobSource::Copy(of) if self.facts.lies_in_hole(storage, of) => {
                        WantedBlob::Copy { oid, of, by }
                    }
                    BlobSource::Copy(_) => continue,
                };
                if !self.blobs.here.contains(&blob.transfer()) {
                    missing.push(Wanted { storage: closing.storage.clone(), blob });
                }
            }
        }
        Ok(missing)
    }

    fn obtain(&mut self, from: NodeId, wanted: Wanted) {
        let members = &self.consensus.membership().members;
        let member = members.get(&from).or_else(|| self.members.present(from));
        let Some(address) = member.map(|member| member.peer_address.clone()) else { return };
        if self.blobs.fetching.insert(wanted.blob.transfer()) {
            self.act(Action::Obtain { from, address, wanted });
        }
    }

    /// A fetch has ended.
    pub(crate) fn obtained(
        &mut self,
        from: NodeId,
        storage: String,
        transfer: Transfer,
        how: Obtained,
    ) -> Result<()> {
        self.blobs.fetching.remove(&transfer);
        if self.blobs.forgotten.remove(&transfer) {
            self.act(Action::Discard { storage, transfer });
            return self.release_held_messages();
        }
        match how {
            Obtained::Here => {
                debug!(%transfer, "a blob has arrived");
                if self.blobs.here.len() >= REMEMBERED {
                    self.blobs.here.clear();
                }
                self.blobs.here.insert(transfer);
                self.act(Action::Arrived(from, transfer));
            }
            Obtained::Failed => self.blobs.held.clear(),
            Obtained::PackedAway => {
                info!(storage, "a blob that the log names was packed away: catching up instead");
                self.blobs.held.clear();
                self.consensus_step(Happened::CannotFollow)?;
            }
        }
        self.release_held_messages()
    }

    /// Takes up the messages whose blobs are here, in order; sees to it that the others' come.
    fn release_held_messages(&mut self) -> Result<()> {
        while let Some(message) = self.blobs.held.front().cloned() {
            let missing = self.missing(&message)?;
            if !missing.is_empty() {
                let from = message.from();
                missing.into_iter().for_each(|wanted| self.obtain(from, wanted));
                break;
            }
            self.blobs.held.pop_front();
            self.consensus_step(Happened::Received(message))?;
        }
        Ok(())
    }

    /// Another node has an upload that this one will need.
    pub(crate) fn announced(&mut self, from: NodeId, storage: String, upload: Upload) {
        if self.blobs.here.contains(&upload.transfer) {
            self.act(Action::Arrived(from, upload.transfer));
        } else if self.storages.contains_key(&storage) && self.facts.has_blobs(&storage) {
            self.obtain(from, Wanted { storage, blob: WantedBlob::Upload(upload, None) });
        }
    }

    /// The transaction of an upload was aborted.
    pub(crate) fn forgotten(&mut self, storage: String, transfer: Transfer) {
        self.blobs.here.remove(&transfer);
        if self.blobs.fetching.contains(&transfer) {
            self.blobs.forgotten.insert(transfer);
        } else {
            self.act(Action::Discard { storage, transfer });
        }
    }

    /// A node has fetched an upload.
    pub(crate) fn arrived(&mut self, at: NodeId, transfer: Transfer) {
        if self.blobs.arrived.len() >= REMEMBERED {
            // Who waits announces again.
            self.blobs.arrived.clear();
        }
        self.blobs.arrived.entry(transfer).or_default().insert(at);
        self.release_ready_transactions();
    }

    /// Lets a transaction go into the log, or holds it until its blobs are on a majority.
    pub(crate) fn with_blobs(
        &mut self,
        outgoing: FinishedTransaction,
    ) -> Option<FinishedTransaction> {
        if outgoing.blobs.all.is_empty() || self.at_majority(&outgoing) {
            return Some(outgoing);
        }
        self.blobs.waiting.push(outgoing);
        None
    }

    /// Some time has passed: what has been said may have been lost.
    pub(crate) fn tick_blobs(&mut self) -> Result<()> {
        let mut announced = Vec::new();
        for outgoing in &self.blobs.waiting {
            for blob in &outgoing.blobs.all {
                if let BlobSource::Upload(upload) = blob.source {
                    let storage = outgoing.storage.clone();
                    announced.push(Action::Announce { storage, upload });
                }
            }
        }
        announced.into_iter().for_each(|action| self.act(action));
        self.release_ready_transactions();
        self.release_held_messages()
    }

    fn release_ready_transactions(&mut self) {
        for outgoing in std::mem::take(&mut self.blobs.waiting) {
            if self.at_majority(&outgoing) {
                self.commits.push(outgoing);
            } else {
                self.blobs.waiting.push(outgoing);
            }
        }
    }

    fn at_majority(&self, outgoing: &FinishedTransaction) -> bool {
        outgoing.blobs.all.iter().all(|blob| {
            let BlobSource::Upload(upload) = blob.source else { return true };
            let nowhere = BTreeSet::new();
            let arrived = self.blobs.arrived.get(&upload.transfer).unwrap_or(&nowhere);
            self.consensus.is_safe_on(arrived)
        })
    }
}
