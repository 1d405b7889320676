//! What the router knows, and what follows from it. Pure: what is heard goes in with the time, and
//! a [`Picture`] comes out.
//!
//! Times are durations since the router's start. Nodes are named by their addresses: an address is
//! *watched* if the router has a connection of its own there, on which it asks for signs of life.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use standby_types::Tid;
use standby_zeo::Value;
use tracing::{error, warn};

use crate::topology::{Node, Topology};

/// Without a primary for so long, writers are given to any node that answers: nodes forward them.
const ANY_NODE: Duration = Duration::from_secs(2);
/// Moments that are kept to tell how far a node lags, and the least time between two.
const HEADS: usize = 4096;
const BETWEEN_HEADS: Duration = Duration::from_millis(100);
/// Another group is nearer only if its round trip is shorter than half, and by so much at least.
const NEARER: Duration = Duration::from_millis(1);

/// What the administrator wants.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// Where the cluster is looked for when nothing better is known.
    pub(crate) seeds: Vec<String>,
    /// The cluster's name; without it, the first that is found.
    pub(crate) cluster: Option<String>,
    /// Groups whose replicas readers get, best first; without any, the nearest.
    pub(crate) groups: Vec<String>,
    /// A replica that lacks for longer what another node has is left.
    pub(crate) max_lag: Duration,
}

/// What connections of clients follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Picture {
    /// Where writers go; none while there is no primary.
    pub(crate) writes: Option<String>,
    /// Where readers go, each as good as the other.
    pub(crate) reads: Vec<String>,
    /// Connections to these are broken: nobody answers there.
    pub(crate) dead: BTreeSet<String>,
    /// Where the router is to have connections of its own.
    pub(crate) watched: BTreeSet<String>,
}

/// What the router knows of an address, for people.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) group: String,
    pub(crate) answers: bool,
    pub(crate) primary: bool,
    pub(crate) lag: Duration,
    pub(crate) round_trip: Option<Duration>,
}

/// The node belongs to another cluster: nothing of it is used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it belongs to the cluster {cluster:?} ({cluster_id}), and the others to {ours:?} \
     ({our_id}): it is left out. Is one of the addresses wrong?"
)]
pub(crate) struct Stranger {
    cluster: String,
    cluster_id: String,
    ours: String,
    our_id: String,
}

/// What an address is known to be.
#[derive(Debug, Default, PartialEq, Eq)]
enum Sight {
    /// Nobody has answered yet, or the connection was lost a moment ago.
    #[default]
    Unknown,
    Answers,
    /// It cannot be reached, or does not answer.
    Dead,
}

#[derive(Debug, Default)]
struct Watch {
    sight: Sight,
    /// Its last transaction.
    last: Tid,
    round_trip: Option<Duration>,
    /// What was last said of it in the log, which is said once.
    said: String,
}

/// See the module.
pub(crate) struct Machine {
    policy: Policy,
    /// Seeds of which nothing is known yet. Each is looked at, so that a wrong one is told of.
    new_seeds: BTreeSet<String>,
    /// The newest.
    topology: Option<Topology>,
    watches: BTreeMap<String, Watch>,
    /// When a transaction was first heard of that is the newest of all nodes.
    heads: VecDeque<(Duration, Tid)>,
    /// The group that readers have now.
    group: Option<String>,
    /// Since when there is no primary.
    headless: Option<Duration>,
}

impl Machine {
    pub(crate) fn new(policy: Policy) -> Machine {
        Machine {
            new_seeds: policy.seeds.iter().cloned().collect(),
            policy,
            topology: None,
            watches: BTreeMap::new(),
            heads: VecDeque::new(),
            group: None,
            headless: None,
        }
    }

    fn watch(&mut self, address: &str) -> &mut Watch {
        self.watches.entry(address.to_owned()).or_default()
    }

    /// A node has let the router in, and told of itself.
    pub(crate) fn connected(
        &mut self,
        now: Duration,
        address: &str,
        told: Option<&Value>,
        last: Tid,
    ) -> Result<(), Stranger> {
        match told {
            None => self.say(
                address,
                "it is no node of a Standby cluster; it is used as any ZEO server".into(),
            ),
            Some(told) => self.told(address, told)?,
        }
        self.sees(address, Sight::Answers);
        self.has(now, address, last);
        Ok(())
    }

