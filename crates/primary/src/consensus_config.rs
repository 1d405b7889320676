//! How a node takes part in consensus.

use standby_config::Profile;
use standby_consensus::Config as RaftConfig;
use standby_types::NodeId;

/// Ticks until an election, at least.
const ELECTION_TICKS: usize = 16;

/// Ticks between heartbeats.
const HEARTBEAT_TICKS: usize = 2;

/// Bytes of committed entries that are held in memory until they are applied.
const UNAPPLIED_LEN: u64 = if cfg!(feature = "simulated") { 4 << 10 } else { 64 << 20 };

/// How the node takes part in consensus.
pub fn raft_config(id: NodeId, witness: bool, profile: Profile) -> RaftConfig {
    RaftConfig {
        id,
        election_ticks: ELECTION_TICKS,
        most_patience_ticks: profile.most_patience_ticks(),
        heartbeat_ticks: HEARTBEAT_TICKS,
        tick: profile.tick(),
        seed: id.0,
        witness,
        unapplied_len: UNAPPLIED_LEN,
    }
}
