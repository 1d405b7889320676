//! Who belongs to the cluster and who votes: the primary sees to it that it becomes what the
//! settings say.
//!
//! Each step is a change of its own, made when nothing else is under way, so that a new primary
//! goes on where the last one stopped: first removals, then newcomers, as learners, then addresses
//! that have changed; those of the fail-over groups get a vote when they have caught up; when they
//! have it, voters of other groups lose theirs. A witness votes wherever it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use standby_consensus::{Change, Command, Member};
use standby_replica::settings::{SETTINGS_LEVEL, Setting};
use standby_types::{LogIndex, NodeId};
use tracing::{info, warn};

use crate::Result;
use crate::action::Action;
use crate::input::Arrival;
use crate::machine::{Machine, NEARLY};

/// For so long a member must have been silent before another machine takes its place by itself.
const REPLACED_AFTER: Duration = Duration::from_secs(60);
const NOT_INVITED: &str = "it is not invited (standby node add), or its join-token, group or \
                           witness line is another than the invitation's";
/// Grace of a switchover that moves the primary to another group.
const MOVE_GRACE: Duration = Duration::from_secs(5);
/// Time between two attempts at it.
const MOVE_PAUSE: Duration = Duration::from_secs(3);

/// Who is there, beside the membership.
#[derive(Default)]
pub(crate) struct Members {
    /// Nodes whose connections are open.
    present: BTreeMap<NodeId, Arrival>,
    /// Nodes that were not let in, and of which the log has told.
    refused: BTreeSet<NodeId>,
    /// The last decision that this node has proposed.
    pub decided: LogIndex,
}

impl Members {
    pub(crate) fn arrived(&mut self, arrival: Arrival) {
        self.present.insert(arrival.member.id, arrival);
    }

    pub(crate) fn gone(&mut self, id: NodeId) {
        self.present.remove(&id);
        self.refused.remove(&id);
    }

    /// All links have ended.
    pub(crate) fn all_gone(&mut self) {
        self.present.clear();
    }

    /// True if a connection of that node is open.
    pub(crate) fn is_present(&self, id: NodeId) -> bool {
        self.present.contains_key(&id)
    }

    /// Who that node says it is, if its connection is open.
    pub(crate) fn present(&self, id: NodeId) -> Option<&Member> {
        self.present.get(&id).map(|arrival| &arrival.member)
    }
}

impl Machine {
    pub(crate) fn tick_membership(&mut self) -> Result<()> {
        // During a switchover the members stay as they are.
        let stays = self.switchover.is_some() || self.config.standby.is_none();
        if !self.serves() || stays {
            return Ok(());
        }
        if self.settings.failover.is_empty() && self.settings.level() >= SETTINGS_LEVEL {
            // The level was just raised: what was so by itself is said now.
            let group = self.me.group.clone();
            self.decide(&Setting::Failover { group, on: true })?;
            return Ok(());
        }
        let mut changes = self.removals();
        if changes.is_empty() {
            changes = self.newcomer();
        }
        if changes.is_empty() {
            changes = self.moves();
        }
        if changes.is_empty() {
            changes = self.promotions();
        }
        if changes.is_empty() {
            changes = self.demotions();
        }
        if changes.is_empty() {
            return self.tick_move();
        }
        let mut outputs = Vec::new();
        // Refused while another change is under way; then it is tried again.
        let _ = self.consensus.change_membership(&changes, &mut outputs);
        self.perform(outputs)
    }

    /// Proposes a decision; one at a time.
    pub(crate) fn decide(&mut self, setting: &Setting) -> Result<bool> {
        if self.applied < self.members.decided {
            return Ok(false);
        }
        let proposed = self.propose(Command::Setting(setting.encode()), None)?;
        self.members.decided = proposed.unwrap_or(self.members.decided);
        Ok(proposed.is_some())
    }

