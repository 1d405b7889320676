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
use standby_consensus::{AppliedPoint, Caution, Command, Consensus, Ending, Event as Happened};
use standby_filestorage::{TransactionMeta, put_meta};
use standby_replica::lineage::{Lineage, Promotion, Relation};
use standby_types::{NodeId, Tid};
use tracing::{info, warn};

use crate::cells::apply_task::ApplyTask;
use crate::cells::command::{Asker, Done};
use crate::cells::log_work::LogWork;
use crate::platform::random::random_hex;
use crate::primary::consensus_config::raft_config;
use crate::primary::engine::{Ended, Engine};

/// A timeline is being begun.
pub(super) enum PromotionStage {
    /// The applier takes what is left of the former timeline's log.
    Applying(Asker),
    /// The log begins anew.
    Logging(Box<Consensus>, Asker),
}

impl Engine {
    /// Makes this node primary of a new timeline, or says why not. Without a group, it is one of
    /// those that vote that has lost the majority.
    pub(super) fn promote(
        &mut self,
        node: &str,
        group: Option<String>,
        asker: Asker,
    ) -> anyhow::Result<()> {
        if let Err(reason) = self.check_promotion(node, group.as_deref()) {
            let _ = asker.send(Err(reason));
            return Ok(());
        }
        let membership = self.consensus.membership().led_by(self.shared.id);
        let promotion = Promotion {
            id: random_hex(8)?,
            node: node.into(),
            now: self.shared.wall_clock(),
            failover: group.map(|group| BTreeSet::from([group])),
            heard_of: self.shared.reports.last_tids(),
            membership,
        };
        warn!(timeline = promotion.id, "forced promotion: this node begins a timeline");
        let entries = self.consensus.remaining(self.applied)?;
        self.turn = Some(PromotionStage::Applying(asker));
        self.shared.apply(ApplyTask::BeginTimeline { entries, promotion: Box::new(promotion) });
        Ok(())
    }

    fn check_promotion(&self, node: &str, group: Option<&str>) -> Result<(), String> {
        let me = &self.shared.member;
        if node != me.name {
            return Err(format!("this is {}, not {node}", me.name));
        }
        if me.witness {
            return Err(format!("{node} is a witness: it has no data"));
        }
        if self.turn.is_some() {
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
        let up = |id: &NodeId| *id == self.shared.id || self.shared.reports.is_up(*id);
        let members = &self.consensus.membership().members;
        let there: BTreeSet<NodeId> = members.keys().copied().filter(up).collect();
        if self.consensus.membership().is_quorum(&there) {
            return Err("a majority of the voters is there: they elect a primary by themselves; \
                        wait a moment, and look at standby status"
                .into());
        }
        if self.consensus.membership().members.is_empty()
            || self.catch_up.is_some()
            || !self.shared.is_whole()
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
        match self.shared.reports.ahead_of(own, counts) {
            Some(other) => Err(format!("{other} has more than {node}: promote that node")),
            None => Ok(()),
        }
    }

    /// The applier has taken everything and has made a checkpoint of it.
    pub(super) fn timeline_begun(&mut self, point: AppliedPoint) -> anyhow::Result<()> {
        let Some(PromotionStage::Applying(asker)) = self.turn.take() else { return Ok(()) };
        let (config, dir) = (raft_config(&self.shared), self.shared.state.log());
        let (consensus, batch) =
            Consensus::anew(config, self.shared.disk.clone(), dir, point, self.role.term)?;
        self.turn = Some(PromotionStage::Logging(Box::new(consensus), asker));
        self.to_log(LogWork::Persist(batch))
    }

    /// The log of the new timeline is there.
    pub(super) fn log_begun(&mut self) -> anyhow::Result<()> {
        let Some(PromotionStage::Logging(consensus, asker)) = self.turn.take() else {
            return Ok(());
        };
        self.shared.peers.end_links();
        self.present.clear();
        self.blobs.leader_changed();
        self.checkpoints.clear();
        self.consensus = *consensus;
        self.shared.set_log_end(self.consensus.persisted_index());
        self.caution = Caution::None;
        self.oriented = true;
        let timeline = self.settings.lineage.timeline();
        let text = format!("{} is primary, on timeline {timeline}", self.shared.member.name);
        self.watch(
            Box::new(Engine::serves),
            Done { text, token: None },
            "the new timeline has not begun yet",
            asker,
        );
        self.step(Happened::Tick)
    }

    /// This node leads: proposes what must be committed before it serves, if its timeline is new.
    /// Called again until it is.
    pub(super) fn open_timeline(&mut self) -> anyhow::Result<()> {
        let lineage = self.settings.lineage.clone();
        for name in self.shared.clone().storages.keys() {
            let first = lineage.first(name);
            self.opening |= self.last_tid(name) < first;
            let proposed = self.storages.get(name).is_some_and(|s| s.last_tid >= first);
            if self.opening && !proposed {
                let text = format!("Standby: timeline {} begins", lineage.timeline());
                self.commit_nothing(name, first, text)?;
            }
        }
        Ok(())
    }

    /// Something was applied: perhaps it is what this primary has waited for.
    pub(super) fn tick_opening(&mut self) {
        let lineage = &self.settings.lineage;
        let open = |name: &String| self.last_tid(name) >= lineage.first(name);
        if self.opening && self.shared.storages.keys().all(open) {
            self.opening = false;
            info!(timeline = lineage.timeline(), "the timeline has begun");
            self.publish_standing();
            self.report_status();
        }
    }

    /// What nodes that have come over have lost may have tids above this timeline's: then a client
    /// that has seen them would not connect ("Server behind client"). The next empty transaction
    /// goes above them.
    pub(super) fn tick_lost(&mut self) -> anyhow::Result<()> {
        if !self.serves() || self.settings.lineage.forks().is_empty() {
            return Ok(());
        }
        for (name, lost) in self.shared.reports.last_lost() {
            let known = self.storages.get(&name).map(|committing| committing.last_tid);
            if known.is_some_and(|last| last <= lost) {
                let text = "Standby: above the lost transactions of another timeline".to_owned();
                self.commit_nothing(&name, lost.next(), text)?;
            }
        }
        Ok(())
    }

    fn last_tid(&self, storage: &str) -> Tid {
        self.shared.storages.get(storage).map_or(Tid::NONE, |storage| storage.reader().last_tid())
    }

    /// Commits an empty transaction, if it can be proposed now.
    fn commit_nothing(&mut self, storage: &str, tid: Tid, text: String) -> anyhow::Result<()> {
        let meta = TransactionMeta { description: text.into(), ..TransactionMeta::new(tid) };
        let mut head = BytesMut::new();
        put_meta(&meta, &mut head);
        let ending = Ending {
            storage: storage.into(),
            head: head.freeze(),
            parts: Vec::new(),
            blobs: Vec::new(),
            rest: Bytes::new(),
        };
        let proposed = self.propose(Command::Transaction(ending), None)?.is_some();
        if proposed && let Some(committing) = self.storages.get_mut(storage) {
            committing.last_tid = tid;
        }
        Ok(())
    }

    /// Another node's history goes on where this one's was left: the node must leave its timeline.
    pub(super) fn outdated(&mut self, lineage: Lineage) {
        let older = self.settings.lineage.relation(&lineage) == Relation::Older;
        if older && self.turn.is_none() {
            self.ends = Some(Ended::ComesOver(lineage));
        }
    }
}
