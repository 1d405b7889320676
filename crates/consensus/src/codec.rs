//! Numbers and byte strings, as they stand in messages and in the log.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes that do not follow their layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub struct Malformed(pub &'static str);

/// Takes values from the front of a byte string. Every method fails instead of reading too far.
pub(crate) struct Reader {
    bytes: Bytes,
    what: &'static str,
}

impl Reader {
    pub fn new(bytes: Bytes, what: &'static str) -> Reader {
        Reader { bytes, what }
    }

    pub fn malformed(&self) -> Malformed {
        Malformed(self.what)
    }

    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.bytes.try_get_u8().map_err(|_| Malformed(self.what))
    }

    pub fn bool(&mut self) -> Result<bool, Malformed> {
        Ok(self.u8()? != 0)
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.bytes.try_get_u32().map_err(|_| Malformed(self.what))
    }

    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.bytes.try_get_u64().map_err(|_| Malformed(self.what))
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut array = [0; N];
        self.bytes.try_copy_to_slice(&mut array).map_err(|_| Malformed(self.what))?;
        Ok(array)
    }

    pub fn bytes(&mut self) -> Result<Bytes, Malformed> {
        let len = self.u32()? as usize;
        if len > self.bytes.len() {
            return Err(self.malformed());
        }
        Ok(self.bytes.split_to(len))
    }

    pub fn string(&mut self) -> Result<String, Malformed> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| self.malformed())
    }

    /// A list: its length, then the items. Every item takes a byte at least.
    pub fn list<T, C: FromIterator<T>>(
        &mut self,
        mut item: impl FnMut(&mut Reader) -> Result<T, Malformed>,
    ) -> Result<C, Malformed> {
        let len = self.u32()? as usize;
        if len > self.bytes.len() {
            return Err(self.malformed());
        }
        (0..len).map(|_| item(self)).collect()
    }

    pub fn rest(self) -> Bytes {
        self.bytes
    }

    pub fn end(self) -> Result<(), Malformed> {
        if self.bytes.is_empty() { Ok(()) } else { Err(self.malformed()) }
    }
}

pub(crate) fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

pub(crate) fn put_list<T>(
    out: &mut BytesMut,
    items: impl ExactSizeIterator<Item = T>,
    mut item: impl FnMut(&mut BytesMut, T),
) {
    out.put_u32(items.len() as u32);
    for each in items {
        item(out, each);
    }
}
