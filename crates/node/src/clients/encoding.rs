//! Finished transactions as they go into the log. Long ones are encoded on the blocking pool, a few
//! parts ahead of what is proposed.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use standby_consensus::PART_LEN;
use standby_filestorage::{Record, RecordData, put_record};
use standby_primary::input::{Finished, Piece, Pieces, Records};
use standby_primary::{Input, MANY};
use standby_zeo::{Content, PendingTransaction};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::cells::shared::Shared;
use crate::platform;

/// Parts of a long transaction that are at hand.
const AT_HAND: usize = 2;

/// Pieces that another thread makes.
struct Coming(mpsc::Receiver<io::Result<Piece>>);

impl Pieces for Coming {
    fn take(&mut self) -> io::Result<Option<Piece>> {
        match self.0.try_recv() {
            Ok(piece) => piece.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// What a client has finished, as it goes into the log.
pub(crate) fn finished(shared: &Arc<Shared>, mut buffer: Box<PendingTransaction>) -> Finished {
    let (meta, blobs) = (buffer.meta.clone(), buffer.take_blobs());
    // Of one with few objects all fits the closing entry, as a rule.
    let rest = match buffer.writes().len() <= MANY {
        true => encode(&buffer, &mut |_| false),
        false => Ok(None),
    };
    let records = match rest {
        Ok(Some(rest)) => Records::Rest(rest),
        Ok(None) => Records::Coming(Box::new(encode_beside(shared, buffer))),
        Err(error) => Records::Unreadable(error),
    };
    Finished { meta, blobs, records }
}

fn encode_beside(shared: &Arc<Shared>, buffer: Box<PendingTransaction>) -> Coming {
    let (pieces, coming) = platform::queue(AT_HAND);
    let shared = shared.clone();
    // It ends at the latest when nobody takes its pieces any more.
    drop(platform::spawn_blocking(move || {
        let send = |piece| {
            let taken = platform::send_blocking(&pieces, piece).is_ok();
            shared.report(Input::Encoded);
            taken
        };
        match encode(&buffer, &mut |part| send(Ok(Piece::Part(part)))) {
            Ok(Some(rest)) => drop(send(Ok(Piece::Rest(rest)))),
            // Nobody takes them.
            Ok(None) => {}
            Err(error) => drop(send(Err(error))),
        }
    }));
    Coming(coming)
}

/// Encodes the changes of a transaction: gives parts to `each`, and returns what is left, which is
/// no longer than a part; `None` if `each` takes no more.
fn encode(
    buffer: &PendingTransaction,
    each: &mut dyn FnMut(Bytes) -> bool,
) -> io::Result<Option<Bytes>> {
    let mut records = BytesMut::new();
    for write in buffer.writes() {
        let data = record_data(buffer.content(write)?);
        put_record(&Record { oid: write.oid, data }, &mut records);
        while records.len() > PART_LEN {
            if !each(records.split_to(PART_LEN).freeze()) {
                return Ok(None);
            }
        }
    }
    Ok(Some(records.freeze()))
}

/// What the session kept, as it goes into the log.
fn record_data(content: Content) -> RecordData {
    match content {
        Content::Data(data) => RecordData::Data(data),
        Content::Back(tid, data) => RecordData::Back(tid, data),
        Content::Gone => RecordData::Gone,
    }
}
