//! Some nodes in one thread: their machines, replicas and logs are the real ones, on disks in
//! memory. The network, the clock and the clients' sessions are here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use standby_config::{Config, Profile};
use standby_consensus::{AppliedPoint, Batch, Committed, Consensus, LogWriter, decode_message};
use standby_filestorage::Access;
use standby_primary::action::{Wanted, Which};
use standby_primary::consensus_config::raft_config;
use standby_primary::input::{Arrival, OutcomeQuestion};
use standby_primary::{
    Action, Asker, Beginning, Caller, Input, Machine, Reading, Request, ServingState,
};
use standby_replica::machine::{Done, Replica};
use standby_replica::outcomes::Outcome;
use standby_replica::start::prepared::Beginning as First;
use standby_replica::start::{Place, Platform, prepare, self_as_member};
use standby_replica::state_dir::StateDir;
use standby_types::disk::{File, Open};
use standby_types::memory::MemoryDisk;
use standby_types::time::utc;
use standby_types::{Disk, NodeId, Oid, Tid, Transfer, Upload};
use standby_zeo::{ClientError, SessionId, Value, VoteAnswer, VoteOutcome};

use crate::facts::{DRAWN, Known, Table, draw, wall_clock};

/// The length of a tick.
const TICK: Duration = Duration::from_millis(50);

fn temporary_file(_: &Path) -> std::io::Result<Arc<dyn File>> {
    MemoryDisk::new().open(Path::new("temporary"), Open::Create)
}

/// A node. Its files survive it.
pub struct Node {
    pub name: String,
    id: NodeId,
    config: Config,
    disk: MemoryDisk,
    known: Arc<Mutex<Known>>,
    running: Option<Running>,
    is_cut: bool,
    crash_looping: bool,
    shown: Option<ServingState>,
    /// When its process was started: its monotonic time counts from then.
    started: Duration,
}

struct Running {
    machine: Machine,
    replica: Replica,
    writer: LogWriter,
    /// Writes of the log that wait for the disk.
    waiting: VecDeque<Batch>,
}

/// A client's session.
struct Session {
    node: usize,
    id: SessionId,
    writes: bool,
    busy: bool,
    /// The tid that its transaction must get.
    tid: Option<Tid>,
    leaving: bool,
}

/// See the module.
#[derive(Default)]
pub struct World {
    pub nodes: Vec<Node>,
    sessions: BTreeMap<String, Session>,
    now: Duration,
    /// What is to be told to machines, in order.
    inputs: VecDeque<(usize, Input)>,
    /// Names of tids, in the order in which they appeared.
    tids: Vec<Tid>,
    asked: u64,
    /// Sessions so far.
    connected: u64,
    /// What has happened since the last command.
    pub said: Vec<String>,
}

impl World {
    /// A world with the nodes of these names and groups; the first one bootstraps the cluster.
    pub fn new(nodes: &[(&str, &str, bool)]) -> World {
        DRAWN.set(0);
        let mut world = World { now: Duration::from_secs(1), ..World::default() };
        for (at, (name, group, witness)) in nodes.iter().enumerate() {
            world.add(name, group, *witness, nodes, at == 0);
        }
        world.settle();
        world
    }

    fn say(&mut self, text: String) {
        self.said.push(text);
    }

    /// Adds a node that knows of these members; without any, it joins the first node.
    pub fn add(
        &mut self,
        name: &str,
        group: &str,
        witness: bool,
        members: &[(&str, &str, bool)],
        bootstraps: bool,
    ) {
        let lines = members.iter().map(|(name, group, witness)| {
            let witness = if *witness { " witness" } else { "" };
            format!("member {name} {} {group}{witness}\n", address(name))
        });
        let lines = match members {
            [] => "join 127.0.0.1:8101\njoin-token secret\n".to_owned(),
            _ => lines.collect(),
        };
        let clients = "<zeo>\naddress 127.0.0.1:8100\ntransaction-timeout 30\n</zeo>\n\
            <filestorage>\npath /Data.fs\nblob-dir /blobs\n</filestorage>\n";
        let clients = if witness { "" } else { clients };
        let witness = if witness { "witness true\n" } else { "" };
        let text = format!(
            "{clients}<standby>\n\
             cluster c\nnode {name}\ngroup {group}\npeer-address {}\nstate-dir /state\n\
             {witness}{lines}</standby>\n",
            address(name)
        );
        let config = Config::parse(Path::new("/zeo.conf"), &text).unwrap();
        let known = Arc::new(Mutex::new(Known::default()));
        let (disk, name) = (MemoryDisk::new(), name.to_owned());
        let (id, running, shown) = (NodeId(0), None, None);
        let (is_cut, crash_looping, started) = (false, false, Duration::ZERO);
        self.nodes.push(Node {
            name,
            id,
            config,
            disk,
            known,
            running,
            is_cut,
            crash_looping,
            shown,
            started,
        });
        let first = if bootstraps { First::Bootstrap } else { First::Join };
        self.start(self.nodes.len() - 1, first);
    }

