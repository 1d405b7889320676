//! What the machine may know beside its inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use standby_types::{NodeId, Oid, Tid};
use standby_zeo::{ClientError, Examination, SessionId, VoteAnswer};

/// What the machine may know beside its inputs, as of the moment of a step. No answer waits: each
/// is in memory.
pub trait Facts: Send {
    /// The time of day, since 1970. Only tids and people look at it.
    fn wall_clock(&self) -> Duration;
    /// A random hexadecimal string of so many bytes, or why there is none.
    fn random_hex(&self, bytes: usize) -> Result<String, String>;

    /// The storage's last transaction that is applied.
    fn last_tid(&self, storage: &str) -> Tid;
    /// The highest oid that is in use.
    fn highest_oid(&self, storage: &str) -> Oid;
    /// Bytes of the data file.
    fn size(&self, storage: &str) -> u64;
    /// True if there is no transaction.
    fn is_empty(&self, storage: &str) -> bool;
    /// True if the data file lacks the revision that has this tid.
    fn lies_in_hole(&self, storage: &str, tid: Tid) -> bool;
    /// True if the data file lacks revisions.
    fn has_holes(&self, storage: &str) -> bool;
    /// True if the storage keeps blobs.
    fn has_blobs(&self, storage: &str) -> bool;
    /// True if a pack was asked for, or runs.
    fn is_packing(&self, storage: &str) -> bool;
    /// Compares a vote with what is applied, if all of that is in memory.
    fn compare(&self, storage: &str, vote: &Examination)
    -> Option<Result<VoteAnswer, ClientError>>;

    /// Which disk of this node is nearly full, if one is: nothing may be written then.
    fn full_disk(&self) -> Option<String>;
    /// True if one is.
    fn lacks_room(&self) -> bool;
    /// How long the log's disk takes for the write that is under way.
    fn log_busy(&self, now: Duration) -> Duration;
    /// True if something is damaged here, and nobody has it.
    fn is_damaged_here(&self) -> bool;
    /// True if that is true of a data file.
    fn lacks_data(&self) -> bool;
    /// True if what the data files show is a moment that was.
    fn is_whole(&self) -> bool;
    /// True if this node is a member of a cluster.
    fn belongs(&self) -> bool;

    /// Who a session is, in words.
    fn who(&self, session: SessionId) -> String;
    /// True if an upload is under way, or its transaction, or a pack that its client waits for.
    fn any_long_call(&self) -> bool;
    /// True if there are sessions that may write.
    fn any_writer(&self) -> bool;

    /// True if the node has room on its disks, as it has reported.
    fn has_room(&self, id: NodeId) -> bool;
    /// True if it has reported that its log's disk is slow.
    fn is_slow(&self, id: NodeId) -> bool;
    /// How long a write of its log took of late, at worst.
    fn slowest_write(&self, id: NodeId) -> Duration;
    /// True if it has reported damage.
    fn is_damaged(&self, id: NodeId) -> bool;
    /// True if it has reported that it lost the leadership again and again.
    fn is_flapping(&self, id: NodeId) -> bool;
    /// For how long nothing was heard of it.
    fn silence_of(&self, id: NodeId) -> Duration;
    /// True if it was heard of lately.
    fn is_up(&self, id: NodeId) -> bool;
    /// The highest feature level that it knows.
    fn feature_level(&self, id: NodeId) -> u32;
    /// The last transactions that any node has reported.
    fn last_tids(&self) -> BTreeMap<String, Tid>;
    /// The last transactions that any node has lost by leaving a timeline.
    fn last_lost(&self) -> BTreeMap<String, Tid>;
    /// By how much this machine's clock is ahead of those of a majority of the voters.
    fn ahead_of_majority(&self, voters: &BTreeSet<NodeId>) -> Option<Duration>;
    /// A node, of those whose group counts, that has more in its log than `log` (term, index).
    fn ahead_of(&self, log: (u64, u64), counts: &dyn Fn(&str) -> bool) -> Option<String>;
}
