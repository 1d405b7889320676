//! What the primary's machine may know: all of it is in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use standby_filestorage::{Access, Reader, StorageError};
use standby_primary::Facts;
use standby_types::{NodeId, Oid, Tid};
use standby_zeo::{ClientError, Examination, SessionId, VoteAnswer};

use crate::cells::client_errors::read_failed;
use crate::cells::shared::Shared;
use crate::platform::random::random_hex;

/// See the module.
pub(super) struct NodeFacts(pub Arc<Shared>);

impl NodeFacts {
    fn reader(&self, storage: &str) -> Option<Reader> {
        self.0.storages.get(storage).map(|storage| storage.reader())
    }
}

impl Facts for NodeFacts {
    fn wall_clock(&self) -> Duration {
        self.0.wall_clock()
    }

    fn random_hex(&self, bytes: usize) -> Result<String, String> {
        random_hex(bytes).map_err(|error| error.to_string())
    }

    fn last_tid(&self, storage: &str) -> Tid {
        self.reader(storage).map_or(Tid::NONE, |reader| reader.last_tid())
    }

    fn highest_oid(&self, storage: &str) -> Oid {
        self.reader(storage).and_then(|reader| reader.highest_oid()).unwrap_or(Oid(0))
    }

    fn size(&self, storage: &str) -> u64 {
        self.reader(storage).map_or(0, |reader| reader.size())
    }

    fn is_empty(&self, storage: &str) -> bool {
        self.reader(storage).is_none_or(|reader| reader.is_empty())
    }

    fn lies_in_hole(&self, storage: &str, tid: Tid) -> bool {
        self.reader(storage).is_some_and(|reader| reader.hole_of(tid).is_some())
    }

    fn has_holes(&self, storage: &str) -> bool {
        self.reader(storage).is_some_and(|reader| !reader.holes().is_empty())
    }

    fn has_blobs(&self, storage: &str) -> bool {
        self.0.storages.get(storage).is_some_and(|storage| storage.blobs.is_some())
    }

    fn is_packing(&self, storage: &str) -> bool {
        self.0.storages.get(storage).is_some_and(|storage| storage.packing.percent().is_some())
    }

    fn compare(
        &self,
        storage: &str,
        vote: &Examination,
    ) -> Option<Result<VoteAnswer, ClientError>> {
        let reader = self.reader(storage)?;
        match vote.compare(|oid| reader.committed_serial(oid, Access::Cached)) {
            Err(StorageError::NotCached) => None,
            compared => Some(compared.map_err(|error| read_failed(&error))),
        }
    }

    fn full_disk(&self) -> Option<String> {
        self.0.room.reason()
    }

    fn lacks_room(&self) -> bool {
        self.0.room.is_low()
    }

    fn log_busy(&self, now: Duration) -> Duration {
        self.0.log_busy.for_how_long(now)
    }

    fn is_damaged_here(&self) -> bool {
        self.0.damage().is_some()
    }

    fn lacks_data(&self) -> bool {
        self.0.lacks_data()
    }

    fn is_whole(&self) -> bool {
        self.0.is_whole()
    }

    fn belongs(&self) -> bool {
        self.0.belongs()
    }

    fn who(&self, session: SessionId) -> String {
        self.0.sessions.get(session).map_or_else(|| "?".into(), |handle| handle.who())
    }

    fn any_long_call(&self) -> bool {
        self.0.sessions.any_long_call()
    }

    fn any_writer(&self) -> bool {
        self.0.sessions.any_writer()
    }

    fn has_room(&self, id: NodeId) -> bool {
        self.0.reports.has_room(id)
    }

    fn is_slow(&self, id: NodeId) -> bool {
        self.0.reports.is_slow(id)
    }

    fn slowest_write(&self, id: NodeId) -> Duration {
        self.0.reports.slowest_write(id)
    }

    fn is_flapping(&self, id: NodeId) -> bool {
        self.0.reports.is_flapping(id)
    }

    fn is_damaged(&self, id: NodeId) -> bool {
        self.0.reports.is_damaged(id)
    }

    fn silence_of(&self, id: NodeId) -> Duration {
        self.0.reports.silence_of(id)
    }

    fn is_up(&self, id: NodeId) -> bool {
        self.0.reports.is_up(id)
    }

    fn feature_level(&self, id: NodeId) -> u32 {
        self.0.reports.feature_level(id)
    }

    fn last_tids(&self) -> BTreeMap<String, Tid> {
        self.0.reports.last_tids()
    }

    fn last_lost(&self) -> BTreeMap<String, Tid> {
        self.0.reports.last_lost()
    }

    fn ahead_of_majority(&self, voters: &BTreeSet<NodeId>) -> Option<Duration> {
        self.0.reports.ahead_of_majority(voters)
    }

    fn ahead_of(&self, log: (u64, u64), counts: &dyn Fn(&str) -> bool) -> Option<String> {
        self.0.reports.ahead_of(log, counts)
    }
}
