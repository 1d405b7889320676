//! Errors that clients are told, in the words of ZODB and of the Python server.

use standby_filestorage::StorageError;
use standby_zeo::ClientError;
use tracing::error;

/// A read failed for another reason than that the object does not exist.
pub(crate) fn read_failed(error: &StorageError) -> ClientError {
    error!(%error, "a read failed");
    ClientError::storage(error.to_string())
}
