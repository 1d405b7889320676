//! What the primary's task is told: by the tasks of this process, and by others.

use standby_consensus::{LogError, PeerMessage, Written};
use standby_primary::command::{Answer, Ask};
use standby_primary::{Input, Request};
use standby_types::NodeId;
use tokio::sync::oneshot;

use crate::transport::handshake::PeerInfo;

/// What this process's own tasks tell.
pub(crate) enum TaskReport {
    /// Something for the machine.
    Input(Box<Input>),
    /// Batches of the log are durable, or cannot be written.
    Persisted(Result<Written, LogError>),
    /// This process must stop.
    Fatal(anyhow::Error),
}

impl From<Input> for TaskReport {
    fn from(input: Input) -> TaskReport {
        TaskReport::Input(Box::new(input))
    }
}

/// What others tell.
pub(crate) enum Event {
    /// Something for the machine.
    Input(Box<Input>),
    /// A peer's message, and the epoch (`Peers::epoch`) of the link over which it came.
    Peer(PeerMessage, u64),
    /// A peer can be reached, or reaches this node.
    PeerUp(PeerInfo),
    /// A peer's connection has closed.
    PeerLost(NodeId),
    /// An administrator asks for something.
    Ask(Ask, oneshot::Sender<Answer>),
    /// Somebody waits until what was told before is done.
    Settled(oneshot::Sender<()>),
}

impl From<Input> for Event {
    fn from(input: Input) -> Event {
        Event::Input(Box::new(input))
    }
}

impl From<Request> for Event {
    fn from(request: Request) -> Event {
        Input::Client(request).into()
    }
}
