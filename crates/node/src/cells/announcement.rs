//! What the nodes tell each other of uploads.

use serde::{Deserialize, Serialize};
use standby_types::hex::{hex, unhex};
use standby_types::{Transfer, Upload};

/// What is said of an upload: that it is to be had, or that it is given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Announcement {
    storage: String,
    transfer: String,
    len: u64,
    sha256: String,
}

impl Announcement {
    /// An announcement of an upload.
    pub(crate) fn of(storage: &str, upload: Upload) -> Announcement {
        let sha256 = hex(&upload.sha256);
        let transfer = upload.transfer.to_string();
        Announcement { storage: storage.into(), transfer, len: upload.len, sha256 }
    }

    pub(crate) fn storage(&self) -> &str {
        &self.storage
    }

    /// The upload; `None` if this is none.
    pub(crate) fn upload(&self) -> Option<Upload> {
        let sha256 = unhex(&self.sha256)?.try_into().ok()?;
        Some(Upload { transfer: Transfer::parse(&self.transfer)?, len: self.len, sha256 })
    }
}
