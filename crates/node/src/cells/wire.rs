//! What nodes say to each other after the handshake: one enum for each conversation.
//!
//! A frame is a length of 4 bytes, a kind of 1 (a letter), and the content. Nodes of other versions
//! speak the same letters: a letter never changes its meaning.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use standby_filestorage::{
    Hole, Record, TransactionMeta, put_meta, put_record, take_meta, take_record,
};
use standby_primary::command::Answer;
use standby_replica::outcomes::Outcomes;
use standby_types::{Oid, Tid, Transfer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::cells::announcement::Announcement;
use crate::cells::status::NodeReport;
use crate::transport::frames::{PeerError, read_frame};

/// A frame of a conversation.
pub(crate) trait Frame: Sized {
    /// Its letter.
    fn kind(&self) -> u8;

    /// Appends its content.
    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError>;

    /// Reads a frame; an error if it is malformed, or none of this conversation.
    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError>;

    /// Appends the whole frame; returns the length of its content.
    fn append(&self, out: &mut BytesMut) -> Result<usize, PeerError> {
        let begin = out.len();
        out.put_u32(0);
        out.put_u8(self.kind());
        self.put(out)?;
        let len = out.len() - begin - 4;
        let announced = u32::try_from(len).map_err(|_| malformed("frame: it is too long"))?;
        out[begin..begin + 4].copy_from_slice(&announced.to_be_bytes());
        Ok(len - 1)
    }

    /// The whole frame.
    fn encode(&self) -> Result<Bytes, PeerError> {
        let mut out = BytesMut::new();
        self.append(&mut out)?;
        Ok(out.freeze())
    }
}

pub(crate) async fn send(
    stream: &mut (impl AsyncWrite + Unpin),
    frame: &impl Frame,
) -> Result<(), PeerError> {
    stream.write_all(&frame.encode()?).await?;
    Ok(stream.flush().await?)
}

/// Receives a frame of at most `limit` bytes.
pub(crate) async fn receive<F: Frame>(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<F, PeerError> {
    let (kind, content) = read_frame(stream, limit).await?;
    F::take(kind, content)
}

fn malformed(what: &str) -> PeerError {
    PeerError::Protocol(format!("a malformed {what}"))
}

fn unknown(kind: u8) -> PeerError {
    PeerError::Protocol(format!("a frame of unknown kind {kind}"))
}

fn text(content: &[u8]) -> String {
    String::from_utf8_lossy(content).into_owned()
}

fn json(value: &impl Serialize, out: &mut BytesMut) -> Result<(), PeerError> {
    Ok(serde_json::to_writer(out.writer(), value)?)
}

/// How each conversation but a link begins: what is wanted, in JSON.
#[derive(Debug, PartialEq)]
pub(crate) struct Question<T>(pub T);

impl<T: Serialize + DeserializeOwned> Frame for Question<T> {
    fn kind(&self) -> u8 {
        b'q'
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        json(&self.0, out)
    }

    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        match kind {
            b'q' => Ok(Question(serde_json::from_slice(&content)?)),
            other => Err(unknown(other)),
        }
    }
}

/// The answer to what an administrator asks for.
#[derive(Debug, PartialEq)]
pub(crate) struct Answered(pub Answer);

impl Frame for Answered {
    fn kind(&self) -> u8 {
        b'a'
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        json(&self.0, out)
    }

    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        match kind {
            b'a' => Ok(Answered(serde_json::from_slice(&content)?)),
            other => Err(unknown(other)),
        }
    }
}

/// What the dialling side of a link says.
#[derive(Debug, PartialEq)]
pub(crate) enum LinkFrame {
    /// 'r': a message of consensus, as [`standby_consensus::decode_message`] reads it.
    Raft(Bytes),
    /// 's': a report of a node, in JSON.
    Report(Box<NodeReport>),
    /// 'a': an upload is to be had, in JSON.
    Announced(Announcement),
    /// 'd': an upload is given up, in JSON.
    Forgotten(Announcement),
    /// 'g': an upload is durable there too: its name, 16 bytes.
    Arrived(Transfer),
    /// 'k': nothing, after a second of it.
    Sign,
    /// What a newer version may say.
    Unknown(u8),
}

