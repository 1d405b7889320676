//! A cluster of machines in memory, with a network that delivers at once unless it is cut.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;

use super::*;
use crate::log::{LogWriter, recover};
use crate::membership::Member;
use crate::message::decode_message;

mod backlog;
mod hand_over;
mod lease;
mod patience;

struct Node {
    memory: MemoryDisk,
    consensus: Consensus,
    writer: LogWriter,
    applied: Vec<(u64, Bytes)>,
    point: AppliedPoint,
    caught_up: Vec<LogIndex>,
    reads: Vec<(u64, LogIndex)>,
    broken: Vec<Broken>,
}

#[derive(Default)]
struct Cluster {
    nodes: BTreeMap<NodeId, Node>,
    now: Duration,
    cut: BTreeSet<(NodeId, NodeId)>,
    /// Nodes whose disk does not answer.
    stalled: BTreeSet<NodeId>,
    batches: BTreeMap<NodeId, Vec<Batch>>,
    /// Each sync takes so many ticks, of all nodes.
    slow_syncs: Option<usize>,
    /// For how many ticks each node has been at a sync, and of how many batches.
    syncing: BTreeMap<NodeId, (usize, usize)>,
    /// What is about to happen, in order.
    events: VecDeque<(NodeId, Event)>,
    running: bool,
    lose_answers_to_catch_up: bool,
    takes_no_entries: Option<NodeId>,
    /// What these nodes apply is told to them later.
    applies_late: BTreeSet<NodeId>,
    /// What is sent to these nodes is still on its way.
    far: BTreeSet<NodeId>,
    on_the_way: Vec<(NodeId, PeerMessage)>,
    /// Each message is so many ticks on its way.
    delay: usize,
    on_the_way_for: VecDeque<(Duration, NodeId, PeerMessage)>,
    /// What is read from logs is read later.
    reads_late: bool,
    late: Vec<(NodeId, Fetch)>,
    /// How often each node has read from its log.
    fetched: BTreeMap<NodeId, usize>,
}

const DIR: &str = "/state/log";
const TICK: Duration = Duration::from_millis(50);
const WITNESS: NodeId = NodeId(9);
const UNAPPLIED_LEN: u64 = 4096;

fn member(id: u64) -> Member {
    Member {
        id: NodeId(id),
        name: format!("n{id}"),
        group: "here".into(),
        peer_address: format!("127.0.0.1:{id}"),
        // By convention of these tests.
        witness: id == WITNESS.0,
    }
}

fn config(id: u64) -> Config {
    Config {
        id: NodeId(id),
        election_ticks: 16,
        most_patience_ticks: 0,
        heartbeat_ticks: 2,
        tick: TICK,
        seed: id,
        witness: id == WITNESS.0,
        unapplied_len: UNAPPLIED_LEN,
    }
}

fn start(id: u64, memory: MemoryDisk, point: AppliedPoint, found: bool) -> Node {
    let disk: Arc<dyn Disk> = Arc::new(memory.clone());
    let mut recovered = recover(&disk, Path::new(DIR)).unwrap();
    let reset = found.then_some((point.index, point.term));
    let writer = LogWriter::open(disk.clone(), Path::new(DIR), &mut recovered, reset).unwrap();
    let consensus =
        Consensus::new(config(id), disk, DIR.into(), &recovered, point.clone()).unwrap();
    Node {
        memory,
        consensus,
        writer,
        applied: Vec::new(),
        point,
        caught_up: Vec::new(),
        reads: Vec::new(),
        broken: Vec::new(),
    }
}

fn empty_point() -> AppliedPoint {
    AppliedPoint {
        index: LogIndex(0),
        term: Term(0),
        membership: Membership::default(),
        state: Bytes::new(),
        open_parts: false,
    }
}

impl Cluster {
    /// A first member, a second data node, and a witness.
    fn with_witness() -> Cluster {
        let mut cluster = Cluster::of(2);
        cluster.join(WITNESS.0);
        cluster.change(NodeId(1), Change::Promote(WITNESS));
        cluster.ticks(10);
        assert_eq!(cluster.nodes[&NodeId(1)].consensus.membership().voters.len(), 3);
        cluster
    }

    /// A new node, as a learner.
    fn join(&mut self, id: u64) {
        self.nodes.insert(NodeId(id), start(id, MemoryDisk::new(), empty_point(), false));
        self.change(NodeId(1), Change::AddLearner(member(id)));
        self.ticks(10);
    }

    fn hand_over(&mut self, from: u64, to: u64) -> Result<(), NotLeader> {
        let mut outputs = Vec::new();
        let consensus = &mut self.nodes.get_mut(&NodeId(from)).unwrap().consensus;
        consensus.hand_over(NodeId(to), &mut outputs)?;
        self.perform(NodeId(from), outputs);
        Ok(())
    }

