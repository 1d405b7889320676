//! `standby demo`: the main job, on this machine, with real processes and real kills.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use standby_node::{Status, ask, fetch_status};
use standby_primary::command::Ask;
use standby_types::lock::lock;
use standby_types::{Oid, Tid};

use crate::process::{NodeProcess, configure};
use crate::status::table;
use crate::zeo_client::Client;

/// How long a writer waits for a primary.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct Options {
    /// How often the primary is killed.
    #[arg(long, default_value_t = 1)]
    kills: usize,
    /// Clients that write.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// End after the last check instead of leaving the cluster up.
    #[arg(long)]
    once: bool,
    /// For programs; implies --once.
    #[arg(long)]
    json: bool,
}

/// Numbers that a writer commits to one object, before it takes the next: walking through the
/// revisions of an object takes time that grows with the square of their number.
const NUMBERS: u64 = 50;

/// What a writer was told: its objects, and the tid under which each number was committed.
#[derive(Default)]
struct Journal {
    oids: Vec<Oid>,
    acknowledged: BTreeMap<u64, Tid>,
    /// Commits whose answer was lost, and which were found to have happened.
    unanswered: u64,
}

#[derive(Default)]
struct Shared {
    journals: Mutex<Vec<Journal>>,
    acks: Mutex<Vec<Instant>>,
    count: AtomicU64,
    stop: AtomicBool,
}

/// What the check at the end found.
#[derive(Default)]
struct Found {
    acknowledged: u64,
    unanswered: u64,
    lost: u64,
    duplicated: u64,
}

pub async fn run(options: &Options) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("standby-demo-").tempdir()?;
    let stop = tokio::signal::ctrl_c();
    tokio::pin!(stop);
    let ended = tokio::select! {
        ended = show(options, dir.path()) => ended,
        _ = &mut stop => Ok(()),
    };
    // Whoever wants to know what went wrong needs the logs.
    ended.map_err(|error| error.context(format!("see the logs in {}", dir.keep().display())))
}

async fn show(options: &Options, dir: &Path) -> anyhow::Result<()> {
    let mut screen = Screen::new(options.json);
    let mut nodes = configure(dir, 3)?;
    screen.say(&format!("Starting three nodes in {}", dir.display()));
    for node in &mut nodes {
        node.start()?;
    }
    let status = wait_until(&nodes, Duration::from_secs(30), |status| healthy(status, 3)).await?;
    screen.show(&status, 0);

    let shared = Arc::new(Shared::default());
    let addresses: Vec<String> = nodes.iter().map(|node| node.address.clone()).collect();
    let writers: Vec<_> = (0..options.clients.max(1))
        .map(|_| tokio::spawn(write(addresses.clone(), shared.clone())))
        .collect();
    screen.say(&format!("{} clients write through ZEO", writers.len()));

    let mut pauses = Vec::new();
    for nth in 1..=options.kills {
        let which = format!("Kill {nth} of {}", options.kills);
        pauses.push(kill_primary(&mut nodes, &shared, &mut screen, &which).await?);
    }
    if options.kills == 0 {
        watch(&nodes, &shared, &mut screen, Duration::from_secs(2)).await;
    }

    let switched = switch_over(&nodes, &shared, &mut screen).await?;

    shared.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await??;
    }
    screen.say("Checking every acknowledged commit on every node");
    let found = check(&nodes, &shared).await?;
    pauses.sort();
    let milliseconds: Vec<u128> = pauses.iter().map(Duration::as_millis).collect();
    if options.json {
        let report = json!({
            "nodes": nodes.len(), "kills": options.kills, "acknowledged": found.acknowledged,
            "lost": found.lost, "duplicated": found.duplicated, "write_pause_ms": milliseconds,
            "switchover_pause_ms": switched.as_millis(),
        });
        println!("{report}");
    } else {
        summary(&found, &milliseconds, options.kills);
        println!("Write pause in the switchover: {} ms.", switched.as_millis());
    }
    if found.lost + found.duplicated > 0 {
        bail!("{} commits lost, {} duplicated: please report this", found.lost, found.duplicated);
    }
    if options.once || options.json {
        for node in &mut nodes {
            node.stop();
        }
        return Ok(());
    }
    leave_up(&nodes);
    std::future::pending().await
}

