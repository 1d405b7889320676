//! What administrators ask the primary for.

use std::collections::BTreeSet;
use std::time::Duration;

use standby_config::word;
use standby_consensus::Member;
use standby_replica::settings::{FEATURE_LEVEL, Invitation, SETTINGS_LEVEL, Setting};
use standby_types::{LogIndex, NodeId};

use crate::Result;
use crate::action::Action;
use crate::caller::Asker;
use crate::command::{Answer, Ask, Done};
use crate::machine::Machine;

/// Time for a decision to come into force.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an answer waits for.
pub(crate) enum Awaited {
    /// The node of this name is no member any more.
    Removed(String),
    /// The nodes of the group have the votes that this entry says.
    Votes(LogIndex, String),
    /// This entry is applied.
    Applied(LogIndex),
    /// This node serves.
    Serves,
}

impl Awaited {
    fn holds(&self, machine: &Machine) -> bool {
        match self {
            Awaited::Removed(node) => machine.consensus.membership().named(node).is_none(),
            Awaited::Votes(index, group) => {
                machine.applied >= *index && machine.has_its_votes(group)
            }
            Awaited::Applied(index) => machine.applied >= *index,
            Awaited::Serves => machine.serves(),
        }
    }

    /// What is told to somebody who has waited in vain.
    fn is_missing(&self) -> &'static str {
        match self {
            Awaited::Removed(_) => "the node is still a member",
            Awaited::Votes(..) => {
                "the votes are not yet what they are to be: nodes are down, or catching up"
            }
            Awaited::Applied(_) => "the decision is not on a majority of the nodes yet",
            Awaited::Serves => "the new timeline has not begun yet",
        }
    }
}

/// An answer that waits until something holds.
pub(crate) struct AwaitedAnswer {
    awaited: Awaited,
    done: Done,
    deadline: Duration,
    pub(crate) asker: Asker,
}

impl Machine {
    pub(crate) fn ask(&mut self, ask: Ask, asker: Asker) -> Result<()> {
        match ask {
            Ask::Backfill { node } => {
                let answer = self.backfill(&node);
                self.reply(asker, answer);
                return Ok(());
            }
            Ask::Promote { node, group } => return self.promote(&node, group, asker),
            _ => {}
        }
        if !self.serves() {
            self.reply(asker, Err("this node is not primary any more; ask again".into()));
            return Ok(());
        }
        match &ask {
            Ask::Switchover { to, grace } => {
                self.begin_switchover(to.as_deref(), *grace, asker);
                return Ok(());
            }
            // A node that does not know the level does not know the entry that says so either.
            Ask::FeatureLevel { level } if !self.raises(*level) => {
                let text = format!("the feature level is {} already", self.settings.level());
                self.reply(asker, Ok(Done { text, token: None }));
                return Ok(());
            }
            _ => {}
        }
        let (setting, done) = match self.decision(&ask) {
            Ok(decision) => decision,
            Err(reason) => {
                self.reply(asker, Err(reason));
                return Ok(());
            }
        };
        if !self.decide(&setting)? {
            self.reply(asker, Err("another change is under way; ask again".into()));
            return Ok(());
        }
        let index = self.members.decided;
        let awaited = match setting {
            Setting::Remove { node } => Awaited::Removed(node),
            Setting::Failover { group, .. } => Awaited::Votes(index, group),
            _ => Awaited::Applied(index),
        };
        self.answer_when(awaited, done, asker);
        Ok(())
    }

    pub(crate) fn reply(&mut self, asker: Asker, answer: Answer) {
        self.act(Action::Reply(asker, answer));
    }

    /// Answers as soon as something holds.
    pub(crate) fn answer_when(&mut self, awaited: Awaited, done: Done, asker: Asker) {
        let deadline = self.now + PATIENCE;
        self.watches.push(AwaitedAnswer { awaited, done, deadline, asker });
    }

