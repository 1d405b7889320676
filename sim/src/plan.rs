//! What goes wrong in a simulation, and when. A seed gives a plan; a plan that ends badly can be
//! made shorter.

use std::time::Duration;

use standby_node::simulated::Random;

/// No fault but a forced promotion lasts longer.
const LONGEST: Duration = Duration::from_secs(6);
/// Within this time a node whose disk was put back has been told so.
const REJOINS: Duration = Duration::from_secs(6);

/// Something that goes wrong, or that an administrator does.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// The process is killed, and started again later.
    Kill {
        /// Which node.
        node: usize,
        /// For how long it is away.
        down: Duration,
    },
    /// Power fails after so many more operations of the disk.
    Cut {
        /// Which node's.
        node: usize,
        /// So many.
        operations: u64,
        /// What was not synced survives in part.
        torn: bool,
        /// For how long it is away.
        down: Duration,
    },
    /// Power fails everywhere at the same moment.
    CutAll {
        /// What was not synced survives in part.
        torn: bool,
        /// For how long.
        down: Duration,
    },
    /// The process is stopped, and goes on later.
    Pause {
        /// Which node.
        node: usize,
        /// For how long.
        time: Duration,
    },
    /// The primary is cut off from the other nodes, but not from its clients.
    Isolate {
        /// For how long.
        time: Duration,
    },
    /// Nothing gets from the first ones to the second ones.
    Block {
        /// These ways. Nodes first, then the clients' machine.
        ways: Vec<(usize, usize)>,
        /// For how long.
        time: Duration,
    },
    /// The connections between the nodes that are open at this moment deliver nothing any more; new
    /// ones work.
    Swallow {
        /// All of them, or each by chance.
        all: bool,
    },
    /// The network is slow, and loses packets.
    SlowNetwork {
        /// A packet takes so long, at most.
        most: Duration,
        /// One in so many is lost.
        lost_one_in: u64,
        /// For how long.
        time: Duration,
    },
    /// The clock of a machine jumps.
    Skew {
        /// Which node's.
        node: usize,
        /// By so many seconds.
        seconds: i64,
    },
    /// Writes of the log take long.
    SlowDisk {
        /// Which node's; `None` for those of all nodes, which stall together.
        node: Option<usize>,
        /// So long, at most.
        most: Duration,
        /// For how long.
        time: Duration,
    },
    /// A disk is full.
    FullDisk {
        /// Which node's.
        node: usize,
        /// For how long.
        time: Duration,
    },
    /// A machine is lost with its disk, and comes back with an empty one.
    LoseDisk {
        /// Which node's.
        node: usize,
        /// For how long it is away.
        down: Duration,
    },
    /// A machine's disk is put back to what it was.
    PutBack {
        /// Which node's.
        node: usize,
        /// So long after this moment, to which it is put back.
        after: Duration,
        /// For how long the machine is away.
        down: Duration,
    },
    /// A machine is lost with its disk, and an administrator replaces the node by another, empty
    /// one.
    Replace {
        /// Which node.
        node: usize,
    },
    /// A node is added to the cluster.
    Add {
        /// Which: one that is not there from the beginning.
        node: usize,
    },
    /// A node is removed from the cluster for good.
    Remove {
        /// Which.
        node: usize,
    },
    /// A sync of the log fails.
    FailSync {
        /// Which node's.
        node: usize,
        /// When the process is started again.
        down: Duration,
    },
    /// A bit of a data file changes, where it has checksums, or of a blob.
    Flip {
        /// Which node's.
        node: usize,
        /// Which of the blocks with checksums; counted around.
        block: usize,
    },
    /// Bytes of a data file cannot be read, where it has checksums, until they are written; or
    /// bytes of a blob.
    BadSector {
        /// Which node's.
        node: usize,
        /// Which of the blocks with checksums; counted around.
        block: usize,
    },
    /// Messages of consensus are lost, come twice, or late.
    Unreliable {
        /// One in so many.
        one_in: u64,
        /// For how long.
        time: Duration,
    },
    /// The fail-over group is lost, or cut off, and the other one is promoted by force.
    Promote {
        /// The nodes are there, but nobody else hears them.
        cut_off: bool,
        /// When the promotion is asked for.
        after: Duration,
        /// When the lost nodes are there again.
        down: Duration,
    },
    /// A planned switchover.
    Switchover {
        /// To which node; `None` for any.
        to: Option<usize>,
    },
    /// A group votes, or does not any more.
    GroupSet {
        /// It votes.
        failover: bool,
    },
    /// The primary moves to another group.
    GroupMove {
        /// Back to the first one.
        home: bool,
    },
}

/// When a fault comes.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Since the beginning.
    pub at: Duration,
    /// What.
    pub fault: Fault,
}

/// A node of a simulated cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// Its group.
    pub group: &'static str,
    /// It votes, but holds no data.
    pub witness: bool,
    /// It is not there from the beginning: it is added.
    pub added: bool,
}

