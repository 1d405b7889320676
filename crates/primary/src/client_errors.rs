//! Errors that clients are told, in the words of ZODB and of the Python server.

use standby_zeo::{ClientError, Value};

/// The error for a storage that does not exist.
pub fn unknown_storage(name: &str) -> ClientError {
    let text = Value::Str(format!("unknown storage: {name}"));
    ClientError::Other("builtins.ValueError", vec![text])
}

/// The error of undo while a pack is under way.
pub fn undo_disabled() -> ClientError {
    ClientError::Undo("Undo is currently disabled for database maintenance.<p>".into())
}
