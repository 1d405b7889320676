//! Raft's messages between nodes, in an encoding of our own.
//!
//! ```text
//! version 1 · type 1 · to, from, term, log term, index, commit, commit term, request snapshot,
//! reject hint 8 each · priority 8 · reject 1 · context (length 4, bytes) ·
//! entries (count 4; each: type 1, term 8, index 8, context, data) ·
//! snapshot (0, or 1 and: index 8, term 8, membership with data, as a byte string)
//! ```

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::{Entry, EntryType, Message, MessageType, Snapshot};
use standby_types::{NodeId, Term};

use crate::codec::{Malformed, Reader, put_bytes, put_list};
use crate::command::{ClosingEntry, closing_with_blobs};
use crate::membership::Membership;

const VERSION: u8 = 1;

/// A message that has come from a peer. What it says is Raft's business.
#[derive(Clone, Debug)]
pub struct PeerMessage(pub(crate) Message);

impl PeerMessage {
    /// Who it says has sent it; the connection must agree.
    pub fn from(&self) -> NodeId {
        NodeId(self.0.from)
    }

    /// To whom it is addressed.
    pub fn to(&self) -> NodeId {
        NodeId(self.0.to)
    }

    /// True if it brings entries of the log.
    pub fn is_append(&self) -> bool {
        self.0.get_msg_type() == MessageType::MsgAppend
    }

    /// True if what it brings takes no room: of a leader that begins its term, or only news of what
    /// is committed.
    pub fn is_without_data(&self) -> bool {
        self.0.get_entries().iter().all(|entry| entry.data.is_empty() && entry.context.is_empty())
    }

    /// The transactions with blobs among its entries: they may be persisted only with their blobs.
    pub fn closings_with_blobs(&self) -> Vec<ClosingEntry> {
        let entries = self.0.get_entries().iter();
        entries.filter_map(|entry| closing_with_blobs(&entry.data)).collect()
    }

    /// The sender's term.
    pub fn term(&self) -> Term {
        Term(self.0.term)
    }
}

/// The messages that travel. The others are Raft's notes to itself.
const TYPES: [(MessageType, u8); 13] = [
    (MessageType::MsgAppend, 3),
    (MessageType::MsgAppendResponse, 4),
    (MessageType::MsgRequestVote, 5),
    (MessageType::MsgRequestVoteResponse, 6),
    (MessageType::MsgSnapshot, 7),
    (MessageType::MsgHeartbeat, 8),
    (MessageType::MsgHeartbeatResponse, 9),
    (MessageType::MsgTransferLeader, 13),
    (MessageType::MsgTimeoutNow, 14),
    (MessageType::MsgReadIndex, 15),
    (MessageType::MsgReadIndexResp, 16),
    (MessageType::MsgRequestPreVote, 17),
    (MessageType::MsgRequestPreVoteResponse, 18),
];

/// The message's bytes; `None` for a note to itself.
pub(crate) fn encode_message(message: &Message) -> Option<Bytes> {
    let (_, code) = TYPES.iter().find(|(kind, _)| *kind == message.get_msg_type())?;
    let size: usize = message.get_entries().iter().map(|e| e.data.len() + 64).sum();
    let mut out = BytesMut::with_capacity(128 + size);
    out.put_slice(&[VERSION, *code]);
    for number in [
        message.to,
        message.from,
        message.term,
        message.log_term,
        message.index,
        message.commit,
        message.commit_term,
        message.request_snapshot,
        message.reject_hint,
        message.priority as u64,
    ] {
        out.put_u64(number);
    }
    out.put_u8(u8::from(message.reject));
    put_bytes(&mut out, &message.context);
    put_list(&mut out, message.get_entries().iter(), |out, entry| {
        out.put_u8(entry_code(entry.get_entry_type()));
        out.put_u64(entry.term);
        out.put_u64(entry.index);
        put_bytes(out, &entry.context);
        put_bytes(out, &entry.data);
    });
    let snapshot = message.get_snapshot();
    out.put_u8(u8::from(!snapshot.is_empty()));
    if !snapshot.is_empty() {
        out.put_u64(snapshot.get_metadata().index);
        out.put_u64(snapshot.get_metadata().term);
        put_bytes(&mut out, &snapshot.data);
    }
    Some(out.freeze())
}

