//! Which objects a record refers to: the set that `ZODB.serialize.referencesf` gives.
//!
//! A record is two pickles, the class and the state. References are *persistent ids*; of their
//! forms, an oid and a tuple `(oid, class)` are references, a list (weak and cross-database
//! references) is not. So it is enough to follow, on the stack, which values are byte strings,
//! tuples and lists; everything else is opaque.
//!
//! Bounds: work and memory are proportional to the record's length.

use std::collections::HashMap;

use crate::DecodeError;

/// A value on the stack, as far as it can be a persistent id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    /// A string of eight bytes.
    Oid([u8; 8]),
    /// A tuple that begins with one.
    Tuple([u8; 8]),
    /// Anything else.
    Other,
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: HashMap<u32, Item>,
}

/// Gives the oid of each reference in a record to `each`, as often as it occurs.
pub fn references(record: &[u8], mut each: impl FnMut([u8; 8])) -> Result<(), DecodeError> {
    let (stack, marks, memo) = Default::default();
    let mut scanner = Scanner { bytes: record, at: 0, stack, marks, memo };
    for _ in 0..2 {
        // The state may refer to what the class has put into the memo.
        scanner.stack.clear();
        scanner.marks.clear();
        scanner.run(&mut each)?;
    }
    Ok(())
}

