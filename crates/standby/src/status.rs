//! `standby status`

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use standby_config::Config;
use standby_node::{NodeStatus, Status, fetch_status};

/// Which node is asked.
#[derive(Args)]
pub struct At {
    /// The admin-address of any node.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
    at: Option<String>,
    /// The configuration of a node; its admin-address is asked.
    #[arg(short = 'C', long = "config", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl At {
    pub fn address(&self) -> anyhow::Result<String> {
        if let Some(address) = &self.at {
            return Ok(address.clone());
        }
        let Some(file) = &self.config else { return Ok("127.0.0.1:8103".into()) };
        let standby = Config::read(file)?.standby;
        let standby = standby.with_context(|| {
            format!(
                "{} has no <standby> section: a node alone has no admin-address",
                file.display()
            )
        })?;
        Ok(standby.admin_address.to_string())
    }
}

pub async fn run(at: &At, json: bool, watch: bool) -> anyhow::Result<()> {
    let address = at.address()?;
    loop {
        let status = fetch_status(&address).await;
        if json {
            println!("{}", serde_json::to_string(&status?)?);
            return Ok(());
        }
        if !watch {
            println!("{}", table(&status?));
            return Ok(());
        }
        print!("\x1b[2J\x1b[H");
        match status {
            Ok(status) => println!("{}", table(&status)),
            Err(error) => println!("{error:#}"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Seconds from which the age of a replica's data is shown.
const STALE: f64 = 3.0;

/// Characters of a line in the column of a node's state.
const WIDTH: usize = 60;

/// A long text in several lines.
fn folded(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        if lines.last().is_some_and(|line| !line.is_empty() && line.len() + word.len() > WIDTH) {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join("\n")
}

/// The cluster as a table for people.
pub fn table(status: &Status) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "node",
        "group",
        "role",
        "state",
        "term",
        "last tid",
        "lag",
        "address",
        "read-only",
        "peer",
    ]);
    for node in &status.nodes {
        let role = if node.voter { node.role.clone() } else { format!("{} (no vote)", node.role) };
        let tids: Vec<String> = match node.last_tid.len() {
            1 => node.last_tid.values().cloned().collect(),
            _ => node.last_tid.iter().map(|(name, tid)| format!("{name}: {tid}")).collect(),
        };
        let lag = match node.lag_seconds {
            Some(seconds) if node.state != "down" => format!("{seconds:.1} s"),
            _ => "?".into(),
        };
        table.add_row([
            node.node.clone(),
            node.group.clone(),
            role,
            state(node).join("\n"),
            status.term.to_string(),
            tids.join("\n"),
            lag,
            node.address.clone(),
            node.read_only_address.clone(),
            node.peer_address.clone(),
        ]);
    }
    format!("{}\n{table}", headline(status))
}

/// What a node does, and what is wrong with it: each in a line of its own.
fn state(node: &NodeStatus) -> Vec<String> {
    let mut lines = vec![node.state.clone()];
    if let Some(seconds) = node.stale_seconds.filter(|seconds| *seconds >= STALE)
        && node.state != "down"
    {
        lines.push(format!("may be {seconds:.0} s old"));
    }
    if let Some(catch_up) = &node.catch_up {
        let percent = catch_up.bytes * 100 / catch_up.total_bytes.max(catch_up.bytes).max(1);
        let rate = catch_up.bytes as f64 / catch_up.seconds.max(0.001) / 1e6;
        let each = catch_up.transactions as f64 / catch_up.seconds.max(0.001);
        lines.push(format!("{percent} %, {rate:.1} MB/s\n{each:.0} transactions/s"));
    }
    let said = |lines: &mut Vec<String>, is_so: bool, line: &str| {
        lines.extend(is_so.then(|| line.to_owned()));
    };
    said(&mut lines, node.no_room.is_some(), "disk nearly full");
    let (held, limit) = node.client_memory;
    if held > limit / 2 {
        lines.push(format!("clients hold {} of {} MB of memory", held >> 20, limit >> 20));
    }
    said(&mut lines, node.slow_disk, "disk slow");
    said(&mut lines, node.no_lease, "no lease: a majority answers too late (profile wan?)");
    if let Some(seconds) = node.future_seconds {
        lines.push(format!("the last commit is {seconds} s\nin the future"));
    }
    lines.extend(node.clock_ahead_seconds.map(|ahead| format!("clock off by {ahead} s")));
    let lost: u64 = node.lost.iter().map(|tail| tail.transactions).sum();
    if lost > 0 {
        lines.push(format!("keeps {lost} lost\ntransactions"));
    }
    let damage = node.damage.iter().chain(&node.stopped).chain(&node.waits).chain(&node.held_vote);
    lines.extend(damage.map(|text| folded(text)));
    said(&mut lines, node.flapping, "flapping");
    said(&mut lines, node.crashes, "crashes");
    let differs = node.differs.iter();
    lines.extend(differs.map(|(name, tid)| format!("differs in storage {name}\nfrom {tid} on")));
    lines.extend(node.packing.values().map(|percent| format!("packing {percent} %")));
    lines.extend(node.backfilling.values().map(|percent| format!("backfilling {percent} %")));
    let holes = node.holes.values().flatten();
    lines.extend(holes.map(|hole| format!("no history from\n{}\nto {}", hole.from, hole.to)));
    lines
}

/// What is true of the cluster as a whole.
fn headline(status: &Status) -> String {
    let primary = status.primary.as_deref().unwrap_or("none");
    let timeline = match status.timeline {
        1 => String::new(),
        number => format!(", timeline {number}"),
    };
    let groups = match status.failover_groups.is_empty() {
        true => String::new(),
        false => format!(", fail-over in {}", status.failover_groups.join(", ")),
    };
    let advice = advice(status);
    let mut lines =
        vec![format!("cluster {}{timeline}{groups}, primary {primary}, {advice}", status.cluster)];
    let moving = status.moving_to.as_ref();
    lines.extend(moving.map(|to| format!("the primary is being moved to group {to}")));
    lines.extend(status.diverged.keys().map(|node| {
        format!("{node} has gone on by itself, on another timeline: standby lineage show")
    }));
    let refused = status.not_let_in.iter();
    lines
        .extend(refused.map(|(node, reason)| format!("{node} is there, and not let in: {reason}")));
    lines.join("\n")
}

/// How many failures the cluster survives, or what to do.
fn advice(status: &Status) -> String {
    let (voters, alive, majority) = status.voters();
    if status.primary.is_none() {
        "no primary: writes wait until a majority of the voters is there (if it is lost for good: \
         standby promote, standby recover-quorum)"
            .to_owned()
    } else if voters < 3 {
        "no fault tolerance: with fewer than three voters, writes stop when one is lost; a witness \
         is enough (standby node add NAME --witness)"
            .to_owned()
    } else if alive < majority {
        format!(
            "only {alive} of {voters} voters are up, level and have room: writes stop, or have \
            stopped"
        )
    } else if alive == majority {
        "the next failure stops writes".to_owned()
    } else {
        format!("{} more failure(s) can be survived", alive - majority)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_matters() {
        let json = r#"{"cluster":"c","timeline":1,"term":4,"primary":"n1","nodes":[
            {"node":"n1","group":"g","role":"primary","voter":true,"state":"up","last_tid":{"1":"00"},
             "applied_index":5,"lag_seconds":0.0,"address":"h:1","read_only_address":"","peer_address":"h:2",
             "admin_address":"","version":"0.1.0","packing":{"1":42},
             "holes":{"1":[{"after":"00","through":"01","from":"yesterday","to":"today"}]}},
            {"node":"n2","group":"g","role":"replica","voter":true,"state":"down","last_tid":{},
             "applied_index":0,"lag_seconds":null,"address":"","read_only_address":"","peer_address":"",
             "admin_address":"","version":""}]}"#;
        let status: Status = serde_json::from_str(json).unwrap();
        let text = table(&status);
        assert!(text.contains("cluster c, primary n1, no fault tolerance"), "{text}");
        assert!(text.contains("n2") && text.contains("down"), "{text}");
        assert!(text.contains("packing 42 %"), "{text}");
        assert!(text.contains("no history from") && text.contains("to today"), "{text}");
    }
}
