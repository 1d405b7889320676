//! When this node had better not be primary.

use std::collections::VecDeque;
use std::time::Duration;

use standby_consensus::Candidacy;
use tracing::{info, warn};

use crate::machine::Machine;

/// Losses of the leadership, within [`FLAPPING_FOR`], from which a node counts as flapping.
const LOSSES: usize = 3;
/// For how long crashes of the process matter.
pub const CRASHES_MATTER: Duration = Duration::from_secs(300);
/// How long a loss counts.
const FLAPPING_FOR: Duration = Duration::from_secs(60);
/// Without a primary for so long, one that flaps, crashes, or lacks a blob, is better than none: it
/// may have the only log with what was committed last, and nobody else can be elected then.
const NO_PRIMARY: Duration = Duration::from_secs(5);

/// What this node knows of itself as a primary.
pub(crate) struct Suitability {
    /// The process had crashed again and again before it was started.
    pub crash_looping: bool,
    /// When this node has lost the leadership.
    losses: VecDeque<Duration>,
    /// When a primary was last known.
    primary_known_at: Duration,
    /// What consensus was told.
    candidacy: Candidacy,
}

impl Suitability {
    pub(crate) fn new(crash_looping: bool) -> Suitability {
        let (losses, primary_known_at) = (VecDeque::new(), Duration::ZERO);
        Suitability { crash_looping, losses, primary_known_at, candidacy: Candidacy::Stands }
    }

    /// The log has begun anew: the new consensus was told nothing yet.
    pub(crate) fn forget_candidacy(&mut self) {
        self.candidacy = Candidacy::Stands;
    }
}

impl Machine {
    /// This node was primary, and nobody had asked it to hand over.
    pub(crate) fn note_lost_leadership(&mut self) {
        self.suitability.losses.push_back(self.now);
        if self.is_flapping() {
            warn!(
                "this node has lost the leadership again and again: it does not stand for a minute"
            );
        }
    }

    /// True if the node has been primary too often for too short a time.
    pub(crate) fn is_flapping(&self) -> bool {
        self.suitability.losses.len() >= LOSSES
    }

    /// Tells consensus what this node may do.
    pub(crate) fn tick_candidacy(&mut self) {
        let now = self.now;
        self.suitability.losses.retain(|at| now < *at + FLAPPING_FOR);
        if self.role.leader.is_some() {
            self.suitability.primary_known_at = now;
        }
        let alone = self.consensus.membership().voters.len() <= 1;
        let crashes = self.suitability.crash_looping && now < CRASHES_MATTER;
        let others_first = self.is_flapping() || self.disks.is_damaged || crashes;
        let waits = others_first && now < self.suitability.primary_known_at + NO_PRIMARY;
        let candidacy = match () {
            // Nobody else could be primary.
            () if alone => Candidacy::Stands,
            () if self.disks.lacks_data => Candidacy::Abstains,
            () if waits => Candidacy::VotesOnly,
            () => Candidacy::Stands,
        };
        if candidacy != self.suitability.candidacy {
            info!(?candidacy, "what this node does in elections has changed");
            self.suitability.candidacy = candidacy;
            self.consensus.set_candidacy(candidacy);
        }
    }
}
