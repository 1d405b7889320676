//! Bytes of a data file for a node on which they are damaged.
//!
//! ```text
//! asking node                                  serving node
//!    'q' JSON: storage, offset in its  ─────▶
//!        data file
//!                                      ◀─────  'd' the bytes of the block, or 'x' why not
//! ```
//!
//! The data files of two nodes need not be the same byte for byte (one may have been packed or
//! recovered another way): who asks compares what comes with its own checksum.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use standby_filestorage::{BLOCK, DamagedBlock, Mend};
use tokio::runtime::Handle;
use tracing::{info, warn};

use crate::cells::repair_sources::RepairSources;
use crate::cells::shared::Shared;
use crate::transport::frames::{PeerError, blocking, read_frame, write_frame};
use crate::transport::handshake::{Introduction, Purpose, connect};
use crate::transport::stream::Stream;

#[derive(Debug, Serialize, Deserialize)]
struct Wanted {
    storage: String,
    offset: u64,
}

/// Asks the node at `address` for a block.
pub async fn fetch_block(
    me: &Introduction,
    address: &str,
    storage: &str,
    damaged: DamagedBlock,
) -> Result<Vec<u8>, PeerError> {
    let (mut stream, _) = connect(me, address, Purpose::Block).await?;
    let wanted = Wanted { storage: storage.to_owned(), offset: damaged.offset };
    write_frame(&mut stream, b'q', &serde_json::to_vec(&wanted)?).await?;
    match read_frame(&mut stream, BLOCK as usize + 1).await? {
        (b'd', bytes) => Ok(bytes.to_vec()),
        (b'x', reason) => Err(PeerError::Refused(String::from_utf8_lossy(&reason).into_owned())),
        (other, _) => Err(PeerError::Protocol(format!("a frame of unknown kind {other}"))),
    }
}

/// Serves a block.
pub async fn serve(shared: &Arc<Shared>, mut stream: Stream) -> Result<(), PeerError> {
    let (_, json) = read_frame(&mut stream, 4 << 10).await?;
    let wanted: Wanted = serde_json::from_slice(&json)?;
    let reader = shared.storages.get(&wanted.storage).map(|storage| storage.reader());
    let found = match reader {
        Some(reader) => blocking(move || Ok(reader.block(wanted.offset)?)).await?,
        None => None,
    };
    match found {
        Some(bytes) => write_frame(&mut stream, b'd', &bytes).await,
        None => write_frame(&mut stream, b'x', b"this node does not have these bytes either").await,
    }
}

/// How long somebody who reads a damaged block waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gets blocks of a storage from them. To be called within the runtime.
pub fn mender(helpers: &Arc<RepairSources>, storage: &str) -> Mend {
    let (helpers, storage, runtime) = (helpers.clone(), storage.to_owned(), Handle::current());
    #[cfg(feature = "simulated")]
    if let Some(mend) = crate::platform::simulated::mender() {
        return mend;
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
                        warn!(storage = name, offset, address, "damage is mended from a node");
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