    /// True if the nodes of a group are to vote.
    pub(crate) fn is_failover(&self, group: &str) -> bool {
        if self.settings.failover.is_empty() {
            // Before there were settings, it was the group of the first member.
            let first = self.config.standby.as_ref().and_then(|s| s.members.first());
            return first.is_some_and(|first| first.group == group);
        }
        self.settings.failover.contains(group)
    }

    /// The nodes of a group that hold data.
    pub(crate) fn data_nodes(&self, group: &str) -> impl Iterator<Item = &Member> {
        let members = self.consensus.membership().members.values();
        members.filter(move |member| member.group == group && !member.witness)
    }

    /// Where a node listens for peers: what it says itself counts, if it has said anything.
    pub(crate) fn address_of(&self, id: NodeId) -> Option<String> {
        let said = self.members.present(id).map(|member| member.peer_address.clone());
        let members = &self.consensus.membership().members;
        said.or_else(|| members.get(&id).map(|member| member.peer_address.clone()))
    }

    fn is_to_vote(&self, member: &Member) -> bool {
        member.witness || self.is_failover(&member.group)
    }

    fn removals(&self) -> Vec<Change> {
        let members = self.consensus.membership().members.values();
        let gone = |member: &&Member| {
            member.id != self.me.id && self.settings.removed.contains(&member.name)
        };
        members.filter(gone).map(|member| Change::Remove(member.id)).collect()
    }

    /// A node that is there and may join.
    fn newcomer(&mut self) -> Vec<Change> {
        let mut refused = Vec::new();
        for (id, arrival) in &self.members.present {
            if self.consensus.membership().contains(*id) {
                continue;
            }
            match self.admission(arrival) {
                Ok(changes) => return changes,
                Err(reason) => refused.push((*id, arrival.member.name.clone(), reason)),
            }
        }
        let is_refused = |id: &NodeId| refused.iter().any(|(one, ..)| one == id);
        let gone = self.members.refused.iter().filter(|id| !is_refused(id));
        for id in gone.copied().collect::<Vec<_>>() {
            self.members.refused.remove(&id);
            self.act(Action::LetIn(id));
        }
        for (id, node, reason) in refused {
            if self.members.refused.insert(id) {
                warn!(node, reason, "a node that wants to join is not let in");
            }
            self.act(Action::Refuse { id, node, reason });
        }
        Vec::new()
    }

    /// What lets a node in that is no member, or why it is not let in.
    fn admission(&self, arrival: &Arrival) -> Result<Vec<Change>, String> {
        let newcomer = &arrival.member;
        let may_replace = self.admits(arrival).ok_or_else(|| NOT_INVITED.to_owned())?;
        let mut changes = Vec::new();
        if let Some(former) = self.consensus.membership().named(&newcomer.name) {
            if let Some(reason) = self.why_not_replace(former, newcomer, may_replace) {
                return Err(reason);
            }
            info!(node = newcomer.name, "the node begins anew, without its former state");
            changes.push(Change::Remove(former.id));
        }
        changes.push(Change::AddLearner(newcomer.clone()));
        Ok(changes)
    }

    /// Why a node that comes under a member's name does not take its place, if so. The one that was
    /// there before is likely to come back, unless it was told otherwise or the newcomer is where
    /// it was.
    fn why_not_replace(
        &self,
        former: &Member,
        newcomer: &Member,
        may_replace: bool,
    ) -> Option<String> {
        let Member { id, name, peer_address, .. } = former;
        let is_there = *id == self.me.id || self.members.is_present(*id);
        if is_there && (!may_replace || *id == self.me.id) {
            return Some(format!("another machine is node {name}, at {peer_address}"));
        }
        let moved = *peer_address != newcomer.peer_address;
        if moved && !may_replace && self.facts.silence_of(*id) < REPLACED_AFTER {
            return Some(format!(
                "another machine was node {name} less than a minute ago, at {peer_address}; to \
                 replace it at once: standby node replace {name}"
            ));
        }
        let voters = &self.consensus.membership().voters;
        let staying: Vec<_> = voters.iter().filter(|voter| *voter != id).collect();
        let there = staying.iter().filter(|voter| self.is_there(***voter)).count();
        (voters.contains(id) && there * 2 <= staying.len() && !may_replace).then(|| {
            format!(
                "without the former {name}, no majority of the other voters is there: start \
            those first"
            )
        })
    }

