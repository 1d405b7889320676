//! A planned change of the primary.
//!
//! ```text
//!             target level, no long calls       nothing under way        target leads
//!  Levelling ───────────────────▶ Draining ─────────────────▶ Handing ─────────────▶ done
//!  commits go on                  clients leave, each         none is left
//!      │                          after its transaction       │
//!      │ grace over, not level        │ 1 s without progress  │ given up by Raft
//!      ▼                              ▼                       ▼
//!    failed                    failed: this node serves them again
//! ```
//!
//! A primary whose disk does not answer does not wait in `Draining` for what that disk holds up.
//!
//! A ZEO client waits for a server when it has no connection, and notices that only if a call is
//! under way. So clients are sent away between two transactions, and those that come are parked:
//! nobody sees an error. A transaction that has begun but not voted is waited for a moment, one
//! that has voted, an upload, and a pack that its client waits for as long as the grace says.
//!
//! From `Handing` on this node gives no answer as primary: the other one may be elected before this
//! one hears of it, without waiting for a lease to end.

use std::time::Duration;

use standby_types::NodeId;
use tracing::{info, warn};

use crate::Result;
use crate::action::Action;
use crate::caller::Asker;
use crate::command::{Answer, Done};
use crate::machine::Machine;

/// Time for the last commits to reach the other node.
const COMMIT_PATIENCE: Duration = Duration::from_secs(1);
/// Time for transactions that have begun to vote.
const BEGUN_PATIENCE: Duration = Duration::from_millis(300);
/// Time, after the grace, for transactions that have finished to be committed: a full disk may be
/// in their way.
const DRAINING_PATIENCE: Duration = Duration::from_secs(5);
/// Time for the new primary to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest grace.
const MAX_GRACE: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Levelling,
    Draining,
    Handing,
}

/// See the module.
pub(crate) struct Switchover {
    target: NodeId,
    name: String,
    grace: Duration,
    /// This node may not be able to finish what is under way: it is not waited for long.
    urgent: bool,
    pub(crate) phase: Phase,
    /// When the phase began.
    since: Duration,
    /// When clients were first parked.
    held_since: Duration,
    /// Since when no transaction is under way.
    idle_since: Option<Duration>,
    asker: Option<Asker>,
}

impl Machine {
    /// Starts one, or says why not.
    pub(crate) fn begin_switchover(&mut self, to: Option<&str>, grace: f64, asker: Asker) {
        let grace = Duration::try_from_secs_f64(grace).unwrap_or_default().min(MAX_GRACE);
        match self.choose(to) {
            Err(reason) => self.reply(asker, Err(reason)),
            Ok(target) => self.switch_to(target, grace, false, Some(asker)),
        }
    }

    pub(crate) fn switch_to(
        &mut self,
        target: NodeId,
        grace: Duration,
        urgent: bool,
        asker: Option<Asker>,
    ) {
        let name = self.name_of(target).unwrap_or_default();
        info!(to = name, "a switchover begins");
        let now = self.now;
        self.switchover = Some(Switchover {
            target,
            name,
            grace,
            urgent,
            phase: Phase::Levelling,
            since: now,
            held_since: now,
            idle_since: None,
            asker,
        });
    }

    /// The node that is to be primary.
    fn choose(&self, to: Option<&str>) -> Result<NodeId, String> {
        if self.switchover.is_some() {
            return Err("a switchover is under way".into());
        }
        if let Some(group) = &self.settings.moving_to {
            return Err(format!("the primary is being moved to group {group}"));
        }
        let Some(name) = to else {
            let own = self.best_voter(|group| group == self.me.group);
            return own.or_else(|| self.best_voter(|_| true)).ok_or_else(|| {
                "no other voter with data is there that would take the role: see standby status"
                    .to_owned()
            });
        };
        let member = self.member(name)?;
        if member.id == self.me.id {
            return Err(format!("{name} is primary already"));
        }
        if member.witness {
            return Err(format!("{name} is a witness: it has no data"));
        }
        if !self.consensus.membership().voters.contains(&member.id) {
            return Err(format!(
                "{name} has no vote: it is of group {}, which is no fail-over group, or has not \
                 caught up yet. To move the primary to another group: standby group move --to \
                 GROUP",
                member.group
            ));
        }
        if !self.is_there(member.id) {
            return Err(format!("{name} is down"));
        }
        if !self.has_room(member.id) {
            return Err(format!("the disk of {name} is nearly full"));
        }
        if let Some(reason) = self.yields(member.id) {
            return Err(format!("{name} {reason}: it would not take the role; see standby status"));
        }
        Ok(member.id)
    }