/// Kills the primary, and starts it again when another node has taken over; returns how long writes
/// paused.
async fn kill_primary(
    nodes: &mut [NodeProcess],
    shared: &Shared,
    screen: &mut Screen,
    which: &str,
) -> anyhow::Result<Duration> {
    watch(nodes, shared, screen, Duration::from_secs(2)).await;
    let status = any_status(nodes).await.context("no node answers")?;
    let name = status.primary.clone().context("there is no primary to kill")?;
    let victim = nodes.iter().position(|n| n.name == name).context("an unknown primary")?;
    let before = shared.count.load(Ordering::Relaxed);
    let killed = Instant::now();
    screen.say(&format!(
        "{which}: SIGKILL to the primary, {name} (process {}), after {before} commits",
        nodes[victim].pid().unwrap_or(0)
    ));
    nodes[victim].kill();
    let pause = pause_after(shared, killed).await?;
    let status = wait_until(nodes, PATIENCE, |status| status.primary.is_some()).await?;
    screen.say(&format!(
        "Writes paused for {} ms; the primary is {} now",
        pause.as_millis(),
        status.primary.as_deref().unwrap_or("?")
    ));
    watch(nodes, shared, screen, Duration::from_secs(1)).await;
    nodes[victim].start()?;
    screen.say(&format!("{name} starts again and catches up"));
    let status = wait_until(nodes, PATIENCE, |status| healthy(status, 3)).await?;
    screen.show(&status, shared.count.load(Ordering::Relaxed));
    Ok(pause)
}

/// Makes another node primary, as before maintenance; returns how long writes paused.
async fn switch_over(
    nodes: &[NodeProcess],
    shared: &Shared,
    screen: &mut Screen,
) -> anyhow::Result<Duration> {
    let name = any_status(nodes).await.and_then(|status| status.primary).unwrap_or_default();
    screen.say(&format!("A planned change: standby switchover, away from {name}"));
    let asked = Instant::now();
    let switchover = Ask::Switchover { to: None, grace: 5.0 };
    let done = ask(&nodes[0].admin_address, &switchover).await?;
    let done = done.map_err(anyhow::Error::msg).context("the switchover")?;
    let pause = pause_after(shared, asked).await?;
    screen.say(&format!("{}; writes paused for {} ms", done.text, pause.as_millis()));
    Ok(pause)
}

fn summary(found: &Found, pauses: &[u128], kills: usize) {
    println!(
        "\n{} commits were acknowledged; {} are lost, {} are there twice.",
        found.acknowledged, found.lost, found.duplicated
    );
    if found.unanswered > 0 {
        println!(
            "{} more were under way when the primary died: they are there once, unanswered.",
            found.unanswered
        );
    }
    if let (Some(median), Some(worst)) = (pauses.get(pauses.len() / 2), pauses.last()) {
        println!("Write pause over {kills} kill(s): median {median} ms, worst {worst} ms.");
    }
}

fn leave_up(nodes: &[NodeProcess]) {
    let addresses: Vec<String> = nodes
        .iter()
        .filter_map(|node| node.address.split_once(':'))
        .map(|(host, port)| format!("({host:?}, {port})"))
        .collect();
    println!(
        "\nThe cluster stays up until Ctrl-C. From Python (pip install ZEO):\n\n    \
         import ZEO, transaction\n    db = ZEO.DB([{}])\n    connection = db.open()\n    \
         connection.root()['hello'] = 'world'; transaction.commit()\n\n\
         or watch it:\n\n    standby status --watch --at {}\n",
        addresses.join(", "),
        nodes[0].admin_address
    );
}

/// Commits one number after the other to an object of its own, whatever happens to the servers.
async fn write(addresses: Vec<String>, shared: Arc<Shared>) -> anyhow::Result<()> {
    let mut client = Client::connect(&addresses, PATIENCE).await?;
    let place = {
        let mut journals = lock(&shared.journals);
        journals.push(Journal::default());
        journals.len() - 1
    };
    let (mut oids, mut oid) = (Vec::new(), None);
    let (mut number, mut serial) = (0u64, Tid::NONE);
    while !shared.stop.load(Ordering::Relaxed) {
        let target = match oid {
            Some(oid) if number % NUMBERS != 0 || serial == Tid::NONE => oid,
            _ => {
                if oids.is_empty() {
                    match client.new_oids(100).await {
                        Ok(fresh) => oids = fresh,
                        Err(_) => {
                            client = Client::connect(&addresses, PATIENCE).await?;
                            continue;
                        }
                    }
                }
                let fresh = oids.pop().context("no oid")?;
                lock(&shared.journals)[place].oids.push(fresh);
                (oid, serial) = (Some(fresh), Tid::NONE);
                fresh
            }
        };
        let data = Bytes::copy_from_slice(&(number + 1).to_be_bytes());
        match client.commit(&[(target, serial, data)]).await {
            Ok(tid) => {
                number += 1;
                serial = tid;
                lock(&shared.journals)[place].acknowledged.insert(number, tid);
                lock(&shared.acks).push(Instant::now());
                shared.count.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                // Unknown: perhaps it is committed, perhaps not. The object tells.
                client = Client::connect(&addresses, PATIENCE).await?;
                let now = loop {
                    match client.load(target).await {
                        Ok(found) => break found,
                        Err(_) => client = Client::connect(&addresses, PATIENCE).await?,
                    }
                };
                if let Some((data, tid)) = now
                    && number_in(&data)? == number + 1
                {
                    lock(&shared.journals)[place].unanswered += 1;
                    (number, serial) = (number + 1, tid);
                }
            }
        }
    }
    Ok(())
}

fn number_in(data: &Bytes) -> anyhow::Result<u64> {
    Ok(u64::from_be_bytes(data[..].try_into().context("not a number")?))
}

