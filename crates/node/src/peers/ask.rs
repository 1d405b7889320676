//! What an administrator asks a node for, passed on to the primary.
//!
//! ```text
//! asking node                    primary
//!    'q' JSON: an Ask     ─────▶
//!                         ◀─────  'a' JSON: what was done, or why not
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::{MAX_FRAME, PeerError, Purpose, connect, read_frame, within, write_frame};
use crate::ask::{Answer, Ask, here};
use crate::node::Shared;
use crate::stream::Stream;

/// An administrator's node says soon what it wants.
const PROMPT: Duration = Duration::from_secs(10);
/// Longer than the other node waits for what was asked for.
const PATIENCE: Duration = crate::ask::PATIENCE.saturating_add(Duration::from_secs(5));

/// Asks the node at `address`.
pub async fn ask(shared: &Shared, address: &str, ask: &Ask) -> Result<Answer, PeerError> {
    let (mut stream, _) = connect(&shared.introduction(), address, Purpose::Ask).await?;
    write_frame(&mut stream, b'q', &serde_json::to_vec(ask)?).await?;
    match within(PATIENCE, read_frame(&mut stream, MAX_FRAME)).await? {
        (b'a', json) => Ok(serde_json::from_slice(&json)?),
        (other, _) => Err(PeerError::Protocol(format!("a frame of unknown kind {other}"))),
    }
}

/// Answers a node that asks.
pub async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let (_, json) = within(PROMPT, read_frame(&mut stream, 64 << 10)).await?;
    let answer = match serde_json::from_slice(&json) {
        Ok(ask) => here(shared, ask).await,
        Err(error) => Err(format!("the primary does not know how to do that: {error}")),
    };
    write_frame(&mut stream, b'a', &serde_json::to_vec(&answer)?).await
}