    /// A first member, and nodes that it takes in.
    fn of(size: u64) -> Cluster {
        let mut cluster = Cluster::default();
        let point = AppliedPoint {
            index: LogIndex(1),
            term: Term(1),
            membership: Membership::founded_by(member(1)),
            ..empty_point()
        };
        cluster.nodes.insert(NodeId(1), start(1, MemoryDisk::new(), point, true));
        cluster.ticks(40);
        assert_eq!(cluster.primary(), Some(NodeId(1)));
        for id in 2..=size {
            cluster.join(id);
            cluster.change(NodeId(1), Change::Promote(NodeId(id)));
            cluster.ticks(10);
        }
        assert_eq!(cluster.nodes[&NodeId(1)].consensus.membership().voters.len() as u64, size);
        cluster
    }

    fn change(&mut self, node: NodeId, change: Change) {
        let mut outputs = Vec::new();
        let consensus = &mut self.nodes.get_mut(&node).unwrap().consensus;
        consensus.change_membership(&[change], &mut outputs).unwrap();
        self.perform(node, outputs);
    }

    fn event(&mut self, id: NodeId, event: Event) {
        self.events.push_back((id, event));
        if !std::mem::replace(&mut self.running, true) {
            while let Some((id, event)) = self.events.pop_front() {
                let Some(node) = self.nodes.get_mut(&id) else { continue };
                let mut outputs = Vec::new();
                node.consensus.step(self.now, event, &mut outputs).unwrap();
                self.perform(id, outputs);
            }
            self.running = false;
        }
    }

    fn perform(&mut self, id: NodeId, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send(to, bytes) => {
                    if !self.cut.contains(&(id, to)) {
                        let message = decode_message(bytes).unwrap();
                        if self.delay > 0 {
                            let due = self.now + TICK * self.delay as u32;
                            self.on_the_way_for.push_back((due, to, message));
                        } else if self.far.contains(&to) {
                            self.on_the_way.push((to, message));
                        } else if self.takes_no_entries != Some(to) || !message.is_append() {
                            self.event(to, Event::Received(message));
                        }
                    }
                }
                Output::Persist(batch) => {
                    self.batches.entry(id).or_default().push(batch);
                    if self.slow_syncs.is_none() {
                        self.disk_answers(id);
                    }
                }
                Output::Commit(committed) => self.apply(id, committed),
                Output::CatchUp { from, target } => {
                    // The stream of transactions, in no time.
                    let applied = self.nodes[&from].applied.clone();
                    let node = self.nodes.get_mut(&id).unwrap();
                    let index = target.index;
                    node.applied = applied.into_iter().filter(|(i, _)| *i <= index.0).collect();
                    node.point = target.clone();
                    node.caught_up.push(index);
                    self.event(id, Event::Applied(target));
                    self.event(id, Event::CaughtUp(index));
                    if self.lose_answers_to_catch_up {
                        self.cut.insert((id, from));
                    }
                }
                Output::ReadIndex(context, index) => {
                    self.nodes.get_mut(&id).unwrap().reads.push((context, index));
                }
                Output::Role(_) => {}
                Output::Fetch(fetch) if self.reads_late => self.late.push((id, fetch)),
                Output::Fetch(fetch) => {
                    *self.fetched.entry(id).or_default() += 1;
                    self.event(id, Event::Fetched(fetch.read()));
                }
                Output::Broken(broken) => self.nodes.get_mut(&id).unwrap().broken.push(broken),
                Output::Purge(index) => {
                    self.nodes.get_mut(&id).unwrap().writer.purge(index).unwrap();
                }
            }
        }
    }

    fn disk_answers(&mut self, id: NodeId) {
        if self.stalled.contains(&id) {
            return;
        }
        let batches = self.batches.remove(&id).unwrap_or_default();
        if !batches.is_empty() {
            let written = self.nodes.get_mut(&id).unwrap().writer.write(batches).unwrap();
            self.event(id, Event::Persisted(written));
        }
    }

    fn sync_slowly(&mut self, id: NodeId) {
        let Some(length) = self.slow_syncs else { return };
        let Some(waiting) = self.batches.get_mut(&id).filter(|batches| !batches.is_empty()) else {
            return;
        };
        // What comes during a sync waits for the next one.
        let (ticks, count) = self.syncing.entry(id).or_insert((0, waiting.len()));
        *ticks += 1;
        if *ticks >= length {
            let batches = waiting.drain(..*count).collect();
            self.syncing.remove(&id);
            let written = self.nodes.get_mut(&id).unwrap().writer.write(batches).unwrap();
            self.event(id, Event::Persisted(written));
        }
    }

    fn apply(&mut self, id: NodeId, committed: Vec<Committed>) {
        let node = self.nodes.get_mut(&id).unwrap();
        for entry in committed {
            let (index, term) = entry.point();
            assert!(index > node.point.index, "applied twice");
            (node.point.index, node.point.term) = (index, term);
            match entry {
                Committed::Command(index, _, data) => node.applied.push((index.0, data)),
                Committed::Membership(_, _, membership) => node.point.membership = membership,
                Committed::Empty(..) => {}
            }
        }
        if !self.applies_late.contains(&id) {
            self.applies(id);
        }
    }

    fn applies(&mut self, id: NodeId) {
        self.applies_late.remove(&id);
        let point = self.nodes[&id].point.clone();
        self.event(id, Event::Applied(point));
    }

    fn ticks(&mut self, count: usize) {
        for _ in 0..count {
            self.now += TICK;
            while let Some((_, to, message)) =
                self.on_the_way_for.pop_front_if(|(due, ..)| *due <= self.now)
            {
                self.event(to, Event::Received(message));
            }
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.sync_slowly(id);
                self.event(id, Event::Tick);
            }
        }
    }

    fn propose(&mut self, id: NodeId, data: &'static [u8]) -> Result<(LogIndex, Term), NotLeader> {
        let mut outputs = Vec::new();
        let consensus = &mut self.nodes.get_mut(&id).unwrap().consensus;
        let point = consensus.propose(Bytes::from_static(data), &mut outputs)?;
        self.perform(id, outputs);
        Ok(point)
    }

    fn primary(&self) -> Option<NodeId> {
        let serving = self.nodes.iter().filter(|(_, node)| node.consensus.role().serves);
        serving.max_by_key(|(_, node)| node.consensus.role().term).map(|(id, _)| *id)
    }

    /// The process is killed and does not come back yet: peers see their connections close.
    fn kill(&mut self, id: NodeId) -> Node {
        let node = self.nodes.remove(&id).unwrap();
        self.batches.remove(&id);
        self.syncing.remove(&id);
        for other in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.event(other, Event::PeerLost(id));
        }
        node
    }

    fn restart(&mut self, id: NodeId, node: Node) {
        node.memory.crash();
        let mut started = start(id.0, node.memory, node.point, false);
        started.applied = node.applied;
        self.nodes.insert(id, started);
    }

    fn isolate(&mut self, id: NodeId) {
        for other in self.nodes.keys().copied() {
            self.cut.extend([(id, other), (other, id)]);
        }
    }

    fn data(&self, id: u64) -> Vec<&[u8]> {
        self.nodes[&NodeId(id)].applied.iter().map(|(_, data)| &data[..]).collect()
    }
}