/// The longest time without an acknowledgement around the kill.
async fn pause_after(shared: &Shared, killed: Instant) -> anyhow::Result<Duration> {
    let deadline = killed + PATIENCE;
    // A second of acknowledgements after the gap, to be sure that it is over.
    let mut resumed = None;
    while Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let acks = lock(&shared.acks);
        let late = acks.iter().filter(|at| **at > killed + Duration::from_millis(50)).count();
        if late > 0 && resumed.is_none() {
            resumed = Some(Instant::now());
        }
        if resumed.is_some_and(|at| at.elapsed() > Duration::from_secs(1)) {
            let mut around: Vec<Instant> =
                acks.iter().filter(|at| **at + Duration::from_secs(1) > killed).copied().collect();
            around.sort();
            let gaps = around.windows(2).map(|pair| pair[1] - pair[0]);
            return gaps.max().context("no commits around the kill");
        }
    }
    bail!("no commit within {} seconds after the kill", PATIENCE.as_secs())
}

/// Walks through every revision of every writer's object on every node.
async fn check(nodes: &[NodeProcess], shared: &Shared) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let journals = std::mem::take(&mut *lock(&shared.journals));
    for node in nodes {
        let address = [node.read_only_address.clone()];
        let mut client = Client::connect_read_only(&address, PATIENCE).await?;
        for journal in &journals {
            let mut revisions: BTreeMap<u64, Vec<Tid>> = BTreeMap::new();
            for oid in &journal.oids {
                let mut before = Tid::MAX;
                while let Some((data, serial)) = client.load_before(*oid, before).await? {
                    revisions.entry(number_in(&data)?).or_default().push(serial);
                    before = serial;
                }
            }
            found.duplicated += revisions.values().filter(|tids| tids.len() > 1).count() as u64;
            let there = |(number, tid): &(&u64, &Tid)| {
                revisions.get(number).is_some_and(|tids| tids.contains(tid))
            };
            let lost = journal.acknowledged.iter().filter(|entry| !there(entry)).count();
            found.lost += lost as u64;
        }
    }
    found.acknowledged = journals.iter().map(|j| j.acknowledged.len() as u64).sum();
    found.unanswered = journals.iter().map(|j| j.unanswered).sum();
    Ok(found)
}

fn healthy(status: &Status, count: usize) -> bool {
    let up = status.nodes.iter().filter(|node| node.voter && node.state == "up").count();
    status.primary.is_some() && up == count
}

async fn any_status(nodes: &[NodeProcess]) -> Option<Status> {
    let mut best: Option<Status> = None;
    for node in nodes.iter().filter(|node| node.pid().is_some()) {
        if let Ok(status) = fetch_status(&node.admin_address).await {
            let better = best.as_ref().is_none_or(|b| {
                (status.primary.is_some(), status.term) > (b.primary.is_some(), b.term)
            });
            if better {
                best = Some(status);
            }
        }
    }
    best
}

async fn wait_until(
    nodes: &[NodeProcess],
    patience: Duration,
    wanted: impl Fn(&Status) -> bool,
) -> anyhow::Result<Status> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Some(status) = any_status(nodes).await.filter(&wanted) {
            return Ok(status);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let words: Vec<String> =
        nodes.iter().map(|node| format!("{}:\n{}", node.name, node.last_words())).collect();
    bail!("the cluster is not ready after {} s\n{}", patience.as_secs(), words.join("\n"))
}

async fn watch(nodes: &[NodeProcess], shared: &Shared, screen: &mut Screen, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if let Some(status) = any_status(nodes).await {
            screen.update(&status, shared.count.load(Ordering::Relaxed));
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// What the user sees: on a terminal a table that stays in its place, else lines.
struct Screen {
    silent: bool,
    live: bool,
    lines_up: usize,
    started: Instant,
}

impl Screen {
    fn new(silent: bool) -> Screen {
        let live = std::io::stdout().is_terminal();
        Screen { silent, live, lines_up: 0, started: Instant::now() }
    }

    fn say(&mut self, text: &str) {
        if !self.silent {
            self.lines_up = 0;
            println!("[{:6.2} s] {text}", self.started.elapsed().as_secs_f64());
        }
    }

    /// Shows the table once, for good.
    fn show(&mut self, status: &Status, commits: u64) {
        self.draw(status, commits);
        self.lines_up = 0;
    }

    /// Shows the table in the place of the last one; only on a terminal.
    fn update(&mut self, status: &Status, commits: u64) {
        if self.live {
            self.draw(status, commits);
        }
    }

    fn draw(&mut self, status: &Status, commits: u64) {
        if self.silent {
            return;
        }
        let text = format!("{}\n{commits} commits acknowledged", table(status));
        let mut out = std::io::stdout();
        if self.lines_up > 0 {
            // Back up, and clear from there.
            let _ = write!(out, "\x1b[{}A\x1b[J", self.lines_up);
        }
        let _ = writeln!(out, "{text}");
        self.lines_up = text.lines().count();
    }
}
