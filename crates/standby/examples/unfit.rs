//! Appends an entry that no node can apply to the log of a node that is stopped: a transaction with
//! the highest tid that there is. For tests of what administrators do then.
//!
//!     unfit STATE-DIR

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bytes::{Bytes, BytesMut};
use standby_consensus::{Batch, ClosingEntry, Command, LogWriter, recover};
use standby_disk::OsDisk;
use standby_filestorage::{TransactionMeta, put_meta};
use standby_types::{Disk, LogIndex, Tid};

fn main() -> anyhow::Result<()> {
    let state = std::env::args_os().nth(1).context("unfit STATE-DIR")?;
    let (disk, dir): (Arc<dyn Disk>, _) = (Arc::new(OsDisk), Path::new(&state).join("log"));
    let mut recovered = recover(&disk, &dir)?;
    let (index, term) = (LogIndex(recovered.last_index().0 + 1), recovered.last_term());
    let mut head = BytesMut::new();
    put_meta(&TransactionMeta::new(Tid(u64::MAX)), &mut head);
    let ending = ClosingEntry {
        storage: "1".into(),
        token: None,
        head: head.freeze(),
        parts: Vec::new(),
        blobs: Vec::new(),
        rest: Bytes::new(),
    };
    let entry = Batch::of_entry(index, term, Command::Transaction(ending).encode());
    LogWriter::open(disk, &dir, &mut recovered, None)?.write(vec![entry])?;
    println!("{index} {term}");
    Ok(())
}
