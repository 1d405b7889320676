//! `standby skip-entry`: the last resort for an entry of the log that no node can apply.

use std::path::PathBuf;

use clap::Args;
use standby_node::config::Config;
use standby_types::{LogIndex, Term};

/// `standby skip-entry`
#[derive(Args)]
pub struct SkipEntry {
    /// The configuration of the node.
    #[arg(short = 'C', long = "config", value_name = "FILE")]
    config: PathBuf,
    /// The entry, as the error names it.
    #[arg(long, value_name = "INDEX")]
    index: u64,
    /// Its term, as the error names it.
    #[arg(long, value_name = "TERM")]
    term: u64,
}

pub fn run(options: &SkipEntry) -> anyhow::Result<()> {
    let SkipEntry { config, index, term } = options;
    let config = Config::read(config)?;
    let path =
        standby_node::replica::state_dir::skip_entry(&config, LogIndex(*index), Term(*term))?;
    println!(
        "when this node starts, entry {index} of term {term} is left out if it cannot be applied; \
         that stands in {}. Do the same on every other node before you start them.",
        path.display()
    );
    Ok(())
}