#[test]
fn entries_reach_all_nodes() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.propose(NodeId(1), b"two").unwrap();
    cluster.ticks(3);
    for id in 1..=3 {
        assert_eq!(cluster.data(id), [b"one", b"two"]);
        assert_eq!(cluster.nodes[&NodeId(id)].consensus.membership().voters.len(), 3);
    }
    assert_eq!(cluster.propose(NodeId(2), b"no"), Err(NotLeader));
}

#[test]
fn nothing_is_committed_before_a_majority_has_it_on_disk() {
    let mut cluster = Cluster::of(3);
    cluster.stalled.extend([NodeId(2), NodeId(3)]);
    cluster.propose(NodeId(1), b"one").unwrap();
    assert!(cluster.data(1).is_empty());
    cluster.stalled.remove(&NodeId(2));
    cluster.disk_answers(NodeId(2));
    assert_eq!(cluster.data(1), [b"one"]);
}

/// The leader's own disk may be the slow one.
#[test]
fn a_majority_without_the_leader_commits() {
    let mut cluster = Cluster::of(3);
    cluster.stalled.insert(NodeId(1));
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.stalled.remove(&NodeId(1));
    cluster.disk_answers(NodeId(1));
    cluster.ticks(3);
    assert_eq!(cluster.data(3), [b"one"]);
}

#[test]
fn a_dead_primary_is_replaced_at_once() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    let dead = cluster.kill(NodeId(1));
    cluster.ticks(2);
    let primary = cluster.primary().expect("no primary after two ticks");
    cluster.propose(primary, b"two").unwrap();
    cluster.restart(NodeId(1), dead);
    cluster.ticks(10);
    assert_eq!(cluster.data(1), [b"one", b"two"]);
    assert!(!cluster.nodes[&NodeId(1)].consensus.role().leads);
}

#[test]
fn a_survivor_alone_does_not_lead() {
    let mut cluster = Cluster::of(3);
    cluster.kill(NodeId(1));
    cluster.kill(NodeId(2));
    cluster.ticks(200);
    assert_eq!(cluster.primary(), None);
}

/// One follower's connection breaks, the leader lives: nothing changes.
#[test]
fn a_false_alarm_is_refused() {
    let mut cluster = Cluster::of(3);
    let term = cluster.nodes[&NodeId(1)].consensus.role().term;
    cluster.event(NodeId(2), Event::PeerLost(NodeId(1)));
    cluster.ticks(20);
    assert_eq!(cluster.primary(), Some(NodeId(1)));
    assert_eq!(cluster.nodes[&NodeId(2)].consensus.role().term, term);
    assert_eq!(cluster.nodes[&NodeId(2)].consensus.role().leader, Some(NodeId(1)));
}

