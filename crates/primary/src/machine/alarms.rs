//! What must not be, and is: a disk that was put back to an earlier state, and a second cluster of
//! the same name.

use std::time::Duration;

use standby_consensus::Broken;
use standby_types::{LogIndex, NodeId};
use tracing::{error, warn};

use crate::action::{Action, Ended, Which};
use crate::machine::Machine;

/// How long a primary may lead without a lease before it says so.
const NO_LEASE: Duration = Duration::from_secs(3);
/// Time between two log lines about that.
const NO_LEASE_QUIET: Duration = Duration::from_secs(60);

/// What must not be, as far as this node knows.
pub(crate) struct Alarms {
    /// Why this node does not serve: there is an older cluster of the same name.
    pub superseded: Option<String>,
    /// Commits that were acknowledged are lost on some node.
    pub lost: Option<String>,
    /// Since when this node leads without a lease.
    lease_lost_at: Option<Duration>,
    /// When the log last spoke of that.
    lease_told_at: Option<Duration>,
}

impl Alarms {
    pub(crate) fn new(superseded: Option<String>) -> Alarms {
        Alarms { superseded, lost: None, lease_lost_at: None, lease_told_at: None }
    }
}

impl Machine {
    /// A majority of the listed members agrees to this node's bootstrap. Whoever has become a
    /// member of a cluster meanwhile bootstraps none.
    pub(crate) fn bootstraps(&mut self) {
        if !self.facts.belongs()
            && self.consensus.membership().members.is_empty()
            && !self.catching_up
        {
            self.end(Ended::Bootstraps);
        }
    }

    /// Consensus has met what Raft rules out.
    pub(crate) fn broken(&mut self, broken: Broken) {
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
        if self.alarms.lost.as_ref() != Some(&text) {
            error!("{text}");
            self.alarms.lost = Some(text);
        }
    }

    /// This node has acknowledged more than it has, and others count on it: it must neither vote
    /// nor acknowledge anything as if nothing had happened.
    pub(crate) fn rolled_back(&mut self, acknowledged: LogIndex, by: &str) {
        let last = self.consensus.persisted_index();
        if last >= acknowledged || self.promotion.is_some() {
            return;
        }
        self.end(Ended::RolledBack(format!(
            "the log of this node ends at entry {last}, and {by} knows that it had acknowledged \
             entry {acknowledged}: its disk was put back to an earlier state, or has lost what was \
             written"
        )));
    }

    /// A listed node belongs to another cluster of the same name. The cluster that was bootstrapped
    /// later is the one that should not be: it came about while the nodes of the other one were
    /// away.
    pub(crate) fn note_other_cluster(&mut self, node: &str, bootstrapped: u64) {
        let listed = self.config.standby.iter().flat_map(|standby| &standby.members);
        let known = listed.into_iter().any(|member| member.name == node)
            || self.consensus.membership().named(node).is_some();
        if !known || bootstrapped >= self.settings.bootstrapped || self.alarms.superseded.is_some()
        {
            return;
        }
        let text = format!(
            "{node} belongs to a cluster of the same name that was bootstrapped before this one: this \
             node does not serve any more. What it has stays as it is. To let it join the older \
             cluster, stop it, keep its data files and {} in another place, and start it again",
            self.config.state_dir().display()
        );
        error!("{text}");
        self.act(Action::NoteSuperseded(text.clone()));
        self.alarms.superseded = Some(text);
        let reason = "this node belongs to a cluster that should not be";
        self.act(Action::CutAll(Which::All, reason));
        self.publish_serving();
        self.report();
    }

    /// The primary knows what the others have acknowledged; all nodes keep it, for the day when a
    /// disk is put back.
    pub(crate) fn tick_acknowledged(&mut self) {
        if !self.role.leads {
            return;
        }
        let committed = self.consensus.commit_index();
        let members = &self.consensus.membership().members;
        let matched = |id: &NodeId| match *id == self.me.id {
            true => Some((*id, self.consensus.persisted_index().min(committed))),
            false => Some((*id, self.consensus.progress(*id)?.matched.min(committed))),
        };
        let known = members.keys().filter_map(matched).collect();
        self.act(Action::Acknowledged(known));
    }

    /// A primary that leads and may not serve says why.
    pub(crate) fn tick_lease(&mut self) {
        let now = self.now;
        let lacks = self.serves() && !self.is_surely_primary();
        let since = self.alarms.lease_lost_at.filter(|_| lacks);
        self.alarms.lease_lost_at = lacks.then(|| since.unwrap_or(now));
        let told = self.alarms.lease_told_at.is_some_and(|at| now < at + NO_LEASE_QUIET);
        if since.is_some_and(|since| now > since + NO_LEASE) && !told {
            self.alarms.lease_told_at = Some(now);
            warn!(
                "this node leads, but a majority answers too late for it to serve: round trips \
                 between the nodes must be shorter than {:?}, or all nodes need \"profile auto\" \
                 or \"profile wan\"",
                self.consensus.lease_length()
            );
        }
    }

    /// True if this node has led for long without being allowed to serve.
    pub(crate) fn has_no_lease(&self) -> bool {
        self.alarms.lease_lost_at.is_some_and(|at| self.now > at + NO_LEASE)
    }
}
