//! Simulates clusters of Standby: the whole node, on machines, networks and disks that a seed
//! governs.
//!
//! The same seed gives the same simulation, to the byte of what is logged.

#[cfg(not(tokio_unstable))]
compile_error!("to be built in its own directory, whose .cargo/config.toml is needed");

mod client;
mod cluster;
mod disk;
mod history;
mod machine;
mod oracle;
mod plan;
mod record;
mod trace;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use standby_types::{Mutation, mutation};
use tracing::level_filters::LevelFilter;

use crate::cluster::{Outcome, run};
use crate::plan::Plan;

#[derive(Parser)]
#[command(
    name = "standby-sim",
    about = "Simulates clusters of Standby, with all that can go wrong"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one simulation for each seed; stops at the first violation, and shrinks its plan
    Run {
        /// From the first up to, not including, the last
        #[arg(long, value_parser = seeds, value_name = "A..B")]
        seeds: std::ops::Range<u64>,
        /// Begins no simulation after so many seconds
        #[arg(long, value_name = "SECONDS")]
        seconds: Option<u64>,
        /// Simulations at the same time
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// Runs one simulation and prints all that happens
    Replay {
        /// Its seed
        seed: u64,
        /// Also what is only of interest to developers
        #[arg(long)]
        debug: bool,
        /// With this bug switched on
        #[arg(long, value_parser = mutation)]
        mutation: Option<Mutation>,
    },
    /// Switches on one bug after the other, and looks for a seed that shows it; fails if one is not
    /// found
    Mutations {
        /// Seeds for each
        #[arg(long, default_value_t = 1000)]
        seeds: u64,
        /// Only this one
        #[arg(long, value_parser = mutation)]
        only: Option<Mutation>,
        /// Bugs that are looked for at the same time
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
}

fn mutation(name: &str) -> Result<Mutation, String> {
    let named = |mutation: &Mutation| format!("{mutation:?}") == name;
    Mutation::ALL.into_iter().find(named).ok_or_else(|| {
        let names: Vec<String> = Mutation::ALL.iter().map(|m| format!("{m:?}")).collect();
        format!("the mutations are {}", names.join(", "))
    })
}

fn seeds(text: &str) -> Result<std::ops::Range<u64>, String> {
    let parts = text.split_once("..").ok_or("seeds are written A..B")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    Ok(number(parts.0)?..number(parts.1)?)
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run { seeds, seconds, threads } => {
            trace::install(LevelFilter::INFO);
            run_seeds(seeds, seconds.map(Duration::from_secs), threads)
        }
        Command::Mutations { seeds, only, threads } => {
            trace::install(LevelFilter::OFF);
            find_mutations(seeds, only, threads)
        }
        Command::Replay { seed, debug, mutation } => {
            trace::install(if debug { LevelFilter::DEBUG } else { LevelFilter::INFO });
            trace::print(true);
            let plan = Plan::of(seed);
            println!("{plan:#?}");
            mutation::switch(mutation);
            let outcome = run(&plan);
            println!("{outcome:#?}");
            if outcome.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn run_seeds(seeds: std::ops::Range<u64>, time: Option<Duration>, threads: usize) -> ExitCode {
    let begun = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((0u64, Outcome::default()));
    let failed = Mutex::new(BTreeMap::<u64, Outcome>::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && time.is_none_or(|t| begun.elapsed() < t) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let outcome = run(&Plan::of(seed));
                    let mut total = total.lock().unwrap_or_else(|error| error.into_inner());
                    total.0 += 1;
                    total.1.commits += outcome.commits;
                    total.1.asked += outcome.asked;
                    total.1.refusals += outcome.refusals;
                    total.1.elections += outcome.elections;
                    total.1.lost_tails += outcome.lost_tails;
                    for (name, count) in &outcome.faults {
                        *total.1.faults.entry(name).or_default() += count;
                    }
                    if total.0 % 500 == 0 {
                        println!("{} seeds, {} s", total.0, begun.elapsed().as_secs());
                    }
                    if !outcome.violations.is_empty() {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().unwrap_or_else(|e| e.into_inner()).insert(seed, outcome);
                    }
                }
            });
        }
    });
    let (count, total) = total.into_inner().unwrap_or_else(|error| error.into_inner());
    println!(
        "{count} seeds in {:.1} s: {} commits acknowledged, {} of them when their client asked for \
        the outcome, {} others not committed, {} times a node became primary, {} lost tails kept",
        begun.elapsed().as_secs_f64(),
        total.commits,
        total.asked,
        total.refusals,
        total.elections,
        total.lost_tails
    );
    for (name, count) in &total.faults {
        println!("  {count:7} {name}");
    }
    let failed = failed.into_inner().unwrap_or_else(|error| error.into_inner());
    let Some((seed, outcome)) = failed.into_iter().next() else {
        println!("no violation");
        return ExitCode::SUCCESS;
    };
    println!("seed {seed}: {}", outcome.violations.join("; "));
    let plan = shrink(Plan::of(seed));
    println!("the shortest plan that still ends badly:\n{:#?}", plan.steps);
    println!("standby-sim replay {seed}");
    ExitCode::FAILURE
}

fn find_mutations(seeds: u64, only: Option<Mutation>, threads: usize) -> ExitCode {
    let wanted: Vec<Mutation> =
        Mutation::ALL.into_iter().filter(|one| only.is_none_or(|only| only == *one)).collect();
    let (next, missed) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(one) = wanted.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    mutation::switch(Some(*one));
                    let begun = Instant::now();
                    let found = (0..seeds).find_map(|seed| {
                        let violation = run(&Plan::of(seed)).violations.into_iter().next()?;
                        Some((seed, violation))
                    });
                    mutation::switch(None);
                    let seconds = begun.elapsed().as_secs_f64();
                    match found {
                        Some((seed, violation)) => {
                            println!("{one:?}: seed {seed}, after {seconds:.1} s: {violation}");
                        }
                        None => {
                            missed.fetch_add(1, Ordering::Relaxed);
                            println!("{one:?}: NOT FOUND with {seeds} seeds, in {seconds:.1} s");
                        }
                    }
                }
            });
        }
    });
    match missed.into_inner() {
        0 => {
            println!("all {} mutations are found", wanted.len());
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}

/// Leaves out what is not needed for a violation.
fn shrink(mut plan: Plan) -> Plan {
    let mut at = 0;
    while at < plan.steps.len() {
        let mut shorter = plan.clone();
        shorter.steps.remove(at);
        if run(&shorter).violations.is_empty() {
            at += 1;
        } else {
            plan = shorter;
        }
    }
    plan
}
