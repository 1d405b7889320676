//! Ends the sessions that hold most, when all clients together hold too much memory.

use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::cells::shared::Shared;

/// How long a session that was ended may take to give back what it holds, before another one is.
const GIVEN_BACK: Duration = Duration::from_millis(50);

/// Ends the session that holds most, as long as all together hold too much.
pub(crate) async fn guard(shared: Arc<Shared>) {
    let memory = &shared.memory;
    loop {
        memory.exceeds().await;
        while memory.is_over() {
            if let Some(session) = shared.sessions.largest() {
                let (held, all, limit) =
                    (session.held() >> 20, memory.used() >> 20, memory.limit() >> 20);
                let reason = format!(
                    "all clients together hold {all} MB of this node's memory, more than the \
                     {limit} MB of client-memory, and this one holds most of it, {held} MB"
                );
                warn!(client = session.who(), "{reason}: its session ends");
                session.cut(&reason);
            }
            tokio::time::sleep(GIVEN_BACK).await;
        }
    }
}