/// A whole simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Where everything comes from.
    pub seed: u64,
    /// The nodes; the first one bootstraps the cluster.
    pub nodes: Vec<NodePlan>,
    /// How fast their clocks go.
    pub rates: Vec<f64>,
    /// Clients that write.
    pub writers: u32,
    /// Clients that read.
    pub readers: u32,
    /// Clients ask for packs.
    pub packs: bool,
    /// Nodes that were away recover fast.
    pub fast: bool,
    /// Nodes are as patient as the network needs (`profile auto`).
    pub auto: bool,
    /// Clients have blobs.
    pub blobs: bool,
    /// A write of a log takes so long at most when nothing is wrong.
    pub device: Duration,
    /// How long things go wrong.
    pub duration: Duration,
    /// What goes wrong.
    pub steps: Vec<Step>,
}

fn millis(random: &mut Random, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(random.range(range))
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Plan {
        let random = &mut Random::new(seed ^ 0x0073_7461_6e64_6279);
        let data = NodePlan { group: "here", witness: false, added: false };
        let witness = NodePlan { witness: true, ..data.clone() };
        let away = NodePlan { group: "there", ..data.clone() };
        let mut nodes = match random.below(10) {
            0 => vec![data.clone(), data.clone(), witness],
            1 => vec![data.clone()],
            2 => vec![data.clone(), data.clone(), data.clone(), away],
            3 => vec![data.clone(), data.clone(), data.clone(), away.clone(), away],
            4 => vec![data.clone(), data.clone(), data.clone(), data.clone(), data.clone()],
            _ => vec![data.clone(), data.clone(), data.clone()],
        };
        // Real clocks differ by a ten thousandth; that the protocol does not depend on it shows
        // sooner so.
        let rate = |random: &mut Random| 0.98 + random.below(41) as f64 / 1000.0;
        let mut rates: Vec<f64> = nodes.iter().map(|_| rate(random)).collect();
        let mut duration = millis(random, 4_000..14_000);
        let count = random.range(1..12);
        let mut steps: Vec<Step> = (0..count)
            .map(|_| Step {
                at: millis(random, 1_500..duration.as_millis() as u64),
                fault: fault(random, &nodes),
            })
            .collect();
        if nodes.iter().any(|node| node.group == "there") && random.one_in(2) {
            let after = millis(random, 100..2_000);
            let fault = Fault::Promote {
                cut_off: random.one_in(2),
                after,
                down: after + millis(random, 500..4_000),
            };
            steps.push(Step { at: millis(random, 1_500..duration.as_millis() as u64), fault });
        }
        // From randomness of its own: the rest of a seed's plan stays what it was.
        let later = &mut Random::new(seed ^ 0x0073_7761_6c6c_6f77);
        if later.one_in(4) {
            let fault = Fault::Swallow { all: later.one_in(2) };
            steps.push(Step { at: millis(later, 1_500..duration.as_millis() as u64), fault });
        }
        // As above. What a majority has acknowledged outlives one disk, unless something else takes
        // it from another.
        let lost = &mut Random::new(seed ^ 0x006c_6f73_7464_6973);
        let all_vote = nodes.iter().all(|node| node.group == "here" && !node.witness);
        if nodes.len() >= 3 && all_vote && lost.one_in(4) {
            steps.retain(|step| !is_damage(&step.fault));
            let node = lost.below(nodes.len() as u64) as usize;
            let fault = Fault::LoseDisk { node, down: millis(lost, 10..3_000) };
            steps.push(Step { at: millis(lost, 1_500..duration.as_millis() as u64), fault });
        }
        // As above.
        let members = &mut Random::new(seed ^ 0x006d_656d_6265_7273);
        let change = members.below(12);
        let replaceable = nodes.len() >= 3 && all_vote;
        // Of two data nodes and a witness, see docs/testing.md: not repaired yet.
        let change = if change == 1 && nodes.iter().any(|node| node.witness) { 0 } else { change };
        let is_rare =
            |step: &Step| matches!(step.fault, Fault::Promote { .. } | Fault::LoseDisk { .. });
        if change < 4 && !steps.iter().any(is_rare) && (change < 2 || replaceable) {
            let at = millis(members, 1_500..duration.as_millis() as u64);
            if change > 0 {
                // It takes from the others what a damage may have taken already.
                steps.retain(|step| !is_damage(&step.fault));
            }
            let node = members.below(nodes.len() as u64) as usize;
            match change {
                2 => steps.push(Step { at, fault: Fault::Replace { node } }),
                3 => {
                    let (after, down) = (millis(members, 50..3_000), millis(members, 10..2_000));
                    // Only the primary knows at once what a node has acknowledged: until it has
                    // told the node, nothing else goes wrong.
                    let quiet = (at + after).saturating_sub(LONGEST)..at + after + down + REJOINS;
                    duration = duration.max(quiet.end + Duration::from_secs(1));
                    steps.retain(|step| !quiet.contains(&step.at));
                    steps.push(Step { at, fault: Fault::PutBack { node, after, down } });
                }
                _ => {
                    let group = nodes[node].group;
                    nodes.push(NodePlan { group, added: true, ..data });
                    rates.push(rate(members));
                    steps.push(Step { at, fault: Fault::Add { node: nodes.len() - 1 } });
                    if change == 1 {
                        let at = millis(members, 1_500..duration.as_millis() as u64);
                        steps.push(Step { at, fault: Fault::Remove { node } });
                    }
                    // The node that was added fails like the others.
                    for _ in 0..members.below(4) {
                        let at = millis(members, 1_500..duration.as_millis() as u64);
                        let fault = fault(members, &nodes);
                        if !is_damage(&fault) {
                            steps.push(Step { at, fault });
                        }
                    }
                }
            }
        }
        // As above. Such nodes go on where round trips take more than a second.
        let slow = &mut Random::new(seed ^ 0x0073_6c6f_776e_6574);
        let auto = slow.one_in(4);
        if auto && slow.one_in(2) {
            let fault = Fault::SlowNetwork {
                most: millis(slow, 100..600),
                lost_one_in: slow.range(20..1000),
                time: millis(slow, 2_000..8_000),
            };
            steps.push(Step { at: millis(slow, 1_500..duration.as_millis() as u64), fault });
        }
        steps.sort_by_key(|step| step.at);
        Plan {
            seed,
            rates,
            writers: random.range(1..5) as u32,
            readers: random.below(3) as u32,
            packs: random.one_in(4),
            fast: random.one_in(5),
            auto,
            device: Duration::from_micros(random.below(4_000)),
            blobs: random.one_in(3),
            duration,
            nodes,
            steps,
        }
    }
}

