//! What consensus wants to be done, and what follows from a change of the role.

use std::time::Duration;

use standby_consensus::{AppliedPoint, Command, Committed, Event as Happened, Output, Role};
use standby_types::{LogIndex, Mutation, NodeId, Oid, mutation};
use tracing::{info, warn};

use crate::Result;
use crate::action::{Action, ServingState, Which};
use crate::caller::Caller;
use crate::machine::Machine;
use crate::machine::commits::Pending;
use crate::machine::serving::Serving;
use crate::oids::Oids;

/// Why a session that may write ends.
pub(crate) const NOT_PRIMARY: &str = "this node is not primary any more";

impl Machine {
    /// Tells consensus of an event, unless a timeline is being begun.
    pub(crate) fn consensus_step(&mut self, event: Happened) -> Result<()> {
        if self.promotion.is_some() {
            return Ok(());
        }
        let mut outputs = Vec::new();
        self.consensus.step(self.now, event, &mut outputs)?;
        self.perform(outputs)
    }

    pub(crate) fn perform(&mut self, outputs: Vec<Output>) -> Result<()> {
        self.outputs.extend(outputs);
        if std::mem::replace(&mut self.performing, true) {
            return Ok(());
        }
        while let Some(output) = self.outputs.pop_front() {
            match output {
                Output::Send(to, message) => self.act(Action::Send(to, message)),
                Output::Persist(batch) => self.act(Action::Persist(batch)),
                Output::Fetch(fetch) => self.act(Action::Fetch(fetch)),
                Output::Commit(entries) => self.committed(entries),
                Output::Role(role) => self.role_changed(role)?,
                Output::CatchUp { from, target } => self.begin_catch_up(from, target),
                Output::ReadIndex(number, index) => self.read_index(number, index)?,
                Output::Purge(index) => self.act(Action::Purge(index)),
                Output::Broken(broken) => self.broken(broken),
            }
        }
        self.performing = false;
        Ok(())
    }

    fn committed(&mut self, entries: Vec<Committed>) {
        let mut work = Vec::with_capacity(entries.len());
        let mut changes = false;
        for entry in entries {
            self.blobs.committed(&entry);
            self.log_tail.committed(&entry);
            let caller = self.commits.committed(entry.point());
            if let Committed::Membership(_, _, membership) = &entry {
                changes = true;
                let members = membership.members.values();
                self.act(Action::Learn(members.map(|m| m.peer_address.clone()).collect()));
                let ids = membership.members.keys().copied().collect();
                self.act(Action::RetainAcknowledged(ids));
                info!(
                    voters = membership.voters.len(), learners = membership.learners.len(),
                    members = ?membership.members.values().map(|m| &m.name).collect::<Vec<_>>(),
                    "the membership has changed"
                );
            }
            work.push((entry, caller));
        }
        self.act(Action::Apply(work));
        if changes {
            // It may tell where the primary is.
            self.publish_serving();
        }
    }

    fn role_changed(&mut self, role: Role) -> Result<()> {
        let before = std::mem::replace(&mut self.role, role);
        if before.serves && !(role.serves && role.term == before.term) {
            if self.switchover.is_none() {
                self.note_lost_leadership();
            }
            self.demoted();
        }
        self.switchover_role_changed();
        if role.serves && !(before.serves && role.term == before.term) {
            self.promoted()?;
        }
        self.oriented |= role.leader.is_some();
        if role.leader != before.leader {
            self.blobs.leader_changed();
        }
        if role.leader.is_some() && role.leader != before.leader {
            self.act(Action::CutAll(Which::Settled, "a primary has appeared"));
            let name = role.leader.and_then(|id| self.name_of(id)).unwrap_or_else(|| "?".into());
            info!(primary = name, term = %role.term, "the primary is known");
        } else if role.leader.is_none() && before.leader.is_some() {
            warn!(term = %role.term, "there is no primary");
        }
        self.publish_serving();
        if role.serves != before.serves || role.leader != before.leader {
            self.report();
        }
        Ok(())
    }

