//! From what is on disk to a node that can run.
//!
//! ```text
//!  state directory   <standby>                       the node
//!  ───────────────   ─────────────────────────────   ─────────────────────────────────────────────
//!  has a checkpoint  any                             resumes: the data files count up to the
//!                                                    checkpoint; the log says what comes after
//!  log is damaged    a majority without it           puts it aside and joins anew, with the data file up to
//!                                                    the checkpoint (`damaged_log.rs`)
//!  has an order to   any                             keeps what only its own timeline has, then resumes
//!  rejoin                                            with what the other one has too (`change_timeline.rs`)
//!  new               none                            bootstraps a cluster of one
//!  new               the only member                 bootstraps the cluster
//!  new               otherwise                       joins: empty, or with a data file that must be
//!                                                    the beginning of the cluster's history
//!  `founds`          first member                    bootstraps the cluster: a majority of the members has
//!                                                    promised itself (`bootstrap.rs`)
//!  `rolled-back`     a majority without it           as with a damaged log: what it had promised is lost
//! ```

mod begin;
pub mod change_timeline;
mod damaged_log;
#[cfg(test)]
mod ground;
pub mod open;
pub mod prepared;
mod resume;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use standby_config::Config;
use standby_consensus::Member;
use standby_filestorage::{LostBlock, StorageError};
use standby_logging::error_text::with_causes;
use standby_types::disk::File;
use standby_types::hex::hex;
use standby_types::{Disk, NodeId};

use crate::lineage::Relation;
use crate::start::begin::begin;
use crate::start::damaged_log::LostLog;
use crate::start::prepared::{Beginning, Prepared, Repairers};
use crate::start::resume::resume;
use crate::state_dir::{DamagedFile, Identity, Note, StateDir};

/// The operating system's number for an error of a device (`EIO`).
const EIO: i32 = 5;

/// What a node takes from its machine when it begins, beside its files.
#[derive(Clone, Copy)]
pub struct Platform {
    /// The time of day, since 1970.
    pub wall_clock: fn() -> Duration,
    /// Fills a buffer with random bytes.
    pub fill_random: fn(&mut [u8]) -> io::Result<()>,
    /// Makes a file in a directory that is gone when it is closed.
    pub temporary_file: fn(&Path) -> io::Result<Arc<dyn File>>,
}

impl Platform {
    /// A random hexadecimal string of `bytes` bytes; never all zeros.
    pub fn random_hex(&self, bytes: usize) -> anyhow::Result<String> {
        let mut random = vec![0; bytes];
        (self.fill_random)(&mut random)?;
        if random.iter().all(|byte| *byte == 0) {
            bail!("the system's randomness is broken: it gives zeros only");
        }
        Ok(hex(&random))
    }
}

/// Where a node begins.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// What its `zeo.conf` says.
    pub config: &'a Config,
    /// Where its files are.
    pub disk: &'a Arc<dyn Disk>,
    /// Its state directory.
    pub state: &'a StateDir,
    /// Who repairs damaged blocks of its data files.
    pub repairers: &'a Repairers,
    /// The rest of its machine.
    pub platform: Platform,
}