fn is_damage(fault: &Fault) -> bool {
    matches!(fault, Fault::Flip { .. } | Fault::BadSector { .. })
}

fn fault(random: &mut Random, nodes: &[NodePlan]) -> Fault {
    let count = nodes.len() as u64;
    let node = random.below(count) as usize;
    match random.below(29) {
        0..=3 => Fault::Kill { node, down: millis(random, 1..3_000) },
        4..=6 => Fault::Cut {
            node,
            operations: random.below(60),
            torn: random.one_in(2),
            down: millis(random, 50..3_000),
        },
        7 => Fault::CutAll { torn: random.one_in(2), down: millis(random, 50..1_000) },
        8 | 9 => Fault::Pause { node, time: millis(random, 20..4_000) },
        24 => Fault::Isolate { time: millis(random, 300..5_000) },
        10..=13 => {
            Fault::Block { ways: ways(random, nodes.len()), time: millis(random, 50..4_000) }
        }
        14 => Fault::SlowNetwork {
            most: millis(random, 5..400),
            lost_one_in: random.range(2..50),
            time: millis(random, 100..4_000),
        },
        15 | 16 => Fault::Skew { node, seconds: random.below(200_000) as i64 - 100_000 },
        17 => Fault::SlowDisk {
            node: (!random.one_in(3)).then_some(node),
            most: millis(random, 10..1_500),
            time: millis(random, 100..4_000),
        },
        18 => Fault::FullDisk { node, time: millis(random, 100..4_000) },
        19 => Fault::FailSync { node, down: millis(random, 50..2_000) },
        22 | 23 => Fault::Flip { node, block: random.below(1 << 20) as usize },
        25 => Fault::BadSector { node, block: random.below(1 << 20) as usize },
        20 => Fault::Unreliable { one_in: random.range(2..40), time: millis(random, 100..4_000) },
        21 if nodes.iter().any(|node| node.group == "there") => match random.below(4) {
            0 => Fault::GroupSet { failover: true },
            1 => Fault::GroupSet { failover: false },
            n => Fault::GroupMove { home: n == 2 },
        },
        _ => Fault::Switchover { to: random.one_in(2).then_some(node) },
    }
}

/// Ways that are blocked: a part of the nodes is cut off, in both directions or in one, or each way
/// by chance. The clients' machine is the last one.
fn ways(random: &mut Random, nodes: usize) -> Vec<(usize, usize)> {
    let all = nodes + 1;
    let pairs = |wanted: &mut dyn FnMut(usize, usize) -> bool| -> Vec<(usize, usize)> {
        let every = (0..all).flat_map(|from| (0..all).map(move |to| (from, to)));
        every.filter(|(from, to)| from != to && wanted(*from, *to)).collect()
    };
    match random.below(5) {
        0 => {
            // The clients may still reach it.
            let alone = random.below(nodes as u64) as usize;
            let others = if random.one_in(2) { nodes } else { all };
            pairs(&mut |from, to| (from == alone || to == alone) && from < others && to < others)
        }
        1 => {
            let alone = random.below(nodes as u64) as usize;
            let outwards = random.one_in(2);
            pairs(&mut |from, to| if outwards { from == alone } else { to == alone })
        }
        2 => {
            let side: Vec<bool> = (0..all).map(|_| random.one_in(2)).collect();
            pairs(&mut |from, to| side[from] != side[to])
        }
        3 => {
            // Two nodes do not hear each other, the others hear both.
            let one = random.below(nodes as u64) as usize;
            let other = random.below(nodes as u64) as usize;
            pairs(&mut |from, to| (from, to) == (one, other) || (to, from) == (one, other))
        }
        _ => {
            let mut random = random.clone();
            pairs(&mut |_, _| random.one_in(3))
        }
    }
}
