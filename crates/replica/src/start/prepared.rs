//! A node before its threads run.

use std::collections::BTreeMap;

use standby_consensus::{LogWriter, Recovered};
use standby_filestorage::{BlobDir, FileStorage, Repair};
use standby_types::NodeId;

use crate::state_dir::Checkpoint;

/// What a new node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// Bootstraps a cluster from its data files.
    Bootstrap,
    /// Waits for a cluster to take it in.
    Join,
}

/// A node before its threads run.
pub struct Prepared {
    /// Who it is.
    pub id: NodeId,
    /// Where it stands.
    pub checkpoint: Checkpoint,
    /// Its storages, open, at the checkpoint's marks.
    pub storages: BTreeMap<String, FileStorage>,
    /// The directories of their blobs.
    pub blobs: BTreeMap<String, BlobDir>,
    /// What the log holds.
    pub recovered: Recovered,
    /// The log, open for appending.
    pub writer: LogWriter,
    /// The data files were not written by this node: a peer must confirm that they are the
    /// beginning of the cluster's history.
    pub unconfirmed: bool,
}

/// Who repairs damaged blocks of each storage.
pub type Repairers = BTreeMap<String, Repair>;