impl Frame for LinkFrame {
    fn kind(&self) -> u8 {
        match self {
            LinkFrame::Raft(_) => b'r',
            LinkFrame::Report(_) => b's',
            LinkFrame::Announced(_) => b'a',
            LinkFrame::Forgotten(_) => b'd',
            LinkFrame::Arrived(_) => b'g',
            LinkFrame::Sign => b'k',
            LinkFrame::Unknown(kind) => *kind,
        }
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        match self {
            LinkFrame::Raft(message) => out.put_slice(message),
            LinkFrame::Report(report) => json(report, out)?,
            LinkFrame::Announced(announcement) | LinkFrame::Forgotten(announcement) => {
                json(announcement, out)?;
            }
            LinkFrame::Arrived(transfer) => out.put_slice(&transfer.0),
            LinkFrame::Sign | LinkFrame::Unknown(_) => {}
        }
        Ok(())
    }

    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        Ok(match kind {
            b'r' => LinkFrame::Raft(content),
            // A report that cannot be read is one of another version.
            b's' => serde_json::from_slice(&content)
                .map_or(LinkFrame::Unknown(kind), |report| LinkFrame::Report(Box::new(report))),
            b'a' => LinkFrame::Announced(serde_json::from_slice(&content)?),
            b'd' => LinkFrame::Forgotten(serde_json::from_slice(&content)?),
            b'g' => {
                let name = content[..].try_into().map_err(|_| malformed("name of an upload"))?;
                LinkFrame::Arrived(Transfer(name))
            }
            b'k' => LinkFrame::Sign,
            other => LinkFrame::Unknown(other),
        })
    }
}

/// What the accepting side of a link says.
#[derive(Debug, PartialEq)]
pub(crate) enum LinkSign {
    /// 'k': it is there, and lets the other one in.
    There,
    /// 'n': it is there, and does not let the other one in as a member: why.
    NotLetIn(String),
}

impl Frame for LinkSign {
    fn kind(&self) -> u8 {
        match self {
            LinkSign::There => b'k',
            LinkSign::NotLetIn(_) => b'n',
        }
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        if let LinkSign::NotLetIn(reason) = self {
            out.put_slice(reason.as_bytes());
        }
        Ok(())
    }

    /// A newer version may say what this one does not know: it is there.
    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        Ok(match kind {
            b'n' => LinkSign::NotLetIn(text(&content)),
            _ => LinkSign::There,
        })
    }
}

/// What is answered to a node that fetches blobs.
#[derive(Debug, PartialEq)]
pub(crate) enum BlobFrame {
    /// 'c': a piece; of a list of blobs, oids and tids of 8 bytes each.
    Piece(Bytes),
    /// 'h': that is all; the SHA-256 of all pieces, which a list does not have.
    End(Bytes),
    /// 'p': a pack has removed it.
    PackedAway,
    /// 'x': why not.
    Refused(String),
}

impl Frame for BlobFrame {
    fn kind(&self) -> u8 {
        match self {
            BlobFrame::Piece(_) => b'c',
            BlobFrame::End(_) => b'h',
            BlobFrame::PackedAway => b'p',
            BlobFrame::Refused(_) => b'x',
        }
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        match self {
            BlobFrame::Piece(bytes) | BlobFrame::End(bytes) => out.put_slice(bytes),
            BlobFrame::PackedAway => {}
            BlobFrame::Refused(reason) => out.put_slice(reason.as_bytes()),
        }
        Ok(())
    }

    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        Ok(match kind {
            b'c' => BlobFrame::Piece(content),
            b'h' => BlobFrame::End(content),
            b'p' => BlobFrame::PackedAway,
            b'x' => BlobFrame::Refused(text(&content)),
            other => return Err(unknown(other)),
        })
    }
}

/// What is answered to a node that asks for a block of a data file.
#[derive(Debug, PartialEq)]
pub(crate) enum BlockFrame {
    /// 'd': its bytes.
    Block(Bytes),
    /// 'x': why not.
    Refused(String),
}

impl Frame for BlockFrame {
    fn kind(&self) -> u8 {
        match self {
            BlockFrame::Block(_) => b'd',
            BlockFrame::Refused(_) => b'x',
        }
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        match self {
            BlockFrame::Block(bytes) => out.put_slice(bytes),
            BlockFrame::Refused(reason) => out.put_slice(reason.as_bytes()),
        }
        Ok(())
    }

