//! A log that has lost something that was durable, found at the start.
//!
//! The node does not know any more what it has promised: it must neither vote nor lead with what is
//! left. It gives its identity up, which the others remove from the voters, and joins anew under
//! its name, as a node with an empty disk does, but with the data file as far as its last
//! checkpoint vouches for it. The others must be a majority without it: then nothing of what was
//! acknowledged is only here.
//!
//! Whatever this was interrupted at, the next start finds a log without what the checkpoint builds
//! on, and does it again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use standby_consensus::{Membership, Recovered, recover};
use standby_types::disk::parent;
use standby_types::{Disk, NodeId};
use tracing::warn;

use crate::start::Place;
use crate::state_dir::{Checkpoint, Identity, StateDir, free_name};

/// Something that was durable in the log is lost.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LostLog(String);

impl LostLog {
    /// It was found out in another way than by reading it.
    pub fn because(reason: String) -> LostLog {
        LostLog(reason)
    }
}

/// Reads the log, which must reach as far as the checkpoint; otherwise the error is a [`LostLog`].
pub fn read(
    disk: &Arc<dyn Disk>,
    state: &StateDir,
    checkpoint: &Checkpoint,
) -> anyhow::Result<Recovered> {
    let recovered = match recover(disk, &state.log()) {
        Err(error) if error.is_damage() => return Err(LostLog(error.to_string()).into()),
        recovered => recovered?,
    };
    if recovered.last_index() < checkpoint.index && !checkpoint.log_begins_here {
        let reason = format!(
            "{}: the log ends at entry {}, but entry {} was durable: the disk has lost data",
            state.log().display(),
            recovered.last_index(),
            checkpoint.index,
        );
        return Err(LostLog(reason).into());
    }
    Ok(recovered)
}

/// Puts the log aside and makes this node a new one with the former one's data; fails if the others
/// cannot do without it.
pub fn begin_anew(
    place: &Place<'_>,
    former: &Identity,
    checkpoint: Checkpoint,
    lost: &LostLog,
) -> anyhow::Result<(Identity, Checkpoint)> {
    let Place { config, state, .. } = *place;
    if config.standby.is_none() {
        bail!("{lost}. {}", advice_to_one_alone(state));
    }
    if !can_do_without(&checkpoint.membership, &former.node) {
        bail!(
            "{lost}. Without this node the others are no majority, as of its last checkpoint. {}",
            advice(state)
        );
    }
    leave_log(place, former, checkpoint, lost)
}

/// The same for a node that knows that the others do without it.
pub fn leave_log(
    place: &Place<'_>,
    former: &Identity,
    checkpoint: Checkpoint,
    lost: &LostLog,
) -> anyhow::Result<(Identity, Checkpoint)> {
    let Place { disk, state, platform, .. } = *place;
    if state.interrupted_catch_up(&**disk)?.is_none() {
        // What the data files hold beyond the checkpoint cannot be compared with the log: it is cut
        // off.
        state.set_catching_up(&**disk, &BTreeMap::new())?;
    }
    // First of all: who has a new identity has promised nothing, whatever becomes of the rest.
    let identity = Identity { id: platform.random_hex(8)?, ..former.clone() };
    state.set_identity(&**disk, &identity)?;
    let kept = put_aside(disk, state)?;
    let checkpoint = checkpoint.without_log();
    state.set_checkpoint(&**disk, &checkpoint)?;
    warn!(
        kept = %kept.display(), former = former.id, node = identity.id,
        "{lost}. The log is put aside; this node joins the cluster anew, under its name, and gets \
         from the others what has come since its last checkpoint"
    );
    Ok((identity, checkpoint))
}

/// What a person can do if the node cannot help itself.
pub fn advice(state: &StateDir) -> String {
    format!(
        "When the others have a primary (if they cannot elect one, \"standby recover-quorum\" on \
         one of them makes one), move {} and the data files away, keep them, and start again: the \
         node then fetches everything",
        state.0.display()
    )
}

