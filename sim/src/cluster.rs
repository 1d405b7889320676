//! One simulation: machines, clients, faults, and what is looked at meanwhile.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use standby_config::Config;
use standby_filestorage::{
    BLOCK, BlobDir, Extent, FileStorage, Magic, Reader, Record, RecordData, Repair, StorageError,
    Transaction, TransactionMeta, blocks_in,
};
use standby_node::Handle;
use standby_node::simulated::{Latency, Network, PLENTY, Random, wall_clock};
use standby_primary::command::{Answer, Ask};
use standby_replica::lost_transactions::open_lost;
use standby_types::time::tid_at;
use standby_types::{Disk, Oid, Tid};
use tokio::sync::oneshot::{self, error::TryRecvError};

use crate::client::{ACCOUNTS, BALANCE, Client, FIRST_FREE, Script};
use crate::disk::SimDisk;
use crate::history::{Event, History};
use crate::machine::{Exit, Machine};
use crate::oracle::{self, BASE};
use crate::plan::{Fault, NodePlan, Plan, Step};
use crate::record::Content;
use crate::trace;

/// What all machines are run for at a time.
const TICK: Duration = Duration::from_millis(2);
/// Within this time after the last fault somebody must have committed.
const RECOVERS: Duration = Duration::from_secs(40);
/// Within this time after the last commit all nodes must have it.
const CONVERGES: Duration = Duration::from_secs(40);
/// How the network is when nothing is wrong with it.
const CALM: Latency =
    Latency { least: Duration::from_micros(200), most: Duration::from_millis(3), lost_one_in: 0 };
/// Nothing has gone wrong for so long, and somebody has served: every node knows the primary.
const CALM_AFTER: Duration = Duration::from_secs(4);
/// Links over which nothing comes are closed within this time, whatever the clocks, and dialled
/// anew.
const SWALLOWED: Duration = Duration::from_secs(4);
/// What could not be done is asked for again after this time.
const ASKS_AGAIN: Duration = Duration::from_secs(1);
/// An administrator waits for an answer for so long.
const GIVES_UP: Duration = Duration::from_secs(15);
/// Where a node keeps its data.
const DATA: &str = "/site/Data.fs";
/// Where it keeps the blobs.
const BLOB_DIR: &str = "/site/blobs";
/// Where it keeps the checksums.
const SUMS: &str = "/site/state/1.sums";

/// What a simulation has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What must not be.
    pub violations: Vec<String>,
    /// Commits that were acknowledged.
    pub commits: usize,
    /// Of how many others clients were told, when they asked, that they are not committed.
    pub refusals: usize,
    /// Commits of which clients were told when they asked.
    pub asked: usize,
    /// Faults that came, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often a node began to serve as primary.
    pub elections: u64,
    /// Files of transactions that were lost by forced promotions.
    pub lost_tails: usize,
    /// Stands for everything that was logged, in its order.
    pub trace: u64,
}

/// What is to be done later.
enum Later {
    Start(usize),
    Resume(usize),
    OpenNetwork,
    CalmNetwork,
    FastDisk(usize),
    EmptyDisk(usize),
    Reliable,
    Promote,
    PutBack(usize, SimDisk, Duration),
}

/// What an administrator asks for, of a node.
struct Wish {
    node: usize,
    ask: Ask,
    answer: Option<oneshot::Receiver<Answer>>,
    /// Not before this moment again.
    next: Duration,
}

struct Cluster {
    plan: Plan,
    network: Network,
    random: Random,
    machines: Vec<Machine>,
    /// Of each node; `None` until it is invited, and from its removal on.
    configs: Vec<Option<Config>>,
    /// What an administrator asks for until it is done.
    wishes: Vec<Wish>,
    /// The clients' machine.
    clients: Machine,
    history: History,
    later: Vec<(Duration, Later)>,
    now: Duration,
    /// What a power failure leaves of what was not synced, where one is to come.
    torn: Vec<bool>,
    down: Vec<Duration>,
    /// The program may fail: its disk does.
    may_fail: Vec<bool>,
    serves: Vec<bool>,
    /// Bits that were flipped: of which node, in which file, at which byte, and what that was.
    flips: Vec<(usize, PathBuf, usize, u8)>,
    /// The node whose data file or blobs were damaged.
    damaged: Option<usize>,
    /// When something was last wrong.
    /// How often a node was started, or has ended.
    changes: u64,
    troubled: Duration,
    calm: bool,
    outcome: Outcome,
}

fn address(machine: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 1, machine as u8 + 1))
}