#[test]
fn row_12_a_cut_off_primary_steps_down_and_its_entries_go() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.isolate(NodeId(1));
    let proposed = cluster.propose(NodeId(1), b"lost").unwrap();
    let lease = cluster.nodes[&NodeId(1)].consensus.lease(cluster.now).unwrap();
    cluster.ticks(40);
    assert!(lease < cluster.now);
    assert!(!cluster.nodes[&NodeId(1)].consensus.role().leads);
    let primary = cluster.primary().unwrap();
    assert_ne!(primary, NodeId(1));
    cluster.propose(primary, b"two").unwrap();
    cluster.cut.clear();
    cluster.ticks(40);
    assert_eq!(cluster.data(1), [b"one", b"two"]);
    let term_there = cluster.nodes[&NodeId(1)].consensus.role().term;
    assert!(term_there > proposed.1);
}

#[test]
fn a_follower_behind_the_log_catches_up() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    let away = cluster.kill(NodeId(3));
    cluster.propose(NodeId(1), b"two").unwrap();
    let applied = cluster.nodes[&NodeId(1)].point.index;
    let mut outputs = Vec::new();
    cluster.nodes.get_mut(&NodeId(1)).unwrap().consensus.compact(applied, &mut outputs);
    cluster.perform(NodeId(1), outputs);
    cluster.restart(NodeId(3), away);
    cluster.ticks(40);
    cluster.propose(NodeId(1), b"three").unwrap();
    cluster.ticks(5);
    assert!(!cluster.nodes[&NodeId(3)].caught_up.is_empty());
    assert_eq!(cluster.data(3), [&b"one"[..], b"two", b"three"]);
    // It goes on from there after a power failure.
    let away = cluster.kill(NodeId(3));
    cluster.restart(NodeId(3), away);
    cluster.propose(NodeId(1), b"four").unwrap();
    cluster.ticks(40);
    assert_eq!(cluster.data(3).len(), 4);
}

