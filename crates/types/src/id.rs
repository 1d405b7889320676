//! Identifiers. Each is a number with a type of its own, so that none is taken for another.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The eight bytes, big-endian, as they stand in files and on the wire.
            pub fn to_bytes(self) -> [u8; 8] {
                self.0.to_be_bytes()
            }

            /// Reads eight big-endian bytes; `None` for any other length.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                Some(Self(u64::from_be_bytes(bytes.try_into().ok()?)))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

number! {
    /// Object identifier. In ZODB, oid 0 is the root object.
    Oid
}
number! {
    /// Transaction identifier: a time stamp that only grows (see [`crate::time`]). An object's
    /// *serial* is the tid of the transaction that wrote its revision. Zero means "none".
    Tid
}
number! {
    /// A node's identity: drawn at random when its state directory is made, kept there, never zero.
    /// A node that lost its disk has another one, so it cannot vote twice in a term.
    NodeId
}
number! {
    /// Raft's term.
    Term
}
number! {
    /// Index of an entry in the replicated log; the first is 1.
    LogIndex
}
number! {
    /// Offset of a byte in `Data.fs`. Zero (the magic's place) means "none".
    Position
}

impl Tid {
    /// No transaction.
    pub const NONE: Tid = Tid(0);
    /// Above every tid that can exist; what clients send for "the current revision".
    pub const MAX: Tid = Tid(0x7fff_ffff_ffff_ffff);

    /// The smallest tid above this one.
    pub fn next(self) -> Tid {
        Tid(self.0.saturating_add(1))
    }
}

macro_rules! hex_display {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }
    )*};
}
macro_rules! decimal_display {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    )*};
}
hex_display!(Oid, Tid, NodeId);
decimal_display!(Term, LogIndex, Position);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_wrong_lengths_are_refused() {
        let oid = Oid(0x0102_0304_0506_0708);
        assert_eq!(oid.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Oid::from_slice(&oid.to_bytes()), Some(oid));
        assert_eq!(Oid::from_slice(b"short"), None);
        assert_eq!(oid.to_string(), "0102030405060708");
        assert_eq!(LogIndex(12).to_string(), "12");
    }
}