/// A first member's configuration; with a token, that of a node which joins.
fn config(plan: &Plan, node: usize, token: Option<&str>) -> Config {
    let listed = plan.nodes.iter().enumerate().filter(|(_, plan)| !plan.added);
    let members = match token {
        None => listed
            .map(|(other, NodePlan { group, witness, .. })| {
                let witness = if *witness { " witness" } else { "" };
                format!("  member n{other} {}:8102 {group}{witness}\n", address(other))
            })
            .collect::<String>(),
        Some(token) => {
            let others = listed.filter(|(other, _)| *other != node);
            let others = others.map(|(other, _)| format!(" {}:8102", address(other)));
            format!("  join{}\n  join-token {token}\n", others.collect::<String>())
        }
    };
    let fast = if plan.fast { "  recovery fast\n" } else { "" };
    let auto = if plan.auto { "  profile auto\n" } else { "" };
    let NodePlan { group, witness, .. } = &plan.nodes[node];
    let host = address(node);
    let blobs = if plan.blobs { format!("  blob-dir {BLOB_DIR}\n") } else { String::new() };
    let serves = match witness {
        true => String::new(),
        false => format!(
            "<zeo>\n  address {host}:8100\n</zeo>\n<filestorage>\n  path {DATA}\n  pack-gc \
            false\n{blobs}\
             </filestorage>\n"
        ),
    };
    let reads = match witness {
        true => "  witness on\n".to_owned(),
        false => format!("  read-only-address {host}:8101\n"),
    };
    let text = format!(
        "{serves}<standby>\n  cluster sim\n  node n{node}\n  group {group}\n  state-dir \
         /site/state\n{reads}  peer-address {host}:8102\n  admin-address {host}:8103\n{members}  \
         log-tail 200kB\n{fast}{auto}</standby>\n"
    );
    Config::parse(Path::new("/site/zeo.conf"), &text).expect("a configuration that can be read")
}

/// Runs a plan.
pub fn run(plan: &Plan) -> Outcome {
    trace::begin();
    let mut random = Random::new(plan.seed);
    let network = Network::new(random.fork(), CALM);
    let machines = (0..plan.nodes.len())
        .map(|node| Machine::new(&format!("n{node}"), address(node), &network, &mut random));
    let machines: Vec<Machine> = machines.collect();
    let count = machines.len();
    let clients = Machine::new("clients", address(count), &network, &mut random);
    let mut cluster = Cluster {
        configs: (0..count)
            .map(|node| (!plan.nodes[node].added).then(|| config(plan, node, None)))
            .collect(),
        wishes: Vec::new(),
        network,
        machines,
        clients,
        history: History::default(),
        later: Vec::new(),
        now: Duration::ZERO,
        torn: vec![false; count],
        down: vec![Duration::ZERO; count],
        may_fail: vec![false; count],
        serves: vec![false; count],
        flips: Vec::new(),
        damaged: None,
        changes: 0,
        troubled: Duration::ZERO,
        calm: false,
        outcome: Outcome::default(),
        random,
        plan: plan.clone(),
    };
    cluster.simulate();
    let mut outcome = cluster.outcome;
    outcome.commits = cluster.history.commits();
    outcome.asked = cluster.history.asked();
    outcome.refusals = cluster.history.refusals();
    outcome.trace = trace::end();
    outcome
}

impl Cluster {
    /// What the first member has: a site's data file.
    fn prepare(&self) {
        let disk = &self.machines[0].disk;
        let mut storage = open(disk).expect("a new data file");
        let content = |amount| Content { client: 0, number: 0, base: Tid::NONE, amount };
        let record = |oid: u64, amount| Record {
            oid: Oid(oid),
            data: RecordData::Data(content(amount).encode(0, false).into()),
        };
        let meta = TransactionMeta {
            tid: tid_at(
                self.machines[0].host.enter(wall_clock).saturating_sub(Duration::from_secs(60)),
            ),
            status: b' ',
            user: "sim".into(),
            description: BASE.into(),
            extension: Default::default(),
        };
        let accounts = (1..=ACCOUNTS).map(|oid| record(oid, BALANCE));
        let records = accounts.chain([record(FIRST_FREE - 1, 0)]).collect();
        storage.append(&Transaction { meta, records }).expect("a disk that works");
        storage.sync().expect("a disk that works");
        disk.sync_dir(Path::new("/site")).expect("a disk that works");
    }

