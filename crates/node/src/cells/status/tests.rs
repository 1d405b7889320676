use super::*;

fn report(node: &str, serves: bool, tid: u64) -> NodeReport {
    NodeReport {
        cluster: "c".into(),
        node: node.into(),
        id: node.into(),
        group: "g".into(),
        serves,
        primary: Some("n1".into()),
        term: 3,
        last_tid: BTreeMap::from([("1".into(), Tid(tid).to_string())]),
        members: vec![
            ("n1".into(), "g".into(), true),
            ("n2".into(), "g".into(), true),
            ("n3".into(), "g".into(), false),
        ],
        ..NodeReport::default()
    }
}

fn seen(report: &NodeReport, age: u64) -> Seen {
    let (age, lag) = (Duration::from_secs(age), Duration::ZERO);
    Seen { report: report.clone(), age, lag, clock_ahead: None }
}

#[test]
fn the_picture_has_every_member() {
    let (n1, n2) = (report("n1", true, 9), report("n2", false, 8));
    let status = compose(&n2, &[seen(&n1, 1), seen(&n2, 0)]);
    assert_eq!(status.primary.as_deref(), Some("n1"));
    let states: Vec<_> = status.nodes.iter().map(|n| (n.state.as_str(), n.voter)).collect();
    assert_eq!(states, [("up", true), ("up", true), ("down", false)]);
}

#[test]
fn a_silent_primary_is_down() {
    let (n1, mut n2) = (report("n1", true, 0), report("n2", false, 0));
    n2.primary = None;
    let status = compose(&n2, &[seen(&n1, 9), seen(&n2, 0)]);
    assert_eq!(status.primary, None);
    let states: Vec<_> = status.nodes.iter().map(|n| n.state.as_str()).collect();
    assert_eq!(states, ["down", "cut-off", "down"]);
}

/// What `status` and the metric say of how many failures can be survived.
#[test]
fn only_voters_that_could_replace_a_lost_one_count() {
    let healthy = |name: &str| NodeReport {
        members: ["n1", "n2", "n3"].map(|name| (name.into(), "g".into(), true)).into(),
        ..report(name, name == "n1", 9)
    };
    let able = |n1: NodeReport, n3: Seen| {
        let status = compose(&n1, &[seen(&n1, 0), seen(&healthy("n2"), 0), n3]);
        assert_eq!((status.voters().0, status.voters().2), (3, 2));
        status.voters().1
    };
    let third = |report: NodeReport| able(healthy("n1"), seen(&report, 0));
    assert_eq!(third(healthy("n3")), 3);
    assert_eq!(third(NodeReport { no_room: Some("full".into()), ..healthy("n3") }), 2);
    assert_eq!(third(NodeReport { primary: None, ..healthy("n3") }), 2, "cut off");
    assert_eq!(third(NodeReport { catching_up: true, ..healthy("n3") }), 2);
    assert_eq!(third(NodeReport { damage: Some("block".into()), ..healthy("n3") }), 2);
    assert_eq!(able(healthy("n1"), seen(&healthy("n3"), 9)), 2, "down");
    let lags = Seen { lag: Duration::from_secs(9), ..seen(&healthy("n3"), 0) };
    assert_eq!(able(healthy("n1"), lags), 2);
    let no_lease = NodeReport { no_lease: true, ..healthy("n1") };
    assert_eq!(able(no_lease, seen(&healthy("n3"), 0)), 0);
}

#[test]
fn row_53_a_clock_in_the_future_is_told_from_one_that_others_have_lost() {
    let reports = Reports::default();
    reports.note_own(report("n1", true, 0));
    let voters = BTreeSet::from([NodeId(1), NodeId(2), NodeId(3)]);
    let hears = |id: u64, behind: f64| {
        for _ in 0..Skew::AGREEING {
            let clock = platform::wall_clock().as_secs_f64() - behind;
            let name = format!("n{id}");
            let id = NodeId(id);
            reports.note(id, NodeReport { clock, id: id.to_string(), ..report(&name, false, 0) });
        }
    };
    hears(2, 90_000.0);
    assert_eq!(reports.ahead_of_majority(&voters), None, "the other one may be wrong");
    hears(3, 80_000.0);
    let ahead = reports.ahead_of_majority(&voters).unwrap().as_secs_f64();
    assert!((79_000.0..81_000.0).contains(&ahead), "{ahead}");
    hears(3, 10.0);
    assert_eq!(reports.ahead_of_majority(&voters), None);
}