/// Opens everything. `beginning` matters only for a new node.
pub fn prepare(place: &Place<'_>, beginning: Beginning) -> anyhow::Result<Prepared> {
    let Place { disk, state, .. } = *place;
    let bootstraps = state.note(&**disk, Note::Bootstraps)?.is_some();
    match (state.identity(&**disk)?, state.checkpoint(&**disk)?) {
        (Some(identity), Some(checkpoint)) if bootstraps && checkpoint.is_blank() => {
            begin(place, Some(identity), Beginning::Bootstrap)
        }
        (Some(mut identity), Some(mut checkpoint)) => {
            state.end_note(&**disk, Note::Bootstraps)?;
            if let Some(reason) = state.note(&**disk, Note::RolledBack)? {
                let lost = LostLog::because(reason);
                // A node that knows no members is none of them. Perhaps it has begun anew, and was
                // interrupted: one more identity does no harm.
                let begin_anew = match checkpoint.membership.members.is_empty() {
                    true => damaged_log::leave_log,
                    false => damaged_log::begin_anew,
                };
                (identity, checkpoint) = begin_anew(place, &identity, checkpoint, &lost)?;
                state.end_note(&**disk, Note::RolledBack)?;
            }
            let Some(lineage) = state.rejoining(&**disk)? else {
                let error = match resume(place, &identity, checkpoint.clone(), false) {
                    Err(error) => error,
                    prepared => return prepared,
                };
                let lost = error.downcast::<LostLog>()?;
                let (identity, checkpoint) =
                    damaged_log::begin_anew(place, &identity, checkpoint, &lost)?;
                return resume(place, &identity, checkpoint, false);
            };
            // Another promotion may have come before this node had rejoined on the last one.
            if checkpoint.has_left() {
                change_timeline::cut(place, &checkpoint)?;
            }
            let own = &checkpoint.settings.lineage;
            if own.relation(&lineage) != Relation::Same {
                let cuts = checkpoint.has_left();
                // What is lost may be what only the former timeline has: nothing is thrown away.
                let prepared = resume(place, &identity, checkpoint, cuts).map_err(|error| {
                    match error.downcast::<LostLog>() {
                        Ok(lost) => anyhow!(
                            "{lost}. This node is to rejoin on the others' timeline, and cannot \
                             say what only its own has. {}",
                            damaged_log::advice(state)
                        ),
                        Err(error) => error,
                    }
                })?;
                change_timeline::leave(place, prepared, &lineage)?;
            }
            let checkpoint = state.checkpoint(&**disk)?.context("the checkpoint is gone")?;
            change_timeline::cut(place, &checkpoint)?;
            let prepared = resume(place, &identity, checkpoint, true)?;
            state.end_rejoining(&**disk)?;
            Ok(prepared)
        }
        (identity, _) => begin(place, identity, beginning),
    }
}

/// Says what a person can do about a file that a start must read and cannot: what has no checksum,
/// or is needed before the other nodes can be asked, is not repaired.
pub fn explain(error: anyhow::Error, config: &Config) -> anyhow::Error {
    let state = StateDir(config.state_dir());
    let io_errors = || error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    let eio = Some(EIO);
    let lost_block = io_errors().any(LostBlock::is_cause);
    let in_state = error.chain().any(|cause| cause.is::<DamagedFile>());
    let in_data = error
        .chain()
        .any(|cause| matches!(cause.downcast_ref(), Some(StorageError::Damaged { .. })));
    if !in_state && !in_data && !lost_block && !io_errors().any(|e| e.raw_os_error() == eio) {
        return error;
    }
    let advice = match &config.standby {
        Some(_) if lost_block => format!(
            "Start the other nodes first: this one asks them for these bytes. If they do not have \
            them: {}",
            damaged_log::advice(&state)
        ),
        Some(_) => damaged_log::advice(&state),
        None if in_state => damaged_log::advice_to_one_alone(&state),
        None => "Restore the file from a backup, or get out of it what can be read, with \
                 python -m ZODB.fsrecover"
            .to_owned(),
    };
    anyhow!("{}. {advice}", with_causes(&error))
}

fn check_identity(place: &Place<'_>, identity: &Identity) -> anyhow::Result<()> {
    let Place { config, state, .. } = *place;
    let Some(standby) = &config.standby else { return Ok(()) };
    if identity.node != standby.node || identity.cluster != standby.cluster {
        bail!(
            "{} belongs to node {} of cluster {}, not to node {} of cluster {}: each node needs a \
             state-dir of its own",
            state.0.display(),
            identity.node,
            identity.cluster,
            standby.node,
            standby.cluster
        );
    }
    Ok(())
}

/// This node as the others will know it.
pub fn self_as_member(config: &Config, id: NodeId) -> Member {
    match &config.standby {
        Some(standby) => Member {
            id,
            name: standby.node.clone(),
            group: standby.group.clone(),
            peer_address: standby.peer_address.to_string(),
            witness: standby.witness,
        },
        None => Member {
            id,
            name: "alone".into(),
            group: "alone".into(),
            peer_address: String::new(),
            witness: false,
        },
    }
}

#[cfg(test)]
mod tests;