    /// Damaged blocks are taken from any other node that has them.
    fn let_nodes_repair(&self) {
        for machine in &self.machines {
            let is_other = |other: &&Machine| other.name != machine.name;
            let others: Vec<SimDisk> =
                self.machines.iter().filter(is_other).map(|other| other.disk.clone()).collect();
            let repair: Repair = Arc::new(move |damaged| {
                let from = damaged.offset as usize;
                others.iter().find_map(|disk| {
                    let bytes = disk.bytes(Path::new(DATA))?;
                    let block = bytes.get(from..from + BLOCK as usize)?;
                    (crc32c::crc32c(block) == damaged.sum).then(|| block.to_vec())
                })
            });
            let mut place = machine.host.repair.lock().unwrap_or_else(PoisonError::into_inner);
            *place = Some(repair);
        }
    }

    fn simulate(&mut self) {
        self.prepare();
        self.let_nodes_repair();
        for (node, machine) in self.machines.iter_mut().enumerate() {
            machine.rate = self.plan.rates[node];
            machine.host.device.store(self.plan.device.as_micros() as u64, Ordering::Relaxed);
            if let Some(config) = &self.configs[node] {
                machine.start_node(config);
            }
        }
        self.start_clients();
        let steps = self.plan.steps.clone();
        let mut next = steps.iter().peekable();
        while self.now < self.plan.duration && self.outcome.violations.is_empty() {
            while let Some(step) = next.next_if(|step| step.at <= self.now) {
                self.happen(&step.fault);
            }
            self.tick();
        }
        self.repair();
        let before = self.history.commits();
        let deadline = self.now + RECOVERS;
        // Every writer must be able to go on.
        let enough = before + 5 * self.plan.writers as usize;
        while self.outcome.violations.is_empty() && self.history.commits() < enough {
            if self.now > deadline {
                let got = self.history.commits() - before;
                self.violation(format!(
                    "liveness: {got} commits within {RECOVERS:?} after the last fault"
                ));
            }
            self.tick();
        }
        let damaged = |machine: &Machine| machine.node().and_then(|node| node.damage());
        while self.outcome.violations.is_empty()
            && let Some(damage) = self.machines.iter().find_map(damaged)
        {
            if self.now > deadline {
                self.violation(format!("repairs: {damage}"));
            }
            self.tick();
        }
        self.clients.kill();
        let deadline = self.now + CONVERGES;
        while self.outcome.violations.is_empty() && !self.is_level() {
            if self.now > deadline {
                let tids: Vec<_> = self.last_tids();
                self.violation(format!(
                    "convergence: after {CONVERGES:?} the nodes' last transactions are {tids:?}"
                ));
            }
            self.tick();
        }
        if self.outcome.violations.is_empty() {
            self.judge();
        }
    }

    fn violation(&mut self, text: String) {
        tracing::error!("VIOLATION: {text}");
        self.outcome.violations.push(text);
    }

    fn start_clients(&mut self) {
        let data = |node: &usize| !self.plan.nodes[*node].witness;
        let nodes: Vec<usize> = (0..self.plan.nodes.len()).filter(data).collect();
        let at = |port: u16| -> Vec<String> {
            nodes.iter().map(|node| format!("{}:{port}", address(*node))).collect()
        };
        let (read_write, read_only) = (at(8100), at(8101));
        let mut clients = Vec::new();
        for client in 0..self.plan.writers + self.plan.readers {
            let writes = client < self.plan.writers;
            let addresses = if writes { read_write.clone() } else { read_only.clone() };
            let pause = Duration::from_millis(self.random.range(1..120));
            let patience = Duration::from_millis(self.random.range(400..4_000));
            let (packs, syncs) = (self.plan.packs, !writes || self.random.one_in(2));
            let blobs = if self.plan.blobs { u64::from(self.plan.writers) } else { 0 };
            let tokens = client % 3 != 0;
            let script =
                Script { client, addresses, writes, pause, patience, packs, syncs, blobs, tokens };
            clients.push(Client::new(script, self.random.fork(), self.history.clone()));
        }
        self.clients.start(async move {
            for client in clients {
                tokio::spawn(client.run());
            }
        });
    }

