//! What clients keep in objects: who wrote it, on the strength of what, and an amount.

use standby_types::Tid;

/// The class of an object: none.
const PLAIN: &[u8] = b"\x80\x03N.";
/// The class of a blob.
const BLOB: &[u8] = b"\x80\x03cZODB.blob\nBlob\n.";

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// The client.
    pub client: u32,
    /// The number of its transaction.
    pub number: u64,
    /// The revision that it has read before.
    pub base: Tid,
    /// What it is worth.
    pub amount: i64,
}

impl Content {
    /// As a record of ZODB: the pickle of a class and the pickle of a state (bytes), `padding`
    /// bytes longer.
    pub fn encode(&self, padding: usize, blob: bool) -> Vec<u8> {
        let Content { client, number, base, amount } = self;
        let text = format!("{client} {number} {} {amount} ", base.0);
        let mut out = [if blob { BLOB } else { PLAIN }, b"\x80\x03B"].concat();
        out.extend_from_slice(&((text.len() + padding) as u32).to_le_bytes());
        out.extend_from_slice(text.as_bytes());
        out.resize(out.len() + padding, b'.');
        out.push(b'.');
        out
    }

    /// Reads a record.
    pub fn decode(record: &[u8]) -> Option<Content> {
        let state = record.strip_prefix(PLAIN).or_else(|| record.strip_prefix(BLOB))?;
        let text = std::str::from_utf8(state.get(7..)?).ok()?;
        let mut words = text.split(' ');
        Some(Content {
            client: words.next()?.parse().ok()?,
            number: words.next()?.parse().ok()?,
            base: Tid(words.next()?.parse().ok()?),
            amount: words.next()?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_what_was_put_into_it() {
        let content = Content { client: 3, number: 12, base: Tid(77), amount: -5 };
        for (padding, blob) in [(0, false), (1, true), (1000, false)] {
            assert_eq!(Content::decode(&content.encode(padding, blob)), Some(content));
        }
        assert_eq!(Content::decode(b"\x80\x03N."), None);
    }
}