    fn backfill(&mut self, node: &str) -> Answer {
        if node != self.me.name {
            return Err(format!("this is {}, not {node}", self.me.name));
        }
        let names = self.names.clone();
        let storages: Vec<_> = names.iter().filter(|name| self.facts.has_holes(name)).collect();
        for name in &storages {
            self.act(Action::Backfill((*name).clone()));
        }
        let text = match storages.is_empty() {
            true => format!("{node} has the whole history"),
            false => format!("{node} gets the history that it lacks from another node"),
        };
        Ok(Done { text, token: None })
    }

    /// Answers those for whom it has come true, or who have waited too long.
    pub(crate) fn tick_watches(&mut self) {
        let now = self.now;
        for watch in std::mem::take(&mut self.watches) {
            if watch.awaited.holds(self) {
                self.reply(watch.asker, Ok(watch.done));
            } else if now > watch.deadline {
                let missing = watch.awaited.is_missing();
                let text = format!("{missing}; the cluster goes on trying, see standby status");
                self.reply(watch.asker, Err(text));
            } else {
                self.watches.push(watch);
            }
        }
    }

    fn has_its_votes(&self, group: &str) -> bool {
        let membership = self.consensus.membership();
        let votes = self.is_failover(group);
        self.data_nodes(group).all(|m| membership.voters.contains(&m.id) == votes)
            && membership.outgoing.is_empty()
    }

    fn decision(&self, ask: &Ask) -> Result<(Setting, Done), String> {
        let level = self.settings.level();
        if level < SETTINGS_LEVEL && !matches!(ask, Ask::FeatureLevel { .. }) {
            return Err(format!(
                "the cluster works at feature level {level}, which has no such thing; when all \
                 nodes run this version: standby feature-level raise"
            ));
        }
        let done = |text: String| Done { text, token: None };
        match ask {
            Ask::Switchover { .. } | Ask::Backfill { .. } | Ask::Promote { .. } => {
                Err("no decision".into())
            }
            Ask::NodeAdd { node, group, witness, replaces } => {
                self.invitation(node, group.as_deref(), *witness, *replaces)
            }
            Ask::NodeRemove { node, force } => {
                let member = self.replica(node)?;
                self.check_loss(&BTreeSet::from([member.id]), *force)?;
                let text = format!(
                    "{node} is no member of the cluster any more. Stop it; to let it in again, use \
                     standby node add, and remove its state-dir first"
                );
                Ok((Setting::Remove { node: node.clone() }, done(text)))
            }
            Ask::GroupSet { group, failover, force } => {
                let text = self.group_set(group, *failover, *force)?;
                Ok((Setting::Failover { group: group.clone(), on: *failover }, done(text)))
            }
            Ask::GroupMove { to } => {
                self.check_group(to)?;
                if !self.data_nodes(to).any(|m| self.is_there(m.id)) {
                    return Err(format!("no node of group {to} with data is there"));
                }
                let witnesses = self.consensus.membership().members.values().filter(|m| m.witness);
                let voters = self.data_nodes(to).count() + witnesses.count();
                let text = format!(
                    "the primary and all votes go to group {to}; with {voters} voter(s) it will \
                    survive {} failure(s)",
                    survivable(voters)
                );
                Ok((Setting::Move { to: to.clone() }, done(text)))
            }
            Ask::FeatureLevel { level: wanted } => {
                let known = self.known_level();
                let wanted = wanted.unwrap_or(FEATURE_LEVEL);
                if wanted > known.0 {
                    return Err(format!(
                        "node {} knows feature level {} only: upgrade it first",
                        known.1, known.0
                    ));
                }
                Ok((Setting::FeatureLevel(wanted), done(format!("the feature level is {wanted}"))))
            }
        }
    }