    /// Whether a node may join, and if so, also in the place of a member that is there.
    fn admits(&self, arrival: &Arrival) -> Option<bool> {
        let newcomer = &arrival.member;
        if let Some(invitation) = self.settings.invitations.get(&newcomer.name)
            && invitation.group == newcomer.group
            && invitation.witness == newcomer.witness
            && (arrival.knows)(&invitation.token)
        {
            return Some(invitation.replaces);
        }
        let says = (&newcomer.name, &newcomer.group, newcomer.witness);
        let listed = &self.config.standby.as_ref()?.members;
        let listed = listed.iter().any(|line| (&line.name, &line.group, line.witness) == says);
        // A member that has lost its disk comes back under its name, whoever is primary.
        let member = self.consensus.membership().named(&newcomer.name);
        let is_member = member.is_some_and(|m| (&m.name, &m.group, m.witness) == says);
        ((listed || is_member) && !self.settings.removed.contains(&newcomer.name)).then_some(false)
    }

    /// A member that says that its peers reach it at another address than it had when it joined.
    fn moves(&self) -> Vec<Change> {
        let membership = self.consensus.membership();
        let there = self.members.present.values().map(|arrival| &arrival.member);
        for says in there.chain([&self.me]) {
            let Some(member) = membership.members.get(&says.id) else { continue };
            if member.peer_address != says.peer_address {
                let (node, from, to) = (&member.name, &member.peer_address, &says.peer_address);
                info!(node, from, to, "a node has another peer address; the membership gets it");
                return membership.moved(says.id, says.peer_address.clone());
            }
        }
        Vec::new()
    }

    fn promotions(&self) -> Vec<Change> {
        let membership = self.consensus.membership();
        let learners = membership.learners.iter().filter_map(|id| membership.members.get(id));
        let mut ready = learners.filter(|m| self.is_to_vote(m) && self.is_level(m.id));
        ready.next().map(|member| Change::Promote(member.id)).into_iter().collect()
    }

    pub(crate) fn is_level(&self, id: NodeId) -> bool {
        let last = self.consensus.last_index().0;
        let level = |p: standby_consensus::Progress| {
            p.active && !p.catching_up && p.matched.0 + NEARLY >= last
        };
        id == self.me.id || self.consensus.progress(id).is_some_and(level)
    }

    fn demotions(&self) -> Vec<Change> {
        let membership = self.consensus.membership();
        let (stay, go): (BTreeSet<_>, BTreeSet<_>) = (membership.voters.iter().copied())
            .partition(|id| membership.members.get(id).is_none_or(|m| self.is_to_vote(m)));
        let level = stay.iter().filter(|id| self.is_level(**id)).count();
        // The primary does not take its own vote away, nor leave too few.
        if !stay.contains(&self.me.id) || level * 2 <= stay.len() {
            return Vec::new();
        }
        go.into_iter().map(Change::Demote).collect()
    }

    /// The primary goes to the group that it is to be in.
    fn tick_move(&mut self) -> Result<()> {
        let Some(to) = self.settings.moving_to.clone() else { return Ok(()) };
        if self.me.group == to {
            self.decide(&Setting::Moved { to })?;
            return Ok(());
        }
        let now = self.now;
        let rests = self.switchover_failed_at.is_some_and(|at| now < at + MOVE_PAUSE);
        let membership = self.consensus.membership();
        // Those that are there are waited for: one voter alone would be no place to be.
        let complete = (self.data_nodes(&to))
            .all(|m| !self.is_there(m.id) || membership.voters.contains(&m.id));
        if self.switchover.is_none()
            && !rests
            && complete
            && let Some(target) = self.best_voter(|group| group == to)
        {
            self.switch_to(target, MOVE_GRACE, false, None);
        }
        Ok(())
    }
}