    fn tick(&mut self) {
        self.now += TICK;
        trace::set_time(self.now);
        self.network.advance(self.now);
        let due: Vec<Later> =
            self.later.extract_if(.., |(at, _)| *at <= self.now).map(|(_, what)| what).collect();
        due.into_iter().for_each(|what| self.do_later(what));
        for node in 0..self.machines.len() {
            trace::set_machine(&self.machines[node].name);
            self.machines[node].step(TICK);
            // Raft ends the process when the log cannot be read.
            let expected = self.machines[node].disk.is_dead();
            if let Some(panic) = trace::take_panic().filter(|_| !expected) {
                self.violation(format!("a panic: {panic}"));
            }
            self.look_at(node);
        }
        let changes = self.machines.iter().map(|machine| machine.changes).sum();
        if std::mem::replace(&mut self.changes, changes) != changes {
            self.history.add(Event::NodesChanged);
        }
        trace::set_machine(&self.clients.name);
        self.clients.step(TICK);
        trace::set_machine("");
        self.administer();
        let down = |node: usize| self.configs[node].is_some() && !self.machines[node].runs();
        let nobody_serves = !self.serves.contains(&true);
        if nobody_serves
            || !self.later.is_empty()
            || !self.wishes.is_empty()
            || (0..self.machines.len()).any(down)
        {
            self.troubled = self.troubled.max(self.now);
        }
        if (self.now > self.troubled + CALM_AFTER) != self.calm {
            self.calm = !self.calm;
            self.history.add(Event::Calm(self.calm));
        }
    }

    /// Where a node's files can be damaged so that the others can repair them.
    fn damage_at(&mut self, node: usize, at: usize) -> Option<(PathBuf, usize)> {
        match self.plan.blobs && at.is_multiple_of(3) {
            true => self.damage_to_blob(node, at / 3),
            false => Some((PathBuf::from(DATA), self.damage_to_data(node, at)?)),
        }
    }

    fn damage_to_blob(&mut self, node: usize, at: usize) -> Option<(PathBuf, usize)> {
        let here = &self.machines[node];
        let bytes = |machine: &Machine, path: &PathBuf| machine.disk.bytes(path);
        let has = |other: &Machine, path: &PathBuf| bytes(other, path) == bytes(here, path);
        let repairable = |path: &PathBuf| {
            path.starts_with(BLOB_DIR)
                && path.extension().is_some_and(|extension| extension == "blob")
                && bytes(here, path).is_some_and(|bytes| !bytes.is_empty())
                && self.data_nodes().any(|other| other.name != here.name && has(other, path))
        };
        let may = self.damaged.is_none_or(|other| other == node);
        let blobs: Vec<_> =
            here.disk.names().into_iter().filter(|_| may).filter(repairable).collect();
        let path = blobs.get(at % blobs.len().max(1))?.clone();
        let len = bytes(here, &path)?.len();
        self.damaged = Some(node);
        Some((path, at % len))
    }

    fn damage_to_data(&mut self, node: usize, block: usize) -> Option<usize> {
        // With another history of packs, recoveries and timelines, the other nodes have other
        // blocks.
        let others = self.data_nodes().count() > 1;
        let promotes = |step: &Step| matches!(step.fault, Fault::Promote { .. });
        let comparable = others
            && !self.plan.packs
            && !self.plan.fast
            && !self.plan.steps.iter().any(promotes)
            // Nor may the others be damaged at the same place.
            && self.damaged.is_none_or(|other| other == node);
        let sums = self.machines[node].disk.bytes(Path::new(SUMS)).filter(|_| comparable)?;
        // What only this node and a witness have acknowledged is nowhere else yet.
        let data = |machine: &Machine| machine.disk.bytes(Path::new(DATA)).unwrap_or_default();
        let name = &self.machines[node].name;
        let others = self.data_nodes().filter(|other| other.name != *name);
        let there = others.map(|other| data(other).len() / BLOCK as usize).max()?;
        let blocks = Some(blocks_in(&sums).min(there)).filter(|blocks| *blocks > 0)?;
        let start = block % blocks * BLOCK as usize;
        self.damaged = Some(node);
        Some(start + block % BLOCK as usize)
    }

    /// Looks at a node after it has run.
    fn look_at(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if machine.runs() && machine.disk.is_dead() {
            self.lose_power(node);
            return;
        }
        match machine.exit() {
            None => {}
            Some(Exit::Again) => {
                machine.kill();
                self.start_node(node);
            }
            Some(exit) => {
                machine.kill();
                let (says, is_damaged) = (format!("{exit:?}"), self.damaged == Some(node));
                // What a start must read before it can ask others; somebody replaces the device.
                let stuck = is_damaged && says.contains("cannot read a sector");
                if stuck {
                    machine.disk.unspoil();
                }
                // The others may have it in their logs only, until they are up: whoever watches the
                // node starts it again.
                let waits = stuck
                    || is_damaged && says.contains("no other node that can be reached has them");
                if std::mem::take(&mut self.may_fail[node]) || waits {
                    tracing::info!("the program has ended: {exit:?}");
                    let at = self.now + self.down[node].max(TICK);
                    self.later.push((at, Later::Start(node)));
                } else {
                    let name = &self.machines[node].name;
                    self.violation(format!("{name} has ended, with a disk that works: {exit:?}"));
                }
            }
        }
        let handle = self.machines[node].node();
        let serves = handle.as_ref().and_then(|handle| Some((handle, handle.serves_in()?)));
        if let Some((handle, term)) = serves {
            self.switch_off_removed(&handle.removed());
            if !self.serves[node] {
                tracing::info!("serves in term {term}");
                self.outcome.elections += 1;
                self.history.add(Event::Serves(self.machines[node].name.clone(), term));
            }
        }
        self.serves[node] = serves.is_some();
    }

