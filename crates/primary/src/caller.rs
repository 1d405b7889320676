//! Who is to be answered.

use standby_zeo::{SessionId, Value};

/// A call of a client that is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Caller {
    /// The client's session.
    pub session: SessionId,
    /// The call's id.
    pub call: Value,
}

/// Who waits for an administrator's answer. The caller numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asker(pub u64);
