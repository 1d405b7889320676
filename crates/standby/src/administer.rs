//! `standby switchover | node | group | feature-level`

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use standby_node::{NodeStatus, Status, ask, fetch_status};
use standby_primary::command::{Ask, Done};

use crate::status::At;

/// `standby switchover`
#[derive(Args)]
pub struct Switchover {
    #[command(flatten)]
    at: At,
    /// The node that is to be primary; without it, the voter that is best placed.
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
    /// Seconds for which uploads, and transactions that have voted, are waited for. Those that take
    /// longer are aborted, and their clients try again.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    grace: f64,
}

/// `standby node`
#[derive(Subcommand)]
pub enum Node {
    /// Lets a new node join: prints a token, and what to write into its configuration.
    ///
    /// The node is started with that configuration and an empty disk. It gets everything from the
    /// others while commits go on; if its group is a fail-over group, it then gets a vote.
    #[command(verbatim_doc_comment)]
    Add {
        #[command(flatten)]
        at: At,
        /// The name of the new node.
        node: String,
        /// Its group; without it, that of the primary.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
        /// It votes, but holds no data and never becomes primary: a small machine in a third place
        /// lets two data nodes survive the loss of either.
        #[arg(long)]
        witness: bool,
    },
    /// Lets another machine take a member's name and place, also if that one is still up.
    Replace {
        #[command(flatten)]
        at: At,
        /// The member.
        node: String,
        /// The group of the new machine; without it, that of the member.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
    },
    /// Fills the holes that fast recoveries ("recovery fast") left in a node's history.
    ///
    /// What lies in a hole can neither be undone nor looked at on that node. Readers and commits go
    /// on meanwhile. If this command is interrupted, the node goes on with it.
    #[command(verbatim_doc_comment)]
    Backfill {
        #[command(flatten)]
        at: At,
        /// The node.
        node: String,
    },
    /// Ends a node's membership. Refused if too few voters would be left.
    Remove {
        #[command(flatten)]
        at: At,
        /// The node.
        node: String,
        /// Also if writes stop, or fewer failures can be survived.
        #[arg(long)]
        force: bool,
    },
}

/// `standby group`
#[derive(Subcommand)]
pub enum Group {
    /// Gives the nodes of a group votes, or takes them away.
    ///
    /// Nodes of a group with "--failover on" vote, and one of them becomes primary by itself when
    /// the primary is lost. Those of other groups only follow and serve readers.
    #[command(verbatim_doc_comment)]
    Set {
        #[command(flatten)]
        at: At,
        /// The group.
        group: String,
        /// Whether its nodes vote.
        #[arg(long, value_name = "on|off", value_parser = on_or_off, action = clap::ArgAction::Set)]
        failover: bool,
        /// Also if writes stop, or fewer failures can be survived.
        #[arg(long)]
        force: bool,
    },
    /// Makes a group the fail-over group and moves the primary there; commits go on.
    ///
    /// Its nodes get votes, one of them becomes primary, and the other groups lose their votes. If
    /// this command is interrupted, the move goes on; to turn back, move to the former group.
    #[command(verbatim_doc_comment)]
    Move {
        #[command(flatten)]
        at: At,
        /// The group.
        #[arg(long, value_name = "GROUP")]
        to: String,
    },
}

/// `standby feature-level`
#[derive(Subcommand)]
pub enum FeatureLevel {
    /// Shows the level.
    Show {
        #[command(flatten)]
        at: At,
    },
    /// Lets the cluster use what newer versions can do. It cannot be taken back.
    Raise {
        #[command(flatten)]
        at: At,
        /// The level; without it, the highest that all nodes know.
        #[arg(long)]
        to: Option<u32>,
    },
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}

/// How often a long change is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a node may be unreachable meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn switchover(options: Switchover) -> anyhow::Result<()> {
    let Switchover { at, to, grace } = options;
    if !(0.0..=60.0).contains(&grace) {
        bail!("--grace {grace}: 0 to 60 seconds are possible");
    }
    done(&at, Ask::Switchover { to, grace }).await.map(|done| println!("{}", done.text))
}

pub async fn node(command: Node) -> anyhow::Result<()> {
    match command {
        Node::Add { at, node, group, witness } => {
            let ask = Ask::NodeAdd { node: node.clone(), group, witness, replaces: false };
            invite(&at, &node, ask).await
        }
        Node::Replace { at, node, group } => {
            let ask = Ask::NodeAdd { node: node.clone(), group, witness: false, replaces: true };
            invite(&at, &node, ask).await
        }
        Node::Backfill { at, node } => {
            let before = fetch_status(&at.address()?).await?;
            let whole = |n: &NodeStatus| n.node == node && n.holes.is_empty();
            let done = done(&at, Ask::Backfill { node: node.clone() }).await?;
            println!("{}", done.text);
            match before.nodes.iter().any(whole) {
                true => Ok(()),
                false => follow_backfill(&at.address()?, &node).await,
            }
        }
        Node::Remove { at, node, force } => {
            let done = done(&at, Ask::NodeRemove { node, force }).await?;
            println!("{}", done.text);
            Ok(())
        }
    }
}