    fn lose_power(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        tracing::info!(torn = self.torn[node], "power fails");
        self.network.power_off(machine.host.address);
        machine.kill();
        let chance = self.torn[node].then_some(&mut self.random);
        machine.disk.cut(chance);
        self.serves[node] = false;
        self.later.push((self.now + self.down[node], Later::Start(node)));
    }

    /// Starts a node that is a member, or invited, and that does not run.
    fn start_node(&mut self, node: usize) {
        let machine = &mut self.machines[node];
        if let Some(config) = &self.configs[node]
            && !machine.runs()
        {
            trace::set_machine(&machine.name);
            tracing::info!("starts");
            self.network.power_on(machine.host.address);
            self.may_fail[node] = false;
            machine.disk.repair();
            machine.start_node(config);
        }
    }

    /// An administrator asks again and again, until it is done or cannot be.
    fn administer(&mut self) {
        for mut wish in std::mem::take(&mut self.wishes) {
            match wish.answer.as_mut().map(oneshot::Receiver::try_recv) {
                Some(Err(TryRecvError::Empty)) if self.now < wish.next => {}
                Some(Ok(Ok(done))) => {
                    tracing::info!("done: {}", done.text);
                    if let Some(token) = done.token {
                        self.configs[wish.node] = Some(config(&self.plan, wish.node, Some(&token)));
                        self.start_node(wish.node);
                    }
                    continue;
                }
                Some(Ok(Err(reason))) if is_final(&reason) => continue,
                Some(_) => (wish.answer, wish.next) = (None, self.now + ASKS_AGAIN),
                None if self.now >= wish.next => {
                    (wish.answer, wish.next) = (self.ask(wish.ask.clone()), self.now + GIVES_UP);
                }
                None => {}
            }
            self.wishes.push(wish);
        }
    }

    fn wish(&mut self, node: usize, ask: Ask) {
        self.wishes.push(Wish { node, ask, answer: None, next: self.now });
    }

    /// Who was removed is switched off.
    fn switch_off_removed(&mut self, removed: &[String]) {
        for name in removed {
            let named = self.machines.iter().position(|machine| machine.name == *name);
            if let Some(node) = named.filter(|node| self.configs[*node].is_some()) {
                tracing::info!("{name} is switched off");
                self.machines[node].kill();
                self.configs[node] = None;
            }
        }
    }

    fn do_later(&mut self, what: Later) {
        match what {
            Later::Start(node) => self.start_node(node),
            Later::PutBack(node, snapshot, down) => {
                tracing::info!(node, "the disk is put back");
                self.machines[node].kill();
                self.machines[node].disk.put_back(&snapshot);
                self.later.push((self.now + down, Later::Start(node)));
            }
            Later::Resume(node) => self.machines[node].paused = false,
            Later::OpenNetwork => self.network.open_all(),
            Later::CalmNetwork => self.network.set_latency(CALM),
            Later::FastDisk(node) => {
                let micros = self.plan.device.as_micros() as u64;
                self.machines[node].host.device.store(micros, Ordering::Relaxed);
            }
            Later::EmptyDisk(node) => {
                self.machines[node].host.free.store(PLENTY, Ordering::Relaxed);
            }
            Later::Reliable => self.set_unreliable(0),
            Later::Promote => self.promote(),
        }
    }

