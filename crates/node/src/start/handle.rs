//! A running node, as who runs it sees it.

use std::sync::Arc;

use standby_primary::command::{Answer, Ask};
use standby_types::Tid;

use crate::admin::route::route;
use crate::cells::shared::Shared;
use crate::peers::command::here;
use crate::platform::watchdog::Pulse;

/// A running node: what it says of itself, and its commands.
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

impl Handle {
    /// Beats while the primary's machine works.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.0.pulse.clone()
    }

    /// Reads the certificates and the secrets again; connections that are open keep theirs.
    pub fn reload_certificates(&self) {
        self.0.reload_certificates();
    }

    /// The term in which it serves as primary, if it does.
    pub fn serves_in(&self) -> Option<u64> {
        let serves = self.0.standing.borrow().serves;
        serves.then(|| self.0.reports.own().term())
    }

    /// What is damaged in the data files and among the blobs, and has not been repaired.
    pub fn damage(&self) -> Option<String> {
        self.0.damage()
    }

    /// The last transaction of the first storage; `None` while its data file is made anew.
    pub fn last_tid(&self) -> Option<Tid> {
        let storage = self.0.storages.values().next()?;
        let busy = storage.packing.percent().is_some() || !storage.reader().is_whole();
        (!busy).then(|| storage.reader().last_tid())
    }

    /// The nodes that were removed from the cluster and are no members any more.
    pub fn removed(&self) -> Vec<String> {
        let settings = self.0.settings();
        let removed = settings.removed.iter().filter(|name| !self.0.reports.is_member(name));
        removed.cloned().collect()
    }

    /// Has the primary do what is asked for, or the node that it is about.
    pub async fn ask(&self, ask: Ask) -> Answer {
        route(&self.0, ask).await
    }

    /// Has this node do it, as far as it knows of others.
    pub async fn ask_this_node(&self, ask: Ask) -> Answer {
        here(&self.0, ask).await
    }
}
