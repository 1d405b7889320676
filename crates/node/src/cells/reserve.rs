//! The reserve on the disks, which temporary and second files do not eat up.

use std::io;
use std::path::Path;
use std::sync::Arc;

use standby_filestorage::Need;
use standby_types::File;
use standby_zeo::MakeSpill;

use crate::cells::shared::Shared;
use crate::platform;

/// Asks for room for a second file beside a data file: all of it at first, and none of the reserve
/// while it is written.
pub(crate) fn room_for(
    shared: &Arc<Shared>,
    data: &Path,
    what: &'static str,
) -> impl Fn(Need) -> io::Result<()> + Send + use<> {
    let (shared, dir) = (shared.clone(), standby_types::disk::parent(data).to_owned());
    move |need| {
        let Need::All(bytes) = need else { return shared.room.check() };
        let (free, reserve) = (platform::free_room(&dir)?.bytes, shared.reserve());
        if free >= bytes.saturating_add(reserve) {
            return Ok(());
        }
        let (node, megabytes) = (&shared.member.name, |bytes: u64| bytes.div_ceil(1 << 20));
        let reason = format!(
            "{what} takes a second file of {} MB on node {node}, and {} MB are kept in reserve, \
            but only {} MB are free at {}",
            megabytes(bytes),
            megabytes(reserve),
            free >> 20,
            dir.display()
        );
        Err(io::Error::new(io::ErrorKind::StorageFull, reason))
    }
}

/// Makes the temporary files of clients' large transactions, which do not eat up the reserve.
pub(crate) fn guarded(shared: Arc<Shared>) -> MakeSpill {
    Arc::new(move || {
        let file = (shared.make_spill)()?;
        Ok(Arc::new(Guarded { file, shared: shared.clone() }))
    })
}

/// A file that takes nothing while there is little room.
struct Guarded {
    file: Arc<dyn File>,
    shared: Arc<Shared>,
}

impl File for Guarded {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_cached_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.shared.room.check()?;
        self.file.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}