    /// The place of a node in the list.
    pub fn at(&self, name: &str) -> usize {
        let at = self.nodes.iter().position(|node| node.name == name);
        at.unwrap_or_else(|| panic!("no node {name}"))
    }

    pub fn id(&self, name: &str) -> NodeId {
        self.nodes[self.at(name)].id
    }

    /// What a node knows.
    pub fn known(&self, at: usize) -> MutexGuard<'_, Known> {
        self.nodes[at].known.lock().unwrap()
    }

    fn start(&mut self, at: usize, first: First) {
        let node = &mut self.nodes[at];
        let disk: Arc<dyn Disk> = Arc::new(node.disk.clone());
        let state = StateDir(node.config.state_dir());
        let platform = Platform { wall_clock, fill_random: draw, temporary_file };
        let repairers = BTreeMap::new();
        let (config, state, repairers) = (&node.config, &state, &repairers);
        let place = Place { config, disk: &disk, state, repairers, platform };
        let prepared = prepare(&place, first).unwrap();
        let me = self_as_member(config, prepared.id);
        let point = prepared.checkpoint.applied_point();
        let raft = raft_config(prepared.id, me.witness, Profile::Lan);
        let log = state.log();
        let consensus = Consensus::new(raft, disk.clone(), log, &prepared.recovered, point);
        let (id, writer) = (prepared.id, prepared.writer);
        let make_spill = Arc::new(|| temporary_file(Path::new("/")));
        let replica =
            Replica::new(&prepared.checkpoint, prepared.storages, prepared.blobs, make_spill);
        *node.known.lock().unwrap() = Known { me: id, ..Known::default() };
        node.started = self.now;
        node.id = id;
        let beginning = Beginning {
            config: config.clone(),
            me,
            storages: replica.storages().map(|(name, _)| name.clone()).collect(),
            log_tail: 1 << 30,
            applied: replica.index(),
            ceilings: replica.ceilings(),
            settings: replica.settings().clone(),
            superseded: None,
            crash_looping: node.crash_looping,
        };
        let facts = Box::new(Table(node.known.clone()));
        publish(node, &replica);
        let (machine, actions) = Machine::new(facts, beginning, consensus.unwrap(), Duration::ZERO);
        node.running = Some(Running { machine, replica, writer, waiting: VecDeque::new() });
        node.shown = None;
        self.perform(at, actions);
        self.link(at);
    }

    /// A node can be reached again, by those that can be reached.
    fn link(&mut self, at: usize) {
        for other in 0..self.nodes.len() {
            if other != at && self.reach(at, other) {
                for (from, to) in [(at, other), (other, at)] {
                    let id = self.nodes[from].id;
                    let member = self_as_member(&self.nodes[from].config, id);
                    let mut known = self.known(to);
                    known.up.insert(id);
                    known.lost.remove(&id);
                    drop(known);
                    // Invitations are to tokens that nobody knows here but by their name.
                    let knows = Box::new(|_: &str| true);
                    self.inputs.push_back((to, Input::PeerUp(Arrival { member, knows })));
                }
            }
        }
    }

    fn reach(&self, one: usize, other: usize) -> bool {
        let there = |at: usize| self.nodes[at].running.is_some() && !self.nodes[at].is_cut;
        there(one) && there(other)
    }

    fn unlink(&mut self, at: usize) {
        for other in 0..self.nodes.len() {
            if other == at {
                continue;
            }
            for (gone, told) in [(at, other), (other, at)] {
                let id = self.nodes[gone].id;
                let now = self.now;
                let mut known = self.known(told);
                if known.up.remove(&id) {
                    known.lost.insert(id, now);
                    drop(known);
                    self.inputs.push_back((told, Input::PeerLost(id)));
                }
            }
        }
    }

    /// The process of a node is gone, with its sessions.
    pub fn kill(&mut self, name: &str) {
        let at = self.at(name);
        self.nodes[at].running = None;
        self.unlink(at);
        self.sessions.retain(|_, session| session.node != at);
        self.settle();
    }

    pub fn restart(&mut self, name: &str, crash_looping: bool) {
        let at = self.at(name);
        self.nodes[at].crash_looping = crash_looping;
        self.start(at, First::Join);
        self.settle();
    }

    /// Nothing reaches a node, nor comes from it.
    pub fn cut(&mut self, name: &str, is_cut: bool) {
        let at = self.at(name);
        self.nodes[at].is_cut = is_cut;
        match is_cut {
            true => self.unlink(at),
            false => self.link(at),
        }
        self.settle();
    }

    /// Nothing reaches a node, nor comes from it, and nobody is told.
    pub fn mute(&mut self, name: &str) {
        let at = self.at(name);
        self.nodes[at].is_cut = true;
    }

    /// The disk of a node's log does not answer, or does again.
    pub fn stall(&mut self, name: &str, stalls: bool) {
        let at = self.at(name);
        let now = self.now - self.nodes[at].started;
        self.known(at).stalled = stalls.then_some(now);
        if !stalls && let Some(running) = &mut self.nodes[at].running {
            for batch in std::mem::take(&mut running.waiting) {
                let written = running.writer.write(vec![batch]).unwrap();
                self.inputs.push_back((at, Input::Persisted(written)));
            }
        }
        self.settle();
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += TICK;
            for at in 0..self.nodes.len() {
                self.inputs.push_back((at, Input::Tick));
            }
            self.settle();
        }
    }

    pub fn tell(&mut self, at: usize, input: Input) {
        self.inputs.push_back((at, input));
        self.settle();
    }

    pub fn next_asker(&mut self) -> Asker {
        self.asked += 1;
        Asker(self.asked)
    }

    /// A new session of this name at a node.
    pub fn connect(&mut self, name: &str, at: usize, writes: bool) -> SessionId {
        self.connected += 1;
        let id = SessionId(self.connected);
        let session = Session { node: at, id, writes, busy: false, tid: None, leaving: false };
        self.sessions.insert(name.into(), session);
        self.known(at).names.insert(id, name.into());
        id
    }

    /// The node and the session of a client.
    pub fn session(&self, name: &str) -> (usize, SessionId) {
        let session = self.sessions.get(name).unwrap_or_else(|| panic!("no session {name}"));
        (session.node, session.id)
    }

    /// A client begins a transaction, or ends it.
    pub fn set_busy(&mut self, name: &str, busy: bool, tid: Option<Tid>) {
        let session = self.sessions.get_mut(name).unwrap();
        (session.busy, session.tid) = (busy, tid);
        self.leave();
    }

    /// The tid that a client's transaction must get.
    pub fn wanted_tid(&self, name: &str) -> Option<Tid> {
        self.sessions.get(name).and_then(|session| session.tid)
    }

    /// The serial of an object at a node.
    pub fn serial(&self, at: usize, oid: Oid) -> Tid {
        let known = self.known(at);
        let reader = known.reader.as_ref().unwrap();
        reader.committed_serial(oid, Access::Blocking).unwrap().unwrap_or(Tid::NONE)
    }

    /// An upload that is durable at a node.
    pub fn stage(&self, at: usize, transfer: Transfer) -> Upload {
        let running = self.nodes[at].running.as_ref().unwrap();
        let mut staging = running.replica.blobs().next().unwrap().stage(transfer).unwrap();
        staging.write(b"blob").unwrap();
        let (upload, staged) = staging.finish().unwrap();
        staged.keep();
        upload
    }

    fn settle(&mut self) {
        while let Some((at, input)) = self.inputs.pop_front() {
            let (now, time) = (self.now - self.nodes[at].started, self.now);
            let writers = self.sessions.values().any(|s| s.node == at && s.writes);
            let mut known = self.known(at);
            (known.now, known.time) = (now, time);
            known.writers = writers;
            drop(known);
            let Some(running) = &mut self.nodes[at].running else { continue };
            let actions = running.machine.step(now, input).unwrap();
            self.perform(at, actions);
        }
    }

    fn perform(&mut self, at: usize, actions: Vec<Action>) {
        for action in actions {
            if self.nodes[at].running.is_some() {
                self.act(at, action);
            }
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table of the script's commands")]
    fn act(&mut self, at: usize, action: Action) {
        let name = self.nodes[at].name.clone();
        match action {
            Action::Send(to, message) => self.send(at, to, message),
            Action::Persist(batch) => self.persist(at, batch),
            Action::Fetch(fetch) => {
                self.inputs.push_back((at, Input::EntriesFetched(fetch.read())));
            }
            Action::RetainAcknowledged(_) => self.say_members(at),
            Action::Purge(_) | Action::Learn(_) => {}
            Action::Acknowledged(_) | Action::Lease(_) | Action::Report => {}
            Action::BeginLog { point, term } => {
                let node = &mut self.nodes[at];
                let raft = raft_config(node.id, false, Profile::Lan);
                let log = StateDir(node.config.state_dir()).log();
                let disk = Arc::new(node.disk.clone());
                let (consensus, batch) = Consensus::anew(raft, disk, log, point, term).unwrap();
                self.say(format!("{name}: its log begins anew"));
                self.inputs.push_back((at, Input::LogBegins(Box::new(consensus), batch)));
            }
            Action::Apply(entries) => self.apply(at, entries),
            Action::Read(reading) => self.read(at, reading),
            Action::SendWritersAwayWhenApplied => self.send_away(at, Which::Writers, "departs"),
            Action::CatchUp { from, target, .. } => self.catch_up(at, from, &target),
            Action::CatchUpWithoutData(target) => self.caught_up(at, &target),
            Action::Backfill(storage) => self.say(format!("{name}: backfills {storage}")),
            Action::BeginTimeline { entries, promotion } => {
                let entries = entries.into_iter().map(|entry| (entry, None)).collect();
                self.apply(at, entries);
                let node = &mut self.nodes[at];
                let Some(running) = &mut node.running else { return };
                let certain = running.replica.last_tids();
                running.replica.begin_timeline(&promotion, &certain).unwrap();
                let point = running.replica.point();
                self.say(format!("{name}: begins timeline {}", promotion.id));
                self.applied(at, Vec::new());
                self.inputs.push_back((at, Input::TimelineBegun(point)));
            }
            Action::Examine { storage, vote } => {
                let reader = self.known(at).reader.clone().unwrap();
                let answer = vote.compare(|oid| reader.committed_serial(oid, Access::Blocking));
                let answer = answer.map_err(|error| ClientError::storage(error.to_string()));
                self.inputs.push_back((at, Input::Examined { storage, vote, answer }));
            }
            Action::Answer(caller, answer) => {
                let text = match &answer {
                    Ok(value) => self.value(value),
                    Err(error) => format!("error: {}", words(error)),
                };
                self.answered(&caller, &text);
            }
            Action::AnswerTooEarly(..) => unreachable!("no mutation is on"),
            Action::RefuseStorage(caller, error) => {
                self.answered(&caller, &format!("error: {}", words(&error)));
            }
            Action::Voted(session, outcome) => {
                let text = match outcome {
                    VoteOutcome::Answer(VoteAnswer::Voted) => "voted".to_owned(),
                    VoteOutcome::Answer(VoteAnswer::Conflicts(conflicts)) => {
                        let oids = conflicts.iter().map(|(oid, tid)| {
                            format!("object {} has serial {}", oid.0, self.tid(*tid))
                        });
                        format!("conflicts: {}", Vec::from_iter(oids).join(", "))
                    }
                    VoteOutcome::Answer(VoteAnswer::Refused(error))
                    | VoteOutcome::Failed(error) => format!("refused: {}", words(&error)),
                };
                let who = self.who(session);
                if !text.starts_with("voted") && !text.starts_with("conflicts") {
                    self.end_transaction(session);
                }
                self.say(format!("{who}: {text}"));
            }
            Action::CountConflict(_) => {}
            Action::Cut(session, reason) | Action::SendOneAway(session, reason) => {
                let who = self.who(session);
                self.say(format!("{who}: sent away: {reason}"));
                self.close(session);
            }
            Action::CutAll(which, reason) | Action::SendAway(which, reason) => {
                self.send_away(at, which, reason);
            }
            Action::LetWritersLeave => {
                for session in self.sessions.values_mut() {
                    session.leaving |= session.node == at && session.writes;
                }
                self.leave();
            }
            Action::Forget(_) => {}
            Action::PackBegins(storage, _) => {
                self.known(at).packing = true;
                self.say(format!("{name}: a pack of storage {storage} is asked for"));
            }
            Action::PacksEnd => self.known(at).packing = false,
            Action::Announce { upload, .. } => {
                self.say(format!("{name}: announces upload {}", number(upload.transfer)));
            }
            Action::Arrived(to, transfer) => {
                let from = self.nodes[at].id;
                self.say(format!("{name}: has upload {}", number(transfer)));
                if let Some(to) = self.nodes.iter().position(|node| node.id == to) {
                    self.inputs.push_back((to, Input::Arrived(from, transfer)));
                }
            }
            Action::Obtain { from, wanted, .. } => self.obtain(&name, from, &wanted),
            Action::Discard { transfer, .. } => {
                self.say(format!("{name}: discards upload {}", number(transfer)));
            }
            Action::EndLinks => self.say(format!("{name}: its links end")),
            Action::Refuse { node, reason, .. } => {
                let text = format!("{name}: does not let {node} in: {reason}");
                if !self.said.contains(&text) {
                    self.say(text);
                }
            }
            Action::LetIn(id) => {
                let other = self.name_of(id);
                self.say(format!("{name}: refuses {other} no more"));
            }
            Action::Serve(state) => self.serve(at, state),
            Action::NoteSuperseded(_) => self.say(format!("{name}: is superseded")),
            Action::Reply(_, Ok(done)) => {
                let token = done.token.map_or_else(String::new, |token| format!(" ({token})"));
                self.say(format!("{name} answers: {}{token}", done.text));
            }
            Action::Reply(_, Err(reason)) => self.say(format!("{name} refuses: {reason}")),
            Action::Drop(_) => self.say(format!("{name}: does not answer: it is primary no more")),
            Action::End(ended) => {
                self.say(format!("{name} ends: {ended:?}"));
                self.nodes[at].running = None;
                self.unlink(at);
            }
        }
    }

    /// The membership has changed: the leader says what it is.
    fn say_members(&mut self, at: usize) {
        let Some(running) = &self.nodes[at].running else { return };
        let state = running.machine.own_state();
        if !state.role.leads {
            return;
        }
        let names = |ids: &BTreeSet<NodeId>| {
            let member = |id: &NodeId| state.membership.members.get(id).map(|m| m.name.clone());
            let mut names: Vec<_> = ids.iter().filter_map(member).collect();
            names.sort();
            names.join(" ")
        };
        let mut text = format!("voters: {}", names(&state.membership.voters));
        if !state.membership.outgoing.is_empty() {
            text.push_str(&format!(" (until then: {})", names(&state.membership.outgoing)));
        }
        if !state.membership.learners.is_empty() {
            text.push_str(&format!("; learners: {}", names(&state.membership.learners)));
        }
        let name = &self.nodes[at].name;
        self.say(format!("{name}: {text}"));
    }

    fn send(&mut self, at: usize, to: NodeId, message: Bytes) {
        let to = self.nodes.iter().position(|node| node.id == to);
        if let Some(to) = to.filter(|to| self.reach(at, *to)) {
            self.inputs.push_back((to, Input::Peer(decode_message(message).unwrap())));
        }
    }

    fn persist(&mut self, at: usize, batch: Batch) {
        let stalled = self.known(at).stalled.is_some();
        let Some(running) = &mut self.nodes[at].running else { return };
        if stalled {
            return running.waiting.push_back(batch);
        }
        let written = running.writer.write(vec![batch]).unwrap();
        self.inputs.push_back((at, Input::Persisted(written)));
    }

    fn apply(&mut self, at: usize, entries: Vec<(Committed, Option<Caller>)>) {
        let name = self.nodes[at].name.clone();
        let mut finished = Vec::new();
        for (entry, caller) in entries {
            let Some(running) = &mut self.nodes[at].running else { return };
            match running.replica.apply(&entry).unwrap() {
                Done::Applied(applied) => {
                    let (tid, time) = (self.tid(applied.tid), utc(applied.tid));
                    if let Some(caller) = caller {
                        finished.push(caller.session);
                        let node = &self.nodes[at];
                        publish(node, &node.running.as_ref().unwrap().replica);
                        self.answered(&caller, &format!("committed as {tid}, at {time}"));
                        self.end_transaction(caller.session);
                    }
                }
                Done::Pack(storage) => {
                    self.say(format!("{name}: packs storage {storage}"));
                    self.known(at).packing = false;
                    if let Some(caller) = caller {
                        self.answered(&caller, "packed");
                    }
                }
                Done::Nothing => {}
            }
        }
        self.applied(at, finished);
    }

    fn applied(&mut self, at: usize, finished: Vec<SessionId>) {
        let node = &self.nodes[at];
        let Some(running) = &node.running else { return };
        publish(node, &running.replica);
        let input = Input::Applied {
            point: running.replica.point(),
            ceilings: running.replica.ceilings(),
            settings: running.replica.settings().clone(),
            finished,
        };
        self.inputs.push_back((at, input));
    }

    /// Storages are empty as long as nodes join: nothing is to be copied.
    fn catch_up(&mut self, at: usize, from: NodeId, target: &AppliedPoint) {
        let (name, from) = (self.nodes[at].name.clone(), self.name_of(from));
        self.say(format!("{name}: catches up from {from}"));
        self.caught_up(at, target);
    }

    fn caught_up(&mut self, at: usize, target: &AppliedPoint) {
        let node = &mut self.nodes[at];
        let Some(running) = &mut node.running else { return };
        running.replica.caught_up(target).unwrap();
        let checkpoint = running.replica.checkpoint().unwrap();
        StateDir(node.config.state_dir()).set_checkpoint(&node.disk, &checkpoint).unwrap();
        self.applied(at, Vec::new());
        self.inputs.push_back((at, Input::CaughtUp(target.index)));
    }

    fn read(&mut self, at: usize, reading: Reading) {
        match reading {
            Reading::Register { caller, .. } => {
                let last = self.known(at).reader.as_ref().unwrap().last_tid();
                let last = self.tid(last);
                self.answered(&caller, &format!("registered; the last transaction is {last}"));
            }
            Reading::Sync(caller) => self.answered(&caller, "in sync"),
            Reading::Invalidations { caller, .. } => self.answered(&caller, "invalidations"),
            Reading::Outcome(question) => self.outcome(at, &question),
        }
    }

    fn outcome(&mut self, at: usize, question: &OutcomeQuestion) {
        let OutcomeQuestion { caller, storage, token, since } = question;
        let Some(running) = &self.nodes[at].running else { return };
        let text = match running.replica.outcome(storage, *token, *since) {
            Outcome::Committed(tid) => format!("it was committed as {}", self.tid(tid)),
            Outcome::NotCommitted => "it is not committed".to_owned(),
            Outcome::Forgotten => "nobody knows: it is forgotten".to_owned(),
            Outcome::TimelineChanged => "nobody knows: the timeline has changed".to_owned(),
        };
        self.answered(caller, &text);
    }

    fn obtain(&mut self, name: &str, from: NodeId, wanted: &Wanted) {
        let transfer = number(wanted.blob.transfer());
        let from = self.name_of(from);
        self.say(format!("{name}: fetches upload {transfer} from {from}"));
    }

    fn serve(&mut self, at: usize, state: ServingState) {
        let node = &mut self.nodes[at];
        if node.shown.as_ref() == Some(&state) {
            return;
        }
        let other = state.other_primary.as_deref().map(|address| {
            let end = address.trim_end_matches(":8101").rsplit('.').next().unwrap_or_default();
            format!("n{end}")
        });
        let role = match (state.serves, other) {
            (true, _) => "serves as primary".to_owned(),
            (false, Some(other)) => format!("{other} is primary"),
            (false, None) => "no primary".to_owned(),
        };
        let readers = match (state.serves, state.ready) {
            (true, _) => "",
            (false, true) => "; readers are served",
            (false, false) => "; readers are not served",
        };
        let text = format!("{}: {role}{readers}", node.name);
        node.shown = Some(state);
        self.say(text);
    }

    fn send_away(&mut self, at: usize, which: Which, reason: &str) {
        let is = |session: &Session| match which {
            Which::All => true,
            Which::Readers => !session.writes,
            Which::Writers => session.writes,
            Which::Settled => false,
        };
        let gone = self.sessions.iter().filter(|(_, s)| s.node == at && is(s));
        let gone: Vec<_> = gone.map(|(name, session)| (name.clone(), session.id)).collect();
        for (name, id) in gone {
            self.say(format!("{name}: sent away: {reason}"));
            self.close(id);
        }
    }

    /// Those leave that are to, and have no transaction.
    fn leave(&mut self) {
        let gone = self.sessions.iter().filter(|(_, s)| s.leaving && !s.busy);
        let gone: Vec<_> = gone.map(|(name, session)| (name.clone(), session.id)).collect();
        for (name, id) in gone {
            self.say(format!("{name}: leaves"));
            self.close(id);
        }
    }

    /// A session is gone.
    pub fn close(&mut self, id: SessionId) {
        let found = self.sessions.iter().find(|(_, session)| session.id == id);
        let Some((name, node)) = found.map(|(name, s)| (name.clone(), s.node)) else { return };
        self.sessions.remove(&name);
        let storage = Some("1".to_owned());
        let request = Request::Closed { session: id, storage };
        self.inputs.push_back((node, Input::Client(request)));
    }

    fn end_transaction(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.values_mut().find(|session| session.id == id) {
            session.busy = false;
        }
        self.leave();
    }

    fn answered(&mut self, caller: &Caller, text: &str) {
        let who = self.who(caller.session);
        self.say(format!("{who}: {text}"));
    }

    fn who(&self, id: SessionId) -> String {
        let found = self.sessions.iter().find(|(_, session)| session.id == id);
        found.map_or_else(|| "(gone)".into(), |(name, _)| name.clone())
    }

    fn name_of(&self, id: NodeId) -> String {
        let node = self.nodes.iter().find(|node| node.id == id);
        node.map_or_else(|| "?".into(), |node| node.name.clone())
    }

    /// The name of a tid.
    pub fn tid(&mut self, tid: Tid) -> String {
        if tid == Tid::NONE {
            return "none".into();
        }
        let at = self.tids.iter().position(|known| *known == tid).unwrap_or_else(|| {
            self.tids.push(tid);
            self.tids.len() - 1
        });
        format!("t{}", at + 1)
    }

    /// The tid of this name.
    pub fn tid_named(&self, name: &str) -> Option<Tid> {
        let number: usize = name.strip_prefix('t')?.parse().ok()?;
        self.tids.get(number.checked_sub(1)?).copied()
    }

    fn value(&mut self, value: &Value) -> String {
        match value {
            Value::List(list) => {
                let oid = |value: &Value| match value {
                    Value::Bytes(bytes) => Oid::from_slice(bytes).map_or(0, |oid| oid.0),
                    _ => 0,
                };
                let (first, last) = (list.first().map_or(0, oid), list.last().map_or(0, oid));
                format!("oids {first} to {last}")
            }
            Value::None => "None".into(),
            other => format!("{other:?}"),
        }
    }
}

/// Where the node listens.
fn address(name: &str) -> String {
    format!("127.0.0.{}:8101", name.trim_start_matches('n'))
}

/// Readers see what is applied.
fn publish(node: &Node, replica: &Replica) {
    let reader = replica.storage("1").map(|storage| storage.reader());
    node.known.lock().unwrap().reader = reader;
}

fn number(transfer: Transfer) -> String {
    let text = transfer.to_string();
    text.trim_start_matches('0').to_owned()
}

fn words(error: &ClientError) -> String {
    match error {
        ClientError::Other(name, arguments) => {
            let text = arguments.iter().map(|value| match value {
                Value::Str(text) => text.clone(),
                other => format!("{other:?}"),
            });
            format!("{name}: {}", Vec::from_iter(text).join(", "))
        }
        ClientError::Conflict { oid, .. } => format!("ConflictError on object {}", oid.0),
        ClientError::ReadConflict { oid, .. } => format!("ReadConflictError on object {}", oid.0),
        other => format!("{other:?}"),
    }
}
