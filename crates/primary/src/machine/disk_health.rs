//! Full, slow and damaged disks: who may commit, and where the primary should be.

use std::collections::BTreeSet;
use std::time::Duration;

use standby_types::NodeId;
use standby_zeo::ClientError;
use tracing::{info, warn};

use crate::machine::Machine;

/// Between two attempts to find a better place for the primary.
const PAUSE: Duration = Duration::from_secs(10);
/// How long transactions that have voted are waited for.
const GRACE: Duration = Duration::from_secs(5);
/// A write of the log that takes longer is a sign of a bad disk.
const SLOW: Duration = Duration::from_secs(1);
/// How long a disk counts as slow after such a write.
const SLOW_FOR: Duration = Duration::from_secs(60);
/// By how much another disk must be faster to be a better place: volumes in a cloud stall together.
const FASTER: u32 = 2;

/// The slowest write of the log, of about the last [`SLOW_FOR`].
#[derive(Default)]
pub(crate) struct SlowestWrite {
    seen_at: Duration,
    took: Duration,
}

impl SlowestWrite {
    fn note(&mut self, now: Duration, took: Duration) {
        if took >= self.took || now > self.seen_at + SLOW_FOR {
            *self = SlowestWrite { seen_at: now, took };
        }
    }
}

/// The state of this node's disks.
#[derive(Default)]
pub(crate) struct Disks {
    /// How long the log takes.
    slowest_write: SlowestWrite,
    /// Something is damaged, and nobody has it: another node would be a better primary.
    pub is_damaged: bool,
    /// That is true of a data file.
    pub lacks_data: bool,
    /// When a better place for the primary was last looked for.
    moved_at: Option<Duration>,
}

impl Machine {
    /// True if the node has room on its disks, as far as is known.
    pub(crate) fn has_room(&self, id: NodeId) -> bool {
        match id == self.me.id {
            true => !self.facts.lacks_room(),
            false => self.facts.has_room(id),
        }
    }

    /// True if nothing bad is known of the node's disks.
    pub(crate) fn has_good_disks(&self, id: NodeId) -> bool {
        self.has_room(id)
            && match id == self.me.id {
                true => !self.is_slow() && !self.disks.is_damaged,
                false => !self.facts.is_slow(id) && !self.facts.is_damaged(id),
            }
    }

    /// True if writes of the log take too long here, or did a moment ago.
    pub(crate) fn is_slow(&self) -> bool {
        self.slowest_write() > SLOW
    }

    /// How long a write of the log takes here, at worst.
    pub(crate) fn slowest_write(&self) -> Duration {
        self.disks.slowest_write.took
    }

    /// True if the node would be a better primary than this one, whose disks are full, slow or
    /// damaged.
    fn is_better_place(&self, id: NodeId) -> bool {
        let only_slow = self.has_room(self.me.id) && !self.disks.is_damaged;
        let faster = || self.facts.slowest_write(id) < self.slowest_write() / FASTER;
        self.has_good_disks(id) && (!only_slow || faster())
    }

    /// Why nothing can be committed now, if disks are full.
    pub(crate) fn no_room(&self) -> Option<ClientError> {
        if let Some(reason) = self.facts.full_disk() {
            return Some(ClientError::storage(reason));
        }
        let membership = self.consensus.membership();
        let low: Vec<_> =
            membership.voters.iter().copied().filter(|id| !self.has_room(*id)).collect();
        if low.is_empty() {
            return None;
        }
        let voters = membership.voters.union(&membership.outgoing).copied();
        let with_room: BTreeSet<_> = voters.filter(|id| self.has_room(*id)).collect();
        if membership.is_quorum(&with_room) {
            return None;
        }
        let names: BTreeSet<_> = low.iter().filter_map(|id| self.name_of(*id)).collect();
        Some(ClientError::storage(format!(
            "nothing can be committed: the disks of {} are nearly full, and the others are no \
            majority",
            Vec::from_iter(names).join(", ")
        )))
    }

    /// A primary with a full or slow disk lets a node with better ones be primary.
    pub(crate) fn tick_disks(&mut self) {
        let now = self.now;
        let was_slow = self.is_slow();
        let busy = self.facts.log_busy(now);
        self.disks.slowest_write.note(now, busy);
        if self.is_slow() && !was_slow {
            let seconds = busy.as_secs_f64();
            warn!(seconds, "the disk of the log is slow: one write takes that long already");
        }
        self.disks.is_damaged = self.facts.is_damaged_here();
        self.disks.lacks_data = self.facts.lacks_data();
        let rests = self.disks.moved_at.is_some_and(|at| now < at + PAUSE);
        let moving = self.switchover.is_some() || self.settings.moving_to.is_some();
        if self.has_good_disks(self.me.id) || !self.serves() || moving || rests {
            return;
        }
        self.disks.moved_at = Some(now);
        let better = self.best_voter(|group| group == self.me.group);
        match better.or_else(|| self.best_voter(|_| true)) {
            Some(target) if self.is_better_place(target) => {
                info!(
                    "this primary's disk is full, slow or damaged: another node is to be primary"
                );
                let urgent = self.is_slow();
                self.switch_to(target, GRACE, urgent, None);
            }
            _ => warn!(
                "this primary's disk is full, slow or damaged, and no other voter has a better one"
            ),
        }
    }
}
