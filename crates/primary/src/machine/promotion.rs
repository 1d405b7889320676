//! Forced promotion: this node begins a timeline without asking a majority, for there is none any
//! more.
//!
//! ```text
//!            entries applied,            log empty,           elected by itself,
//!            checkpoint written          durable              first transactions applied
//!  Applying ───────────────────▶ Logging ──────────▶ opening ───────────────────────────▶ serves
//! ```
//!
//! Whatever is in its log counts as committed; then the log begins anew, with this node as the only
//! voter. Each storage's history goes on with an empty transaction, above every tid that the former
//! primary can have given out: a client that has seen more than this node finds its cache outdated
//! and drops it.

use std::collections::BTreeSet;

use bytes::{Bytes, BytesMut};
use standby_consensus::{AppliedPoint, Batch, ClosingEntry, Command, Consensus, Event as Happened};
use standby_filestorage::{TransactionMeta, put_meta};
use standby_replica::lineage::{Lineage, Promotion, Relation};
use standby_types::{NodeId, Tid};
use tracing::{info, warn};

use crate::Result;
use crate::action::{Action, Ended};
use crate::caller::Asker;
use crate::command::Done;
use crate::machine::Machine;
use crate::machine::commands::Awaited;

/// A timeline is being begun.
pub(crate) enum PromotionStage {
    /// The applier takes what is left of the former timeline's log.
    Applying(Asker),
    /// The log begins anew.
    Logging(Box<Consensus>, Asker),
}

impl Machine {
    /// Makes this node primary of a new timeline, or says why not. Without a group, it is one of
    /// those that vote that has lost the majority.
    pub(crate) fn promote(
        &mut self,
        node: &str,
        group: Option<String>,
        asker: Asker,
    ) -> Result<()> {
        if let Err(reason) = self.check_promotion(node, group.as_deref()) {
            self.reply(asker, Err(reason));
            return Ok(());
        }
        let id = match self.facts.random_hex(8) {
            Ok(id) => id,
            Err(reason) => {
                self.reply(asker, Err(reason));
                return Ok(());
            }
        };
        let membership = self.consensus.membership().led_by(self.me.id);
        let promotion = Promotion {
            id,
            node: node.into(),
            now: self.facts.wall_clock(),
            failover: group.map(|group| BTreeSet::from([group])),
            heard_of: self.facts.last_tids(),
            membership,
        };
        warn!(timeline = promotion.id, "forced promotion: this node begins a timeline");
        let entries = self.consensus.remaining(self.applied)?;
        self.promotion = Some(PromotionStage::Applying(asker));
        self.act(Action::BeginTimeline { entries, promotion: Box::new(promotion) });
        Ok(())
    }

    fn check_promotion(&self, node: &str, group: Option<&str>) -> Result<(), String> {
        let me = &self.me;
        if node != me.name {
            return Err(format!("this is {}, not {node}", me.name));
        }
        if me.witness {
            return Err(format!("{node} is a witness: it has no data"));
        }
        if self.promotion.is_some() {
            return Err("a promotion is under way".into());
        }
        if let Some(group) = group
            && group != me.group
        {
            return Err(format!("{node} is of group {}, not of {group}", me.group));
        }
        if group.is_none() && !self.is_failover(&me.group) {
            return Err(format!(
                "group {} does not vote; to make a primary of one of its nodes: standby promote \
                --group {} --force",
                me.group, me.group
            ));
        }
        if let Some(primary) = self.role.leader {
            let name = self.name_of(primary).unwrap_or_else(|| "a node".into());
            return Err(format!(
                "{name} is primary: a forced promotion is for a primary that is lost, and loses \
                 commits. To move the primary: standby group move --to {}, or standby switchover",
                me.group
            ));
        }
        let up = |id: &NodeId| *id == self.me.id || self.facts.is_up(*id);
        let members = &self.consensus.membership().members;
        let there: BTreeSet<NodeId> = members.keys().copied().filter(up).collect();
        if self.consensus.membership().is_quorum(&there) {
            return Err("a majority of the voters is there: they elect a primary by themselves; \
                        wait a moment, and look at standby status"
                .into());
        }
        if self.consensus.membership().members.is_empty()
            || self.catching_up
            || !self.facts.is_whole()
        {
            return Err(format!(
                "{node} is being brought up to date: what it has is a moment that never was, or \
                nothing"
            ));
        }
        let own = (self.consensus.last_term().0, self.consensus.last_index().0);
        let counts = |other: &str| match group {
            Some(group) => other == group,
            None => self.is_failover(other),
        };
        match self.facts.ahead_of(own, &counts) {
            Some(other) => Err(format!("{other} has more than {node}: promote that node")),
            None => Ok(()),
        }
    }

