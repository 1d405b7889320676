//! Room for a second file beside a data file.

use std::io;

/// What is about to be written of a second file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// So many bytes in all.
    All(u64),
    /// The next transaction.
    Next,
}

/// Says whether there is room for it. An error ends the copying; what was written stays, for the
/// caller to remove.
pub type Room<'a> = &'a dyn Fn(Need) -> io::Result<()>;
