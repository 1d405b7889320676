//! A model of Standby's election, commit, change of members and forced promotion, searched
//! exhaustively.
//!
//! `cluster.rs` has the steps, `properties.rs` what must hold. What is here are the small clusters
//! that are searched, and the bugs that the search must find.

mod cluster;
mod properties;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use cluster::{Action, Bounds, Cluster, Mutation, Nodes};
use stateright::{Checker, HasDiscoveries, Model, Property};

/// Searches every state of small clusters.
#[derive(Parser)]
struct Arguments {
    /// Only this one.
    #[arg(long)]
    only: Option<String>,
    /// One term, one kill, one promotion or transaction more. It takes long, and much memory.
    #[arg(long)]
    night: bool,
    /// With this bug built in.
    #[arg(long)]
    mutation: Option<Mutation>,
    /// Each bug must be found.
    #[arg(long, conflicts_with_all = ["only", "night", "mutation"])]
    mutations: bool,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

struct Search {
    name: &'static str,
    bounds: Bounds,
    /// Which of [`properties::SOMETIMES`] must be seen.
    seen: &'static [usize],
    /// What it must find when it is built in.
    finds: &'static [Mutation],
}

impl Model for Search {
    type State = Cluster;
    type Action = Action;

    fn init_states(&self) -> Vec<Cluster> {
        vec![Cluster::founded(&self.bounds)]
    }

    fn actions(&self, state: &Cluster, actions: &mut Vec<Action>) {
        state.actions(&self.bounds, actions);
    }

    fn next_state(&self, state: &Cluster, action: Action) -> Option<Cluster> {
        state.after(&self.bounds, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        // A property is a function without a state of its own: each has a number of its own here.
        macro_rules! numbered {
            ($kind:ident, $of:ident, $($number:literal)*) => {
                [$(Property::<Self>::$kind(
                    properties::$of[$number].0,
                    |_, state| (properties::$of[$number].1)(state),
                )),*]
            };
        }
        let sometimes = numbered!(sometimes, SOMETIMES, 0 1 2 3 4 5);
        let mut all = Vec::from(numbered!(always, ALWAYS, 0 1 2 3 4 5 6));
        let seen = |(number, property)| self.seen.contains(&number).then_some(property);
        all.extend(sometimes.into_iter().enumerate().filter_map(seen));
        all
    }
}

fn nodes(numbers: &[usize]) -> Nodes {
    numbers.iter().fold(Nodes::default(), |nodes, number| nodes.with(*number))
}

use Mutation::*;

fn searches(night: bool, mutation: Option<Mutation>) -> Vec<Search> {
    let more = u8::from(night);
    let bounds = Bounds {
        nodes: 3,
        voters: nodes(&[0, 1, 2]),
        witnesses: Nodes::default(),
        changes: Vec::new(),
        promoted: Nodes::default(),
        terms: 3 + more,
        commits: 2,
        kills: 1 + more,
        promotions: 0,
        clocks: false,
        mutation,
    };
    vec![
        Search {
            name: "three voters",
            bounds: bounds.clone(),
            seen: &[0, 1],
            finds: &[ForgetVote, GrantToAnyone, CommitAlone],
        },
        Search {
            name: "three voters, one term more",
            bounds: Bounds { terms: 4 + more, commits: 1, kills: 0, ..bounds.clone() },
            seen: &[0],
            finds: &[CountFormerTerms],
        },
        Search {
            name: "two and a witness",
            bounds: Bounds { witnesses: nodes(&[2]), kills: 2, ..bounds.clone() },
            seen: &[0, 1],
            finds: &[],
        },
        Search {
            name: "a founder takes others in",
            bounds: Bounds {
                voters: nodes(&[0]),
                changes: vec![nodes(&[0, 1, 2])],
                commits: 1 + more,
                ..bounds.clone()
            },
            seen: &[0, 2],
            finds: &[],
        },
        Search {
            name: "the primary moves to another group",
            bounds: Bounds {
                nodes: 4,
                voters: nodes(&[0, 1]),
                changes: vec![nodes(&[2, 3])],
                terms: 2 + more,
                commits: 1,
                ..bounds.clone()
            },
            seen: &[0, 2],
            finds: &[NoJointMajority, ForgetCommit],
        },
        Search {
            name: "another group is promoted",
            bounds: Bounds {
                voters: nodes(&[0, 1]),
                promoted: nodes(&[2]),
                terms: 2,
                commits: 2 + more,
                kills: more,
                promotions: 1,
                clocks: true,
                ..bounds.clone()
            },
            seen: &[0, 3, 4, 5],
            finds: &[LoseTheTail],
        },
        Search {
            name: "a node of a lost majority is promoted",
            bounds: Bounds {
                promoted: nodes(&[0, 2]),
                terms: 2,
                commits: 2 + more,
                kills: 0,
                promotions: 1 + more,
                ..bounds
            },
            seen: &[0, 3, 4, 5],
            finds: &[KeepByTid],
        },
    ]
}

/// True if nothing was found that must not be, and all was seen that must be.
fn run(search: Search, threads: usize, built_in: Option<Mutation>) -> bool {
    let (name, started) = (search.name, Instant::now());
    let ends = HasDiscoveries::AnyFailures;
    let checker = search.checker().threads(threads).finish_when(ends).spawn_bfs().join();
    let found = checker.discoveries();
    let mut well = true;
    for (property, path) in &found {
        if properties::ALWAYS.iter().any(|(name, _)| name == property) {
            well = false;
            if let Some(mutation) = built_in {
                println!("{mutation:?} in {name}: not so: {property}, {:?}", started.elapsed());
            } else {
                println!("\n{name}: NOT SO: {property}");
                path.clone().into_actions().iter().for_each(|action| println!("    {action:?}"));
                println!("    {:#?}", path.last_state());
            }
        }
    }
    if built_in.is_none() {
        let properties = checker.model().properties();
        for property in &properties {
            let expected = properties::SOMETIMES.iter().any(|(name, _)| *name == property.name);
            if expected && !found.contains_key(property.name) {
                println!("{name}: never: {}", property.name);
                well = false;
            }
        }
        println!(
            "{name:40} {:>10} states, {:>2} steps deep, {:>4.0} s",
            checker.unique_state_count(),
            checker.max_depth(),
            started.elapsed().as_secs_f64()
        );
    }
    well
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut well = true;
    if arguments.mutations {
        for mutation in <Mutation as clap::ValueEnum>::value_variants() {
            let mut searches = searches(false, Some(*mutation)).into_iter();
            let search = searches.find(|search| search.finds.contains(mutation));
            if search.is_none_or(|search| run(search, arguments.threads, Some(*mutation))) {
                println!("{mutation:?}: NOT FOUND");
                well = false;
            }
        }
    } else {
        for search in searches(arguments.night, arguments.mutation) {
            if arguments.only.as_ref().is_none_or(|only| only == search.name) {
                well &= run(search, arguments.threads, None);
            }
        }
    }
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
