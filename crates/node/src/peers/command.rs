//! What an administrator asks a node for, forwarded to the primary.
//!
//! ```text
//! asking node                    primary
//!    'q' JSON: an Ask     ─────▶
//!                         ◀─────  'a' JSON: what was done, or why not
//! ```

use std::sync::Arc;
use std::time::Duration;

use standby_primary::command::{Answer, Ask};
use tokio::sync::oneshot;

use crate::cells::events::Event;
use crate::cells::shared::Shared;
use crate::cells::wire::{Answered, Question, receive, send};
use crate::transport::frames::{MAX_FRAME, PeerError, within};
use crate::transport::handshake::{Purpose, connect};
use crate::transport::stream::Stream;

/// Longer than anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// An administrator's node says soon what it wants.
const PROMPT: Duration = Duration::from_secs(10);
/// Longer than the other node waits for what was asked for.
const ANSWER: Duration = PATIENCE.saturating_add(Duration::from_secs(5));

/// Asks the node at `address`.
pub(crate) async fn ask(shared: &Shared, address: &str, ask: &Ask) -> Result<Answer, PeerError> {
    let (mut stream, _) = connect(&shared.introduction(), address, Purpose::Ask).await?;
    send(&mut stream, &Question(ask.clone())).await?;
    let Answered(answer) = within(ANSWER, receive(&mut stream, MAX_FRAME)).await?;
    Ok(answer)
}

/// Answers a node that asks.
pub(crate) async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let asked = within(PROMPT, receive(&mut stream, 64 << 10)).await?;
    // What this version does not know is told in words.
    let Question::<serde_json::Value>(asked) = asked;
    let answer = match serde_json::from_value(asked) {
        Ok(ask) => here(shared, ask).await,
        Err(error) => Err(format!("the primary does not know how to do that: {error}")),
    };
    send(&mut stream, &Answered(answer)).await
}

/// Does it here, if this node is the one to do it.
pub(crate) async fn here(shared: &Arc<Shared>, ask: Ask) -> Answer {
    let (asker, answer) = oneshot::channel();
    shared.tell(Event::Ask(ask, asker)).await;
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err("the primary has changed before it was done; see standby status".into()),
        Err(_) => Err("it is not done yet; see standby status".into()),
    }
}
