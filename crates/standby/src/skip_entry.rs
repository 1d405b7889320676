//! `standby skip-entry`: the last resort for an entry of the log that no node can apply.

use std::io;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use standby_config::Config;
use standby_disk::{LockFile, OsDisk};
use standby_replica::state_dir::StateDir;
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
    let state = StateDir(config.state_dir());
    if state.identity(&OsDisk)?.is_none() {
        bail!("{} is no state-dir of a node", state.0.display());
    }
    let locks = config.storages.iter().map(|storage| LockFile::take(&storage.path));
    let _locks = locks.collect::<io::Result<Vec<_>>>().context("stop the node first")?;
    let path = state.skip(&OsDisk, LogIndex(*index), Term(*term))?;
    println!(
        "when this node starts, entry {index} of term {term} is left out if it cannot be applied; \
         that stands in {}. Do the same on every other node before you start them.",
        path.display()
    );
    Ok(())
}
