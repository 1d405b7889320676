//! What must not be, and is: a disk that was put back to an earlier state, and a second cluster of
//! the same name.

use std::time::Duration;

use standby_consensus::Broken;
use standby_replica::state_dir::Note;
use standby_types::{LogIndex, NodeId};
use tracing::{error, warn};

use crate::primary::engine::{Ended, Engine};

/// How long a primary may lead without a lease before it says so.
pub(super) const NO_LEASE: Duration = Duration::from_secs(3);
/// Time between two log lines about that.
const NO_LEASE_QUIET: Duration = Duration::from_secs(60);

impl Engine {
    /// A majority of the listed members agrees to this node's founding. Whoever has become a member
    /// of a cluster meanwhile founds none.
    pub(super) fn founds(&mut self) {
        if !self.shared.belongs()
            && self.consensus.membership().members.is_empty()
            && self.catch_up.is_none()
        {
            self.ends = Some(Ended::Founds);
        }
    }

    /// Consensus has met what Raft rules out.
    pub(super) fn broken(&mut self, broken: Broken) {
        match broken {
            Broken::LostHere { acknowledged, leader } => {
                let by = self.name_of(leader).unwrap_or_default();
                self.rolled_back(acknowledged, &by);
            }
            Broken::LeaderLacks { committed, leader } => {
                let leader = self.name_of(leader).unwrap_or_default();
                self.alarm(format!(
                    "entry {committed} is committed here, and the primary, {leader}, has another \
                     one in its place: commits that were acknowledged are lost there, because the \
                     disk of some node was put back to an earlier state. This node follows no \
                     more; its data file has them"
                ));
            }
            Broken::AheadOfLeader { node, committed } => {
                let node = self.name_of(node).unwrap_or_default();
                self.alarm(format!(
                    "{node} has committed entries up to {committed}, which this primary lacks: \
                     commits that were acknowledged are only on {node} now. The disk of some node \
                     was put back to an earlier state"
                ));
            }
        }
    }

    fn alarm(&mut self, text: String) {
        if self.alarm.as_ref() != Some(&text) {
            error!("{text}");
            self.alarm = Some(text);
        }
    }

    /// This node has acknowledged more than it has, and others count on it: it must neither vote
    /// nor acknowledge anything as if nothing had happened.
    pub(super) fn rolled_back(&mut self, acknowledged: LogIndex, by: &str) {
        let last = self.consensus.persisted_index();
        if last >= acknowledged || self.turn.is_some() {
            return;
        }
        self.ends = Some(Ended::RolledBack(format!(
            "the log of this node ends at entry {last}, and {by} knows that it had acknowledged \
             entry {acknowledged}: its disk was put back to an earlier state, or has lost what was \
             written"
        )));
    }

    /// A listed node belongs to another cluster of the same name. The cluster that was founded
    /// later is the one that should not be: it came about while the nodes of the other one were
    /// away.
    pub(super) fn note_other_cluster(&mut self, node: &str, founded: u64) {
        let listed = self.shared.config.standby.iter().flat_map(|standby| &standby.members);
        let known = listed.into_iter().any(|member| member.name == node)
            || self.consensus.membership().named(node).is_some();
        if !known || founded >= self.settings.founded || self.superseded.is_some() {
            return;
        }
        let text = format!(
            "{node} belongs to a cluster of the same name that was founded before this one: this \
             node does not serve any more. What it has stays as it is. To let it join the older \
             cluster, stop it, keep its data files and {} in another place, and start it again",
            self.shared.state.0.display()
        );
        error!("{text}");
        if let Err(error) = self.shared.state.set_note(&*self.shared.disk, Note::Superseded, &text)
        {
            error!(%error, "cannot note durably that this node does not serve");
        }
        self.superseded = Some(text);
        self.shared.sessions.cut("this node belongs to a cluster that should not be", |_| true);
        self.publish_standing();
        self.report_status();
    }

    /// The primary knows what the others have acknowledged; all nodes keep it, for the day when a
    /// disk is put back.
    pub(super) fn tick_acknowledged(&mut self) {
        if !self.role.leads {
            return;
        }
        let committed = self.consensus.commit_index();
        let members = &self.consensus.membership().members;
        let matched = |id: &NodeId| match *id == self.shared.id {
            true => Some((*id, self.consensus.persisted_index().min(committed))),
            false => Some((*id, self.consensus.progress(*id)?.matched.min(committed))),
        };
        self.shared.add_acknowledged(members.keys().filter_map(matched));
    }

    /// A primary that leads and may not serve says why.
    pub(super) fn tick_lease(&mut self) {
        let now = self.shared.now();
        let lacks = self.serves() && !self.shared.lease.holds(now);
        let since = self.lease_lost_at.filter(|_| lacks);
        self.lease_lost_at = lacks.then(|| since.unwrap_or(now));
        let told = self.lease_told_at.is_some_and(|at| now < at + NO_LEASE_QUIET);
        if since.is_some_and(|since| now > since + NO_LEASE) && !told {
            self.lease_told_at = Some(now);
            warn!(
                "this node leads, but a majority answers too late for it to serve: round trips \
                 between the nodes must be shorter than {:?}, or all nodes need \"profile auto\" \
                 or \"profile wan\"",
                self.consensus.lease_length()
            );
        }
    }
}
