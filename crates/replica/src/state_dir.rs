//! What a node remembers beside the data: who it is, and its last checkpoint.
//!
//! ```text
//! STATE-DIR/identity      JSON; written once
//! STATE-DIR/checkpoint    JSON, a line feed, its CRC-32C in hexadecimal; replaced atomically
//! STATE-DIR/log/          the replicated log
//! STATE-DIR/NAME.index    the index of storage NAME
//! STATE-DIR/NAME.sums     the checksums of its data file (see `filestorage/src/checksums/blocks.rs`)
//! STATE-DIR/NAME.blobs.sums   the checksums of its blobs (see `filestorage/src/checksums/blobs.rs`)
//! STATE-DIR/promise       JSON: to whose bootstrap this node has promised itself (see `bootstrap.rs`)
//! STATE-DIR/founds        exists from when a majority agrees to this node's bootstrap until it has bootstrapped
//! STATE-DIR/peers         JSON: the peer addresses of the members, as they were last heard of
//! STATE-DIR/superseded    text: why this node does not serve any more (see `Engine::note_other_cluster`)
//! STATE-DIR/rolled-back   text: why this node gives up its vote and joins anew at its next start
//! STATE-DIR/coming-over   JSON: the lineage (see `lineage.rs`) on which the node rejoins at its start
//! STATE-DIR/accepted      the name of a timeline for which this node leaves its own: `standby lineage accept`
//! STATE-DIR/catching-up   JSON: the holes of each storage; exists while transactions come from a peer
//!                         instead of the log
//! ```

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use standby_consensus::{AppliedPoint, Member, Membership};
use standby_filestorage::{Hole, Holes, Job, Mark};
use standby_logging::error_text::with_causes;
use standby_types::disk::{parent, read_all, replace};
use standby_types::hex::{hex, unhex};
use standby_types::{Disk, LogIndex, NodeId, Oid, Position, Term, Tid};
use tracing::warn;

use crate::lineage::Lineage;
use crate::outcomes::Outcomes;
use crate::settings::Settings;

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Drawn at random.
    pub id: String,
    /// The node's name when it was drawn.
    pub node: String,
    /// The cluster's name.
    pub cluster: String,
}

impl Identity {
    /// The id as a number.
    pub fn node_id(&self) -> anyhow::Result<NodeId> {
        Ok(NodeId(parse_hex(&self.id)?))
    }
}

/// What is durable in the data files, and the entry of the log that they stand at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Drawn when the cluster was bootstrapped; empty until this node has joined it.
    pub cluster_id: String,
    /// Entries up to this one are applied.
    pub index: LogIndex,
    /// Its term.
    pub term: Term,
    /// The log begins after `index`: what it holds otherwise is out of date.
    pub log_begins_here: bool,
    /// The members as of that entry.
    pub membership: Membership,
    /// The settings as of that entry.
    pub settings: Settings,
    /// The storages, by name.
    pub storages: BTreeMap<String, StoragePoint>,
    /// Up to where each node has acknowledged the log, as far as this one knows, and the log was
    /// committed: what the node had then, it must always have.
    pub acknowledged: BTreeMap<NodeId, LogIndex>,
}

/// A storage's part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoragePoint {
    /// How far the data file counts.
    pub mark: Mark,
    /// Oids up to this one may have been handed out.
    pub ceiling: Oid,
    /// A packed file is being put in the place of the data file, where the same state ends here.
    pub packed: Option<Mark>,
    /// Packs to do, in order.
    pub packs: Vec<Job>,
    /// What the data file lacks.
    pub holes: Holes,
    /// The holes are to be filled.
    pub backfill: bool,
    /// What has become of transactions with a token.
    pub outcomes: Outcomes,
}

impl StoragePoint {
    /// A data file that is as it was found.
    pub fn of(mark: Mark, ceiling: Oid) -> StoragePoint {
        StoragePoint {
            mark,
            ceiling,
            packed: None,
            packs: Vec::new(),
            holes: Holes::default(),
            backfill: false,
            outcomes: Outcomes::unknown_until(mark.tid),
        }
    }
}

impl Checkpoint {
    /// True if the node has never belonged to a cluster.
    pub fn is_blank(&self) -> bool {
        self.cluster_id.is_empty() && self.index == LogIndex(0)
    }

    /// True if the node has left a timeline, and has nothing of another one's log yet.
    pub fn has_left(&self) -> bool {
        self.index == LogIndex(0) && !self.settings.lineage.forks().is_empty()
    }