    /// Why a node does not stand for election while there is a primary, if it does not.
    fn yields(&self, id: NodeId) -> Option<&'static str> {
        match () {
            () if self.facts.is_damaged(id) => Some("has damaged data"),
            () if self.facts.is_flapping(id) => {
                Some("has lost the leadership again and again within a minute")
            }
            () => None,
        }
    }

    /// The voter with data, of the groups that are `wanted`, that is nearest to this one.
    pub(crate) fn best_voter(&self, wanted: impl Fn(&str) -> bool) -> Option<NodeId> {
        let membership = self.consensus.membership();
        let fits = |id: &NodeId| {
            let member = membership.members.get(id);
            *id != self.me.id
                && member.is_some_and(|m| !m.witness && wanted(&m.group))
                && self.is_there(*id)
                && self.yields(*id).is_none()
        };
        let matched = |id: &NodeId| self.consensus.progress(*id).map(|progress| progress.matched);
        let voters = membership.voters.iter().copied().filter(fits);
        voters.max_by_key(|id| (self.has_good_disks(*id), matched(id)))
    }

    /// True if the node's connection is open and it has answered lately.
    pub(crate) fn is_there(&self, id: NodeId) -> bool {
        let active = self.consensus.progress(id).is_some_and(|progress| progress.active);
        id == self.me.id || active && self.members.is_present(id)
    }

    /// True if clients that may write are to leave, and those that come are parked.
    pub(crate) fn lets_clients_go(&self) -> bool {
        self.switchover.as_ref().is_some_and(|s| s.phase != Phase::Levelling)
    }

    /// Goes on if it can.
    pub(crate) fn tick_switchover(&mut self) -> Result<()> {
        let Some(switchover) = &self.switchover else { return Ok(()) };
        if !self.role.leads {
            return Ok(());
        }
        let (phase, target) = (switchover.phase, switchover.target);
        if phase != Phase::Handing && !self.is_there(target) {
            return self.switchover_failed("it cannot be reached any more");
        }
        let last = self.consensus.last_index().0;
        let behind =
            self.consensus.progress(target).map_or(last, |p| last.saturating_sub(p.matched.0));
        match phase {
            Phase::Levelling => self.tick_levelling(behind),
            Phase::Draining => self.tick_draining(behind),
            Phase::Handing if self.consensus.is_handing_over() => Ok(()),
            Phase::Handing => self.switchover_failed("it did not take the primary's role"),
        }
    }

    /// The target gets what it lacks, and clients end what would take long.
    fn tick_levelling(&mut self, behind: u64) -> Result<()> {
        let Some(switchover) = &self.switchover else { return Ok(()) };
        let waited = self.now.saturating_sub(switchover.since);
        let level = self.is_level(switchover.target);
        let waits_for_calls = self.facts.any_long_call() && waited < switchover.grace;
        if level && (!waits_for_calls || switchover.urgent) {
            self.enter(Phase::Draining);
            self.publish_serving();
            self.act(Action::LetWritersLeave);
            return self.tick_switchover();
        }
        if waited >= switchover.grace.max(COMMIT_PATIENCE) {
            return self.switchover_failed(&format!("it is {behind} log entries behind"));
        }
        Ok(())
    }

    /// Transactions end, and clients that write leave.
    fn tick_draining(&mut self, behind: u64) -> Result<()> {
        let Some(switchover) = &self.switchover else { return Ok(()) };
        let waited = self.now.saturating_sub(switchover.since);
        let (grace, target) = (switchover.grace, switchover.target);
        let idle = self.storages.values().all(|s| s.transactions.is_empty());
        let alone = waited >= BEGUN_PATIENCE || !self.facts.any_writer();
        // A node that has not applied the last change of members does not stand for election.
        let level = self.commits.is_idle() && behind == 0 && !self.consensus.is_changing();
        // What is under way then ends as if this node had died: the target has it, or nobody.
        let enough = switchover.urgent && waited >= COMMIT_PATIENCE && behind == 0;
        if idle && alone && level || enough {
            return self.hand_over(target);
        }
        let now = self.now;
        let idle_since = idle.then(|| switchover.idle_since.unwrap_or(now));
        if idle_since.is_some_and(|since| now >= since + COMMIT_PATIENCE) {
            return self.switchover_failed("the last commits do not reach it");
        }
        if let Some(switchover) = &mut self.switchover {
            switchover.idle_since = idle_since;
        }
        if waited >= grace {
            self.end_transactions();
        }
        if waited >= grace + DRAINING_PATIENCE {
            return self.switchover_failed("what is under way here does not end");
        }
        Ok(())
    }

    fn hand_over(&mut self, target: NodeId) -> Result<()> {
        // Who has acknowledged what, as long as this node can tell.
        self.tick_acknowledged();
        self.enter(Phase::Handing);
        self.publish_lease();
        // After the applier has queued the last replies.
        self.act(Action::SendWritersAwayWhenApplied);
        let mut outputs = Vec::new();
        if self.consensus.hand_over(target, &mut outputs).is_err() {
            return self.switchover_failed("it has no vote any more");
        }
        self.perform(outputs)
    }

    fn enter(&mut self, phase: Phase) {
        let now = self.now;
        if let Some(switchover) = &mut self.switchover {
            if phase == Phase::Draining {
                switchover.held_since = now;
            }
            (switchover.phase, switchover.since) = (phase, now);
        }
    }

    /// The grace is over: whoever has voted and does not finish loses its place.
    fn end_transactions(&mut self) {
        for name in &*self.names.clone() {
            let undecided =
                self.storages.get(name).map_or_else(Vec::new, |s| s.transactions.undecided());
            for session in undecided {
                let reason = "another node becomes primary, and its transaction took too long";
                self.end_transaction(name, session, reason);
            }
        }
    }

    /// Back to how it was.
    fn switchover_failed(&mut self, reason: &str) -> Result<()> {
        let Some(switchover) = self.switchover.take() else { return Ok(()) };
        warn!(to = switchover.name, reason, "the switchover was given up; this node is primary");
        self.switchover_failed_at = Some(self.now);
        if let Some(asker) = switchover.asker {
            let text = format!(
                "the switchover to {} was given up: {reason}; {} is primary as before",
                switchover.name, self.me.name
            );
            self.reply(asker, Err(text));
        }
        self.publish_serving();
        self.publish_lease();
        Ok(())
    }

    /// This node's role, or what it knows of the leader, has changed.
    pub(crate) fn switchover_role_changed(&mut self) {
        if self.switchover.is_none() || self.role.leads {
            return;
        }
        let Some(leader) = self.role.leader else { return };
        let Some(switchover) = self.switchover.take() else { return };
        let pause = self.now.saturating_sub(switchover.held_since).as_millis();
        let name = self.name_of(leader).unwrap_or_default();
        let answer: Answer = if leader == switchover.target {
            info!(to = name, held_ms = pause, "the switchover is done");
            let text = format!("{name} is primary, {pause} ms after clients were parked");
            Ok(Done { text, token: None })
        } else {
            warn!(wanted = switchover.name, primary = name, "the switchover ended elsewhere");
            Err(format!("{name} is primary now: {} did not take the role", switchover.name))
        };
        if let Some(asker) = switchover.asker {
            self.reply(asker, answer);
        }
    }

    /// After a hand-over nobody has been heard of for long.
    pub(crate) fn switchover_lost(&mut self) {
        let now = self.now;
        let late = |s: &mut Switchover| now.saturating_sub(s.since) > PATIENCE;
        if !self.role.leads
            && let Some(switchover) = self.switchover.take_if(late)
            && let Some(asker) = switchover.asker
        {
            let text = format!(
                "{} was handed the primary's role, but no primary is heard of now; see standby \
                status",
                switchover.name
            );
            self.reply(asker, Err(text));
        }
    }
}
