//! `standby promote | recover-quorum | lost | lineage`: what is done after a place, or a majority,
//! is lost for good.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use serde_json::json;
use standby_config::Config;
use standby_disk::OsDisk;
use standby_node::{NodeStatus, Status, fetch_status};
use standby_primary::command::Ask;
use standby_replica::lineage::Fork;
use standby_replica::lost_transactions::{LostTail, blobs_of, open_lost};
use standby_replica::start::change_timeline::{accept, describe_fork};
use standby_replica::state_dir::StateDir;
use standby_types::time::{tid_at, time_of, utc};
use standby_types::{Disk, Oid, Tid};

use crate::administer::done;
use crate::status::At;

/// `standby promote`
#[derive(Args)]
pub struct Promote {
    #[command(flatten)]
    at: At,
    /// The group that is to go on.
    #[arg(long, value_name = "GROUP")]
    group: String,
    /// Commits that have not reached the group may be lost.
    #[arg(long)]
    force: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// `standby recover-quorum`
#[derive(Args)]
pub struct RecoverQuorum {
    #[command(flatten)]
    at: At,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// `standby lost`
#[derive(Subcommand)]
pub enum Lost {
    /// Shows what nodes have lost by leaving a timeline, and the files that keep it.
    List {
        #[command(flatten)]
        at: At,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Copies a file of lost transactions and its blobs, with a list of what is in it.
    ///
    /// To be run on the machine where the file is. DIR gets NAME.fs, which Python's FileStorage
    /// opens (NAME.blobs is its blob_dir), and transactions.json.
    #[command(verbatim_doc_comment)]
    Export {
        /// The file; standby lost list shows it.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// A directory, which is made.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
}

/// `standby lineage`
#[derive(Subcommand)]
pub enum LineageOf {
    /// Shows the forced promotions so far, and nodes that have gone on by themselves.
    Show {
        #[command(flatten)]
        at: At,
    },
    /// After two forced promotions: this node is to belong to the timeline with that name.
    ///
    /// To be run for each node of the timeline that is given up, while it is stopped or before it
    /// is started again. What only that timeline has is kept in a file (standby lost list).
    #[command(verbatim_doc_comment)]
    Accept {
        /// The name; standby lineage show tells it.
        name: String,
        /// The configuration of the node.
        #[arg(short = 'C', long = "config", value_name = "FILE")]
        config: PathBuf,
    },
}

pub async fn promote(options: Promote) -> anyhow::Result<()> {
    let Promote { at, group, force, yes } = options;
    let status = fetch_status(&at.address()?).await?;
    if !force {
        bail!(
            "this is for a primary that is lost with its whole group: commits may be lost, and \
             --force says that you know. While the primary is there: standby group move --to \
             {group}"
        );
    }
    let counts = |node: &NodeStatus| node.group == group;
    let node = plan(&status, &group, counts)?;
    confirm(&group, yes)?;
    let done = done(&at, Ask::Promote { node, group: Some(group) }).await?;
    println!("{}", done.text);
    Ok(())
}

pub async fn recover_quorum(options: RecoverQuorum) -> anyhow::Result<()> {
    let RecoverQuorum { at, yes } = options;
    let status = fetch_status(&at.address()?).await?;
    let counts = |node: &NodeStatus| status.failover_groups.contains(&node.group);
    let node = plan(&status, "that votes", counts)?;
    confirm(&status.cluster, yes)?;
    let done = done(&at, Ask::Promote { node, group: None }).await?;
    println!("{}", done.text);
    Ok(())
}

/// The node that would be promoted; shows what may be lost.
fn plan(
    status: &Status,
    group: &str,
    counts: impl Fn(&NodeStatus) -> bool,
) -> anyhow::Result<String> {
    if let Some(primary) = &status.primary {
        bail!(
            "{primary} is primary: nothing needs to be forced (standby switchover, standby group \
            move)"
        );
    }
    let holds_data = |node: &&NodeStatus| node.role != "witness";
    let mut there: Vec<_> = (status.nodes.iter().filter(holds_data))
        .filter(|node| counts(node) && node.state != "down")
        .collect();
    there.sort_by_key(|node| std::cmp::Reverse(node.log));
    let Some(best) = there.first() else {
        bail!("no node of group {group} is there; standby status shows the groups");
    };
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["node", "group", "state", "last heard", "its last transaction then"]);
    for node in status.nodes.iter().filter(holds_data) {
        let heard = match node.heard {
            never if never <= 0.0 => "not since this node started".to_owned(),
            seconds => utc(tid_at(std::time::Duration::from_secs_f64(seconds))),
        };
        let tids: Vec<_> = node.last_tid.values().map(|tid| utc(parse(tid))).collect();
        table.add_row([&node.node, &node.group, &node.state, &heard, &tids.join("\n")]);
    }
    println!("{table}");
    println!("{} would be primary: of the nodes that are there, it has most.", best.node);
    for (storage, tid) in &best.last_tid {
        let others = status.nodes.iter().filter_map(|node| {
            let theirs = parse(node.last_tid.get(storage)?);
            (theirs > parse(tid)).then_some((theirs, &node.node))
        });
        match others.max() {
            Some((last, node)) => {
                let missing = time_of(last).saturating_sub(time_of(parse(tid)));
                println!(
                    "It lacks commits of {:.1} seconds that {node} is known to have in storage \
                    {storage}.",
                    missing.as_secs_f64()
                );
            }
            None => println!("It has all commits of storage {storage} that are known here."),
        }
    }
    println!(
        "Commits that were acknowledged after the lost nodes were last heard are not known here. \
         They are lost until those nodes come back, which then keep them in files (standby lost \
         list) and follow."
    );
    Ok(best.node.clone())
}

fn confirm(word: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        bail!("nobody is there to ask; --yes says that it is meant");
    }
    print!("If the former primary may still be running, stop it first. To go on, type {word}: ");
    io::stdout().flush()?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    match line.trim() == word {
        true => Ok(()),
        false => bail!("nothing was done"),
    }
}

fn parse(tid: &str) -> Tid {
    Tid(u64::from_str_radix(tid, 16).unwrap_or(0))
}

pub async fn lost(command: Lost) -> anyhow::Result<()> {
    match command {
        Lost::List { at, json } => {
            let status = fetch_status(&at.address()?).await?;
            let lost: Vec<(&str, &LostTail)> = (status.nodes.iter())
                .flat_map(|node| node.lost.iter().map(|tail| (node.node.as_str(), tail)))
                .collect();
            let holds_data = |node: &&NodeStatus| node.role != "witness";
            let silent = status.nodes.iter().filter(holds_data).filter(|node| node.state == "down");
            let silent: Vec<_> = silent.map(|node| node.node.as_str()).collect();
            match json {
                true => println!("{}", serde_json::to_string(&lost)?),
                false if lost.is_empty() && silent.is_empty() => {
                    println!("no node has lost anything");
                }
                false if lost.is_empty() => {
                    println!("no node that could be asked has lost anything")
                }
                false => println!("{}", table_of(&lost)),
            }
            if !silent.is_empty() {
                eprintln!(
                    "not asked, for they are down: {}. What they have lost is shown when they are \
                    back",
                    silent.join(", ")
                );
            }
            Ok(())
        }
        Lost::Export { file, to } => export(&file, &to),
    }
}

fn table_of(lost: &[(&str, &LostTail)]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["node", "storage", "timeline", "transactions", "objects", "users", "file"]);
    for (node, tail) in lost {
        table.add_row([
            (*node).to_owned(),
            tail.storage.clone(),
            tail.timeline.to_string(),
            format!("{}\nfrom {}\nto   {}", tail.transactions, tail.from, tail.to),
            tail.objects.to_string(),
            tail.users.join("\n"),
            format!(
                "{}\n{}",
                tail.file.display(),
                if tail.blobs.is_some() { "with blobs" } else { "" }
            ),
        ]);
    }
    table
}

fn export(file: &Path, to: &Path) -> anyhow::Result<()> {
    let name = file.file_name().with_context(|| format!("{} is no file", file.display()))?;
    let reader = open_lost(&(Arc::new(OsDisk) as Arc<dyn Disk>), file)?;
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let copied = to.join(name);
    if copied.exists() {
        bail!("{} is there already", copied.display());
    }
    let blobs = blobs_of(file);
    let blob_dir = blobs_of(&copied);
    if blobs.is_dir() {
        copy_tree(&blobs, &blob_dir)?;
    }
    let mut exported = Vec::new();
    let mut transactions = reader.transactions(Tid::NONE, Tid::MAX)?;
    while let Some(stored) = transactions.advance()? {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let object = |(oid, _): (Oid, _)| {
            let bytes = oid.to_bytes();
            let dir = blob_dir.to_owned();
            let dir = bytes.iter().fold(dir, |dir, byte| dir.join(format!("0x{byte:02x}")));
            let blob = dir.join(format!("0x{}.blob", stored.meta.tid));
            json!({"oid": oid.to_string(), "blob": blob.exists().then_some(blob)})
        };
        let objects: Vec<_> = reader.records_of(&stored)?.into_iter().map(object).collect();
        exported.push(json!({
            "tid": stored.meta.tid.to_string(),
            "time": utc(stored.meta.tid),
            "user": text(&stored.meta.user),
            "description": text(&stored.meta.description),
            "objects": objects,
        }));
    }
    fs::write(to.join("transactions.json"), serde_json::to_vec_pretty(&exported)?)?;
    fs::copy(file, &copied).with_context(|| format!("cannot write {}", copied.display()))?;
    println!("{} transactions, in {}", exported.len(), to.display());
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_tree(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

pub async fn lineage(command: LineageOf) -> anyhow::Result<()> {
    match command {
        LineageOf::Show { at } => {
            let status = fetch_status(&at.address()?).await?;
            println!("this node and those that it works with:");
            show(&status.forks);
            for (node, forks) in &status.diverged {
                println!("\n{node}, which has gone on by itself:");
                show(forks);
            }
            Ok(())
        }
        LineageOf::Accept { name, config } => {
            let file = Config::read(&config)?;
            if file.standby.is_none() {
                bail!(
                    "{} has no <standby> section: a node alone has one timeline",
                    config.display()
                );
            }
            let path = accept(&OsDisk, &StateDir(file.state_dir()), &name)?;
            println!(
                "when this node starts and meets a node of timeline {name}, it rejoins on it; \
                 until then the choice stands in {}",
                path.display()
            );
            Ok(())
        }
    }
}

fn show(forks: &[Fork]) {
    println!("  timeline 1");
    for (number, fork) in (2..).zip(forks) {
        println!("  {}", describe_fork(number, fork));
        for (storage, tid) in fork.ends() {
            println!("    goes on after the transaction {tid} ({}) of storage {storage}", utc(tid));
        }
    }
}