impl Scanner<'_> {
    fn run(&mut self, each: &mut dyn FnMut([u8; 8])) -> Result<(), DecodeError> {
        loop {
            let at = self.at;
            let code = self.take(1)?[0];
            let malformed = DecodeError::Malformed { code, at };
            match code {
                b'.' => return Ok(()),
                b'Q' => {
                    let id = self.pop(malformed)?;
                    if let Item::Oid(oid) | Item::Tuple(oid) = id {
                        each(oid);
                    }
                    self.stack.push(Item::Other);
                }
                b'P' => {
                    let line = self.line(malformed)?;
                    if let Ok(oid) = line.try_into() {
                        each(oid);
                    }
                    self.stack.push(Item::Other);
                }
                b'N' | b')' | b']' | b'}' | 0x88 | 0x89 | 0x8f => self.stack.push(Item::Other),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop(malformed)?),
                b'1' => {
                    let start = self.mark(malformed)?;
                    self.stack.truncate(start);
                }
                b'2' => {
                    let top = *self.stack.last().ok_or(malformed)?;
                    self.stack.push(top);
                }
                // Strings.
                b'X' | b'B' | b'T' => self.string(4)?,
                0x8c | b'C' | b'U' => self.string(1)?,
                0x8d | 0x8e | 0x96 => self.string(8)?,
                b'V' | b'S' => {
                    let text = unescaped(self.line(malformed)?, code == b'S');
                    self.stack.push(text.try_into().map_or(Item::Other, Item::Oid));
                }
                // Numbers.
                b'K' => self.opaque(1)?,
                b'M' => self.opaque(2)?,
                b'J' => self.opaque(4)?,
                b'G' => self.opaque(8)?,
                b'I' | b'L' | b'F' => {
                    self.line(malformed)?;
                    self.stack.push(Item::Other);
                }
                0x8a | 0x8b => {
                    let len = self.length(if code == 0x8a { 1 } else { 4 })?;
                    self.opaque(len)?;
                }
                // Containers.
                0x85..=0x87 => {
                    let n = usize::from(code - 0x84);
                    let start = self.stack.len().checked_sub(n).ok_or(malformed)?;
                    self.tuple(start);
                }
                b't' => {
                    let start = self.mark(malformed)?;
                    self.tuple(start);
                }
                b'l' | b'd' | b'o' | b'i' | 0x91 => {
                    if code == b'i' {
                        self.line(malformed.clone())?;
                        self.line(malformed.clone())?;
                    }
                    let start = self.mark(malformed)?;
                    self.stack.truncate(start);
                    self.stack.push(Item::Other);
                }
                b'e' | b'u' | 0x90 => {
                    let start = self.mark(malformed)?;
                    self.stack.truncate(start);
                }
                b'a' | b'b' => drop(self.pop(malformed)?),
                b's' => {
                    self.pop(malformed.clone())?;
                    self.pop(malformed)?;
                }
                // Classes and calls.
                b'c' => {
                    self.line(malformed.clone())?;
                    self.line(malformed)?;
                    self.stack.push(Item::Other);
                }
                0x82 => self.opaque(1)?,
                0x83 => self.opaque(2)?,
                0x84 => self.opaque(4)?,
                b'R' | 0x81 | 0x93 => {
                    self.pop(malformed.clone())?;
                    self.pop(malformed)?;
                    self.stack.push(Item::Other);
                }
                0x92 => {
                    for _ in 0..3 {
                        self.pop(malformed.clone())?;
                    }
                    self.stack.push(Item::Other);
                }
                0x97 => self.stack.push(Item::Other),
                0x98 => {}
                // The memo.
                b'q' | b'r' | b'p' | 0x94 => {
                    let key = match code {
                        b'q' => u32::from(self.take(1)?[0]),
                        b'r' => self.length(4)? as u32,
                        b'p' => self.number(malformed.clone())?,
                        _ => self.memo.len() as u32,
                    };
                    let top = *self.stack.last().ok_or(malformed)?;
                    self.memo.insert(key, top);
                }
                b'h' | b'j' | b'g' => {
                    let key = match code {
                        b'h' => u32::from(self.take(1)?[0]),
                        b'j' => self.length(4)? as u32,
                        _ => self.number(malformed.clone())?,
                    };
                    let kept = *self.memo.get(&key).ok_or(malformed)?;
                    self.stack.push(kept);
                }
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                _ => return Err(DecodeError::Unsupported { code, at }),
            }
        }
    }

    fn take(&mut self, n: usize) -> Result<&[u8], DecodeError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(DecodeError::Truncated(self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian length of `n` bytes.
    fn length(&mut self, n: usize) -> Result<usize, DecodeError> {
        let bytes = self.take(n)?;
        let length = bytes.iter().rev().fold(0u64, |length, byte| length << 8 | u64::from(*byte));
        usize::try_from(length).map_err(|_| DecodeError::Truncated(self.at))
    }

    fn string(&mut self, length_of_length: usize) -> Result<(), DecodeError> {
        let len = self.length(length_of_length)?;
        let item = self.take(len)?.try_into().map_or(Item::Other, Item::Oid);
        self.stack.push(item);
        Ok(())
    }

    fn opaque(&mut self, len: usize) -> Result<(), DecodeError> {
        self.take(len)?;
        self.stack.push(Item::Other);
        Ok(())
    }

    fn tuple(&mut self, start: usize) {
        let first = self.stack.get(start).copied();
        self.stack.truncate(start);
        self.stack.push(match first {
            Some(Item::Oid(oid)) => Item::Tuple(oid),
            _ => Item::Other,
        });
    }

    fn pop(&mut self, malformed: DecodeError) -> Result<Item, DecodeError> {
        self.stack.pop().ok_or(malformed)
    }

    /// Where the innermost mark is.
    fn mark(&mut self, malformed: DecodeError) -> Result<usize, DecodeError> {
        self.marks.pop().filter(|start| *start <= self.stack.len()).ok_or(malformed)
    }

    fn line(&mut self, malformed: DecodeError) -> Result<&[u8], DecodeError> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n').ok_or(malformed)?;
        self.at += len + 1;
        Ok(&rest[..len])
    }

    fn number(&mut self, malformed: DecodeError) -> Result<u32, DecodeError> {
        let line = std::str::from_utf8(self.line(malformed.clone())?).ok();
        line.and_then(|line| line.trim().parse().ok()).ok_or(malformed)
    }
}