/// The same for a node that is alone.
pub fn advice_to_one_alone(state: &StateDir) -> String {
    format!(
        "To go on with what the data files hold, move {} away and start again: what was committed \
        last may be missing",
        state.0.display()
    )
}

/// True if the other members can elect without the one of this name, and so remove it.
fn can_do_without(membership: &Membership, name: &str) -> bool {
    let others = membership.members.values().filter(|member| member.name != name);
    let others: BTreeSet<NodeId> = others.map(|member| member.id).collect();
    !others.is_empty() && membership.is_quorum(&others)
}

fn put_aside(disk: &Arc<dyn Disk>, state: &StateDir) -> anyhow::Result<PathBuf> {
    let log = state.log();
    let kept = free_name(&**disk, &log, "damaged")?;
    disk.rename(&log, &kept)
        .with_context(|| format!("cannot move {} to {}", log.display(), kept.display()))?;
    disk.create_dir(&log)?;
    disk.sync_dir(parent(&log))?;
    Ok(kept)
}

#[cfg(test)]
mod tests {

    use standby_consensus::Member;
    use standby_disk::OsDisk;
    use standby_filestorage::{Record, RecordData, Transaction, TransactionMeta};
    use standby_types::{LogIndex, Oid, Tid};

    use super::*;
    use crate::start::ground::Ground;
    use crate::start::prepare;
    use crate::start::prepared::Beginning;
    use crate::start::prepared::Prepared;
    use crate::state_dir::Note;

    struct Node {
        dir: tempfile::TempDir,
        ground: Ground,
    }

    impl Node {
        /// One of `voters` nodes, whose checkpoint is after two transactions; a third one is in its
        /// data file.
        fn of(voters: u64) -> Node {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().display();
            let text = format!(
                "<zeo>\naddress localhost:8100\n</zeo>\n<filestorage>\npath \
                {path}/Data.fs\n</filestorage>\n\
                 <standby>\ncluster c\nnode n1\ngroup g\npeer-address 127.0.0.1:1\n\
                 member n1 127.0.0.1:1 g\nstate-dir {path}/state\n</standby>\n"
            );
            let node = Node { dir, ground: Ground::new(Arc::new(OsDisk), &text) };
            let mut prepared = node.prepare(Beginning::Bootstrap).unwrap();
            let storage = prepared.storages.get_mut("1").unwrap();
            for tid in [10, 20] {
                add(storage, tid);
            }
            let mut checkpoint = prepared.checkpoint.clone();
            checkpoint.storages.get_mut("1").unwrap().mark = storage.mark();
            for id in 2..=voters {
                let member = Member { id: NodeId(id), name: format!("n{id}"), ..me(&checkpoint) };
                checkpoint.membership.voters.insert(member.id);
                checkpoint.membership.members.insert(member.id, member);
            }
            node.ground.state.set_checkpoint(&*node.ground.disk, &checkpoint).unwrap();
            add(storage, 30);
            storage.sync().unwrap();
            node
        }

        fn prepare(&self, beginning: Beginning) -> anyhow::Result<Prepared> {
            prepare(&self.ground.place(), beginning)
        }

        /// As a bad disk would: the header of a segment is not what was written, and something is
        /// behind it.
        fn damage_the_log(&self) {
            let segment = self.ground.disk.list(&self.ground.state.log()).unwrap().remove(0);
            let mut bytes = std::fs::read(&segment).unwrap();
            bytes[3] ^= 0x10;
            std::fs::write(&segment, &bytes).unwrap();
            std::fs::write(segment.with_file_name("0000000000000099.log"), bytes).unwrap();
        }

        fn id(&self) -> String {
            self.ground.state.identity(&*self.ground.disk).unwrap().unwrap().id
        }

