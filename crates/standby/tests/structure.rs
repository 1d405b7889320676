//! What the structure promises: which crates are pure, and which way the arrows point.

mod sources;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use sources::collect;

const PURE: [&str; 7] = [
    "standby-types",
    "standby-pickle",
    "standby-filestorage",
    "standby-zeo",
    "standby-consensus",
    "standby-replica",
    "standby-primary",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Each package of the workspace with its dependencies that are not for tests.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let used = all.filter(|d| d["kind"].is_null()).map(|d| text(&d["name"]));
            (text(&package["name"]), used.collect())
        })
        .collect()
}

#[test]
fn pure_crates_depend_on_nothing_that_does_io() {
    let banned =
        ["tokio", "mio", "rustix", "libc", "socket2", "rand", "getrandom", "hyper", "axum"];
    let all = dependencies();
    for name in PURE {
        for used in &all[name] {
            assert!(!banned.contains(&used.as_str()), "{name} depends on {used}");
        }
    }
}

#[test]
fn arrows_point_one_way() {
    let allowed: &[(&str, &[&str])] = &[
        ("standby-types", &[]),
        ("standby-pickle", &[]),
        ("standby-filestorage", &["standby-types"]),
        ("standby-zeo", &["standby-types", "standby-pickle"]),
        ("standby-consensus", &["standby-types"]),
        ("standby-disk", &["standby-types"]),
        ("standby-logging", &["standby-types"]),
        ("standby-config", &["standby-logging", "standby-zeo"]),
        (
            "standby-replica",
            &[
                "standby-types",
                "standby-filestorage",
                "standby-zeo",
                "standby-consensus",
                "standby-logging",
                "standby-config",
            ],
        ),
        (
            "standby-primary",
            &[
                "standby-types",
                "standby-filestorage",
                "standby-zeo",
                "standby-consensus",
                "standby-config",
                "standby-replica",
            ],
        ),
        (
            "standby-node",
            &[
                "standby-types",
                "standby-filestorage",
                "standby-zeo",
                "standby-consensus",
                "standby-disk",
                "standby-logging",
                "standby-config",
                "standby-replica",
                "standby-primary",
            ],
        ),
    ];
    let router = &["standby-types", "standby-zeo", "standby-config", "standby-node"];
    let allowed = allowed.iter().copied().chain([("standby-router", &router[..])]);
    let all = dependencies();
    for (name, may) in allowed {
        let ours = all[name].iter().filter(|used| used.starts_with("standby"));
        for used in ours {
            assert!(may.contains(&used.as_str()), "{name} depends on {used}");
        }
    }
}

#[test]
fn pure_sources_name_no_clock_no_socket_no_randomness_no_file_system() {
    let banned = [
        "tokio::",
        "std::net",
        "std::fs",
        "std::thread",
        "SystemTime",
        "Instant",
        "thread_rng",
        "getrandom",
        "std::env",
        "std::process",
    ];
    for name in PURE {
        let crate_dir = root().join("crates").join(name.trim_start_matches("standby-"));
        let mut files = Vec::new();
        collect(&crate_dir.join("src"), &mut files);
        assert!(!files.is_empty());
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            let code = text.split("\nmod tests {").next().unwrap();
            for word in banned {
                assert!(!code.contains(word), "{}: {word}", file.display());
            }
        }
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let mut files = Vec::new();
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        collect(&entry.unwrap().path().join("src"), &mut files);
    }
    for file in files {
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= 1000, "{} has {lines} lines", file.display());
    }
}

/// A queue without a bound, and a task that nobody joins in the same line, say beside them what
/// bounds and ends them.
#[test]
fn queues_without_a_bound_and_tasks_say_why() {
    let (mut files, mut silent) = (Vec::new(), Vec::new());
    collect(&root().join("crates/node/src"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let path = file.display().to_string();
        if path.contains("simulated") {
            continue;
        }
        let code = text.split("\nmod tests {").next().unwrap_or_default();
        let lines: Vec<&str> = code.lines().collect();
        for (nth, line) in lines.iter().enumerate() {
            let wants = line.contains("unbounded_channel(") || line.contains("tokio::spawn(");
            let says = |line: &&str| line.trim_start().starts_with("//");
            if wants && !lines[nth.saturating_sub(1)..nth].iter().any(says) {
                silent.push(format!("{path}:{}", nth + 1));
            }
        }
    }
    assert!(silent.is_empty(), "no comment says what ends or bounds it: {silent:#?}");
}