    fn happen(&mut self, fault: &Fault) {
        trace::set_machine("");
        tracing::info!("{fault:?}");
        self.troubled = self.now;
        *self.outcome.faults.entry(name_of(fault)).or_default() += 1;
        match fault {
            Fault::Kill { node, down } => {
                self.machines[*node].kill();
                self.later.push((self.now + *down, Later::Start(*node)));
            }
            Fault::LoseDisk { node, down } => {
                self.machines[*node].kill();
                self.machines[*node].disk.lose();
                self.later.push((self.now + *down, Later::Start(*node)));
            }
            Fault::PutBack { node, after, down } => {
                let snapshot = self.machines[*node].disk.snapshot();
                self.later.push((self.now + *after, Later::PutBack(*node, snapshot, *down)));
            }
            Fault::Replace { node } => {
                self.machines[*node].kill();
                self.machines[*node].disk.lose();
                self.configs[*node] = None;
                let name = self.machines[*node].name.clone();
                let ask = Ask::NodeAdd { node: name, group: None, witness: false, replaces: true };
                self.wish(*node, ask);
            }
            Fault::Add { node } => {
                let NodePlan { group, witness, .. } = self.plan.nodes[*node];
                let group = Some(group.to_owned());
                let name = self.machines[*node].name.clone();
                self.wish(*node, Ask::NodeAdd { node: name, group, witness, replaces: false });
            }
            Fault::Remove { node } => {
                let name = self.machines[*node].name.clone();
                self.wish(*node, Ask::NodeRemove { node: name, force: true });
            }
            Fault::Cut { node, operations, torn, down } => {
                if self.machines[*node].runs() {
                    self.torn[*node] = *torn;
                    self.down[*node] = *down;
                    self.machines[*node].disk.cut_after(*operations);
                }
            }
            Fault::CutAll { torn, down } => {
                for node in 0..self.machines.len() {
                    if self.machines[node].runs() {
                        (self.torn[node], self.down[node]) = (*torn, *down);
                        self.lose_power(node);
                    }
                }
            }
            Fault::Pause { node, time } => {
                self.machines[*node].paused = true;
                self.later.push((self.now + *time, Later::Resume(*node)));
            }
            Fault::Isolate { time } => {
                if let Some(node) = self.serves.iter().position(|serves| *serves) {
                    let others = (0..self.machines.len()).filter(|other| *other != node);
                    self.cut_off(&[node], &others.collect::<Vec<_>>(), *time);
                }
            }
            Fault::Block { ways, time } => {
                for (from, to) in ways {
                    self.network.block(address(*from), address(*to));
                }
                self.later.push((self.now + *time, Later::OpenNetwork));
            }
            Fault::Swallow { all } => {
                let nodes: Vec<IpAddr> = (0..self.machines.len()).map(address).collect();
                let random = &mut self.random;
                self.network.swallow(&nodes, || *all || random.one_in(2));
                // Until then nobody need have noticed.
                self.troubled = self.now + SWALLOWED;
            }
            Fault::SlowNetwork { most, lost_one_in, time } => {
                let latency = Latency { most: *most, lost_one_in: *lost_one_in, ..CALM };
                self.network.set_latency(latency);
                self.later.push((self.now + *time, Later::CalmNetwork));
            }
            Fault::Skew { node, seconds } => {
                self.machines[*node].set_skew(seconds * 1_000_000_000);
            }
            Fault::SlowDisk { node, most, time } => {
                let micros = most.as_micros() as u64;
                for machine in 0..self.machines.len() {
                    if node.is_none_or(|node| node == machine) {
                        self.machines[machine].host.device.store(micros, Ordering::Relaxed);
                        self.later.push((self.now + *time, Later::FastDisk(machine)));
                    }
                }
            }
            Fault::FullDisk { node, time } => {
                self.machines[*node].host.free.store(1 << 20, Ordering::Relaxed);
                self.later.push((self.now + *time, Later::EmptyDisk(*node)));
            }
            Fault::FailSync { node, down } => {
                if self.machines[*node].runs() {
                    self.may_fail[*node] = true;
                    self.down[*node] = *down;
                    self.machines[*node].disk.fail_sync();
                }
            }
            Fault::Flip { node, block } => {
                if let Some((path, offset)) = self.damage_at(*node, *block) {
                    let disk = &self.machines[*node].disk;
                    let byte = disk.bytes(&path).map_or(0, |bytes| bytes[offset]);
                    disk.flip(&path, offset);
                    self.flips.push((*node, path, offset, byte));
                }
            }
            Fault::BadSector { node, block } => {
                if let Some((path, offset)) = self.damage_at(*node, *block) {
                    self.machines[*node].disk.spoil(&path, offset);
                }
            }
            Fault::Unreliable { one_in, time } => {
                self.set_unreliable(*one_in);
                self.later.push((self.now + *time, Later::Reliable));
            }
            Fault::Promote { cut_off, after, down } => {
                let is_here = |node: &usize| self.plan.nodes[*node].group == "here";
                let nodes = 0..self.plan.nodes.len();
                let (here, there): (Vec<usize>, Vec<usize>) = nodes.partition(is_here);
                if *cut_off {
                    self.cut_off(&here, &there, *down);
                } else {
                    for node in here {
                        self.machines[node].kill();
                        self.later.push((self.now + *down, Later::Start(node)));
                    }
                }
                self.later.push((self.now + *after, Later::Promote));
            }
            Fault::Switchover { to } => {
                let to = to.map(|node| format!("n{node}"));
                self.ask(Ask::Switchover { to, grace: 1.0 });
            }
            Fault::GroupSet { failover } => {
                let group = "there".to_owned();
                self.ask(Ask::GroupSet { group, failover: *failover, force: false });
            }
            Fault::GroupMove { home } => {
                let to = if *home { "here" } else { "there" };
                self.ask(Ask::GroupMove { to: to.into() });
            }
        }
    }