/// Of what a follower lacks most is on the leader's disk only: it is read beside the machine.
#[test]
fn a_follower_far_behind_gets_what_is_on_disk_only() {
    let mut cluster = Cluster::of(4);
    let away = [NodeId(3), NodeId(4)].map(|id| (id, cluster.kill(id)));
    let long: [&'static [u8]; 2] = [&[1; 3000], &[2; 3000]];
    for number in 0..20 {
        cluster.propose(NodeId(1), long[number % 2]).unwrap();
    }
    for (id, node) in away {
        cluster.restart(id, node);
    }
    cluster.ticks(40);
    cluster.propose(NodeId(1), b"last").unwrap();
    cluster.ticks(5);
    for id in [3, 4] {
        assert!(cluster.nodes[&NodeId(id)].caught_up.is_empty());
        assert_eq!(cluster.data(id), cluster.data(1));
    }
    // Two followers may wait for the same; hardly more is read than what they lack.
    let fetched = cluster.fetched[&NodeId(1)];
    assert!((2..=8).contains(&fetched), "{fetched}");
}

/// What cannot be read back from the log comes from the data file.
#[test]
fn a_follower_is_not_held_up_by_a_damaged_log() {
    let mut cluster = Cluster::of(3);
    let away = cluster.kill(NodeId(3));
    for _ in 0..20 {
        cluster.propose(NodeId(1), &[1; 3000]).unwrap();
    }
    let memory = &cluster.nodes[&NodeId(1)].memory;
    for path in memory.list(Path::new(DIR)).unwrap() {
        let file = memory.open(&path, Open::Write).unwrap();
        file.write_at(&vec![0; file.len().unwrap() as usize], 0).unwrap();
    }
    cluster.restart(NodeId(3), away);
    cluster.ticks(40);
    cluster.propose(NodeId(1), b"last").unwrap();
    cluster.ticks(5);
    assert!(!cluster.nodes[&NodeId(3)].caught_up.is_empty());
    assert_eq!(cluster.data(3), cluster.data(1));
}

/// The message that tells the leader of a completed catch-up may be lost.
#[test]
fn a_lost_answer_to_a_catch_up_does_not_stop_replication() {
    let mut cluster = Cluster::of(2);
    cluster.nodes.insert(NodeId(3), start(3, MemoryDisk::new(), empty_point(), false));
    cluster.cut.insert((NodeId(3), NodeId(1)));
    cluster.change(NodeId(1), Change::AddLearner(member(3)));
    // The leader sends no snapshot to a node that it does not hear.
    cluster.cut.clear();
    cluster.lose_answers_to_catch_up = true;
    cluster.ticks(5);
    assert_eq!(cluster.nodes[&NodeId(3)].caught_up.len(), 1);
    cluster.lose_answers_to_catch_up = false;
    cluster.cut.clear();
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(50);
    assert_eq!(cluster.data(3), [b"one"]);
}

/// It hears the leader, and takes none of its entries, as one that lacks their blobs.
#[test]
fn a_follower_that_cannot_use_the_log_catches_up() {
    for another_leads in [false, true] {
        let mut cluster = Cluster::of(3);
        cluster.propose(NodeId(1), b"one").unwrap();
        cluster.ticks(5);
        cluster.takes_no_entries = Some(NodeId(3));
        cluster.propose(NodeId(1), b"two").unwrap();
        if another_leads {
            cluster.kill(NodeId(1));
            cluster.ticks(60);
        }
        cluster.ticks(20);
        assert_eq!(cluster.data(3), [b"one"]);
        let before = cluster.nodes[&NodeId(3)].caught_up.len();
        cluster.event(NodeId(3), Event::CannotFollow);
        cluster.ticks(5);
        cluster.takes_no_entries = None;
        cluster.ticks(60);
        let leader = cluster.primary().unwrap();
        cluster.propose(leader, b"three").unwrap();
        cluster.ticks(5);
        assert_eq!(cluster.data(3), [&b"one"[..], b"two", b"three"]);
        assert_eq!(cluster.nodes[&NodeId(3)].caught_up.len(), before + 1);
    }
}

/// The leader dies while its snapshot is being installed; the follower may be asked to stand for
/// election before its disk has answered.
#[test]
fn an_election_while_a_snapshot_is_being_installed() {
    let mut cluster = Cluster::of(3);
    let away = cluster.kill(NodeId(3));
    cluster.propose(NodeId(1), b"one").unwrap();
    let applied = cluster.nodes[&NodeId(1)].point.index;
    let mut outputs = Vec::new();
    cluster.nodes.get_mut(&NodeId(1)).unwrap().consensus.compact(applied, &mut outputs);
    cluster.perform(NodeId(1), outputs);
    cluster.stalled.insert(NodeId(3));
    cluster.restart(NodeId(3), away);
    cluster.ticks(5);
    assert_eq!(cluster.nodes[&NodeId(3)].caught_up.len(), 1);
    cluster.kill(NodeId(1));
    cluster.ticks(40);
    cluster.stalled.clear();
    cluster.disk_answers(NodeId(3));
    cluster.ticks(60);
    assert!(cluster.primary().is_some());
}

#[test]
fn votes_are_on_disk_before_they_are_sent() {
    let mut cluster = Cluster::of(3);
    cluster.stalled.extend([NodeId(2), NodeId(3)]);
    cluster.kill(NodeId(1));
    cluster.ticks(60);
    assert_eq!(cluster.primary(), None);
    for id in [2, 3] {
        let node = &cluster.nodes[&NodeId(id)];
        let disk: Arc<dyn Disk> = Arc::new(node.memory.clone());
        let on_disk = recover(&disk, Path::new(DIR)).unwrap().hard_state;
        // Whatever it has decided in memory, nobody has heard of a term that is not on disk.
        assert!(node.consensus.hard_state().term >= on_disk.term);
    }
    cluster.stalled.clear();
    cluster.disk_answers(NodeId(2));
    cluster.disk_answers(NodeId(3));
    cluster.ticks(60);
    assert!(cluster.primary().is_some());
}

#[test]
fn reads_on_a_replica_learn_how_far_they_must_see() {
    let mut cluster = Cluster::of(3);
    let (index, _) = cluster.propose(NodeId(1), b"one").unwrap();
    cluster.event(NodeId(2), Event::ReadIndex(77));
    cluster.ticks(3);
    let reads = &cluster.nodes[&NodeId(2)].reads;
    assert!(matches!(reads[..], [(77, at)] if at >= index), "{reads:?}");
}

#[test]
fn a_reinstalled_node_replaces_its_former_self() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.kill(NodeId(3));
    cluster.nodes.insert(NodeId(4), start(4, MemoryDisk::new(), empty_point(), false));
    let reinstalled = Member { name: "n3".into(), ..member(4) };
    let mut outputs = Vec::new();
    let changes = [Change::Remove(NodeId(3)), Change::AddLearner(reinstalled)];
    let consensus = &mut cluster.nodes.get_mut(&NodeId(1)).unwrap().consensus;
    consensus.change_membership(&changes, &mut outputs).unwrap();
    cluster.perform(NodeId(1), outputs);
    cluster.ticks(40);
    let membership = cluster.nodes[&NodeId(1)].consensus.membership().clone();
    assert!(!membership.contains(NodeId(3)) && membership.learners.contains(&NodeId(4)));
    assert!(membership.outgoing.is_empty(), "still in joint consensus: {membership:?}");
    cluster.change(NodeId(1), Change::Promote(NodeId(4)));
    cluster.ticks(10);
    assert_eq!(cluster.data(4), [b"one"]);
    assert_eq!(cluster.nodes[&NodeId(4)].consensus.membership().voters.len(), 3);
}

/// A voter, a learner, and the leader itself: the address changes, their votes do not.
#[test]
fn a_member_that_has_moved_keeps_its_vote() {
    let mut cluster = Cluster::of(3);
    cluster.join(4);
    for id in [3, 4, 1].map(NodeId) {
        let before = cluster.nodes[&NodeId(1)].consensus.membership().clone();
        let changes = before.moved(id, "elsewhere:1".into());
        let mut outputs = Vec::new();
        let consensus = &mut cluster.nodes.get_mut(&NodeId(1)).unwrap().consensus;
        consensus.change_membership(&changes, &mut outputs).unwrap();
        cluster.perform(NodeId(1), outputs);
        cluster.ticks(10);
        let mut expected = before;
        expected.members.get_mut(&id).unwrap().peer_address = "elsewhere:1".into();
        for node in cluster.nodes.values() {
            assert_eq!(*node.consensus.membership(), expected);
        }
        assert_eq!(cluster.primary(), Some(NodeId(1)));
    }
    assert_eq!(Membership::default().moved(NodeId(5), "elsewhere:1".into()), []);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    assert_eq!(cluster.data(4), [b"one"]);
}