    /// The applier has taken everything and has made a checkpoint of it.
    pub(crate) fn timeline_begun(&mut self, point: AppliedPoint) {
        if matches!(self.promotion, Some(PromotionStage::Applying(_))) {
            self.act(Action::BeginLog { point, term: self.role.term });
        }
    }

    /// The log of the new timeline is there, and not durable yet.
    pub(crate) fn log_begins(&mut self, consensus: Box<Consensus>, batch: Batch) {
        let Some(PromotionStage::Applying(asker)) = self.promotion else { return };
        self.promotion = Some(PromotionStage::Logging(consensus, asker));
        self.act(Action::Persist(batch));
    }

    /// The log of the new timeline is durable.
    pub(crate) fn log_begun(&mut self) -> Result<()> {
        let Some(PromotionStage::Logging(consensus, asker)) = self.promotion.take() else {
            return Ok(());
        };
        self.act(Action::EndLinks);
        self.members.all_gone();
        self.blobs.leader_changed();
        self.log_tail.clear();
        self.consensus = *consensus;
        self.suitability.forget_candidacy();
        self.oriented = true;
        let timeline = self.settings.lineage.timeline();
        let text = format!("{} is primary, on timeline {timeline}", self.me.name);
        self.answer_when(Awaited::Serves, Done { text, token: None }, asker);
        self.consensus_step(Happened::Tick)
    }

    /// This node leads: proposes what must be committed before it serves, if its timeline is new.
    /// Called again until it is.
    pub(crate) fn open_timeline(&mut self) -> Result<()> {
        let lineage = self.settings.lineage.clone();
        for name in &*self.names.clone() {
            let first = lineage.first(name);
            self.opening |= self.facts.last_tid(name) < first;
            let proposed = self.storages.get(name).is_some_and(|s| s.last_tid >= first);
            if self.opening && !proposed {
                let text = format!("Standby: timeline {} begins", lineage.timeline());
                self.commit_nothing(name, first, text)?;
            }
        }
        Ok(())
    }

    /// Something was applied: perhaps it is what this primary has waited for.
    pub(crate) fn tick_opening(&mut self) {
        let lineage = &self.settings.lineage;
        let open = |name: &String| self.facts.last_tid(name) >= lineage.first(name);
        if self.opening && self.names.iter().all(open) {
            self.opening = false;
            info!(timeline = lineage.timeline(), "the timeline has begun");
            self.publish_serving();
            self.report();
        }
    }

    /// What nodes that have rejoined have lost may have tids above this timeline's: then a client
    /// that has seen them would not connect ("Server behind client"). The next empty transaction
    /// goes above them.
    pub(crate) fn tick_lost(&mut self) -> Result<()> {
        if !self.serves() || self.settings.lineage.forks().is_empty() {
            return Ok(());
        }
        for (name, lost) in self.facts.last_lost() {
            let known = self.storages.get(&name).map(|committing| committing.last_tid);
            if known.is_some_and(|last| last <= lost) {
                let text = "Standby: above the lost transactions of another timeline".to_owned();
                self.commit_nothing(&name, lost.next(), text)?;
            }
        }
        Ok(())
    }

    /// Commits an empty transaction, if it can be proposed now.
    fn commit_nothing(&mut self, storage: &str, tid: Tid, text: String) -> Result<()> {
        let meta = TransactionMeta { description: text.into(), ..TransactionMeta::new(tid) };
        let mut head = BytesMut::new();
        put_meta(&meta, &mut head);
        let closing = ClosingEntry {
            storage: storage.into(),
            token: None,
            head: head.freeze(),
            parts: Vec::new(),
            blobs: Vec::new(),
            rest: Bytes::new(),
        };
        let proposed = self.propose(Command::Transaction(closing), None)?.is_some();
        if proposed && let Some(committing) = self.storages.get_mut(storage) {
            committing.last_tid = tid;
        }
        Ok(())
    }

    /// Another node's history goes on where this one's was left: the node must leave its timeline.
    pub(crate) fn outdated(&mut self, lineage: Lineage) {
        let older = self.settings.lineage.relation(&lineage) == Relation::Older;
        if older && self.promotion.is_none() {
            self.end(Ended::Rejoins(lineage));
        }
    }
}
