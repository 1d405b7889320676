//! What a machine may know beside its inputs: what the script says, and what its node has.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use standby_filestorage::{Access, Reader};
use standby_primary::Facts;
use standby_replica::settings::FEATURE_LEVEL;
use standby_types::{NodeId, Oid, Tid};
use standby_zeo::{ClientError, Examination, SessionId, VoteAnswer};

thread_local! {
    pub static DRAWN: Cell<u64> = const { Cell::new(0) };
}

/// Another name each time is all that is needed.
pub fn draw(bytes: &mut [u8]) -> std::io::Result<()> {
    let drawn = DRAWN.get() + 1;
    DRAWN.set(drawn);
    bytes.fill(0);
    let len = bytes.len();
    bytes[len - 1] = drawn as u8;
    Ok(())
}

/// The time of day when a world begins.
pub fn wall_clock() -> Duration {
    Duration::from_secs(1_700_000_000)
}

/// What a machine may know, as the script says.
#[derive(Default)]
pub struct Known {
    pub me: NodeId,
    /// Monotonic.
    pub now: Duration,
    /// Since the beginning of the world.
    pub time: Duration,
    /// By how much the clock is ahead.
    pub ahead: Duration,
    /// By how much a majority says that it is ahead.
    pub said_ahead: Option<Duration>,
    pub reader: Option<Reader>,
    pub packing: bool,
    pub full: BTreeSet<NodeId>,
    pub slow: BTreeSet<NodeId>,
    pub damaged: BTreeSet<NodeId>,
    pub flapping: BTreeSet<NodeId>,
    /// What is damaged is in a data file.
    pub lacks_data: bool,
    pub stalled: Option<Duration>,
    pub long_call: bool,
    pub writers: bool,
    pub up: BTreeSet<NodeId>,
    pub lost: BTreeMap<NodeId, Duration>,
    pub levels: BTreeMap<NodeId, u32>,
    /// A node that has more in its log.
    pub more: Option<String>,
    pub names: BTreeMap<SessionId, String>,
}

/// See [`Known`].
pub struct Table(pub Arc<Mutex<Known>>);

impl Table {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap()
    }

    fn read<T>(&self, read: impl FnOnce(&Reader) -> T) -> T {
        read(self.known().reader.as_ref().unwrap())
    }
}

impl Facts for Table {
    fn wall_clock(&self) -> Duration {
        let known = self.known();
        wall_clock() + known.time + known.ahead
    }

    fn random_hex(&self, bytes: usize) -> Result<String, String> {
        let mut random = vec![0; bytes];
        draw(&mut random).unwrap();
        Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn last_tid(&self, _: &str) -> Tid {
        self.read(|reader| reader.last_tid())
    }

    fn highest_oid(&self, _: &str) -> Oid {
        self.read(|reader| reader.highest_oid().unwrap_or(Oid(0)))
    }

    fn size(&self, _: &str) -> u64 {
        self.read(|reader| reader.size())
    }

    fn is_empty(&self, _: &str) -> bool {
        self.read(|reader| reader.is_empty())
    }

    fn lies_in_hole(&self, _: &str, _: Tid) -> bool {
        false
    }

    fn has_holes(&self, _: &str) -> bool {
        false
    }

    fn has_blobs(&self, _: &str) -> bool {
        true
    }

    fn is_packing(&self, _: &str) -> bool {
        self.known().packing
    }

    fn compare(&self, _: &str, vote: &Examination) -> Option<Result<VoteAnswer, ClientError>> {
        let compared =
            self.read(|reader| vote.compare(|oid| reader.committed_serial(oid, Access::Blocking)));
        Some(compared.map_err(|error| ClientError::storage(error.to_string())))
    }

    fn full_disk(&self) -> Option<String> {
        self.lacks_room().then(|| "the disk is nearly full".to_owned())
    }

    fn lacks_room(&self) -> bool {
        let known = self.known();
        known.full.contains(&known.me)
    }

    fn log_busy(&self, now: Duration) -> Duration {
        self.known().stalled.map_or(Duration::ZERO, |since| now - since)
    }

    fn is_damaged_here(&self) -> bool {
        let known = self.known();
        known.damaged.contains(&known.me)
    }

    fn lacks_data(&self) -> bool {
        self.known().lacks_data
    }

    fn is_whole(&self) -> bool {
        true
    }

    fn belongs(&self) -> bool {
        true
    }

    fn who(&self, session: SessionId) -> String {
        self.known().names.get(&session).cloned().unwrap_or_else(|| "?".into())
    }

    fn any_long_call(&self) -> bool {
        self.known().long_call
    }

    fn any_writer(&self) -> bool {
        self.known().writers
    }

    fn has_room(&self, id: NodeId) -> bool {
        !self.known().full.contains(&id)
    }

    fn is_slow(&self, id: NodeId) -> bool {
        self.known().slow.contains(&id)
    }

    fn slowest_write(&self, id: NodeId) -> Duration {
        if self.is_slow(id) { Duration::from_secs(10) } else { Duration::ZERO }
    }

    fn is_flapping(&self, id: NodeId) -> bool {
        self.known().flapping.contains(&id)
    }

    fn is_damaged(&self, id: NodeId) -> bool {
        self.known().damaged.contains(&id)
    }

    fn silence_of(&self, id: NodeId) -> Duration {
        let known = self.known();
        known.lost.get(&id).map_or(Duration::ZERO, |at| known.time - *at)
    }

    fn is_up(&self, id: NodeId) -> bool {
        self.known().up.contains(&id)
    }

    fn feature_level(&self, id: NodeId) -> u32 {
        self.known().levels.get(&id).copied().unwrap_or(FEATURE_LEVEL)
    }

    fn last_tids(&self) -> BTreeMap<String, Tid> {
        BTreeMap::new()
    }

    fn last_lost(&self) -> BTreeMap<String, Tid> {
        BTreeMap::new()
    }

    fn ahead_of_majority(&self, _: &BTreeSet<NodeId>) -> Option<Duration> {
        self.known().said_ahead
    }

    fn ahead_of(&self, _: (u64, u64), _: &dyn Fn(&str) -> bool) -> Option<String> {
        self.known().more.clone()
    }
}