    fn set_unreliable(&self, one_in: u64) {
        for machine in &self.machines {
            machine.host.unreliable.store(one_in, Ordering::Relaxed);
        }
    }

    /// These nodes and those hear nothing of each other.
    fn cut_off(&mut self, these: &[usize], those: &[usize], time: Duration) {
        for (one, other) in these.iter().flat_map(|one| those.iter().map(move |b| (*one, *b))) {
            self.network.block(address(one), address(other));
            self.network.block(address(other), address(one));
        }
        self.later.push((self.now + time, Later::OpenNetwork));
    }

    /// One of the running nodes that `wanted` says.
    fn any_node(&mut self, wanted: impl Fn(&NodePlan) -> bool) -> Option<(usize, Handle)> {
        let nodes = self.machines.iter().zip(&self.plan.nodes).enumerate();
        let running: Vec<(usize, Handle)> = nodes
            .filter(|(_, (_, plan))| wanted(plan))
            .filter_map(|(node, (machine, _))| Some((node, machine.node()?)))
            .collect();
        self.random.pick(&running).cloned()
    }

    /// An administrator, who sees nothing of the other place, promotes a node of this one.
    fn promote(&mut self) {
        let Some((node, handle)) = self.any_node(|plan| plan.group == "there") else { return };
        self.history.add(Event::Promoted);
        let machine = &self.machines[node];
        let ask = Ask::Promote { node: machine.name.clone(), group: Some("there".into()) };
        machine.spawn(async move {
            let answer = handle.ask_this_node(ask).await;
            tracing::info!("answer: {answer:?}");
        });
    }

    /// An administrator asks some node; `None` if none is there. Nobody answers if it ends
    /// meanwhile.
    fn ask(&mut self, ask: Ask) -> Option<oneshot::Receiver<Answer>> {
        let (node, handle) = self.any_node(|_| true)?;
        let (sender, receiver) = oneshot::channel();
        self.machines[node].spawn(async move {
            let answer = handle.ask(ask).await;
            tracing::info!("answer: {answer:?}");
            let _ = sender.send(answer);
        });
        Some(receiver)
    }

    /// Nothing is wrong any more.
    fn repair(&mut self) {
        trace::set_machine("");
        tracing::info!("no more faults");
        self.later.clear();
        self.set_unreliable(0);
        self.network.open_all();
        self.network.set_latency(CALM);
        for node in 0..self.machines.len() {
            let machine = &mut self.machines[node];
            machine.set_skew(0);
            machine.paused = false;
            machine.disk.repair();
            self.do_later(Later::EmptyDisk(node));
            self.do_later(Later::FastDisk(node));
            self.do_later(Later::Start(node));
        }
    }

    /// The members that hold data.
    fn data_nodes(&self) -> impl Iterator<Item = &Machine> {
        let nodes = self.machines.iter().enumerate();
        let is_data = |node: usize| !self.plan.nodes[node].witness && self.configs[node].is_some();
        nodes.filter(move |(node, _)| is_data(*node)).map(|(_, machine)| machine)
    }

    fn last_tids(&self) -> Vec<Option<Tid>> {
        self.data_nodes().map(|machine| machine.node()?.last_tid()).collect()
    }

    /// All nodes have the same.
    fn is_level(&self) -> bool {
        let tids = self.last_tids();
        let pending = self.machines.iter().any(|machine| machine.exit().is_some());
        !pending
            && self.wishes.is_empty()
            && tids.iter().all(|tid| tid.is_some() && *tid == tids[0])
    }

    /// What is damaged, and nobody has read since, is still so.
    fn flip_back(&self) {
        for (node, path, offset, before) in &self.flips {
            let byte = |machine: &Machine| {
                machine.disk.bytes(path).and_then(|bytes| bytes.get(*offset).copied())
            };
            let here = byte(&self.machines[*node]);
            if path.starts_with(BLOB_DIR) {
                // The others may have packed it away meanwhile; the file of a blob never changes.
                if here.is_some_and(|here| here != *before) {
                    self.machines[*node].disk.flip(path, *offset);
                }
                continue;
            }
            let others = self.data_nodes().filter(|other| other.name != self.machines[*node].name);
            if others.map(byte).any(|there| there != here && there.is_some()) {
                self.machines[*node].disk.flip(path, *offset);
            }
        }
    }