    fn take(kind: u8, content: Bytes) -> Result<Self, PeerError> {
        Ok(match kind {
            b'd' => BlockFrame::Block(content),
            b'x' => BlockFrame::Refused(text(&content)),
            other => return Err(unknown(other)),
        })
    }
}

/// What a transaction says, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Digest {
    pub tid: Tid,
    /// It was packed, or comes from a fast recovery: what it says need not be the same everywhere.
    pub partial: bool,
    /// A checksum of all that it says.
    pub sum: u32,
}

/// 'd': what is answered to a node that compares its data file: of each transaction its tid 8, its
/// status 1 ('p' if it is partial), its checksum 4.
#[derive(Debug, PartialEq)]
pub(crate) struct Digests(pub Vec<Digest>);

const DIGEST: usize = 13;

impl Frame for Digests {
    fn kind(&self) -> u8 {
        b'd'
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        for Digest { tid, partial, sum } in &self.0 {
            out.put_u64(tid.0);
            out.put_u8(if *partial { b'p' } else { b' ' });
            out.put_u32(*sum);
        }
        Ok(())
    }

    fn take(kind: u8, mut content: Bytes) -> Result<Self, PeerError> {
        if kind != b'd' {
            return Err(unknown(kind));
        }
        if !content.len().is_multiple_of(DIGEST) {
            return Err(malformed("list of checksums"));
        }
        let count = content.len() / DIGEST;
        let one = |_| Digest {
            tid: Tid(content.get_u64()),
            partial: content.get_u8() == b'p',
            sum: content.get_u32(),
        };
        Ok(Digests((0..count).map(one).collect()))
    }
}

/// What is answered to a node that catches up. Everything that follows a storage's name is about
/// that storage.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum CatchUpFrame {
    /// 'p': about how many bytes come in all, 8; again and again.
    Total(u64),
    /// 's': a storage's name.
    Storage(String),
    /// 'f': a hole in what comes: after 8, through 8.
    Hole(Hole),
    /// 'o': what has become of the storage's transactions with a token, as [`Outcomes::encode`]
    /// writes it.
    Outcomes(Outcomes),
    /// 't': a transaction's head.
    Begin(TransactionMeta),
    /// 'b': the oid of the next record, which has a blob.
    Blob(Oid),
    /// 'c': bytes of that blob.
    BlobPiece(Bytes),
    /// 'h': the SHA-256 of all of them.
    BlobEnd(Bytes),
    /// 'd': a record.
    Record(Record),
    /// 'e': the end of a transaction.
    End,
    /// 'z': that is all.
    Done,
    /// 'x': why not.
    Refused(String),
}

impl Frame for CatchUpFrame {
    fn kind(&self) -> u8 {
        match self {
            CatchUpFrame::Total(_) => b'p',
            CatchUpFrame::Storage(_) => b's',
            CatchUpFrame::Hole(_) => b'f',
            CatchUpFrame::Outcomes(_) => b'o',
            CatchUpFrame::Begin(_) => b't',
            CatchUpFrame::Blob(_) => b'b',
            CatchUpFrame::BlobPiece(_) => b'c',
            CatchUpFrame::BlobEnd(_) => b'h',
            CatchUpFrame::Record(_) => b'd',
            CatchUpFrame::End => b'e',
            CatchUpFrame::Done => b'z',
            CatchUpFrame::Refused(_) => b'x',
        }
    }

    fn put(&self, out: &mut BytesMut) -> Result<(), PeerError> {
        match self {
            CatchUpFrame::Total(bytes) => out.put_u64(*bytes),
            CatchUpFrame::Storage(text) | CatchUpFrame::Refused(text) => {
                out.put_slice(text.as_bytes());
            }
            CatchUpFrame::Hole(hole) => {
                out.put_u64(hole.after.0);
                out.put_u64(hole.through.0);
            }
            CatchUpFrame::Begin(meta) => put_meta(meta, out),
            CatchUpFrame::Blob(oid) => out.put_u64(oid.0),
            CatchUpFrame::Outcomes(outcomes) => out.put_slice(&outcomes.encode()),
            CatchUpFrame::BlobPiece(bytes) | CatchUpFrame::BlobEnd(bytes) => out.put_slice(bytes),
            CatchUpFrame::Record(record) => put_record(record, out),
            CatchUpFrame::End | CatchUpFrame::Done => {}
        }
        Ok(())
    }

