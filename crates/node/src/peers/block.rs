//! Bytes of a data file for a node on which they are damaged.
//!
//! The asking node names the storage and an offset in its data file; the answer is a
//! [`BlockFrame`].
//!
//! The data files of two nodes need not be the same byte for byte (one may have been packed or
//! recovered another way): who asks compares what comes with its own checksum.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_filestorage::{BLOCK, DamagedBlock, Repair};
use tokio::runtime::Handle;
use tracing::{info, warn};

use crate::cells::repair_sources::RepairSources;
use crate::cells::shared::Shared;
use crate::cells::wire::{BlockFrame, Question, receive, send};
use crate::transport::frames::{PeerError, blocking};
use crate::transport::handshake::{Introduction, Purpose, connect};
use crate::transport::stream::Stream;

#[derive(Debug, Serialize, Deserialize)]
struct Wanted {
    storage: String,
    offset: u64,
}

/// Asks the node at `address` for a block.
pub(crate) async fn fetch_block(
    me: &Introduction,
    address: &str,
    storage: &str,
    damaged: DamagedBlock,
) -> Result<Vec<u8>, PeerError> {
    let (mut stream, _) = connect(me, address, Purpose::Block).await?;
    let wanted = Wanted { storage: storage.to_owned(), offset: damaged.offset };
    send(&mut stream, &Question(wanted)).await?;
    match receive(&mut stream, BLOCK as usize + 1).await? {
        BlockFrame::Block(bytes) => Ok(bytes.to_vec()),
        BlockFrame::Refused(reason) => Err(PeerError::Refused(reason)),
    }
}

/// Serves a block.
pub(crate) async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let Question::<Wanted>(wanted) = receive(&mut stream, 4 << 10).await?;
    let reader = shared.storages.get(&wanted.storage).map(|storage| storage.reader());
    let found = match reader {
        Some(reader) => blocking(move || Ok(reader.block(wanted.offset)?)).await?,
        None => None,
    };
    let lacks = || BlockFrame::Refused("this node does not have these bytes either".into());
    let answer = found.map_or_else(lacks, |bytes| BlockFrame::Block(bytes.into()));
    send(&mut stream, &answer).await
}

/// How long somebody who reads a damaged block waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gets blocks of a storage from them. To be called within the runtime.
pub(crate) fn repairer(helpers: &Arc<RepairSources>, storage: &str) -> Repair {
    let (helpers, storage, runtime) = (helpers.clone(), storage.to_owned(), Handle::current());
    #[cfg(feature = "simulated")]
    if let Some(repair) = crate::platform::simulated::repairer() {
        return repair;
    }
    Arc::new(move |damaged| {
        let (me, addresses) = helpers.get();
        let (me, name) = (me?, storage.clone());
        let (sender, answer) = channel();
        runtime.spawn(async move {
            for address in addresses {
                match fetch_block(&me, &address, &name, damaged).await {
                    Ok(bytes) if crc32c::crc32c(&bytes) == damaged.sum => {
                        let offset = damaged.offset;
                        warn!(storage = name, offset, address, "damage is repaired from a node");
                        let _ = sender.send(bytes);
                        return;
                    }
                    Ok(_) => info!(
                        address,
                        offset = damaged.offset,
                        "the data file of that node is not the same there"
                    ),
                    Err(error) => {
                        info!(address, %error, "cannot get a damaged block from a node")
                    }
                }
            }
        });
        answer.recv_timeout(PATIENCE).ok()
    })
}
