//! Places between transactions.

use standby_types::{Position, Tid};

/// The end of a transaction: where the next one begins, and its tid. The start of an empty file
/// is (4, [`Tid::NONE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Offset of the byte after the transaction.
    pub position: Position,
    /// The transaction.
    pub tid: Tid,
}

impl Mark {
    /// The mark of a file without transactions.
    pub const START: Mark = Mark { position: Position(4), tid: Tid::NONE };
}