    fn take(kind: u8, mut content: Bytes) -> Result<Self, PeerError> {
        let transaction = |_| malformed("transaction");
        let number = |bytes: &[u8]| {
            bytes.try_into().map(u64::from_be_bytes).map_err(|_| malformed("number"))
        };
        Ok(match kind {
            b'p' => CatchUpFrame::Total(number(&content)?),
            b's' => CatchUpFrame::Storage(text(&content)),
            b'f' => {
                let (after, through) = content.split_at(content.len() / 2);
                let (after, through) = (Tid(number(after)?), Tid(number(through)?));
                CatchUpFrame::Hole(Hole { after, through })
            }
            b'o' => CatchUpFrame::Outcomes(
                Outcomes::decode(&content).ok_or_else(|| malformed("outcomes"))?,
            ),
            b't' => CatchUpFrame::Begin(take_meta(&mut content).map_err(transaction)?),
            b'b' => CatchUpFrame::Blob(Oid(number(&content)?)),
            b'c' => CatchUpFrame::BlobPiece(content),
            b'h' => CatchUpFrame::BlobEnd(content),
            b'd' => CatchUpFrame::Record(take_record(&mut content).map_err(transaction)?),
            b'e' => CatchUpFrame::End,
            b'z' => CatchUpFrame::Done,
            b'x' => CatchUpFrame::Refused(text(&content)),
            other => return Err(unknown(other)),
        })
    }
}