#[test]
fn lag_is_the_time_since_the_primary_had_more() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut progress = Progress::default();
    for (seconds, index) in [(0, 10), (1, 10), (3600, 11), (3601, 15)] {
        progress.note(at(seconds), index);
    }
    assert_eq!(progress.lag(at(3602), 15), Duration::ZERO);
    assert_eq!(progress.lag(at(3602), 12), Duration::from_secs(1));
    assert_eq!(progress.lag(at(3602), 10), Duration::from_secs(2));
    assert_eq!(progress.lag(at(3602), 0), Duration::from_secs(3602));
}

#[test]
fn a_clock_is_wrong_if_all_reports_say_so() {
    let mut skew = Skew::default();
    for ahead in [86_400.0, 3.0, -0.1, 5.0] {
        skew.note("n2", ahead);
        assert_eq!(skew.ahead(), None);
    }
    for ahead in [-2.0, -2.1, -2.04, -3.0] {
        skew.note("n2", ahead);
    }
    assert_eq!(skew.ahead(), Some(-2.0));
}

#[test]
fn reports_come_while_the_status_is_looked_at() {
    let reports = Reports::default();
    reports.note_own(report("n1", true, 0));
    std::thread::scope(|scope| {
        scope.spawn(|| (0..20_000).for_each(|_| drop(reports.status())));
        for _ in 0..20_000 {
            reports.note(NodeId(2), report("n2", true, 0));
        }
    });
    assert_eq!(reports.status().nodes.len(), 3);
}

#[test]
fn a_closed_connection_is_noticed_at_once() {
    let reports = Reports::default();
    reports.note_own(report("n1", true, 0));
    reports.note(NodeId(2), report("n2", false, 0));
    assert_eq!(reports.status().nodes[1].state, "up");
    reports.lost(NodeId(2));
    assert_eq!(reports.status().nodes[1].state, "down");
}

#[test]
fn a_removed_node_is_shown_until_it_is_no_member() {
    let reports = Reports::default();
    reports.note_own(report("n1", true, 0));
    reports.note(NodeId(2), report("n2", false, 0));
    reports.note(NodeId(4), report("n4", false, 0));
    let removed = ["n2", "n4"].map(String::from).into();
    let shown = |reports: &Reports| -> Vec<String> {
        reports.status().nodes.into_iter().map(|node| node.node).collect()
    };
    reports.forget_removed(&removed);
    assert_eq!(shown(&reports), ["n1", "n2", "n3"]);
    let mut own = report("n1", true, 0);
    own.members.retain(|(name, _, _)| name != "n2");
    reports.note_own(own);
    reports.forget_removed(&removed);
    assert_eq!(shown(&reports), ["n1", "n3"]);
}

#[test]
fn row_31_an_identity_belongs_to_one_process_at_a_time() {
    let reports = Reports::default();
    let of = |run: &str| NodeReport { run: run.into(), ..report("n2", false, 0) };
    reports.note(NodeId(2), of("first"));
    assert!(reports.is_taken(NodeId(2), "second"));
    assert!(!reports.is_taken(NodeId(2), "first"));
    assert!(!reports.is_taken(NodeId(3), "second"));
    reports.lost(NodeId(2));
    assert!(!reports.is_taken(NodeId(2), "second"), "a restart comes back at once");
}

#[test]
fn ctime_is_pythons() {
    assert_eq!(ctime(Duration::from_secs(0)), "Thu Jan  1 00:00:00 1970");
    assert_eq!(ctime(Duration::from_secs(1_795_489_799)), "Tue Nov 24 03:09:59 2026");
}
