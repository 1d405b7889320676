//! Full disks: who may commit, and where the primary should be.

use std::collections::BTreeSet;
use std::time::Duration;

use standby_types::NodeId;
use standby_zeo::ClientError;
use tracing::{info, warn};

use super::Engine;

/// Between two attempts to find a better place for the primary.
const PAUSE: Duration = Duration::from_secs(10);
/// How long transactions that have voted are waited for.
const GRACE: Duration = Duration::from_secs(5);

impl Engine {
    /// True if the node has room on its disks, as far as is known.
    pub(super) fn has_room(&self, id: NodeId) -> bool {
        if id == self.shared.id {
            !self.shared.room.is_low()
        } else {
            self.shared.reports.has_room(id)
        }
    }

    /// Why nothing can be committed now, if disks are full.
    pub(super) fn no_room(&self) -> Option<ClientError> {
        if let Some(reason) = self.shared.room.reason() {
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
            "nothing can be committed: the disks of {} are nearly full, and the others are no majority",
            Vec::from_iter(names).join(", ")
        )))
    }

    /// A primary without room lets a node that has some be primary.
    pub(super) fn tend_room(&mut self) {
        let now = self.shared.now();
        let rests = self.moved_for_room.is_some_and(|at| now < at + PAUSE);
        let busy = self.switchover.is_some() || self.settings.moving_to.is_some();
        if !self.shared.room.is_low() || !self.serves() || busy || rests {
            return;
        }
        self.moved_for_room = Some(now);
        let better = self.best_voter(|group| group == self.shared.member.group);
        match better.or_else(|| self.best_voter(|_| true)) {
            Some(target) if self.has_room(target) => {
                info!("this primary's disk is nearly full: another node is to be primary");
                self.switch_to(target, GRACE, None);
            }
            _ => warn!("this primary's disk is nearly full, and no other voter has room"),
        }
    }
}