async fn invite(at: &At, node: &str, ask: Ask) -> anyhow::Result<()> {
    let done = done(at, ask).await?;
    let status = fetch_status(&at.address()?).await?;
    let peer = status.nodes.iter().find(|n| Some(&n.node) == status.primary.as_ref());
    let peer = peer.map_or("HOST:PORT", |n| n.peer_address.as_str());
    println!(
        "{}. In the <standby> section of its configuration, instead of member lines:\n\n  \
         cluster     {}\n  node        {node}\n  join        {peer}\n  join-token  {}\n\n\
         with the same secret-file as the other nodes, if they have one.",
        done.text,
        status.cluster,
        done.token.as_deref().unwrap_or("?"),
    );
    Ok(())
}

pub async fn group(command: Group) -> anyhow::Result<()> {
    match command {
        Group::Set { at, group, failover, force } => {
            let done = done(&at, Ask::GroupSet { group, failover, force }).await?;
            println!("{}", done.text);
            Ok(())
        }
        Group::Move { at, to } => {
            let done = done(&at, Ask::GroupMove { to: to.clone() }).await?;
            println!("{}", done.text);
            follow_move(&at.address()?, &to).await
        }
    }
}

/// Shows how far the history of a node is, until it is whole.
async fn follow_backfill(address: &str, node: &str) -> anyhow::Result<()> {
    let mut shown = None;
    let mut seen = Instant::now();
    loop {
        let status = fetch_status(address).await;
        let found = status.map(|status| status.nodes.into_iter().find(|n| n.node == node));
        match found {
            Ok(Some(found)) if found.state != "down" => {
                if found.holes.is_empty() {
                    println!("done: {node} has the whole history");
                    return Ok(());
                }
                // It waits for a pack; otherwise it is being done, or has failed.
                if !found.backfilling.is_empty() || !found.packing.is_empty() {
                    seen = Instant::now();
                }
                let percent = found.backfilling.values().min().copied();
                if percent.is_some() && percent != shown {
                    println!("{} %", percent.unwrap_or_default());
                    shown = percent;
                }
                if seen.elapsed() > PATIENCE / 6 {
                    bail!("the history could not be completed; the log of {node} says why");
                }
            }
            other if seen.elapsed() > PATIENCE => {
                other?;
                bail!("{node} is down; when it is back, it goes on");
            }
            _ => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Shows how a move goes on until it is done.
async fn follow_move(address: &str, to: &str) -> anyhow::Result<()> {
    let mut shown = String::new();
    let mut seen = Instant::now();
    loop {
        match fetch_status(address).await {
            Ok(status) => {
                seen = Instant::now();
                if status.moving_to.as_deref() != Some(to) && is_in(&status, to) {
                    println!("done: {} is primary", status.primary.unwrap_or_default());
                    return Ok(());
                }
                if status.moving_to.is_some_and(|other| other != to) {
                    bail!("another move has taken the place of this one");
                }
                let voting: Vec<String> = (status.nodes.iter())
                    .filter(|node| node.group == to && node.role != "witness")
                    .map(|node| {
                        let vote = if node.voter { "votes" } else { "no vote yet" };
                        format!("{} {}, {vote}", node.node, node.state)
                    })
                    .collect();
                let primary = status.primary.as_deref().unwrap_or("none");
                let now = format!("primary {primary}; {}", voting.join("; "));
                if now != shown {
                    println!("{now}");
                    shown = now;
                }
            }
            Err(error) if seen.elapsed() > PATIENCE => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// True if the primary and all votes for data are in the group.
fn is_in(status: &Status, group: &str) -> bool {
    let voters = status.nodes.iter().filter(|node| node.voter && node.role != "witness");
    status.failover_groups.iter().eq([group])
        && status.nodes.iter().any(|n| Some(&n.node) == status.primary.as_ref() && n.group == group)
        && voters.into_iter().all(|node| node.group == group)
}

pub async fn feature_level(command: FeatureLevel) -> anyhow::Result<()> {
    match command {
        FeatureLevel::Show { at } => {
            println!("{}", fetch_status(&at.address()?).await?.feature_level);
        }
        FeatureLevel::Raise { at, to } => {
            println!("{}", done(&at, Ask::FeatureLevel { level: to }).await?.text);
        }
    }
    Ok(())
}

pub async fn done(at: &At, what: Ask) -> anyhow::Result<Done> {
    let address = at.address()?;
    let started = Instant::now();
    let mut asking = std::pin::pin!(ask(&address, &what));
    loop {
        tokio::select! {
            answer = &mut asking => {
                if started.elapsed() > Duration::from_secs(1) && std::io::stderr().is_terminal() {
                    eprintln!();
                }
                return answer?.map_err(anyhow::Error::msg).context("refused");
            }
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                if std::io::stderr().is_terminal() {
                    eprint!("\rwaiting, {} s ", started.elapsed().as_secs());
                }
            }
        }
    }
}
