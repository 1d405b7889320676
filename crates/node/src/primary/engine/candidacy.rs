//! When this node had better not be primary.

use std::time::Duration;

use standby_consensus::Caution;
use tracing::{info, warn};

use crate::platform::crash_notes;
use crate::primary::engine::Engine;

/// Losses of the leadership, within [`FLAPPING_FOR`], from which a node counts as flapping.
const LOSSES: usize = 3;
/// How long a loss counts.
const FLAPPING_FOR: Duration = Duration::from_secs(60);
/// Without a primary for so long, one that flaps, crashes, or lacks a blob, is better than none: it
/// may have the only log with what was committed last, and nobody else can be elected then.
const NO_PRIMARY: Duration = Duration::from_secs(5);

impl Engine {
    /// This node was primary, and nobody had asked it to hand over.
    pub(super) fn note_lost_leadership(&mut self) {
        self.losses.push_back(self.shared.now());
        if self.is_flapping() {
            warn!(
                "this node has lost the leadership again and again: it does not stand for a minute"
            );
        }
    }

    /// True if the node has been primary too often for too short a time.
    pub(super) fn is_flapping(&self) -> bool {
        self.losses.len() >= LOSSES
    }

    /// Tells consensus what this node may do.
    pub(super) fn tick_caution(&mut self) {
        let now = self.shared.now();
        self.losses.retain(|at| now < *at + FLAPPING_FOR);
        if self.role.leader.is_some() {
            self.primary_known_at = now;
        }
        let alone = self.consensus.membership().voters.len() <= 1;
        let crashes = self.crashes && now < crash_notes::REMEMBERED;
        let others_first = self.is_flapping() || self.is_damaged || crashes;
        let waits = others_first && now < self.primary_known_at + NO_PRIMARY;
        let caution = match () {
            // Nobody else could be primary.
            () if alone => Caution::None,
            () if self.lacks_data => Caution::Abstains,
            () if waits => Caution::DoesNotStand,
            () => Caution::None,
        };
        if caution != self.caution {
            info!(?caution, "what this node does in elections has changed");
            self.caution = caution;
            self.consensus.set_caution(caution);
        }
    }
}