/// The first member's checkpoint may be older than the cluster: its membership then names the first
/// member only. The first member must not elect itself with that.
#[test]
fn an_old_checkpoint_does_not_bring_an_old_membership_back() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    let mut dead = cluster.kill(NodeId(1));
    cluster.ticks(5);
    let primary = cluster.primary().unwrap();
    dead.point = AppliedPoint {
        index: LogIndex(1),
        term: Term(1),
        membership: Membership::founded_by(member(1)),
        ..empty_point()
    };
    dead.applied.clear();
    cluster.restart(NodeId(1), dead);
    cluster.isolate(NodeId(1));
    for _ in 0..100 {
        cluster.ticks(1);
        assert!(!cluster.nodes[&NodeId(1)].consensus.role().leads, "elected itself alone");
    }
    cluster.propose(primary, b"two").unwrap();
    cluster.cut.clear();
    cluster.ticks(40);
    assert_eq!(cluster.data(1), [b"one", b"two"]);
    assert_eq!(cluster.nodes[&NodeId(1)].consensus.membership().voters.len(), 3);
}

/// The same seeds give the same elections.
#[test]
fn elections_are_repeatable() {
    let run = || {
        let mut cluster = Cluster::of(3);
        cluster.isolate(NodeId(1));
        cluster.ticks(50);
        (cluster.primary(), cluster.nodes[&NodeId(2)].consensus.role())
    };
    assert_eq!(run(), run());
}

#[test]
fn leadership_is_handed_over_in_no_time_and_nothing_is_lost() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.hand_over(1, 3).unwrap();
    cluster.ticks(1);
    assert_eq!(cluster.primary(), Some(NodeId(3)));
    cluster.propose(NodeId(3), b"two").unwrap();
    cluster.ticks(3);
    for id in 1..=3 {
        assert_eq!(cluster.data(id), [b"one", b"two"]);
    }
}

#[test]
fn row_22_a_hand_over_to_a_node_that_does_not_answer_is_given_up() {
    let mut cluster = Cluster::of(3);
    cluster.cut.extend([(NodeId(1), NodeId(3)), (NodeId(3), NodeId(1))]);
    cluster.hand_over(1, 3).unwrap();
    assert!(cluster.nodes[&NodeId(1)].consensus.is_handing_over());
    assert!(cluster.propose(NodeId(1), b"held").is_err());
    cluster.ticks(17);
    assert!(!cluster.nodes[&NodeId(1)].consensus.is_handing_over());
    cluster.propose(NodeId(1), b"one").unwrap();
    assert_eq!(cluster.data(2), [b"one"]);
}

#[test]
fn row_22_a_hand_over_goes_forward_when_the_other_dies_in_its_election() {
    let mut cluster = Cluster::of(3);
    // The others hear it stand, and it does not hear their answers.
    cluster.cut.extend([(NodeId(1), NodeId(3)), (NodeId(2), NodeId(3))]);
    let mut outputs = Vec::new();
    let consensus = &mut cluster.nodes.get_mut(&NodeId(3)).unwrap().consensus;
    consensus.raft.raft.become_follower(consensus.role.term.0, 1);
    let mut message = Message::default();
    message.set_msg_type(MessageType::MsgTimeoutNow);
    (message.from, message.to, message.term) = (1, 3, consensus.role.term.0);
    cluster
        .nodes
        .get_mut(&NodeId(1))
        .unwrap()
        .consensus
        .hand_over(NodeId(3), &mut outputs)
        .unwrap();
    cluster.event(NodeId(3), Event::Received(PeerMessage(message)));
    cluster.kill(NodeId(3));
    assert_eq!(cluster.primary(), None);
    cluster.ticks(12);
    assert_eq!(cluster.primary(), Some(NodeId(1)));
}

#[test]
fn learners_and_witnesses_are_handed_nothing() {
    let mut cluster = Cluster::with_witness();
    cluster.join(3);
    assert_eq!(cluster.hand_over(1, 3), Err(NotLeader));
    assert_eq!(cluster.hand_over(1, WITNESS.0), Err(NotLeader));
    assert_eq!(cluster.hand_over(1, 1), Err(NotLeader));
    assert_eq!(cluster.hand_over(2, 1), Err(NotLeader));
}

