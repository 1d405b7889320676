//! Frames: a length (4 bytes, big-endian), then that many bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The longest frame a registered client may send: one record of an object, with its head.
pub const MAX_FRAME: usize = 1 << 30;

/// The longest frame before `register` has succeeded: strangers get no memory.
pub const MAX_FRAME_BEFORE_REGISTER: usize = 64 << 10;

/// A frame announced more bytes than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {announced} bytes was announced; at most {limit} are allowed here")]
pub struct FrameTooLong {
    /// What the header says.
    pub announced: usize,
    /// What is allowed.
    pub limit: usize,
}

/// Cuts a stream of bytes into frames.
#[derive(Default)]
pub struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    /// Where to put the bytes that were received. Memory grows with what has come, not with
    /// what was announced.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Bytes of memory that it holds.
    pub fn held(&self) -> usize {
        self.buffer.capacity()
    }

    /// The next whole frame, without its header.
    pub fn next_frame(&mut self, limit: usize) -> Result<Option<Bytes>, FrameTooLong> {
        let Some(header) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let announced = u32::from_be_bytes(*header) as usize;
        if announced > limit {
            return Err(FrameTooLong { announced, limit });
        }
        if self.buffer.len() < 4 + announced {
            return Ok(None);
        }
        self.buffer.advance(4);
        Ok(Some(self.buffer.split_to(announced).freeze()))
    }
}

/// A frame with the given content.
pub fn frame(content: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(4 + content.len());
    out.put_u32(content.len() as u32);
    out.put_slice(content);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_whole_and_in_order() {
        let mut reader = FrameReader::default();
        let stream = [frame(b"one"), frame(b""), frame(b"three")].concat();
        let mut found = Vec::new();
        for byte in stream {
            reader.buffer().put_u8(byte);
            while let Some(frame) = reader.next_frame(100).unwrap() {
                found.push(frame);
            }
        }
        assert_eq!(found, [&b"one"[..], b"", b"three"]);
    }

    #[test]
    fn long_frames_are_refused_by_their_header() {
        let mut reader = FrameReader::default();
        reader.buffer().put_u32(101);
        let refused = FrameTooLong { announced: 101, limit: 100 };
        assert_eq!(reader.next_frame(100), Err(refused));
    }
}