    /// Looks at everything that clients were told, and at what the nodes have.
    fn judge(&mut self) {
        for machine in &mut self.machines {
            machine.kill();
        }
        self.flip_back();
        self.machines.iter().for_each(|machine| machine.disk.unspoil());
        let (mut files, mut histories, mut violations) = (Vec::new(), Vec::new(), Vec::new());
        for machine in self.data_nodes() {
            files.push((
                machine.name.clone(),
                machine.disk.bytes(Path::new(DATA)).unwrap_or_default(),
            ));
            match open(&machine.disk).and_then(|storage| oracle::transactions(&storage.reader())) {
                Ok(history) => {
                    if self.plan.blobs {
                        violations.extend(blobs_are_there(machine, &history));
                    }
                    histories.push(history);
                }
                Err(error) => violations.push(format!("opens: {}: {error}", machine.name)),
            }
        }
        let events = self.history.events();
        let lost: Vec<_> =
            self.data_nodes().flat_map(|machine| lost_files(&machine.disk)).collect();
        let partly = oracle::is_packed(&events) || self.plan.fast;
        if partly {
            violations.extend(oracle::current_revisions_are_equal(&histories));
        } else {
            violations.extend(oracle::files_are_equal(&files, &histories));
        }
        let lost_tails = lost.len();
        violations.extend(oracle::judge(&events, &histories, partly, lost));
        self.outcome.lost_tails = lost_tails;
        violations.into_iter().for_each(|text| self.violation(text));
    }
}

/// True if asking again is of no use.
fn is_final(reason: &str) -> bool {
    ["is no node of this cluster", "is primary", "is a member already"]
        .iter()
        .any(|part| reason.contains(part))
}

/// Opens a machine's data file.
fn open(disk: &SimDisk) -> Result<FileStorage, StorageError> {
    let (path, no_index) = (Path::new(DATA), Path::new("/site/no-index"));
    let disk = Arc::new(disk.clone());
    let opened =
        FileStorage::open(disk, path, no_index, Magic::Fs30, Extent::Whole, &mut |_, _| ());
    Ok(opened?.0)
}

fn blobs_are_there(machine: &Machine, history: &[oracle::Transaction]) -> Option<String> {
    let blobs = match BlobDir::open(Arc::new(machine.disk.clone()), Path::new(BLOB_DIR)) {
        Ok(blobs) => blobs,
        Err(error) => return Some(format!("opens: {}: {error}", machine.name)),
    };
    let blob = |oid, tid| machine.disk.bytes(&blobs.path(oid, tid));
    oracle::blobs_are_there(&machine.name, history, blob)
}

/// What a machine keeps of timelines that it has left.
fn lost_files(disk: &SimDisk) -> Vec<Result<Reader, StorageError>> {
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let is_lost = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("lost-") && name.ends_with(".fs")
    };
    disk.names().into_iter().filter(is_lost).map(|path| open_lost(&shared, &path)).collect()
}

fn name_of(fault: &Fault) -> &'static str {
    match fault {
        Fault::Kill { .. } => "kill",
        Fault::Cut { .. } => "power failure",
        Fault::CutAll { .. } => "power failure of all",
        Fault::Pause { .. } => "pause",
        Fault::Isolate { .. } => "primary cut off",
        Fault::Block { .. } => "partition",
        Fault::Swallow { .. } => "black hole",
        Fault::SlowNetwork { .. } => "slow network",
        Fault::Skew { .. } => "clock jump",
        Fault::SlowDisk { .. } => "slow disk",
        Fault::FullDisk { .. } => "full disk",
        Fault::LoseDisk { .. } => "lost disk",
        Fault::PutBack { .. } => "disk put back",
        Fault::Replace { .. } => "replaced node",
        Fault::Add { .. } => "added node",
        Fault::Remove { .. } => "removed node",
        Fault::FailSync { .. } => "failing sync",
        Fault::Flip { .. } => "flipped bit",
        Fault::BadSector { .. } => "unreadable sector",
        Fault::Unreliable { .. } => "unreliable messages",
        Fault::Promote { .. } => "forced promotion",
        Fault::Switchover { .. } => "switchover",
        Fault::GroupSet { .. } => "change of voters",
        Fault::GroupMove { .. } => "group move",
    }
}

#[cfg(test)]
mod tests;