        /// The node is a new one, with what its checkpoint vouches for.
        fn has_begun_anew(&self, former: &str) {
            let prepared = self.prepare(Beginning::Bootstrap).unwrap();
            assert_ne!(self.id(), former);
            assert_eq!(format!("{:016x}", prepared.id.0), self.id());
            assert_eq!(prepared.storages["1"].mark().tid, Tid(20));
            assert_eq!(prepared.recovered.last_index(), LogIndex(0));
            assert!(prepared.checkpoint.membership.members.is_empty());
            assert!(!prepared.checkpoint.cluster_id.is_empty());
        }
    }

    fn me(checkpoint: &Checkpoint) -> Member {
        checkpoint.membership.members.values().next().unwrap().clone()
    }

    fn add(storage: &mut standby_filestorage::FileStorage, tid: u64) {
        let meta = TransactionMeta::new(Tid(tid));
        let data = RecordData::Data("data".into());
        storage.append(&Transaction { meta, records: vec![Record { oid: Oid(1), data }] }).unwrap();
    }

    #[test]
    fn row_28_a_node_whose_log_is_damaged_joins_anew() {
        let node = Node::of(3);
        let former = node.id();
        node.damage_the_log();
        node.has_begun_anew(&former);
        let id = node.id();
        assert!(node.dir.path().join("state/log.damaged-1/0000000000000099.log").exists());
        // It stays who it is now.
        node.has_begun_anew(&former);
        assert_eq!(node.id(), id);
    }

    #[test]
    fn row_28_a_log_that_is_gone_is_as_bad_as_a_damaged_one() {
        let node = Node::of(3);
        let former = node.id();
        std::fs::remove_dir_all(node.ground.state.log()).unwrap();
        std::fs::create_dir(node.ground.state.log()).unwrap();
        node.has_begun_anew(&former);
    }

    /// The process ends between two of its steps.
    #[test]
    fn row_28_joining_anew_may_be_interrupted() {
        for steps in 0..3 {
            let node = Node::of(3);
            let former = node.id();
            node.damage_the_log();
            node.ground.state.set_catching_up(&*node.ground.disk, &BTreeMap::new()).unwrap();
            if steps > 0 {
                let identity = node.ground.state.identity(&*node.ground.disk).unwrap().unwrap();
                let identity = Identity { id: "0000000000000077".into(), ..identity };
                node.ground.state.set_identity(&*node.ground.disk, &identity).unwrap();
            }
            if steps > 1 {
                std::fs::rename(
                    node.ground.state.log(),
                    node.dir.path().join("state/log.damaged-1"),
                )
                .unwrap();
            }
            node.has_begun_anew(&former);
        }
    }

    /// Its disk was put back to a moment before it was a member: the others know what it had
    /// acknowledged under its identity, and would tell it again and again.
    #[test]
    fn a_node_without_members_that_was_rolled_back_gets_another_identity() {
        let node = Node::of(3);
        let former = node.id();
        let disk = &*node.ground.disk;
        let checkpoint = node.ground.state.checkpoint(disk).unwrap().unwrap();
        node.ground.state.set_checkpoint(disk, &checkpoint.without_log()).unwrap();
        node.ground.state.set_note(disk, Note::RolledBack, "it was put back").unwrap();
        node.has_begun_anew(&former);
        let id = node.id();
        node.has_begun_anew(&former);
        assert_eq!(node.id(), id);
    }

    #[test]
    fn row_28_a_damaged_log_that_the_others_need_is_left_to_a_person() {
        let node = Node::of(2);
        let former = node.id();
        node.damage_the_log();
        let error = node.prepare(Beginning::Bootstrap).err().unwrap().to_string();
        assert!(error.contains("is damaged") || error.contains("is not whole"), "{error}");
        assert!(error.contains("recover-quorum"), "{error}");
        assert_eq!(node.id(), former);
        assert!(!node.dir.path().join("state/log.damaged-1").exists());
    }
}