/// Reads a message; refuses what is not one.
pub fn decode_message(bytes: Bytes) -> Result<PeerMessage, Malformed> {
    let mut reader = Reader::new(bytes, "peer message");
    if reader.u8()? != VERSION {
        return Err(reader.malformed());
    }
    let code = reader.u8()?;
    let kind = TYPES.iter().find(|(_, c)| *c == code).ok_or(reader.malformed())?.0;
    let mut message = Message::default();
    message.set_msg_type(kind);
    message.to = reader.u64()?;
    message.from = reader.u64()?;
    message.term = reader.u64()?;
    message.log_term = reader.u64()?;
    message.index = reader.u64()?;
    message.commit = reader.u64()?;
    message.commit_term = reader.u64()?;
    message.request_snapshot = reader.u64()?;
    message.reject_hint = reader.u64()?;
    message.priority = reader.u64()? as i64;
    message.reject = reader.bool()?;
    message.context = reader.bytes()?;
    let entries: Vec<Entry> = reader.list(|r| {
        let mut entry = Entry::default();
        entry.set_entry_type(entry_type(r.u8()?).ok_or(r.malformed())?);
        entry.term = r.u64()?;
        entry.index = r.u64()?;
        entry.context = r.bytes()?;
        entry.data = r.bytes()?;
        Ok(entry)
    })?;
    // Raft relies on entries that follow each other without a gap.
    let follow = (entries.iter().enumerate())
        .all(|(nth, e)| e.index == message.index.wrapping_add(nth as u64 + 1));
    if kind == MessageType::MsgAppend && !follow {
        return Err(reader.malformed());
    }
    let asks = matches!(kind, MessageType::MsgReadIndex | MessageType::MsgReadIndexResp);
    if asks && entries.len() != 1 {
        return Err(reader.malformed());
    }
    message.set_entries(entries.into());
    if reader.bool()? {
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = reader.u64()?;
        snapshot.mut_metadata().term = reader.u64()?;
        snapshot.data = reader.bytes()?;
        let (membership, _) = Membership::decode(snapshot.data.clone())?;
        snapshot.mut_metadata().set_conf_state(membership.to_conf_state());
        message.set_snapshot(snapshot);
    } else if kind == MessageType::MsgSnapshot {
        return Err(reader.malformed());
    }
    reader.end()?;
    Ok(PeerMessage(message))
}

pub(crate) fn entry_code(kind: EntryType) -> u8 {
    match kind {
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    }
}

/// The one-by-one form of membership changes (1) is never used here.
pub(crate) fn entry_type(code: u8) -> Option<EntryType> {
    match code {
        0 => Some(EntryType::EntryNormal),
        2 => Some(EntryType::EntryConfChangeV2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append() -> Message {
        let mut entry = Entry::default();
        entry.index = 8;
        entry.term = 3;
        entry.data = Bytes::from_static(b"data");
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgAppend);
        message.to = 2;
        message.from = 1;
        message.term = 3;
        message.index = 7;
        message.reject_hint = 5;
        message.priority = -1;
        message.context = Bytes::from_static(b"context");
        message.set_entries(vec![entry].into());
        message
    }

    #[test]
    fn messages_travel() {
        let message = append();
        let back = decode_message(encode_message(&message).unwrap()).unwrap();
        assert_eq!(back.0, message);
    }

    #[test]
    fn snapshots_travel_with_their_membership() {
        let member = crate::Member {
            id: NodeId(1),
            name: "n1".into(),
            group: "g".into(),
            peer_address: "h:1".into(),
            witness: false,
        };
        let mut data = BytesMut::new();
        let membership = Membership::founded_by(member);
        membership.encode(&mut data);
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgSnapshot);
        message.mut_snapshot().mut_metadata().index = 9;
        message.mut_snapshot().mut_metadata().set_conf_state(membership.to_conf_state());
        message.mut_snapshot().data = data.freeze();
        let back = decode_message(encode_message(&message).unwrap()).unwrap();
        assert_eq!(back.0, message);
    }

    #[test]
    fn gaps_and_notes_to_itself_are_refused() {
        let mut message = append();
        message.mut_entries()[0].index = 9;
        assert!(decode_message(encode_message(&message).unwrap()).is_err());
        message.set_msg_type(MessageType::MsgHup);
        assert!(encode_message(&message).is_none());
    }

    proptest::proptest! {
        #[test]
        fn damaged_messages_are_read_or_refused(at: usize, byte: u8) {
            let mut bytes = encode_message(&append()).unwrap().to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = decode_message(bytes.into());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = decode_message(bytes.into());
        }
    }
}