/// Reads a frame of each conversation, writes what it has read, and reads it again; an error if
/// that is something else. For tests and the fuzz target: what cannot be read at first is none.
pub fn read_in_all_ways(kind: u8, content: &Bytes) -> Result<(), PeerError> {
    fn one<F: Frame + PartialEq>(kind: u8, content: &Bytes, exact: bool) -> Result<(), PeerError> {
        let Ok(frame) = F::take(kind, content.clone()) else { return Ok(()) };
        let mut whole = frame.encode()?;
        let same_length = whole.get_u32() as usize == whole.len();
        let again = F::take(whole.get_u8(), whole)?;
        let same = same_length && (!exact || again == frame);
        if same { Ok(()) } else { Err(malformed("frame: it was written as another one")) }
    }
    one::<Question<serde_json::Value>>(kind, content, false)?;
    one::<Answered>(kind, content, true)?;
    // A report has fractions, which JSON rounds.
    one::<LinkFrame>(kind, content, kind != b's')?;
    one::<LinkSign>(kind, content, true)?;
    one::<BlobFrame>(kind, content, true)?;
    one::<BlockFrame>(kind, content, true)?;
    one::<Digests>(kind, content, true)?;
    one::<CatchUpFrame>(kind, content, true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use standby_filestorage::RecordData;
    use standby_types::TransactionToken;

    use super::*;

    fn bytes() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    fn outcomes() -> impl Strategy<Value = Outcomes> {
        let committed = (any::<[u8; 16]>(), any::<u64>());
        (any::<u64>(), proptest::collection::vec(committed, 0..5)).prop_map(
            |(horizon, committed)| {
                let mut outcomes = Outcomes::unknown_until(Tid(horizon));
                for (tid, (client, number)) in committed.into_iter().enumerate() {
                    outcomes.committed(TransactionToken { client, number }, Tid(tid as u64));
                }
                outcomes
            },
        )
    }

    fn catch_up_frame() -> impl Strategy<Value = CatchUpFrame> {
        let data = prop_oneof![
            bytes().prop_map(RecordData::Data),
            (any::<u64>(), proptest::option::of(bytes()))
                .prop_map(|(tid, data)| RecordData::Back(Tid(tid), data)),
            Just(RecordData::Gone),
        ];
        let meta = (any::<u64>(), bytes(), bytes(), bytes());
        prop_oneof![
            any::<u64>().prop_map(CatchUpFrame::Total),
            ".{0,20}".prop_map(CatchUpFrame::Storage),
            (any::<u64>(), any::<u64>()).prop_map(|(after, through)| {
                CatchUpFrame::Hole(Hole { after: Tid(after), through: Tid(through) })
            }),
            meta.prop_map(|(tid, user, description, extension)| {
                let (tid, status) = (Tid(tid), b' ');
                CatchUpFrame::Begin(TransactionMeta { tid, status, user, description, extension })
            }),
            any::<u64>().prop_map(|oid| CatchUpFrame::Blob(Oid(oid))),
            outcomes().prop_map(CatchUpFrame::Outcomes),
            bytes().prop_map(CatchUpFrame::BlobPiece),
            bytes().prop_map(CatchUpFrame::BlobEnd),
            (any::<u64>(), data)
                .prop_map(|(oid, data)| CatchUpFrame::Record(Record { oid: Oid(oid), data })),
            Just(CatchUpFrame::End),
            Just(CatchUpFrame::Done),
            ".{0,20}".prop_map(CatchUpFrame::Refused),
        ]
    }

    fn comes_back<F: Frame + PartialEq + std::fmt::Debug>(frame: F) {
        let mut whole = frame.encode().unwrap();
        assert_eq!(whole.get_u32() as usize, whole.len());
        assert_eq!(whole.get_u8(), frame.kind());
        assert_eq!(F::take(frame.kind(), whole).unwrap(), frame);
    }

    proptest! {
        #[test]
        fn frames_of_a_catch_up_come_back(frame in catch_up_frame()) {
            comes_back(frame);
        }

        #[test]
        fn anything_is_read_or_refused(kind in any::<u8>(), content in bytes()) {
            for letter in [kind, b'a' + kind % 26] {
                read_in_all_ways(letter, &content).unwrap();
            }
        }
    }

    #[test]
    fn other_frames_come_back() {
        let bytes = Bytes::from_static(b"bytes");
        comes_back(Question(serde_json::json!({ "storage": "1" })));
        comes_back(Answered(Err("no".into())));
        comes_back(LinkFrame::Raft(bytes.clone()));
        comes_back(LinkFrame::Report(Box::default()));
        comes_back(LinkFrame::Arrived(Transfer([7; 16])));
        comes_back(LinkFrame::Sign);
        comes_back(LinkSign::There);
        comes_back(LinkSign::NotLetIn("why".into()));
        comes_back(BlobFrame::Piece(bytes.clone()));
        comes_back(BlobFrame::End(bytes.clone()));
        comes_back(BlobFrame::PackedAway);
        comes_back(BlobFrame::Refused("why".into()));
        comes_back(BlockFrame::Block(bytes));
        comes_back(BlockFrame::Refused("why".into()));
        let digest = |tid, partial| Digest { tid: Tid(tid), partial, sum: 5 };
        comes_back(Digests(vec![digest(1, true), digest(u64::MAX, false)]));
    }

    /// The letters and the layout are those of former versions.
    #[test]
    fn the_bytes_stay() {
        let hole = CatchUpFrame::Hole(Hole { after: Tid(1), through: Tid(2) });
        let whole = b"\0\0\0\x11f\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02";
        assert_eq!(hole.encode().unwrap()[..], whole[..]);
        let digests = Digests(vec![Digest { tid: Tid(3), partial: true, sum: 4 }]);
        assert_eq!(digests.encode().unwrap()[..], b"\0\0\0\x0ed\0\0\0\0\0\0\0\x03p\0\0\0\x04"[..]);
        let sign = LinkSign::NotLetIn("no".into());
        assert_eq!(sign.encode().unwrap()[..], b"\0\0\0\x03nno"[..]);
    }

    #[test]
    fn what_a_newer_version_says_is_no_error() {
        let content = Bytes::from_static(b"{}");
        assert_eq!(LinkFrame::take(b'?', content.clone()).unwrap(), LinkFrame::Unknown(b'?'));
        assert_eq!(LinkSign::take(b'?', content.clone()).unwrap(), LinkSign::There);
        assert!(CatchUpFrame::take(b'?', content).is_err());
        assert!(Digests::take(b'd', Bytes::from_static(&[0; 12])).is_err());
    }
}