    /// A node tells of its cluster.
    pub(crate) fn told(&mut self, address: &str, told: &Value) -> Result<(), Stranger> {
        let mut told = match Topology::read(told) {
            Ok(told) => told,
            Err(unreadable) => {
                // Whatever it tells: a node forwards clients to the primary by itself.
                self.say(
                    address,
                    format!("what it tells of its cluster is left out: {unreadable}"),
                );
                return Ok(());
            }
        };
        let (ours, our_id) = match (&self.topology, &self.policy.cluster) {
            (Some(known), _) => (known.cluster.clone(), known.cluster_id.clone()),
            (None, Some(name)) => (name.clone(), "as --cluster says".into()),
            (None, None) => (told.cluster.clone(), told.cluster_id.clone()),
        };
        let foreign = match &self.topology {
            Some(_) => told.cluster_id != our_id,
            None => told.cluster != ours,
        };
        if foreign {
            let Topology { cluster, cluster_id, .. } = told;
            return Err(Stranger { cluster, cluster_id, ours, our_id });
        }
        if let Some(known) = &self.topology {
            told.complete_by(known);
            if told.timeline > known.timeline {
                // Its tids may be lower.
                self.heads.clear();
                self.watches.values_mut().for_each(|watch| watch.last = Tid::NONE);
            }
        }
        let is_primary = told.node_at(address).is_some_and(|node| told.is_primary(node));
        let age = self.topology.as_ref().map(Topology::age);
        let replaces = match Some(told.age()).cmp(&age) {
            Ordering::Less => false,
            // At the same time nobody knows the nodes better than their primary.
            Ordering::Equal => is_primary || self.living_primary().is_none(),
            Ordering::Greater => true,
        };
        if replaces {
            self.topology = Some(told);
        }
        Ok(())
    }

    /// A node has this transaction.
    pub(crate) fn has(&mut self, now: Duration, address: &str, tid: Tid) {
        let watch = self.watch(address);
        watch.last = watch.last.max(tid);
        match self.heads.back_mut() {
            Some((_, newest)) if *newest >= tid => {}
            Some((since, newest)) if now.saturating_sub(*since) < BETWEEN_HEADS => *newest = tid,
            _ => {
                if self.heads.len() == HEADS {
                    self.heads.pop_front();
                }
                self.heads.push_back((now, tid));
            }
        }
    }

    /// A node has answered within this time.
    pub(crate) fn answered(&mut self, address: &str, round_trip: Duration) {
        let watch = self.watch(address);
        let former = watch.round_trip.unwrap_or(round_trip);
        // One slow answer says little.
        watch.round_trip = Some((former * 3 + round_trip) / 4);
    }

    /// The connection to an address is lost. `dead` if there is nobody any more.
    pub(crate) fn lost(&mut self, address: &str, dead: bool, why: String) {
        self.sees(address, if dead { Sight::Dead } else { Sight::Unknown });
        self.say(address, why);
    }

    fn sees(&mut self, address: &str, sight: Sight) {
        self.watch(address).sight = sight;
        self.new_seeds.remove(address);
    }

    /// Says something of an address once, until something else is to be said.
    fn say(&mut self, address: &str, what: String) {
        if self.is_new(address, &what) {
            warn!(address, "{what}");
        }
    }

    /// True if it is not what was said of the address last; it is from now on.
    fn is_new(&mut self, address: &str, what: &str) -> bool {
        let said = &mut self.watch(address).said;
        let new = said != what;
        what.clone_into(said);
        new
    }

    /// An address belongs to another cluster.
    pub(crate) fn foreign(&mut self, address: &str, stranger: &Stranger) {
        self.sees(address, Sight::Unknown);
        let what = stranger.to_string();
        if self.is_new(address, &what) {
            error!(address, "{what}");
        }
    }

    fn answers(&self, address: &str) -> bool {
        self.watches.get(address).is_some_and(|watch| watch.sight == Sight::Answers)
    }

    fn primary(&self) -> Option<&Node> {
        let topology = self.topology.as_ref()?;
        topology.node(topology.primary.as_deref()?)
    }

    /// The primary, if it answers.
    fn living_primary(&self) -> Option<&Node> {
        self.primary().filter(|node| self.answers(node.watched_at()))
    }

    /// For how long a node has lacked what another one has.
    fn lag(&self, now: Duration, address: &str) -> Duration {
        let last = self.watches.get(address).map_or(Tid::NONE, |watch| watch.last);
        // Oldest first, and the tids grow.
        let first_lacked = self.heads.partition_point(|(_, tid)| *tid <= last);
        self.heads.get(first_lacked).map_or(Duration::ZERO, |(since, _)| now.saturating_sub(*since))
    }

    /// What follows from all that is known.
    pub(crate) fn picture(&mut self, now: Duration) -> Picture {
        let watched = self.watched();
        self.watches.retain(|address, _| watched.contains(address));
        let writes = self.writes(now);
        let reads = self.reads(now);
        Picture { writes, reads, dead: self.dead(), watched }
    }

    /// All nodes; and the seeds, each once, and while no node answers or nobody tells of nodes.
    fn watched(&self) -> BTreeSet<String> {
        let nodes = self.topology.iter().flat_map(|topology| &topology.nodes);
        let mut watched: BTreeSet<_> =
            nodes.map(|node| node.watched_at().to_owned()).filter(|at| !at.is_empty()).collect();
        if !watched.iter().any(|address| self.answers(address)) {
            watched.extend(self.policy.seeds.iter().cloned());
        }
        watched.extend(self.new_seeds.iter().cloned());
        watched
    }

