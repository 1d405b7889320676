//! One `Data.fs`: its bytes, its one writer, and its readers.

pub(crate) mod append;
pub(crate) mod format;
pub(crate) mod history;
pub(crate) mod holes;
pub(crate) mod iterate;
pub(crate) mod mark;
pub(crate) mod open;
pub(crate) mod read;
pub(crate) mod scan;
pub(crate) mod shared;
pub(crate) mod transaction;
pub(crate) mod undo;
