//! What the nodes say of themselves, and what is shown to people.

mod picture;
mod report;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use standby_replica::lineage::Lineage;
use standby_replica::settings::FEATURE_LEVEL;
use standby_types::lock::lock;
use standby_types::{NodeId, Tid};
use tracing::warn;

pub use crate::cells::status::picture::{NodeStatus, Status};
use crate::cells::status::picture::{Seen, compose, tenths};
pub use crate::cells::status::report::{CatchUp, MissingHistory, NodeReport};
use crate::platform::{self, Instant};

/// Silence after which a node counts as down.
const SILENCE: Duration = Duration::from_millis(2500);
/// Silence after which another process may have a node's identity: it reports twice a second.
const IDENTITY_SILENCE: Duration = Duration::from_millis(1500);

/// The latest report of each node.
#[derive(Default)]
pub(crate) struct Reports {
    own: Mutex<NodeReport>,
    heard: Mutex<Heard>,
}

/// What others have said.
struct Heard {
    /// With the moment; `None` once the node's connection has closed.
    others: BTreeMap<NodeId, (NodeReport, Option<Instant>)>,
    progress: Progress,
    /// By the nodes' identities.
    skews: BTreeMap<String, Skew>,
    /// Nodes that have gone on by themselves, and their histories.
    diverged: BTreeMap<String, Lineage>,
    /// When each node was last heard, whatever became of its connection.
    last_heard: BTreeMap<NodeId, Instant>,
    /// When this node began to listen.
    begun: Instant,
}

impl Default for Heard {
    fn default() -> Heard {
        Heard {
            others: BTreeMap::new(),
            progress: Progress::default(),
            skews: BTreeMap::new(),
            diverged: BTreeMap::new(),
            last_heard: BTreeMap::new(),
            begun: Instant::now(),
        }
    }
}

/// By how much a node's clock differs from this one's, as far as reports tell that take some time
/// to come.
#[derive(Default)]
struct Skew {
    /// Of the last reports, the difference that is least.
    last: VecDeque<f64>,
    told: bool,
}

impl Skew {
    /// Reports that must agree.
    const AGREEING: usize = 4;
    /// A difference in seconds that is too much.
    const MUCH: f64 = 0.5;
    /// One with which a clock is not used any more.
    const TOO_MUCH: f64 = 3600.0;

    fn note(&mut self, node: &str, ahead: f64) {
        self.last.push_back(ahead);
        if self.last.len() > Skew::AGREEING {
            self.last.pop_front();
        }
        match self.ahead() {
            Some(seconds) if !self.told => {
                self.told = true;
                warn!(
                    node,
                    seconds,
                    "the clock of a node is not this one's: it is ahead by so much, or behind if \
                    that is negative"
                );
            }
            None => self.told = false,
            Some(_) => {}
        }
    }

    fn ahead(&self) -> Option<f64> {
        let least = self.last.iter().copied().min_by(|a, b| a.abs().total_cmp(&b.abs()))?;
        let known = self.last.len() == Skew::AGREEING && least.abs() > Skew::MUCH;
        known.then(|| tenths(least))
    }
}

/// When the primary had applied what: what lag is measured by.
#[derive(Default)]
struct Progress(VecDeque<(Instant, u64)>);

impl Progress {
    /// Samples that are kept, about two a second.
    const LEN: usize = 10_000;

    fn note(&mut self, now: Instant, index: u64) {
        let news = self.0.back().is_none_or(|(_, last)| index > *last);
        if news {
            self.0.push_back((now, index));
        }
        if self.0.len() > Progress::LEN {
            self.0.pop_front();
        }
    }

    /// For how long the primary has had more than this.
    fn lag(&self, now: Instant, index: u64) -> Duration {
        let missing = self.0.partition_point(|(_, applied)| *applied <= index);
        self.0.get(missing).map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at))
    }
}

