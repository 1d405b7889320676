//! Plans that ended badly once, and what all plans have in common.

use super::*;

#[test]
fn the_same_plan_gives_the_same_trace() {
    trace::install(tracing::level_filters::LevelFilter::INFO);
    for seed in [16, 69, 755] {
        let plan = Plan::of(seed);
        assert_eq!(run(&plan), run(&plan), "seed {seed}");
    }
}

/// Runs a seed with these faults instead of its own, at these milliseconds.
fn nothing_is_violated(seed: u64, steps: &[(u64, Fault)]) {
    trace::install(tracing::level_filters::LevelFilter::INFO);
    let steps = steps.iter().cloned();
    let steps = steps.map(|(millis, fault)| Step { at: Duration::from_millis(millis), fault });
    let plan = Plan { steps: steps.collect(), ..Plan::of(seed) };
    assert_eq!(run(&plan).violations, Vec::<String>::new());
}

/// The primary proposed something while it performed what its election had brought: its log got
/// that first.
#[test]
fn entries_reach_the_log_in_their_order() {
    let at = Duration::from_millis;
    let steps = [
        (1671, Fault::GroupMove { home: false }),
        (2058, Fault::FailSync { node: 3, down: at(1818) }),
        (3647, Fault::CutAll { torn: false, down: at(721) }),
    ];
    nothing_is_violated(8868, &steps);
}

/// A primary that lost its role before the invitation was committed said that the node may join.
#[test]
fn a_decision_that_is_lost_is_not_answered_as_done() {
    let steps = [(1542, Fault::Swallow { all: true }), (1782, Fault::Add { node: 3 })];
    nothing_is_violated(418, &steps);
}

/// The source of a catch-up was restarted meanwhile, and sent what it had applied again by then:
/// the node that caught up lacked two acknowledged transactions, and could become primary.
#[test]
fn a_source_that_was_restarted_sends_all_that_was_asked_for() {
    let at = Duration::from_millis;
    let steps = [
        (1920, Fault::Pause { node: 1, time: at(2360) }),
        (2051, Fault::Add { node: 3 }),
        (2207, Fault::Kill { node: 0, down: at(2965) }),
    ];
    nothing_is_violated(2528, &steps);
}

/// A clock that leapt by a day made all transactions a day old: what clients asked for was forgotten.
#[test]
fn what_became_of_a_commit_is_known_after_a_clock_has_leapt() {
    let at = Duration::from_millis;
    let steps = [
        (2666, Fault::Cut { node: 0, operations: 2, torn: false, down: at(64) }),
        (3848, Fault::Skew { node: 0, seconds: 87_600 }),
        (5571, Fault::SlowDisk { node: Some(0), most: at(497), time: at(3095) }),
    ];
    nothing_is_violated(822, &steps);
}

/// A node that was away while another was added, and became primary, had no link to it: its answers
/// went nowhere.
#[test]
fn a_node_answers_a_primary_that_was_added_while_it_was_away() {
    let at = Duration::from_millis;
    let steps = [
        (5142, Fault::SlowNetwork { most: at(95), lost_one_in: 3, time: at(1187) }),
        (5927, Fault::Add { node: 3 }),
        (6017, Fault::FullDisk { node: 0, time: at(3454) }),
        (6707, Fault::Remove { node: 2 }),
        (7894, Fault::Swallow { all: false }),
    ];
    nothing_is_violated(4983, &steps);
}

#[test]
fn every_fault_comes_in_some_plan() {
    let mut seen = std::collections::BTreeSet::new();
    let plans = (0..300).map(Plan::of);
    plans.for_each(|plan| seen.extend(plan.steps.iter().map(|step| name_of(&step.fault))));
    assert_eq!(seen.len(), 24, "{seen:?}");
}
