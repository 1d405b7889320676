//! Uploads on their way to a place.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use standby_types::disk::parent;
use standby_types::{Disk, File, Transfer, Upload};

use crate::StorageError;
use crate::blobs::remove_if_there;

/// An upload while it is being written. Dropped, it leaves nothing.
pub struct Staging {
    pub(super) file: Arc<dyn File>,
    pub(super) transfer: Transfer,
    pub(super) len: u64,
    pub(super) hash: Sha256,
    pub(super) staged: Option<Staged>,
}

impl Staging {
    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, self.len)?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Makes it durable under its staged name.
    pub fn finish(mut self) -> Result<(Upload, Staged), StorageError> {
        let Some(staged) = self.staged.take() else {
            return Err(StorageError::io(Path::new(""), "finish")(io::ErrorKind::NotFound.into()));
        };
        let [part, whole] = &staged.paths.clone();
        let failed = StorageError::io(whole, "write");
        self.file.sync().map_err(&failed)?;
        staged.disk.make_read_only(part).map_err(&failed)?;
        staged.disk.rename(part, whole).map_err(&failed)?;
        staged.disk.sync_dir(parent(whole)).map_err(&failed)?;
        let sha256 = std::mem::take(&mut self.hash).finalize().into();
        Ok((Upload { transfer: self.transfer, len: self.len, sha256 }, staged))
    }
}

/// Keeps an upload on disk; when it is dropped, the file goes, unless it was [`Staged::keep`]ed.
pub struct Staged {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) paths: [PathBuf; 2],
}

impl Staged {
    /// The file stays: the log names it.
    pub fn keep(mut self) {
        self.paths = Default::default();
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for path in self.paths.iter().filter(|path| !path.as_os_str().is_empty()) {
            // What cannot be removed now goes at the next start.
            let _ = remove_if_there(&*self.disk, path);
        }
    }
}