/// The text of a line of protocol 0: quoted, with the escapes of a Python literal, or bare, with
/// those of `raw-unicode-escape`.
fn unescaped(line: &[u8], quoted: bool) -> Vec<u8> {
    let mut rest = match line {
        [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] if quoted => inner,
        other => other,
    };
    let mut text = Vec::new();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let digits = match (first, tail) {
            (b'\\', [b'x', ..]) if quoted => 2,
            (b'\\', [b'u', ..]) if !quoted => 4,
            (b'\\', [escaped, after @ ..]) if quoted => {
                rest = after;
                text.push(match escaped {
                    b'n' => b'\n',
                    b't' => b'\t',
                    b'r' => b'\r',
                    other => *other,
                });
                continue;
            }
            _ => 0,
        };
        let code = tail
            .get(1..1 + digits)
            .filter(|_| digits > 0)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match code.map(u8::try_from) {
            Some(Ok(byte)) => {
                text.push(byte);
                rest = &tail[1 + digits..];
            }
            _ => text.push(*first),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(record: &[u8]) -> Result<Vec<[u8; 8]>, DecodeError> {
        let mut oids = Vec::new();
        references(record, |oid| oids.push(oid))?;
        Ok(oids)
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let digit = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    }

    const ONE: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 1];
    const TWO: [u8; 8] = [0, 0, 0, 0, 0, 0, 0x12, 0x34];

    /// Records that Python wrote, with what `referencesf` of ZODB 6.4 gives for them. Among the
    /// persistent ids are weak and cross-database ones.
    #[test]
    fn agrees_with_referencesf() {
        // Protocol 1.
        let record = bytes(concat!(
            "2858010000006d710058010000004371017471022e7d71002858010000006171015d7102285808000000",
            "41424344454647487103512868034e74710451655801000000747105286803514b014740040000000000",
            "004e4930310a635f636f646563730a656e636f64650a7106285808000000616263646566676871075806",
            "0000006c6174696e31710874710952710a5803000000787878710b74710c5803000000626967710d4c31",
            "3138303539313632303731373431313330333432344c0a5803000000736574710e635f5f6275696c7469",
            "6e5f5f0a7365740a710f285d7110284b014b0265747111527112752e",
        ));
        assert_eq!(found(&record), Ok(vec![*b"ABCDEFGH", *b"ABCDEFGH", *b"ABCDEFGH"]));
        // Protocol 2.
        let record = bytes(concat!(
            "800258010000006d710058010000004371018671022e80027d71002858010000006171015d7102285808",
            "000000414243444546474871035168034e86710451655801000000747105286803514b01474004000000",
            "0000004e88635f636f646563730a656e636f64650a710658080000006162636465666768710758060000",
            "006c6174696e31710886710952710a5803000000787878710b74710c5803000000626967710d8a090000",
            "000000000000405803000000736574710e635f5f6275696c74696e5f5f0a7365740a710f5d7110284b01",
            "4b0265857111527112752e",
        ));
        assert_eq!(found(&record), Ok(vec![*b"ABCDEFGH", *b"ABCDEFGH", *b"ABCDEFGH"]));
        // Protocol 3.
        let record = bytes(concat!(
            "800358010000006d710058010000004371018671022e80037d71002858010000006171015d7102284308",
            "000000000000000171035803000000636c73710486710551430800000000000012347106515d71072858",
            "01000000777108680685710965515d710a680661515d710b2858010000006e710c58020000006462710d",
            "680686710e65515d710f2858010000006d7110680d680658010000006371118771126551655801000000",
            "747113286805514b014740040000000000004e8843086162636465666768711458030000007878787115",
            "747116580300000062696771178a0900000000000000004058030000007365747118636275696c74696e",
            "730a7365740a71195d711a284b014b026585711b52711c752e",
        ));
        assert_eq!(found(&record), Ok(vec![ONE, TWO, ONE]));
    }

    #[test]
    fn all_protocols_and_forms() {
        let class = b"(Vm\nVC\nt.";
        let state = |pickle: &[u8]| found(&[&class[..], pickle].concat());
        // Protocol 0: an escaped literal, an escaped bare string, a persistent id in a line.
        assert_eq!(state(b"S'\\x00\\x00\\x00\\x00\\x00\\x00\\x124'\nQ."), Ok(vec![TWO]));
        assert_eq!(state(b"V\\u0000\0\0\0\0\0\0\x01\nQ."), Ok(vec![ONE]));
        assert_eq!(state(b"PABCDEFGH\n."), Ok(vec![*b"ABCDEFGH"]));
        // Protocol 2 of Python 2: (oid, class) with the oid memoised.
        let one: &[u8] = b"\x80\x02U\x08\0\0\0\0\0\0\0\x01q\x01cm\nC\n\x86Q0h\x01Q.";
        assert_eq!(state(one), Ok(vec![ONE, ONE]));
        // Protocols 4 and 5: frames, memo without numbers, short strings.
        for protocol in [4, 5] {
            let head: &[u8] = &[0x80, protocol, 0x95, 0, 0, 0, 0, 0, 0, 0, 0];
            let body =
                b"C\x08\0\0\0\0\0\0\0\x01\x94\x8c\x01C\x94\x86\x94Q0]C\x08\0\0\0\0\0\0\x124aQ.";
            assert_eq!(state(&[head, body].concat()), Ok(vec![ONE]));
        }
        // The memo of the class is also that of the state.
        assert_eq!(found(b"C\x08\0\0\0\0\0\0\0\x01q\x01.h\x01Q."), Ok(vec![ONE]));
        assert!(state(b"Q.").is_err());
        assert!(found(b"N.").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = found(&bytes);
        }
    }
}
