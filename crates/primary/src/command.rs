//! What administrators ask for. Any node takes it; the primary does it, or the node that it is
//! about.

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Ask {
    /// Another node becomes primary.
    Switchover {
        /// Which; `None` for the one that is best placed.
        to: Option<String>,
        /// Seconds for which transactions that have voted, uploads, and packs are waited for.
        grace: f64,
    },
    /// A node may join.
    NodeAdd {
        node: String,
        /// Its group; that of the member whose place it takes, if it does.
        group: Option<String>,
        /// It votes, but holds no data.
        witness: bool,
        /// It takes the place of the member with its name.
        replaces: bool,
    },
    /// A node is a member no more.
    NodeRemove {
        node: String,
        /// Also if that is dangerous.
        force: bool,
    },
    /// The nodes of a group vote, or do not.
    GroupSet {
        group: String,
        /// They vote.
        failover: bool,
        /// Also if that is dangerous.
        force: bool,
    },
    /// The primary and all voters are to be in this group.
    GroupMove { to: String },
    /// A node fills the holes that fast recoveries left in its history.
    Backfill { node: String },
    /// A node begins a timeline: its group, or the majority of the voters, is lost for good.
    Promote {
        node: String,
        /// The group that votes from now on, with all of its nodes; `None` for those that do
        /// already.
        group: Option<String>,
    },
    /// The cluster may use what newer versions can do.
    FeatureLevel {
        /// Up to this level; `None` for the highest that all nodes know.
        level: Option<u32>,
    },
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// In words.
    pub text: String,
    /// What a new node proves to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// What was done, or why not.
pub type Answer = Result<Done, String>;
