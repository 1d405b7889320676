//! What a node has lost by leaving a timeline, and keeps in files of its own.
//!
//! ```text
//! DIR/lost-<timeline>-<tid>.fs      beside the data file: the transactions that were given up, the last of which
//!                                   is <tid>; a data file that Python's FileStorage opens
//! DIR/lost-<timeline>-<tid>.blobs/  their blobs
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use standby_config::{Config, StorageSection};
use standby_filestorage::{Extent, FileStorage, Magic, Reader, StorageError};
use standby_types::disk::parent;
use standby_types::time::utc;
use standby_types::{Disk, Oid, Tid};
use tracing::warn;

/// What a node has lost by leaving a timeline.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub struct LostTail {
    /// The file that keeps it.
    pub file: PathBuf,
    pub storage: String,
    /// The number of the timeline that was left.
    pub timeline: u64,
    /// How many transactions it is.
    pub transactions: u64,
    pub first: String,
    pub last: String,
    /// The same as times for people.
    pub from: String,
    /// See `from`.
    pub to: String,
    /// Who committed them.
    pub users: Vec<String>,
    /// How many objects they changed.
    pub objects: u64,
    /// The directory of their blobs, if they have any.
    pub blobs: Option<PathBuf>,
}

impl LostTail {
    /// Reads what a file keeps.
    pub fn read(
        disk: &Arc<dyn Disk>,
        file: &Path,
        storage: &str,
        timeline: u64,
    ) -> Result<LostTail, StorageError> {
        let mut tail = LostTail {
            file: file.to_owned(),
            storage: storage.to_owned(),
            timeline,
            blobs: Some(blobs_of(file))
                .filter(|dir| disk.list(dir).is_ok_and(|found| !found.is_empty())),
            ..LostTail::default()
        };
        let (mut users, mut objects) = (BTreeSet::new(), BTreeSet::<Oid>::new());
        let reader = open_lost(disk, file)?;
        let mut transactions = reader.transactions(Tid::NONE, Tid::MAX)?;
        while let Some(stored) = transactions.advance()? {
            let (tid, time) = (stored.meta.tid.to_string(), utc(stored.meta.tid));
            if tail.transactions == 0 {
                (tail.first, tail.from) = (tid.clone(), time.clone());
            }
            (tail.last, tail.to) = (tid, time);
            tail.transactions += 1;
            users.insert(String::from_utf8_lossy(&stored.meta.user).into_owned());
            objects.extend(reader.records_of(&stored)?.into_iter().map(|(oid, _)| oid));
        }
        tail.objects = objects.len() as u64;
        tail.users = users.into_iter().filter(|user| !user.is_empty()).collect();
        Ok(tail)
    }
}

/// A reader of a file that keeps lost transactions.
pub fn open_lost(disk: &Arc<dyn Disk>, file: &Path) -> Result<Reader, StorageError> {
    if !disk.exists(file).unwrap_or(true) {
        // It would be made otherwise.
        let (path, source) = (file.to_owned(), std::io::ErrorKind::NotFound.into());
        return Err(StorageError::Io { path, action: "open", source });
    }
    // It is read from its beginning to its end: no index of it is kept.
    let index = file.with_extension("no-index");
    let opened =
        FileStorage::open(disk.clone(), file, &index, Magic::Fs30, Extent::Whole, &mut |_, _| ());
    Ok(opened?.0.reader())
}

/// What lies beside the data files of what was lost.
pub fn lost_tails(config: &Config, disk: &Arc<dyn Disk>) -> anyhow::Result<Vec<LostTail>> {
    let mut tails = Vec::new();
    for section in &config.storages {
        let suffix = suffix_of(config, section);
        for path in disk.list(parent(&section.path))? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let inner = name.strip_prefix("lost-").and_then(|rest| rest.strip_suffix(".fs"));
            let Some(inner) = inner.and_then(|inner| inner.strip_suffix(suffix.as_str())) else {
                continue;
            };
            let Some((timeline, tid)) = inner.split_once('-') else { continue };
            if let (Ok(timeline), Ok(_)) = (timeline.parse(), u64::from_str_radix(tid, 16)) {
                match LostTail::read(disk, &path, &section.name, timeline) {
                    Ok(tail) => tails.push(tail),
                    // It is looked at by people only: the node can do without.
                    Err(error) => warn!(%error, "cannot read a file of lost transactions"),
                }
            }
        }
    }
    Ok(tails)
}

/// Tells the files of storages apart whose data files are in one directory.
fn suffix_of(config: &Config, section: &StorageSection) -> String {
    let dir = parent(&section.path);
    match config.storages.iter().filter(|other| parent(&other.path) == dir).count() {
        1 => String::new(),
        _ => format!("-{}", section.name),
    }
}

/// Where the transactions that a storage has lost by leaving a timeline are kept.
pub fn lost_path(config: &Config, section: &StorageSection, timeline: u64, last: Tid) -> PathBuf {
    let suffix = suffix_of(config, section);
    parent(&section.path).join(format!("lost-{timeline}-{last}{suffix}.fs"))
}

/// Where the blobs of lost transactions are kept.
pub fn blobs_of(file: &Path) -> PathBuf {
    file.with_extension("blobs")
}