    /// The same data, of a node that has nothing of a log and is no member.
    pub fn without_log(self) -> Checkpoint {
        Checkpoint {
            index: LogIndex(0),
            term: Term(0),
            log_begins_here: false,
            membership: Membership::default(),
            acknowledged: BTreeMap::new(),
            ..self
        }
    }

    /// The same as the consensus sees it.
    pub fn applied_point(&self) -> AppliedPoint {
        let ceilings = self.storages.iter().map(|(name, s)| (name.clone(), s.ceiling)).collect();
        AppliedPoint {
            index: self.index,
            term: self.term,
            membership: self.membership.clone(),
            state: encode_shared(&self.cluster_id, &ceilings, &self.settings).into(),
            open_parts: false,
        }
    }
}

/// A file of the state directory that is not what was written.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged: {reason}", path.display())]
pub struct DamagedFile {
    path: PathBuf,
    reason: String,
}

impl DamagedFile {
    fn at<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> DamagedFile {
        move |error| DamagedFile { path: path.to_owned(), reason: error.to_string() }
    }
}

/// To whose bootstrap this node has promised itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// The first member's name.
    pub node: String,
    /// The first member's identity.
    pub id: String,
}

/// The file with the entries that are left out.
const SKIPPED: &str = "skipped-entries";

/// Something that the next start must know. Each is a file with a text for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// A majority of the listed members agrees to this node's bootstrap.
    Bootstraps,
    /// This node's cluster is the younger one of two: it does not serve.
    Superseded,
    /// This node's disk was put back to an earlier state: it gives up its vote and joins anew.
    RolledBack,
}

impl Note {
    fn name(self) -> &'static str {
        match self {
            Note::Bootstraps => "founds",
            Note::Superseded => "superseded",
            Note::RolledBack => "rolled-back",
        }
    }
}

/// Paths in a state directory.
#[derive(Debug, Clone)]
pub struct StateDir(pub PathBuf);

impl StateDir {
    /// Where the log is.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// The index file of a storage.
    pub fn index(&self, storage: &str) -> PathBuf {
        self.0.join(format!("{storage}.index"))
    }

    /// The checksums of a storage's blobs.
    pub fn blob_sums(&self, storage: &str) -> PathBuf {
        self.0.join(format!("{storage}.blobs.sums"))
    }

    /// Exists while transactions come from a peer.
    pub fn catching_up(&self) -> PathBuf {
        self.0.join("catching-up")
    }

    /// Reads who this node is; `None` if it is new.
    pub fn identity(&self, disk: &dyn Disk) -> anyhow::Result<Option<Identity>> {
        self.read_json(disk, "identity")
    }

