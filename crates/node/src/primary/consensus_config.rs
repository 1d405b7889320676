//! How a node takes part in consensus.

use standby_consensus::Config as RaftConfig;

use crate::cells::shared::Shared;

/// Ticks until an election, at least.
const ELECTION_TICKS: usize = 16;

/// Ticks between heartbeats.
const HEARTBEAT_TICKS: usize = 2;

/// Bytes of committed entries that are held in memory until they are applied.
const UNAPPLIED_LEN: u64 = if cfg!(feature = "simulated") { 4 << 10 } else { 64 << 20 };

/// How the node takes part in consensus.
pub fn raft_config(shared: &Shared) -> RaftConfig {
    RaftConfig {
        id: shared.id,
        election_ticks: ELECTION_TICKS,
        most_patience_ticks: shared.profile().most_patience_ticks(),
        heartbeat_ticks: HEARTBEAT_TICKS,
        tick: shared.tick(),
        seed: shared.id.0,
        witness: shared.member.witness,
        unapplied_len: UNAPPLIED_LEN,
    }
}