#[test]
fn two_data_nodes_and_a_witness_survive_any_single_failure() {
    for lost in [NodeId(1), NodeId(2), WITNESS] {
        let mut cluster = Cluster::with_witness();
        cluster.propose(NodeId(1), b"one").unwrap();
        cluster.kill(lost);
        cluster.ticks(40);
        let primary = cluster.primary().unwrap();
        assert_ne!(primary, WITNESS);
        cluster.propose(primary, b"two").unwrap();
        cluster.ticks(12);
        for id in [1, 2].map(NodeId).into_iter().filter(|id| *id != lost) {
            assert_eq!(cluster.data(id.0), [b"one", b"two"], "without {lost}");
        }
    }
}

#[test]
fn a_witness_never_leads_and_holds_no_data() {
    let mut cluster = Cluster::with_witness();
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    assert_eq!(cluster.data(WITNESS.0), [] as [&[u8]; 0]);
    cluster.kill(NodeId(1));
    cluster.kill(NodeId(2));
    cluster.ticks(400);
    assert_eq!(cluster.primary(), None);
    assert_eq!(cluster.nodes[&WITNESS].consensus.role().leader, None);
}

#[test]
fn what_only_the_primary_has_is_kept_from_the_witness_while_the_other_node_is_there() {
    let mut cluster = Cluster::with_witness();
    cluster.stalled.insert(NodeId(2));
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(4);
    assert!(cluster.data(1).is_empty(), "a majority is the other data node's, not the witness's");
    // The primary dies: the other one may lead, for the witness knows of nothing that it lacks.
    cluster.stalled.clear();
    cluster.batches.clear();
    let second = cluster.nodes.remove(&NodeId(2)).unwrap();
    cluster.restart(NodeId(2), second);
    cluster.kill(NodeId(1));
    cluster.ticks(40);
    assert_eq!(cluster.primary(), Some(NodeId(2)));
}

#[test]
fn a_node_whose_disk_stalls_holds_nothing_up_for_long() {
    let mut cluster = Cluster::with_witness();
    cluster.stalled.insert(NodeId(2));
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(12);
    assert_eq!(cluster.data(1), [b"one"], "the witness makes up the majority");
    cluster.propose(NodeId(1), b"two").unwrap();
    cluster.ticks(1);
    assert_eq!(cluster.data(1), [b"one", b"two"], "at once, as long as the node is slow");
    cluster.stalled.clear();
    cluster.disk_answers(NodeId(2));
    cluster.ticks(6);
    assert_eq!(cluster.data(2), [b"one", b"two"]);
}

#[test]
fn a_learner_that_is_cut_off_knows_of_no_leader_any_more() {
    let mut cluster = Cluster::of(3);
    cluster.join(4);
    cluster.ticks(3);
    assert_eq!(cluster.nodes[&NodeId(4)].consensus.role().leader, Some(NodeId(1)));
    cluster.isolate(NodeId(4));
    cluster.ticks(40);
    assert_eq!(cluster.nodes[&NodeId(4)].consensus.role().leader, None);
    cluster.cut.clear();
    cluster.ticks(3);
    assert_eq!(cluster.nodes[&NodeId(4)].consensus.role().leader, Some(NodeId(1)));
}

#[test]
fn a_voter_is_made_a_learner() {
    let mut cluster = Cluster::of(3);
    cluster.change(NodeId(1), Change::Demote(NodeId(3)));
    cluster.ticks(10);
    let membership = cluster.nodes[&NodeId(1)].consensus.membership().clone();
    assert_eq!(membership.voters, BTreeSet::from([NodeId(1), NodeId(2)]));
    assert_eq!(membership.learners, BTreeSet::from([NodeId(3)]));
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    assert_eq!(cluster.data(3), [b"one"]);
}

#[test]
fn row_28_who_has_lost_something_neither_stands_nor_votes() {
    let mut cluster = Cluster::of(3);
    let set = |cluster: &mut Cluster, id, candidacy| {
        cluster.nodes.get_mut(&NodeId(id)).unwrap().consensus.set_candidacy(candidacy);
    };
    set(&mut cluster, 2, Candidacy::Abstains);
    cluster.propose(NodeId(1), b"one").unwrap();
    let dead = cluster.kill(NodeId(1));
    cluster.ticks(200);
    assert_eq!(cluster.primary(), None, "two of three are no majority if one abstains");
    set(&mut cluster, 2, Candidacy::Stands);
    cluster.ticks(100);
    assert!(cluster.primary().is_some());
    cluster.restart(NodeId(1), dead);
    cluster.ticks(10);
    assert_eq!(cluster.data(1), [b"one"]);
}

#[test]
fn row_41_who_does_not_stand_still_votes() {
    let mut cluster = Cluster::of(3);
    let node = &mut cluster.nodes.get_mut(&NodeId(2)).unwrap().consensus;
    node.set_candidacy(Candidacy::VotesOnly);
    // By its rank it would stand first.
    cluster.kill(NodeId(1));
    cluster.ticks(10);
    assert_eq!(cluster.primary(), Some(NodeId(3)));
    // Nor is it handed the leadership by one that does not know.
    cluster.hand_over(3, 2).unwrap();
    cluster.ticks(60);
    assert_eq!(cluster.primary(), Some(NodeId(3)));
}