    /// Writes who this node is.
    pub fn set_identity(&self, disk: &dyn Disk, identity: &Identity) -> anyhow::Result<()> {
        // The log holds what is in the data files.
        disk.create_private_dir(&self.0)?;
        disk.create_dir(&self.log())?;
        let path = self.0.join("identity");
        replace(disk, &path, &serde_json::to_vec_pretty(identity)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads the last checkpoint; `None` if there is none.
    pub fn checkpoint(&self, disk: &dyn Disk) -> anyhow::Result<Option<Checkpoint>> {
        let path = self.0.join("checkpoint");
        if !disk.exists(&path)? {
            return Ok(None);
        }
        let bytes =
            read_all(disk, &path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(decode(&bytes).map_err(DamagedFile::at(&path))?))
    }

    /// Replaces the last checkpoint, durably.
    pub fn set_checkpoint(&self, disk: &dyn Disk, checkpoint: &Checkpoint) -> io::Result<()> {
        replace(disk, &self.0.join("checkpoint"), &encode(checkpoint)?)
    }

    /// To whose bootstrap this node has promised itself, if it has.
    pub fn promise(&self, disk: &dyn Disk) -> anyhow::Result<Option<Promise>> {
        self.read_json(disk, "promise")
    }

    /// Promises durably.
    pub fn set_promise(&self, disk: &dyn Disk, promise: &Promise) -> io::Result<()> {
        replace(disk, &self.0.join("promise"), &serde_json::to_vec_pretty(promise)?)
    }

    /// The peer addresses of the members, as they were last heard of. They only help to find the
    /// others: without them a start goes on.
    pub fn peers(&self, disk: &dyn Disk) -> BTreeSet<String> {
        self.read_json(disk, "peers")
            .unwrap_or_else(|error| {
                warn!("cannot read the addresses of the other nodes: {}", with_causes(&error));
                None
            })
            .unwrap_or_default()
    }

    /// Remembers them.
    pub fn set_peers(&self, disk: &dyn Disk, addresses: &BTreeSet<String>) -> io::Result<()> {
        replace(disk, &self.0.join("peers"), &serde_json::to_vec_pretty(addresses)?)
    }

    fn read_json<T: DeserializeOwned>(
        &self,
        disk: &dyn Disk,
        name: &str,
    ) -> anyhow::Result<Option<T>> {
        let path = self.0.join(name);
        if !disk.exists(&path)? {
            return Ok(None);
        }
        let bytes =
            read_all(disk, &path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(serde_json::from_slice(&bytes).map_err(DamagedFile::at(&path))?))
    }

    /// A note that survives the process; the name is one of [`Note`].
    pub fn note(&self, disk: &dyn Disk, note: Note) -> anyhow::Result<Option<String>> {
        let path = self.0.join(note.name());
        if !disk.exists(&path)? {
            return Ok(None);
        }
        let bytes =
            read_all(disk, &path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Writes a note, durably.
    pub fn set_note(&self, disk: &dyn Disk, note: Note, text: &str) -> io::Result<()> {
        replace(disk, &self.0.join(note.name()), text.as_bytes())
    }

    /// Removes a note, durably.
    pub fn end_note(&self, disk: &dyn Disk, note: Note) -> io::Result<()> {
        remove(disk, &self.0.join(note.name()))
    }

    /// Entries of the log that are left out if they cannot be applied: a line each, an index and a
    /// term.
    pub fn skipped(&self, disk: &dyn Disk) -> anyhow::Result<BTreeSet<(LogIndex, Term)>> {
        let path = self.0.join(SKIPPED);
        if !disk.exists(&path)? {
            return Ok(BTreeSet::new());
        }
        let bytes =
            read_all(disk, &path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes);
        let entry = |line: &str| {
            let (index, term) = line.split_once(' ')?;
            Some((LogIndex(index.parse().ok()?), Term(term.trim().parse().ok()?)))
        };
        let lines = text.lines().map(|line| {
            entry(line)
                .with_context(|| format!("{}: {line:?} is no index and term", path.display()))
        });
        lines.collect()
    }

    /// Adds one of these, durably.
    pub fn skip(&self, disk: &dyn Disk, index: LogIndex, term: Term) -> anyhow::Result<PathBuf> {
        let mut skipped = self.skipped(disk)?;
        skipped.insert((index, term));
        let lines = skipped.iter().map(|(index, term)| format!("{index} {term}\n"));
        let path = self.0.join(SKIPPED);
        replace(disk, &path, lines.collect::<String>().as_bytes())?;
        Ok(path)
    }

    /// Says durably that this node leaves its timeline for another one at its next start.
    pub fn set_rejoining(&self, disk: &dyn Disk, lineage: &Lineage) -> io::Result<()> {
        replace(disk, &self.0.join("coming-over"), &serde_json::to_vec_pretty(lineage)?)
    }

    /// The history that this node is to have instead of its own, if it is to.
    pub fn rejoining(&self, disk: &dyn Disk) -> anyhow::Result<Option<Lineage>> {
        let path = self.0.join("coming-over");
        if !disk.exists(&path)? {
            return Ok(None);
        }
        let lineage = serde_json::from_slice(&read_all(disk, &path)?);
        Ok(Some(lineage.map_err(DamagedFile::at(&path))?))
    }

    /// This node has rejoined.
    pub fn end_rejoining(&self, disk: &dyn Disk) -> io::Result<()> {
        for path in [self.0.join("coming-over"), self.accepted()] {
            remove(disk, &path)?;
        }
        Ok(())
    }

    /// Holds the name of the timeline that an administrator has chosen.
    pub fn accepted(&self) -> PathBuf {
        self.0.join("accepted")
    }

    /// Says durably that transactions come from a peer now, and what they leave out.
    pub fn set_catching_up(
        &self,
        disk: &dyn Disk,
        holes: &BTreeMap<String, Holes>,
    ) -> io::Result<()> {
        let files: BTreeMap<_, _> = holes.iter().map(|(name, h)| (name, hole_files(h))).collect();
        replace(disk, &self.catching_up(), &serde_json::to_vec(&files)?)
    }

    /// The holes that a catch-up may have made that did not end; `None` if there was none.
    pub fn interrupted_catch_up(
        &self,
        disk: &dyn Disk,
    ) -> anyhow::Result<Option<BTreeMap<String, Holes>>> {
        let path = self.catching_up();
        if !disk.exists(&path)? {
            return Ok(None);
        }
        let bytes = read_all(disk, &path)?;
        if bytes.is_empty() {
            // It comes from a version without holes.
            return Ok(Some(BTreeMap::new()));
        }
        let files: BTreeMap<String, Vec<HoleFile>> =
            serde_json::from_slice(&bytes).map_err(DamagedFile::at(&path))?;
        let read = |(name, files): (String, Vec<HoleFile>)| Ok((name, holes_of(&files)?));
        files.into_iter().map(read).collect::<anyhow::Result<_>>().map(Some)
    }

    /// The catch-up is complete, and the checkpoint says what it has left out.
    pub fn end_catching_up(&self, disk: &dyn Disk) -> io::Result<()> {
        remove(disk, &self.catching_up())
    }
}

/// A name beside `path` that nothing has: it ends with `why` and a number.
pub fn free_name(disk: &dyn Disk, path: &Path, why: &str) -> anyhow::Result<PathBuf> {
    (1..)
        .map(|n| PathBuf::from(format!("{}.{why}-{n}", path.display())))
        .find(|name| !disk.exists(name).unwrap_or(false))
        .with_context(|| format!("no name is free beside {}", path.display()))
}

/// Removes a file, durably, if it is there.
fn remove(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    if disk.exists(path)? {
        disk.remove(path)?;
        disk.sync_dir(parent(path))?;
    }
    Ok(())
}

#[derive(Serialize, Deserialize)]
struct CheckpointFile {
    version: u32,
    cluster_id: String,
    index: u64,
    term: u64,
    log_begins_here: bool,
    voters: Vec<String>,
    outgoing: Vec<String>,
    learners: Vec<String>,
    learners_next: Vec<String>,
    auto_leave: bool,
    members: Vec<MemberFile>,
    #[serde(default)]
    settings: Settings,
    storages: BTreeMap<String, StorageFile>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    acknowledged: BTreeMap<String, u64>,
}

#[derive(Serialize, Deserialize)]
struct MemberFile {
    id: String,
    name: String,
    group: String,
    peer_address: String,
    #[serde(default)]
    witness: bool,
}

#[derive(Serialize, Deserialize)]
struct StorageFile {
    #[serde(flatten)]
    mark: MarkFile,
    oid_ceiling: String,
    packed: Option<MarkFile>,
    packs: Vec<PackFile>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    holes: Vec<HoleFile>,
    #[serde(default)]
    backfill: bool,
    /// Hexadecimal. Empty from a version without tokens.
    #[serde(default)]
    outcomes: String,
}

#[derive(Serialize, Deserialize)]
struct HoleFile {
    after: String,
    through: String,
}

fn hole_files(holes: &Holes) -> Vec<HoleFile> {
    let file =
        |hole: &Hole| HoleFile { after: hole.after.to_string(), through: hole.through.to_string() };
    holes.iter().map(file).collect()
}

fn holes_of(files: &[HoleFile]) -> anyhow::Result<Holes> {
    let mut holes = Holes::default();
    for file in files {
        let (after, through) = (Tid(parse_hex(&file.after)?), Tid(parse_hex(&file.through)?));
        holes.add(Hole { after, through });
    }
    Ok(holes)
}

fn outcomes_of(text: &str) -> anyhow::Result<Outcomes> {
    if text.is_empty() {
        return Ok(Outcomes::default());
    }
    let bytes = unhex(text).context("the outcomes of transactions are not hexadecimal")?;
    Outcomes::decode(&bytes).context("the outcomes of transactions cannot be read")
}

#[derive(Serialize, Deserialize)]
struct MarkFile {
    position: u64,
    tid: String,
}

#[derive(Serialize, Deserialize)]
struct PackFile {
    time: String,
    gc: bool,
}

impl MarkFile {
    fn of(mark: Mark) -> MarkFile {
        MarkFile { position: mark.position.0, tid: mark.tid.to_string() }
    }

    fn mark(&self) -> anyhow::Result<Mark> {
        Ok(Mark { position: Position(self.position), tid: Tid(parse_hex(&self.tid)?) })
    }
}

fn parse_hex(text: &str) -> anyhow::Result<u64> {
    u64::from_str_radix(text, 16).with_context(|| format!("{text:?} is not a hexadecimal number"))
}

fn encode(checkpoint: &Checkpoint) -> io::Result<Vec<u8>> {
    let ids = |set: &BTreeSet<NodeId>| set.iter().map(ToString::to_string).collect();
    let membership = &checkpoint.membership;
    let members = membership.members.values().map(|member| MemberFile {
        id: member.id.to_string(),
        name: member.name.clone(),
        group: member.group.clone(),
        peer_address: member.peer_address.clone(),
        witness: member.witness,
    });
    let storages = checkpoint.storages.iter().map(|(name, storage)| {
        let file = StorageFile {
            mark: MarkFile::of(storage.mark),
            oid_ceiling: storage.ceiling.to_string(),
            packed: storage.packed.map(MarkFile::of),
            packs: storage
                .packs
                .iter()
                .map(|job| PackFile { time: job.time.to_string(), gc: job.gc })
                .collect(),
            holes: hole_files(&storage.holes),
            backfill: storage.backfill,
            outcomes: hex(&storage.outcomes.encode()),
        };
        (name.clone(), file)
    });
    let file = CheckpointFile {
        version: 1,
        cluster_id: checkpoint.cluster_id.clone(),
        index: checkpoint.index.0,
        term: checkpoint.term.0,
        log_begins_here: checkpoint.log_begins_here,
        voters: ids(&membership.voters),
        outgoing: ids(&membership.outgoing),
        learners: ids(&membership.learners),
        learners_next: ids(&membership.learners_next),
        auto_leave: membership.auto_leave,
        members: members.collect(),
        settings: checkpoint.settings.clone(),
        storages: storages.collect(),
        acknowledged: (checkpoint.acknowledged.iter())
            .map(|(id, index)| (id.to_string(), index.0))
            .collect(),
    };
    let mut bytes = serde_json::to_vec_pretty(&file)?;
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(format!("\n{sum:08x}\n").as_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> anyhow::Result<Checkpoint> {
    let Some((json, sum)) = bytes.strip_suffix(b"\n").and_then(|b| b.split_last_chunk::<8>())
    else {
        bail!("it is too short");
    };
    let json = json.strip_suffix(b"\n").context("it has no checksum")?;
    if parse_hex(std::str::from_utf8(sum)?)? != u64::from(crc32c::crc32c(json)) {
        bail!("its checksum is wrong");
    }
    let file: CheckpointFile = serde_json::from_slice(json)?;
    if file.version != 1 {
        bail!("it has version {}, this program knows version 1", file.version);
    }
    let ids = |list: &[String]| {
        list.iter().map(|id| parse_hex(id).map(NodeId)).collect::<anyhow::Result<BTreeSet<_>>>()
    };
    let mut membership = Membership {
        voters: ids(&file.voters)?,
        outgoing: ids(&file.outgoing)?,
        learners: ids(&file.learners)?,
        learners_next: ids(&file.learners_next)?,
        auto_leave: file.auto_leave,
        members: BTreeMap::new(),
    };
    for member in file.members {
        let id = NodeId(parse_hex(&member.id)?);
        let MemberFile { name, group, peer_address, witness, .. } = member;
        membership.members.insert(id, Member { id, name, group, peer_address, witness });
    }
    let mut storages = BTreeMap::new();
    for (name, storage) in file.storages {
        let job = |file: &PackFile| Ok(Job { time: Tid(parse_hex(&file.time)?), gc: file.gc });
        let point = StoragePoint {
            mark: storage.mark.mark()?,
            ceiling: Oid(parse_hex(&storage.oid_ceiling)?),
            packed: storage.packed.map(|mark| mark.mark()).transpose()?,
            packs: storage.packs.iter().map(job).collect::<anyhow::Result<_>>()?,
            holes: holes_of(&storage.holes)?,
            backfill: storage.backfill,
            outcomes: outcomes_of(&storage.outcomes)?,
        };
        storages.insert(name, point);
    }
    Ok(Checkpoint {
        cluster_id: file.cluster_id,
        index: LogIndex(file.index),
        term: Term(file.term),
        log_begins_here: file.log_begins_here,
        membership,
        settings: file.settings,
        storages,
        acknowledged: (file.acknowledged.into_iter())
            .map(|(id, index)| Ok((NodeId(parse_hex(&id)?), LogIndex(index))))
            .collect::<anyhow::Result<_>>()?,
    })
}

#[derive(Serialize, Deserialize)]
struct SharedState<'a> {
    cluster_id: Cow<'a, str>,
    ceilings: BTreeMap<String, String>,
    #[serde(default)]
    settings: Cow<'a, Settings>,
}

/// What a node that begins with a catch-up must know beside the transactions and the members.
pub fn encode_shared(
    cluster_id: &str,
    ceilings: &BTreeMap<String, Oid>,
    settings: &Settings,
) -> Vec<u8> {
    let ceilings = ceilings.iter().map(|(name, oid)| (name.clone(), oid.to_string())).collect();
    let (cluster_id, settings) = (cluster_id.into(), Cow::Borrowed(settings));
    serde_json::to_vec(&SharedState { cluster_id, ceilings, settings }).unwrap_or_default()
}

/// Reads what [`encode_shared`] wrote.
pub fn decode_shared(bytes: &[u8]) -> anyhow::Result<(String, BTreeMap<String, Oid>, Settings)> {
    let state: SharedState = serde_json::from_slice(bytes)?;
    let ceilings = state
        .ceilings
        .into_iter()
        .map(|(name, oid)| Ok((name, Oid(parse_hex(&oid)?))))
        .collect::<anyhow::Result<_>>()?;
    Ok((state.cluster_id.into_owned(), ceilings, state.settings.into_owned()))
}

#[cfg(test)]
mod tests {
    use standby_types::TransactionToken;
    use standby_types::memory::MemoryDisk;

    use super::*;

    fn checkpoint() -> Checkpoint {
        let member = Member {
            id: NodeId(7),
            name: "n1".into(),
            group: "here".into(),
            peer_address: "127.0.0.1:1".into(),
            witness: true,
        };
        let mark = Mark { position: Position(100), tid: Tid(0x0102) };
        let mut holes = Holes::default();
        holes.add(Hole { after: Tid(1), through: Tid(2) });
        Checkpoint {
            cluster_id: "abc".into(),
            index: LogIndex(5),
            term: Term(2),
            log_begins_here: true,
            membership: Membership::founded_by(member),
            settings: Settings::bootstrapped_in("here"),
            storages: BTreeMap::from([(
                "1".into(),
                StoragePoint {
                    mark,
                    ceiling: Oid(9),
                    packed: Some(Mark { position: Position(50), ..mark }),
                    packs: vec![Job { time: Tid(3), gc: true }],
                    holes,
                    backfill: true,
                    outcomes: {
                        let mut outcomes = Outcomes::unknown_until(Tid(3));
                        let token = TransactionToken { client: [7; 16], number: 2 };
                        outcomes.committed(token, Tid(0x0102));
                        outcomes
                    },
                },
            )]),
            acknowledged: BTreeMap::from([(NodeId(8), LogIndex(4))]),
        }
    }

    #[test]
    fn checkpoints_come_back_or_are_called_damaged() {
        let disk = MemoryDisk::new();
        let dir = StateDir("/state".into());
        assert_eq!(dir.checkpoint(&disk).unwrap(), None);
        dir.set_checkpoint(&disk, &checkpoint()).unwrap();
        disk.crash();
        assert_eq!(dir.checkpoint(&disk).unwrap(), Some(checkpoint()));

        let bytes = encode(&checkpoint()).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(decode(&damaged).is_err() || decode(&damaged).unwrap() == checkpoint());
            assert!(decode(&bytes[..at]).is_err());
        }
    }

    #[test]
    fn a_catch_up_leaves_its_holes_behind() {
        let disk = MemoryDisk::new();
        let dir = StateDir("/state".into());
        assert_eq!(dir.interrupted_catch_up(&disk).unwrap(), None);
        let holes = checkpoint().storages["1"].holes.clone();
        let holes = BTreeMap::from([("1".to_owned(), holes)]);
        dir.set_catching_up(&disk, &holes).unwrap();
        disk.crash();
        assert_eq!(dir.interrupted_catch_up(&disk).unwrap(), Some(holes));
        replace(&disk, &dir.catching_up(), b"").unwrap();
        assert_eq!(dir.interrupted_catch_up(&disk).unwrap(), Some(BTreeMap::new()));
        dir.end_catching_up(&disk).unwrap();
        assert_eq!(dir.interrupted_catch_up(&disk).unwrap(), None);
    }

    #[test]
    fn shared_state_travels() {
        let ceilings = BTreeMap::from([("main".to_owned(), Oid(255))]);
        let settings = Settings::bootstrapped_in("here");
        let encoded = encode_shared("id", &ceilings, &settings);
        assert_eq!(decode_shared(&encoded).unwrap(), ("id".to_owned(), ceilings, settings));
    }
}