impl Reports {
    /// A peer has reported.
    pub(crate) fn note(&self, from: NodeId, report: NodeReport) {
        let heard = &mut *lock(&self.heard);
        // A node that began anew has another identity; its former self is forgotten.
        heard.others.retain(|id, (known, _)| *id == from || known.node != report.node);
        if report.serves {
            heard.progress.note(Instant::now(), report.applied_index);
        }
        if report.clock > 0.0 {
            let ahead = report.clock - platform::wall_clock().as_secs_f64();
            heard.skews.entry(report.id.clone()).or_default().note(&report.node, ahead);
        }
        heard.last_heard.insert(from, Instant::now());
        heard.others.insert(from, (report, Some(Instant::now())));
    }

    /// A peer does not belong to the cluster any more.
    pub(crate) fn forget(&self, peer: NodeId) {
        let mut heard = lock(&self.heard);
        heard.others.remove(&peer);
        heard.last_heard.remove(&peer);
    }

    /// Nodes that were removed and are no members any more are not shown.
    pub(crate) fn forget_removed(&self, removed: &BTreeSet<String>) {
        let own = self.own();
        let is_member = |node: &str| own.members.iter().any(|(member, _, _)| member == node);
        lock(&self.heard)
            .others
            .retain(|_, (report, _)| !removed.contains(&report.node) || is_member(&report.node));
    }

    /// A peer's connection has closed.
    pub(crate) fn lost(&self, peer: NodeId) {
        if let Some((_, at)) = lock(&self.heard).others.get_mut(&peer) {
            *at = None;
        }
    }

    /// True if another process than `run` has been this node until a moment ago.
    pub(crate) fn is_taken(&self, id: NodeId, run: &str) -> bool {
        let heard = lock(&self.heard);
        let Some((report, Some(at))) = heard.others.get(&id) else { return false };
        let known = !run.is_empty() && !report.run.is_empty();
        known && report.run != run && at.elapsed() < IDENTITY_SILENCE
    }

    /// True if a node with this name was a member when this node last reported.
    pub(crate) fn is_member(&self, name: &str) -> bool {
        lock(&self.own).members.iter().any(|(member, _, _)| member == name)
    }

    /// The highest feature level that a node is known to know.
    pub(crate) fn feature_level(&self, id: NodeId) -> u32 {
        let known = lock(&self.heard).others.get(&id).map(|(report, _)| report.knows_level);
        match id.to_string() == lock(&self.own).id {
            true => FEATURE_LEVEL,
            false => known.unwrap_or(0).max(1),
        }
    }

    /// A node has another history than this one, and neither is the beginning of the other.
    pub(crate) fn note_diverged(&self, node: &str, lineage: &Lineage) {
        lock(&self.heard).diverged.insert(node.to_owned(), lineage.clone());
    }

    /// The last transaction of each storage that any node has ever spoken of.
    pub(crate) fn last_tids(&self) -> BTreeMap<String, Tid> {
        let heard = lock(&self.heard);
        let tids = heard.others.values().flat_map(|(report, _)| &report.last_tid);
        latest(tids)
    }

    /// The last transaction of each storage that a node has lost by leaving a timeline.
    pub(crate) fn last_lost(&self) -> BTreeMap<String, Tid> {
        let own = self.own().lost;
        let heard = lock(&self.heard);
        let lost = heard.others.values().flat_map(|(report, _)| &report.lost).chain(&own);
        latest(lost.map(|tail| (&tail.storage, &tail.last)))
    }

    /// For how long a node has not been heard, or since when this one listens, if it never was.
    /// That a connection has closed does not matter here.
    pub(crate) fn silence_of(&self, id: NodeId) -> Duration {
        let heard = lock(&self.heard);
        heard.last_heard.get(&id).unwrap_or(&heard.begun).elapsed()
    }

    /// By how much this node's clock is ahead of those of a majority of the voters, if that is an
    /// hour or more: by the least of these.
    pub(crate) fn ahead_of_majority(&self, voters: &BTreeSet<NodeId>) -> Option<Duration> {
        let heard = lock(&self.heard);
        let behind = |voter: &NodeId| {
            let ahead = heard.skews.get(&voter.to_string())?.ahead()?;
            (ahead <= -Skew::TOO_MUCH).then_some(-ahead)
        };
        let behind: Vec<f64> = voters.iter().filter_map(behind).collect();
        let least = behind.iter().copied().min_by(f64::total_cmp)?;
        (behind.len() * 2 > voters.len()).then(|| Duration::from_secs_f64(least))
    }

