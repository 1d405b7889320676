//! When this node had better not be primary.

use std::collections::VecDeque;
use std::time::Duration;

use standby_consensus::Caution;
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
pub(crate) struct Candidacy {
    /// The process had crashed again and again before it was started.
    pub crash_looping: bool,
    /// When this node has lost the leadership.
    losses: VecDeque<Duration>,
    /// When a primary was last known.
    primary_known_at: Duration,
    /// What consensus was told.
    caution: Caution,
}

impl Candidacy {
    pub(crate) fn new(crash_looping: bool) -> Candidacy {
        let (losses, primary_known_at) = (VecDeque::new(), Duration::ZERO);
        Candidacy { crash_looping, losses, primary_known_at, caution: Caution::None }
    }

    /// The log has begun anew: the new consensus was told nothing yet.
    pub(crate) fn forget_caution(&mut self) {
        self.caution = Caution::None;
    }
}

impl Machine {
    /// This node was primary, and nobody had asked it to hand over.
    pub(crate) fn note_lost_leadership(&mut self) {
        self.candidacy.losses.push_back(self.now);
        if self.is_flapping() {
            warn!(
                "this node has lost the leadership again and again: it does not stand for a minute"
            );
        }
    }

    /// True if the node has been primary too often for too short a time.
    pub(crate) fn is_flapping(&self) -> bool {
        self.candidacy.losses.len() >= LOSSES
    }

    /// Tells consensus what this node may do.
    pub(crate) fn tick_candidacy(&mut self) {
        let now = self.now;
        self.candidacy.losses.retain(|at| now < *at + FLAPPING_FOR);
        if self.role.leader.is_some() {
            self.candidacy.primary_known_at = now;
        }
        let alone = self.consensus.membership().voters.len() <= 1;
        let crashes = self.candidacy.crash_looping && now < CRASHES_MATTER;
        let others_first = self.is_flapping() || self.disks.is_damaged || crashes;
        let waits = others_first && now < self.candidacy.primary_known_at + NO_PRIMARY;
        let caution = match () {
            // Nobody else could be primary.
            () if alone => Caution::None,
            () if self.disks.lacks_data => Caution::Abstains,
            () if waits => Caution::DoesNotStand,
            () => Caution::None,
        };
        if caution != self.candidacy.caution {
            info!(?caution, "what this node does in elections has changed");
            self.candidacy.caution = caution;
            self.consensus.set_caution(caution);
        }
    }
}
