//! What administrators decide about the cluster. It is part of the replicated state: every node
//! knows it, and the next primary goes on with what the last one began.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::lineage::Lineage;

/// What this program can do. A cluster uses what its feature level includes; it is raised by
/// command, when every node can do it.
///
/// 1: transactions, packs, blobs. 2: settings, and with them groups, witnesses, invitations. 3:
/// connections between nodes that share a secret are sealed. 4: transactions have tokens, by which
/// clients ask for their outcome.
pub const FEATURE_LEVEL: u32 = 4;
/// The level from which transactions may have tokens.
pub const TOKENS_LEVEL: u32 = 4;
/// The level from which connections between nodes are sealed.
pub const SEALED_LEVEL: u32 = 3;
/// The level from which there are settings.
pub const SETTINGS_LEVEL: u32 = 2;

/// The decisions that are in force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Zero stands for 1: a cluster from before there were settings.
    #[serde(default)]
    pub feature_level: u32,
    /// The groups whose nodes vote. Empty at level 1: that of the first member.
    #[serde(default)]
    pub failover: BTreeSet<String>,
    /// The group that is to have the primary and all voters.
    #[serde(default)]
    pub moving_to: Option<String>,
    /// Nodes that may join, by name.
    #[serde(default)]
    pub invitations: BTreeMap<String, Invitation>,
    /// Nodes that are no members any more and must not come back by themselves.
    #[serde(default)]
    pub removed: BTreeSet<String>,
    /// The forced promotions so far.
    #[serde(default)]
    pub lineage: Lineage,
    /// When the cluster was bootstrapped, in seconds since 1970; 0 if that was before it was noted.
    /// Tells two clusters of one name apart.
    #[serde(default, rename = "founded")]
    pub bootstrapped: u64,
}

/// A node may join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// The group that it will belong to.
    pub group: String,
    /// As a witness.
    pub witness: bool,
    /// What it proves to know.
    pub token: String,
    /// It takes the place of the member with its name, also if that one is up.
    pub replaces: bool,
}

/// A decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum Setting {
    /// The cluster may use what this level includes.
    FeatureLevel(u32),
    /// The nodes of a group vote, or do not.
    Failover {
        group: String,
        /// They vote.
        on: bool,
    },
    /// The primary and all voters are to be in this group.
    Move { to: String },
    /// They are.
    Moved { to: String },
    /// A node may join.
    Invite {
        node: String,
        /// As what, and how it proves that it is meant.
        invitation: Invitation,
    },
    /// A node is a member no more.
    Remove { node: String },
}

impl Setting {
    /// As it stands in the log.
    pub fn encode(&self) -> Bytes {
        // Nothing in it can fail to be JSON.
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// Reads what [`Setting::encode`] wrote; `None` if it is none that this program knows.
    pub fn decode(bytes: &[u8]) -> Option<Setting> {
        serde_json::from_slice(bytes).ok()
    }
}

impl Settings {
    /// Those of a new cluster.
    pub fn bootstrapped_in(group: &str) -> Settings {
        Settings {
            feature_level: FEATURE_LEVEL,
            failover: BTreeSet::from([group.to_owned()]),
            ..Settings::default()
        }
    }

    /// The feature level.
    pub fn level(&self) -> u32 {
        self.feature_level.max(1)
    }

    /// Takes a decision. The same decisions in the same order make the same settings on every node.
    pub fn apply(&mut self, setting: Setting) {
        match setting {
            Setting::FeatureLevel(level) => self.feature_level = self.feature_level.max(level),
            Setting::Failover { group, on: true } => {
                self.failover.insert(group);
            }
            Setting::Failover { group, on: false } => {
                self.failover.remove(&group);
            }
            Setting::Move { to } => {
                self.failover.insert(to.clone());
                self.moving_to = Some(to);
            }
            Setting::Moved { to } if self.moving_to.as_ref() == Some(&to) => {
                self.failover = BTreeSet::from([to]);
                self.moving_to = None;
            }
            Setting::Moved { .. } => {}
            Setting::Invite { node, invitation } => {
                self.removed.remove(&node);
                self.invitations.insert(node, invitation);
            }
            Setting::Remove { node } => {
                self.invitations.remove(&node);
                self.removed.insert(node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation() -> Invitation {
        let (group, token) = ("paris".into(), "secret".into());
        Invitation { group, witness: false, token, replaces: false }
    }

    #[test]
    fn decisions_travel() {
        let settings = [
            Setting::FeatureLevel(2),
            Setting::Failover { group: "paris".into(), on: true },
            Setting::Move { to: "paris".into() },
            Setting::Moved { to: "paris".into() },
            Setting::Invite { node: "n4".into(), invitation: invitation() },
            Setting::Remove { node: "n4".into() },
        ];
        for setting in settings {
            assert_eq!(Setting::decode(&setting.encode()), Some(setting));
        }
        assert_eq!(Setting::decode(br#"{"of-the-future":1}"#), None);
    }

    /// Checkpoints and snapshots of older versions have this name.
    #[test]
    fn the_time_of_the_bootstrap_is_written_as_founded() {
        let settings = Settings { bootstrapped: 7, ..Settings::default() };
        let json = serde_json::to_value(&settings).unwrap();
        assert_eq!(json["founded"], 7);
        assert_eq!(serde_json::from_value::<Settings>(json).unwrap().bootstrapped, 7);
    }

    #[test]
    fn a_group_is_moved_to_once_the_new_group_says_so() {
        let mut settings = Settings::bootstrapped_in("london");
        settings.apply(Setting::Move { to: "paris".into() });
        assert_eq!(settings.failover.len(), 2);
        settings.apply(Setting::Moved { to: "london".into() });
        assert_eq!(settings.moving_to.as_deref(), Some("paris"), "another move's end");
        settings.apply(Setting::Moved { to: "paris".into() });
        assert_eq!(settings.failover, BTreeSet::from(["paris".to_owned()]));
        assert_eq!(settings.moving_to, None);
    }

    #[test]
    fn a_removed_node_comes_back_only_when_it_is_invited() {
        let mut settings = Settings::bootstrapped_in("london");
        settings.apply(Setting::Invite { node: "n4".into(), invitation: invitation() });
        settings.apply(Setting::Remove { node: "n4".into() });
        assert!(settings.removed.contains("n4") && settings.invitations.is_empty());
        settings.apply(Setting::Invite { node: "n4".into(), invitation: invitation() });
        assert!(settings.removed.is_empty());
    }
}
