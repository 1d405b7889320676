use super::*;

/// Name, group, state.
type Member<'a> = (&'a str, &'a str, &'a str);

const THREE: [Member<'_>; 3] =
    [("n1", "london", "up"), ("n2", "london", "up"), ("n3", "paris", "up")];

fn told(id: &str, term: i64, primary: Option<&str>, members: &[Member<'_>]) -> Value {
    let text = |key: &str, value: &str| (Value::str(key), Value::str(value));
    let node = |(name, group, state): &Member<'_>| {
        let role = if primary == Some(name) { "primary" } else { "replica" };
        Value::Dict(vec![
            text("node", name),
            text("group", group),
            text("role", role),
            text("state", state),
            text("address", &format!("{name}:1")),
            text("read_only_address", &format!("{name}:2")),
        ])
    };
    Value::Dict(vec![
        (Value::str("version"), Value::Int(1)),
        text("cluster", "archive"),
        text("cluster_id", id),
        (Value::str("timeline"), Value::Int(1)),
        (Value::str("term"), Value::Int(term)),
        (Value::str("primary"), primary.map_or(Value::None, Value::str)),
        (Value::str("nodes"), Value::List(members.iter().map(node).collect())),
    ])
}

fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

fn machine() -> Machine {
    Machine::new(Policy {
        seeds: vec!["seed:1".into()],
        cluster: None,
        groups: Vec::new(),
        max_lag: ms(10_000),
    })
}

/// A router that has connections to all three nodes; n1 is primary.
fn connected() -> Machine {
    let mut machine = machine();
    for node in ["n1", "n2", "n3"] {
        let told = told("77", 4, Some("n1"), &THREE);
        machine.connected(ms(0), &format!("{node}:2"), Some(&told), Tid(10)).unwrap();
        machine.answered(&format!("{node}:2"), ms(1));
    }
    machine
}

fn listed(addresses: &[&str]) -> Vec<String> {
    addresses.iter().map(|address| (*address).to_owned()).collect()
}

#[test]
fn the_cluster_is_found_from_one_seed_which_is_left_then() {
    let mut machine = machine();
    assert_eq!(machine.picture(ms(0)).watched, ["seed:1".into()].into());
    let all = told("77", 4, Some("n1"), &THREE);
    machine.connected(ms(1), "seed:1", Some(&all), Tid(1)).unwrap();
    // Its nodes may be gone: the seed stays until one of them answers.
    let picture = machine.picture(ms(1));
    assert_eq!(picture.watched.len(), 4);
    assert_eq!(picture.writes, None);
    machine.connected(ms(2), "n1:2", Some(&all), Tid(1)).unwrap();
    let picture = machine.picture(ms(2));
    assert_eq!(picture.watched, ["n1:2", "n2:2", "n3:2"].map(String::from).into());
    assert_eq!(picture.writes.as_deref(), Some("n1:1"));
}

#[test]
fn writers_wait_for_the_next_primary_and_readers_do_not() {
    let mut machine = connected();
    assert_eq!(machine.picture(ms(0)).writes.as_deref(), Some("n1:1"));
    machine.lost("n1:2", true, "frozen".into());
    let picture = machine.picture(ms(100));
    assert_eq!(picture.writes, None);
    assert_eq!(picture.dead, ["n1:1", "n1:2"].map(String::from).into());
    assert_eq!(picture.reads, listed(&["n2:2"]));
    machine.told("n3:2", &told("77", 5, Some("n3"), &THREE)).unwrap();
    assert_eq!(machine.picture(ms(200)).writes.as_deref(), Some("n3:1"));
    // What a node of the past tells is of no interest.
    machine.connected(ms(300), "n1:2", Some(&told("77", 4, Some("n1"), &THREE)), Tid(9)).unwrap();
    let picture = machine.picture(ms(300));
    assert_eq!(picture.writes.as_deref(), Some("n3:1"));
    assert!(picture.dead.is_empty());
}

#[test]
fn without_a_primary_in_reach_any_node_gets_writers_after_a_while() {
    let mut machine = connected();
    machine.lost("n1:2", true, "its host vanished, for this machine only".into());
    assert_eq!(machine.picture(ms(100)).writes, None);
    assert_eq!(machine.picture(ms(2000)).writes, None);
    assert_eq!(machine.picture(ms(2100)).writes.as_deref(), Some("n2:1"));
}

#[test]
fn a_replica_that_lags_is_left() {
    let mut machine = connected();
    machine.has(ms(1000), "n1:2", Tid(20));
    machine.has(ms(1010), "n3:2", Tid(20));
    machine.has(ms(5000), "n1:2", Tid(30));
    assert_eq!(machine.picture(ms(11_000)).reads, listed(&["n2:2"]));
    // Beyond it, the other group is better; and nobody lags behind what nobody has.
    machine.has(ms(11_001), "n3:2", Tid(30));
    assert_eq!(machine.picture(ms(11_002)).reads, listed(&["n3:2"]));
    machine.has(ms(11_003), "n2:2", Tid(30));
    assert_eq!(machine.lag(ms(60_000), "n2:2"), Duration::ZERO);
}

#[test]
fn readers_without_replicas_get_the_primary_and_then_anybody() {
    let mut machine = connected();
    let members = [("n1", "london", "up"), ("n2", "london", "damaged"), ("n3", "paris", "down")];
    machine.told("n1:2", &told("77", 4, Some("n1"), &members)).unwrap();
    assert_eq!(machine.picture(ms(1)).reads, listed(&["n1:2"]));
    machine.lost("n1:2", true, "killed".into());
    assert_eq!(machine.picture(ms(2)).reads, listed(&["n2:2", "n3:2"]));
}

#[test]
fn readers_go_to_a_nearer_group_only_if_it_is_much_nearer() {
    let mut machine = connected();
    assert_eq!(machine.picture(ms(0)).reads, listed(&["n2:2"]));
    for _ in 0..50 {
        machine.answered("n2:2", ms(2));
    }
    assert_eq!(machine.picture(ms(1)).reads, listed(&["n2:2"]));
    for _ in 0..50 {
        machine.answered("n2:2", ms(5));
    }
    assert_eq!(machine.picture(ms(2)).reads, listed(&["n3:2"]));
    machine.policy.groups = vec!["rome".into(), "london".into()];
    assert_eq!(machine.picture(ms(3)).reads, listed(&["n2:2"]));
}

#[test]
fn all_nodes_may_be_replaced() {
    let mut machine = connected();
    let others = [("m1", "london", "up"), ("m2", "london", "up")];
    machine.told("n1:2", &told("77", 6, Some("m1"), &others)).unwrap();
    // None of those that are known now has answered yet.
    let picture = machine.picture(ms(1));
    assert_eq!(picture.watched, ["m1:2", "m2:2", "seed:1"].map(String::from).into());
    let told = told("77", 6, Some("m1"), &others);
    machine.connected(ms(2), "m1:2", Some(&told), Tid(3)).unwrap();
    assert_eq!(machine.picture(ms(2)).writes.as_deref(), Some("m1:1"));
}

#[test]
fn nodes_of_another_cluster_are_left_out() {
    let mut machine = connected();
    let other = told("88", 9, Some("n9"), &[("n9", "london", "up")]);
    let stranger = machine.connected(ms(1), "n9:1", Some(&other), Tid(99)).unwrap_err();
    assert!(stranger.to_string().contains("(88)"), "{stranger}");
    let picture = machine.picture(ms(1));
    assert_eq!(picture.writes.as_deref(), Some("n1:1"));
    let mut machine = Machine::new(Policy { cluster: Some("library".into()), ..machine.policy });
    assert!(machine.connected(ms(1), "seed:1", Some(&other), Tid(99)).is_err());
}

#[test]
fn each_seed_is_looked_at_before_it_is_left() {
    let policy = Policy { seeds: listed(&["n1:1", "wrong:1"]), ..machine().policy };
    let mut machine = Machine::new(policy);
    let all = told("77", 4, Some("n1"), &THREE);
    machine.connected(ms(1), "n1:2", Some(&all), Tid(1)).unwrap();
    assert!(machine.picture(ms(1)).watched.contains("wrong:1"));
    let other = told("88", 9, Some("n9"), &[("n9", "london", "up")]);
    let stranger = machine.connected(ms(2), "wrong:1", Some(&other), Tid(99)).unwrap_err();
    machine.foreign("wrong:1", &stranger);
    assert!(!machine.picture(ms(3)).watched.contains("wrong:1"));
}

#[test]
fn a_server_that_tells_of_no_cluster_serves_all_and_is_never_given_up() {
    let mut machine = machine();
    machine.connected(ms(1), "seed:1", None, Tid(1)).unwrap();
    let picture = machine.picture(ms(1));
    assert_eq!((picture.writes.as_deref(), picture.reads), (Some("seed:1"), listed(&["seed:1"])));
    machine.lost("seed:1", true, "it does not answer".into());
    assert!(machine.picture(ms(2)).dead.is_empty());
}

#[test]
fn what_cannot_be_understood_is_left_out() {
    let mut machine = machine();
    machine.connected(ms(1), "seed:1", Some(&Value::Int(1)), Tid(1)).unwrap();
    assert_eq!(machine.picture(ms(1)).writes.as_deref(), Some("seed:1"));
}

#[test]
fn moments_that_are_kept_are_bounded() {
    let mut machine = connected();
    for nth in 1..20_000 {
        machine.has(ms(nth * 150), "n1:2", Tid(nth + 10));
    }
    assert_eq!(machine.heads.len(), HEADS);
}
