//! Whether this node serves clients that may write.

use crate::machine::Machine;
use crate::machine::switchover::Phase;

/// Whether this node serves clients that may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serving {
    /// It does not lead, or has not applied all that its predecessors committed.
    Replica,
    /// It belongs to a cluster that should not be.
    Superseded,
    /// It leads, and its timeline's first transactions are not committed yet.
    Opening,
    /// It serves.
    Primary,
    /// It serves those that are here until their transactions have ended: a switchover is under
    /// way.
    Draining,
    /// It has handed over: the other node may be elected already.
    HandedOver,
}

impl Machine {
    /// See [`Serving`].
    pub(crate) fn serving(&self) -> Serving {
        let phase = self.switchover.as_ref().map(|switchover| switchover.phase);
        match phase {
            _ if !self.role.serves => Serving::Replica,
            _ if self.alarms.superseded.is_some() => Serving::Superseded,
            _ if self.opening => Serving::Opening,
            None | Some(Phase::Levelling) => Serving::Primary,
            Some(Phase::Draining) => Serving::Draining,
            Some(Phase::Handing) => Serving::HandedOver,
        }
    }

    /// True if this node answers as primary.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.serving(), Serving::Primary | Serving::Draining)
    }
}
