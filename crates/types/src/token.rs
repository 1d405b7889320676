//! Transaction tokens: how a client names a transaction before it has a tid.

use std::fmt;

/// Names one transaction of one client, so that the client can ask what became of it.
///
/// ```text
/// client 16 (drawn at random) · number 8 (big-endian)
/// ```
///
/// A client uses each number once, and a higher one for each transaction. It begins the next
/// transaction when it knows the outcome of the one before, or takes another name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionToken {
    /// The client's name.
    pub client: [u8; 16],
    /// The transaction's number.
    pub number: u64,
}

impl TransactionToken {
    /// Bytes of a token.
    pub const LEN: usize = 24;

    /// The bytes, as they stand in files and on the wire.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.client);
        bytes[16..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    /// Reads what [`TransactionToken::to_bytes`] wrote.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> TransactionToken {
        let (mut client, mut number) = ([0; 16], [0; 8]);
        client.copy_from_slice(&bytes[..16]);
        number.copy_from_slice(&bytes[16..]);
        TransactionToken { client, number: u64::from_be_bytes(number) }
    }

    /// The same; `None` for any other length.
    pub fn from_slice(bytes: &[u8]) -> Option<TransactionToken> {
        bytes.try_into().ok().map(TransactionToken::from_bytes)
    }
}

impl fmt::Debug for TransactionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransactionToken({self})")
    }
}

impl fmt::Display for TransactionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.client.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, "/{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_travel() {
        let token = TransactionToken { client: [7; 16], number: 258 };
        assert_eq!(TransactionToken::from_slice(&token.to_bytes()), Some(token));
        assert_eq!(TransactionToken::from_slice(&[0; 23]), None);
        assert_eq!(TransactionToken::from_slice(&[0; 25]), None);
        assert_eq!(TransactionToken::from_slice(b""), None);
        assert_eq!(token.to_string(), format!("{}/258", "07".repeat(16)));
    }
}