    fn writes(&mut self, now: Duration) -> Option<String> {
        let address = self.living_primary().map(|node| node.address.clone());
        if let Some(address) = address.filter(|address| !address.is_empty()) {
            self.headless = None;
            return Some(address);
        }
        let headless = *self.headless.get_or_insert(now);
        let Some(topology) = &self.topology else { return self.seeds().next() };
        if now.saturating_sub(headless) < ANY_NODE {
            return None;
        }
        let answers = |node: &&Node| !node.address.is_empty() && self.answers(node.watched_at());
        let node = topology.nodes.iter().find(answers).map(|node| node.address.clone());
        node.or_else(|| self.seeds().next())
    }

    /// The seeds that answer.
    fn seeds(&self) -> impl Iterator<Item = String> + '_ {
        self.policy.seeds.iter().filter(|seed| self.answers(seed)).cloned()
    }

    fn reads(&mut self, now: Duration) -> Vec<String> {
        let Some(topology) = &self.topology else { return self.seeds().collect() };
        let readable = |node: &&Node| {
            !node.read_only_address.is_empty() && self.answers(&node.read_only_address)
        };
        let nodes: Vec<&Node> = topology.nodes.iter().filter(readable).collect();
        let replicas = nodes.iter().filter(|node| !topology.is_primary(node) && node.state == "up");
        let in_time: Vec<&Node> = replicas
            .copied()
            .filter(|node| self.lag(now, &node.read_only_address) <= self.policy.max_lag)
            .collect();
        let addresses = |nodes: &mut dyn Iterator<Item = &Node>| {
            nodes.map(|node| node.read_only_address.clone()).collect::<Vec<_>>()
        };
        if let Some(group) = self.best_group(&in_time) {
            let reads = addresses(&mut in_time.into_iter().filter(|node| node.group == group));
            self.group = Some(group);
            return reads;
        }
        // The primary is better than a replica that lags, and that than nobody.
        if let Some(primary) = self.living_primary() {
            return vec![primary.watched_at().to_owned()];
        }
        addresses(&mut nodes.into_iter())
    }

    /// The group whose replicas readers get.
    fn best_group(&self, replicas: &[&Node]) -> Option<String> {
        let mut groups: BTreeMap<&str, Duration> = BTreeMap::new();
        for node in replicas {
            let watch = self.watches.get(&node.read_only_address);
            let round_trip = watch.and_then(|watch| watch.round_trip).unwrap_or(Duration::MAX);
            let least = groups.entry(&node.group).or_insert(round_trip);
            *least = round_trip.min(*least);
        }
        let wanted = self.policy.groups.iter().find(|name| groups.contains_key(name.as_str()));
        if let Some(wanted) = wanted {
            return Some(wanted.clone());
        }
        let (nearest, time) = groups.iter().min_by_key(|(_, time)| **time)?;
        // Readers do not go to and fro between groups that are equally near.
        let current = self.group.as_deref().and_then(|group| groups.get_key_value(group));
        if let Some((current, of_current)) = current
            && (*of_current / 2 <= *time || of_current.saturating_sub(*time) < NEARER)
        {
            return Some((*current).to_owned());
        }
        Some((*nearest).to_owned())
    }

    /// Addresses at which clients are connected to a node that does not answer. What is no node of
    /// a cluster may have reasons to be slow, and nobody takes its place.
    fn dead(&self) -> BTreeSet<String> {
        let nodes = self.topology.iter().flat_map(|topology| &topology.nodes);
        let is_dead = |node: &&Node| {
            self.watches.get(node.watched_at()).is_some_and(|watch| watch.sight == Sight::Dead)
        };
        nodes
            .filter(is_dead)
            .flat_map(|node| [node.address.clone(), node.read_only_address.clone()])
            .filter(|address| !address.is_empty())
            .collect()
    }

    /// All nodes, for people.
    pub(crate) fn known(&self, now: Duration) -> Vec<Known> {
        let nodes = self.topology.iter().flat_map(|topology| &topology.nodes);
        let known = nodes.map(|node| Known {
            name: node.name.clone(),
            group: node.group.clone(),
            answers: self.answers(node.watched_at()),
            primary: self.topology.as_ref().is_some_and(|all| all.is_primary(node)),
            lag: self.lag(now, node.watched_at()),
            round_trip: self.watches.get(node.watched_at()).and_then(|watch| watch.round_trip),
        });
        known.collect()
    }

    /// The name of the node at an address of clients, for people.
    pub(crate) fn name_of(&self, address: &str) -> String {
        let node = self.topology.as_ref().and_then(|topology| topology.node_at(address));
        node.map_or_else(|| address.to_owned(), |node| format!("{} ({address})", node.name))
    }
}

impl Topology {
    fn is_primary(&self, node: &Node) -> bool {
        self.primary.as_ref() == Some(&node.name)
    }

    fn node_at(&self, address: &str) -> Option<&Node> {
        self.nodes
            .iter()
            .find(|node| [&node.address, &node.read_only_address].iter().any(|at| *at == address))
    }
}

#[cfg(test)]
mod tests;