    fn demoted(&mut self) {
        warn!("this node is not primary any more");
        self.act(Action::SendAway(Which::Writers, NOT_PRIMARY));
        for committing in self.storages.values_mut() {
            committing.transactions.clear();
            committing.oids = None;
        }
        self.transactions_changed = true;
        self.members.decided = LogIndex(0);
        // What they wait for may be lost: whoever asked is told that the primary has changed.
        for watch in std::mem::take(&mut self.watches) {
            self.act(Action::Drop(watch.asker));
        }
        self.opening = false;
        // One that runs says so again.
        self.act(Action::PacksEnd);
        self.packs.clear();
        self.commits.clear();
        self.outcomes.clear();
        self.blobs.demoted();
    }

    fn promoted(&mut self) -> Result<()> {
        info!(term = %self.role.term, "this node is primary");
        for (name, committing) in &mut self.storages {
            let used = self.facts.highest_oid(name);
            let ceiling = self.ceilings.get(name).copied().unwrap_or(Oid(0));
            committing.last_tid = self.facts.last_tid(name);
            let known = if mutation::on(Mutation::ReuseOids) { used } else { ceiling.max(used) };
            committing.oids = Some(Oids::above(known));
        }
        self.open_timeline()?;
        self.give_oids()
    }

    fn begin_catch_up(&mut self, from: NodeId, target: AppliedPoint) {
        if self.me.witness {
            return self.act(Action::CatchUpWithoutData(target));
        }
        let address = self.address_of(from);
        let address = address
            .or_else(|| target.membership.members.get(&from).map(|m| m.peer_address.clone()));
        let Some(address) = address else {
            return warn!(node = %from, "a catch-up is asked for, but its source has no address");
        };
        self.catching_up = true;
        self.act(Action::CatchUp { from, address, target });
        self.publish_serving();
    }

    /// A checkpoint makes entries of the log needless; those that others may need are kept.
    pub(crate) fn compact(&mut self, checkpointed: LogIndex) -> Result<()> {
        let Some(index) = self.log_tail.checkpointed(checkpointed) else { return Ok(()) };
        let mut outputs = Vec::new();
        self.consensus.compact(index, &mut outputs);
        self.perform(outputs)
    }

    /// Proposes an entry; `None` if it cannot be proposed now.
    pub(crate) fn propose(
        &mut self,
        command: Command,
        caller: Option<Caller>,
    ) -> Result<Option<LogIndex>> {
        let data = command.encode();
        let len = data.len();
        let mut outputs = Vec::new();
        let Ok((index, term)) = self.consensus.propose(data, &mut outputs) else {
            return Ok(None);
        };
        // Before the outputs: with a single voter, none of them can be the commit of this entry,
        // for it is not on disk yet.
        self.commits.proposed(index, Pending { term, len, caller });
        self.perform(outputs)?;
        Ok(Some(index))
    }

    /// Publishes what tasks that serve clients must know.
    pub(crate) fn publish_serving(&mut self) {
        // Whoever hears that this node serves looks at the lease at once.
        self.publish_lease();
        let leader = self.role.leader.filter(|id| *id != self.me.id);
        let state = ServingState {
            serves: self.serving() == Serving::Primary,
            other_primary: leader.and_then(|id| self.address_of(id)),
            ready: !self.catching_up
                && !self.consensus.membership().members.is_empty()
                && self.oriented
                && self.facts.is_whole()
                && self.alarms.superseded.is_none()
                && !self.freshness.refuses,
        };
        self.act(Action::Serve(state));
    }

    /// Publishes until when this node may serve.
    pub(crate) fn publish_lease(&mut self) {
        let alone = self.consensus.membership().voters.len() <= 1;
        let until = match self.consensus.lease(self.now) {
            Some(_) if alone => Duration::MAX,
            Some(until) => until,
            None => Duration::ZERO,
        };
        let lease = self.serves().then_some(until);
        if lease != self.lease {
            self.lease = lease;
            self.act(Action::Lease(lease));
        }
    }

    /// True if this node serves and nobody else can be serving.
    pub(crate) fn is_surely_primary(&self) -> bool {
        let stale = mutation::on(Mutation::StalePrimaryAnswers);
        self.lease.is_some_and(|until| stale || until > self.now)
    }
}