/// A forced promotion: what is in the log is taken, and the log begins anew with one voter.
#[test]
fn a_log_that_begins_anew_belongs_to_its_only_voter() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    cluster.isolate(NodeId(2));
    cluster.stalled.insert(NodeId(3));
    cluster.propose(NodeId(1), b"on one node only").unwrap();
    let node = cluster.kill(NodeId(1));
    let remaining = node.consensus.remaining(node.point.index).unwrap();
    let [Committed::Command(index, term, data)] = &remaining[..] else {
        panic!("{remaining:?}");
    };
    assert_eq!(data, &b"on one node only"[..]);
    let point = AppliedPoint {
        index: *index,
        term: *term,
        membership: node.point.membership.led_by(NodeId(1)),
        ..node.point.clone()
    };
    let disk: Arc<dyn Disk> = Arc::new(node.memory.clone());
    let (consensus, batch) =
        Consensus::anew(config(1), disk, DIR.into(), point.clone(), *term).unwrap();
    let mut node = Node { consensus, point: point.clone(), ..node };
    let written = node.writer.write(vec![batch]).unwrap();
    assert!(written.begins_log());
    let mut alone = Cluster::default();
    alone.nodes.insert(NodeId(1), node);
    alone.ticks(2);
    assert_eq!(alone.primary(), Some(NodeId(1)));
    assert!(alone.nodes[&NodeId(1)].consensus.role().term > *term);
    alone.propose(NodeId(1), b"two").unwrap();
    alone.ticks(2);
    // The others are learners, and get everything anew; also after a power failure.
    for id in [2, 3] {
        alone.nodes.insert(NodeId(id), start(id, MemoryDisk::new(), empty_point(), false));
        alone.ticks(60);
        assert_eq!(alone.nodes[&NodeId(id)].caught_up.len(), 1);
        assert_eq!(alone.data(id).last(), Some(&&b"two"[..]));
        assert_eq!(alone.nodes[&NodeId(id)].consensus.membership().voters.len(), 1);
        let node = alone.kill(NodeId(1));
        alone.restart(NodeId(1), node);
        alone.ticks(60);
        assert_eq!(alone.primary(), Some(NodeId(1)));
    }
}

/// A node, and its disk as it is now: what is put back later.
fn snapshot(cluster: &Cluster, id: u64) -> Node {
    let node = &cluster.nodes[&NodeId(id)];
    let mut earlier = start(id, node.memory.copy(), node.point.clone(), false);
    earlier.applied = node.applied.clone();
    earlier
}

#[test]
fn row_46_a_node_whose_disk_was_put_back_is_told_by_its_leader() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    let earlier = snapshot(&cluster, 3);
    cluster.isolate(NodeId(2));
    let (last, _) = cluster.propose(NodeId(1), b"two").unwrap();
    cluster.ticks(3);
    assert_eq!(cluster.data(3), [b"one", b"two"]);
    cluster.kill(NodeId(3));
    cluster.restart(NodeId(3), earlier);
    cluster.ticks(5);
    let leader = NodeId(1);
    let lost = Broken::LostHere { acknowledged: last, leader };
    assert!(cluster.nodes[&NodeId(3)].broken.contains(&lost));
    assert_eq!(cluster.data(3), [b"one"], "it takes nothing from a leader that counts on it");
}

/// The others have forgotten that the node had acknowledged more: what was acknowledged is lost to
/// them. Whoever has it neither panics nor follows, and its acceptance does not count.
#[test]
fn row_46_a_leader_that_lacks_what_is_committed_is_not_followed() {
    let mut cluster = Cluster::of(3);
    cluster.propose(NodeId(1), b"one").unwrap();
    cluster.ticks(3);
    let earlier = snapshot(&cluster, 3);
    cluster.isolate(NodeId(2));
    for data in [&b"two"[..], b"three"] {
        cluster.propose(NodeId(1), data).unwrap();
    }
    cluster.ticks(3);
    cluster.kill(NodeId(3));
    cluster.restart(NodeId(3), earlier);
    cluster.cut.clear();
    cluster.isolate(NodeId(1));
    cluster.ticks(120);
    let leader = cluster.primary().expect("two of three elect");
    assert_ne!(leader, NodeId(1));
    cluster.propose(leader, b"other").unwrap();
    cluster.ticks(3);
    cluster.cut.clear();
    cluster.ticks(60);
    assert!(cluster.data(1).starts_with(&[b"one", b"two", b"three"]));
    let here = &cluster.nodes[&NodeId(1)].broken;
    let there = &cluster.nodes[&leader].broken;
    let told = |broken: &Broken| {
        matches!(broken, Broken::LeaderLacks { .. } | Broken::AheadOfLeader { .. })
    };
    assert!(here.iter().chain(there).any(told), "{here:?} {there:?}");
    if let Some(progress) = cluster.nodes[&leader].consensus.progress(NodeId(1)) {
        assert!(progress.matched <= cluster.nodes[&leader].consensus.last_index());
    }
}
