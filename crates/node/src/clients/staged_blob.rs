//! A session's upload.

use std::sync::Arc;

use standby_filestorage::Staged;
use standby_types::Upload;
use standby_zeo::StagedFile;

use crate::cells::announcement::Announcement;
use crate::cells::shared::Shared;
use crate::cells::wire::LinkFrame;

/// A session's hold on its upload. The other nodes are told of the upload; and if it is given up,
/// of that.
pub(crate) struct StagedBlob {
    shared: Arc<Shared>,
    announcement: Announcement,
    staged: Option<Staged>,
}

impl StagedBlob {
    /// Tells the other nodes: they fetch the upload while the client goes on.
    pub(crate) fn announce(
        shared: &Arc<Shared>,
        storage: &str,
        upload: Upload,
        staged: Staged,
    ) -> StagedBlob {
        let announcement = Announcement::of(storage, upload);
        shared.peers.tell_all(&LinkFrame::Announced(announcement.clone()));
        StagedBlob { shared: shared.clone(), announcement, staged: Some(staged) }
    }
}

impl StagedFile for StagedBlob {
    fn keep(mut self: Box<Self>) {
        if let Some(staged) = self.staged.take() {
            staged.keep();
        }
    }
}

impl Drop for StagedBlob {
    fn drop(&mut self) {
        if self.staged.is_some() {
            let forgotten = LinkFrame::Forgotten(self.announcement.clone());
            self.shared.peers.tell_all(&forgotten);
        }
    }
}