    /// True if another node has been heard a moment ago.
    pub(crate) fn is_up(&self, id: NodeId) -> bool {
        let heard = lock(&self.heard);
        heard.others.get(&id).is_some_and(|(_, at)| is_recent(at))
    }

    /// A node that is up, holds data, and has a log that goes beyond `(term, index)`, of the groups
    /// that count.
    pub(crate) fn ahead_of(
        &self,
        log: (u64, u64),
        counts: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let heard = lock(&self.heard);
        let found = heard.others.values().find(|(report, at)| {
            is_recent(at) && !report.witness && report.log > log && counts(&report.group)
        });
        found.map(|(report, _)| report.node.clone())
    }

    /// True if a node has said that its log's disk is slow.
    pub(crate) fn is_slow(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_some_and(|(report, _)| report.slow_disk)
    }

    /// How long a write of a node's log took of late, at worst; nothing if it has not said so.
    pub(crate) fn slowest_write(&self, id: NodeId) -> Duration {
        let heard = lock(&self.heard);
        let seconds = heard.others.get(&id).map_or(0.0, |(report, _)| report.slowest_write_seconds);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// True if a node has said that its data file is damaged.
    pub(crate) fn is_damaged(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_some_and(|(report, _)| report.damage.is_some())
    }

    /// True if a node has said that it lost the leadership again and again.
    pub(crate) fn is_flapping(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_some_and(|(report, _)| report.flapping)
    }

    /// True unless a node has said that a disk of it is full.
    pub(crate) fn has_room(&self, id: NodeId) -> bool {
        lock(&self.heard).others.get(&id).is_none_or(|(report, _)| report.no_room.is_none())
    }

    /// This node has something new to report.
    pub(crate) fn note_own(&self, report: NodeReport) {
        if report.serves {
            lock(&self.heard).progress.note(Instant::now(), report.applied_index);
        }
        *lock(&self.own) = report;
    }

    /// This node's report.
    pub(crate) fn own(&self) -> NodeReport {
        lock(&self.own).clone()
    }

    /// The whole picture, as this node sees it.
    pub(crate) fn status(&self) -> Status {
        let own = self.own();
        let now = Instant::now();
        let heard = lock(&self.heard);
        let picture = |report: &NodeReport, age: Duration| Seen {
            report: report.clone(),
            age,
            lag: heard.progress.lag(now, report.applied_index),
            clock_ahead: heard.skews.get(&report.id).and_then(Skew::ahead),
        };
        let age =
            |at: &Option<Instant>| at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let mut seen: Vec<Seen> =
            heard.others.values().map(|(report, at)| picture(report, age(at))).collect();
        seen.push(picture(&own, Duration::ZERO));
        let mut status = compose(&own, &seen);
        let forks = |(node, lineage): (&String, &Lineage)| (node.clone(), lineage.forks().to_vec());
        status.diverged = heard.diverged.iter().map(forks).collect();
        status
    }
}

/// True for a moment within [`SILENCE`].
fn is_recent(at: &Option<Instant>) -> bool {
    at.is_some_and(|at| at.elapsed() < SILENCE)
}

/// The highest of the tids, given as text, of each storage.
fn latest<'a>(tids: impl Iterator<Item = (&'a String, &'a String)>) -> BTreeMap<String, Tid> {
    let mut latest = BTreeMap::new();
    for (name, tid) in tids {
        let tid = Tid(u64::from_str_radix(tid, 16).unwrap_or(0));
        let known = latest.entry(name.clone()).or_insert(tid);
        *known = tid.max(*known);
    }
    latest
}

/// A time as `time.ctime` of Python writes it, in UTC.
pub(crate) fn ctime(since_epoch: Duration) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = since_epoch.as_secs();
    let (year, month, day) = standby_types::time::date_of(since_epoch);
    format!(
        "{} {} {day:2} {:02}:{:02}:{:02} {year}",
        DAYS[(seconds / 86_400 % 7) as usize],
        MONTHS[(month as usize - 1) % 12],
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests;