    fn group_set(&self, group: &str, failover: bool, force: bool) -> Result<String, String> {
        self.check_group(group)?;
        if failover {
            return Ok(format!(
                "the nodes of group {group} vote: one of them can become primary by itself"
            ));
        }
        if self.settings.moving_to.as_deref() == Some(group) {
            return Err(format!("the primary is being moved to group {group}"));
        }
        if *group == self.me.group {
            return Err(format!(
                "the primary is in group {group}; to have the primary and the voters in another \
                 group: standby group move --to GROUP"
            ));
        }
        let data = self.data_nodes(group).map(|m| m.id).collect();
        self.check_loss(&data, force)?;
        Ok(format!(
            "the nodes of group {group} have no vote: none of them becomes primary by itself"
        ))
    }

    fn raises(&self, wanted: Option<u32>) -> bool {
        wanted.unwrap_or(FEATURE_LEVEL) > self.settings.level()
    }

    /// The highest feature level that all members know, and a member that knows no higher one.
    fn known_level(&self) -> (u32, String) {
        let members = self.consensus.membership().members.values();
        members
            .map(|m| (self.facts.feature_level(m.id), m.name.clone()))
            .chain([(FEATURE_LEVEL, self.me.name.clone())])
            .min()
            .unwrap_or_default()
    }

    pub(crate) fn member(&self, name: &str) -> Result<&Member, String> {
        let membership = self.consensus.membership();
        membership.named(name).ok_or_else(|| {
            let names: BTreeSet<_> = membership.members.values().map(|m| m.name.as_str()).collect();
            let names = Vec::from_iter(names).join(", ");
            format!("{name} is no node of this cluster; its nodes: {names}")
        })
    }

    /// A member that is not primary.
    fn replica(&self, name: &str) -> Result<&Member, String> {
        match self.member(name)? {
            member if member.id == self.me.id => Err(format!(
                "{name} is primary: first make another node primary by standby switchover"
            )),
            member => Ok(member),
        }
    }

    fn check_group(&self, name: &str) -> Result<(), String> {
        let members = self.consensus.membership().members.values();
        let groups: BTreeSet<_> = members.map(|m| m.group.as_str()).collect();
        if groups.contains(name) {
            return Ok(());
        }
        let groups = Vec::from_iter(groups).join(", ");
        Err(format!("no node is of group {name}; the groups are {groups}"))
    }

    fn invitation(
        &self,
        node: &str,
        group: Option<&str>,
        witness: bool,
        replaces: bool,
    ) -> Result<(Setting, Done), String> {
        word(node)?;
        let (like, witness) = if replaces {
            let former = self.replica(node)?;
            (former, former.witness)
        } else if self.member(node).is_ok() {
            return Err(format!(
                "{node} is a member already; to let another machine take its place: standby node \
                replace"
            ));
        } else {
            (&self.me, witness)
        };
        let group = group.map_or_else(|| Ok(like.group.clone()), word)?;
        let token = self.facts.random_hex(16)?;
        let done = Done {
            text: format!("node {node} may join as a member of group {group}"),
            token: Some(token.clone()),
        };
        let invitation = Invitation { group, witness, token, replaces };
        Ok((Setting::Invite { node: node.into(), invitation }, done))
    }

    /// Why it is dangerous that these nodes lose their votes, if it is and nobody insists.
    fn check_loss(&self, going: &BTreeSet<NodeId>, force: bool) -> Result<(), String> {
        let membership = self.consensus.membership();
        let before = membership.voters.len();
        let staying: Vec<_> = membership.voters.difference(going).copied().collect();
        if force || staying.len() == before {
            return Ok(());
        }
        let there = staying.iter().filter(|id| self.is_there(**id)).count();
        let majority = staying.len() / 2 + 1;
        let risk = if there < majority {
            format!(
                "{} voters would be left, of which only {there} are up: writes would stop at once",
                staying.len()
            )
        } else if survivable(staying.len()) < survivable(before) {
            format!(
                "{} voters would be left, which survive {} failure(s) instead of {}",
                staying.len(),
                survivable(staying.len()),
                survivable(before)
            )
        } else {
            return Ok(());
        };
        Err(format!("{risk}. If that is what you want: --force"))
    }
}

/// How many of so many voters may be lost before writes stop.
fn survivable(voters: usize) -> usize {
    voters.saturating_sub(1) / 2
}
