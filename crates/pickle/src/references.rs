//! Which objects a record refers to: the set that `ZODB.serialize.referencesf` gives.
//!
//! A record is two pickles, the class and the state. References are *persistent ids*: an oid or a
//! tuple `(oid, class)`; a list is a weak or a cross-database reference. `persistent.rs` has their
//! forms. What stands as a persistent id and has none of them is an error: whoever removes what is
//! not referred to must not go on.
//!
//! Bounds: work and memory are proportional to the record's length.

use std::collections::HashMap;

use crate::DecodeError;
use crate::persistent::{Item, Target, Values};

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Values<'a>,
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: Memo,
}

/// What the memo holds, as far as it matters: of most values only that they are there.
#[derive(Default)]
struct Memo {
    items: HashMap<u32, Item>,
    /// One bit for each number.
    known: Vec<u64>,
    len: u32,
}

impl Memo {
    /// `most`: numbers above it, which no pickler gives, are refused.
    fn put(&mut self, number: u32, item: Item, most: usize) -> bool {
        let (word, bit) = (number as usize / 64, 1 << (number % 64));
        if number as usize > most {
            return false;
        }
        if self.known.len() <= word {
            self.known.resize(word + 1, 0);
        }
        self.len += u32::from(self.known[word] & bit == 0);
        self.known[word] |= bit;
        if item != Item::Other {
            self.items.insert(number, item);
        } else if !self.items.is_empty() {
            self.items.remove(&number);
        }
        true
    }

    fn get(&self, number: u32) -> Option<Item> {
        let known = self.known.get(number as usize / 64)?;
        let known = known & 1 << (number % 64) != 0;
        known.then(|| self.items.get(&number).copied().unwrap_or(Item::Other))
    }
}

/// Picklers number the memo from 0 on; some have written other records before and did not forget
/// them.
const NUMBERS_BEFORE: usize = 1 << 24;

/// Gives the oid of each reference in a record to `each`, as often as it occurs.
pub fn references(record: &[u8], mut each: impl FnMut([u8; 8])) -> Result<(), DecodeError> {
    let (stack, marks, memo) = Default::default();
    let values = Values::new(record);
    let mut scanner = Scanner { bytes: record, at: 0, values, stack, marks, memo };
    for _ in 0..2 {
        // The state may refer to what the class has put into the memo.
        scanner.stack.clear();
        scanner.marks.clear();
        scanner.run(&mut each)?;
    }
    Ok(())
}

impl<'a> Scanner<'a> {
    #[expect(clippy::too_many_lines, reason = "a table of opcodes")]
    fn run(&mut self, each: &mut dyn FnMut([u8; 8])) -> Result<(), DecodeError> {
        loop {
            let at = self.at;
            let code = self.take(1)?[0];
            let malformed = DecodeError::Malformed { code, at };
            match code {
                b'.' => return Ok(()),
                b'Q' => {
                    let id = self.pop(malformed)?;
                    self.refer(self.values.target(id), at, each)?;
                }
                b'P' => {
                    let line = self.line(malformed)?;
                    self.refer(Values::target_of_line(line), at, each)?;
                }
                b'N' | b')' | b'}' | 0x88 | 0x89 | 0x8f => self.stack.push(Item::Other),
                b'(' => self.marks.push(self.stack.len()),
                b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
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
                b'X' => self.string(4, true)?,
                0x8c => self.string(1, true)?,
                0x8d => self.string(8, true)?,
                b'B' | b'T' => self.string(4, false)?,
                b'C' | b'U' => self.string(1, false)?,
                0x8e => self.string(8, false)?,
                0x96 => {
                    let len = self.length(8)?;
                    self.opaque(len)?;
                }
                b'V' => {
                    let text = raw_unicode(self.line(malformed)?);
                    let item = self.values.made(text.as_bytes(), true);
                    self.stack.push(item);
                }
                b'S' => {
                    let bytes = literal(self.line(malformed)?);
                    let item = self.values.made(&bytes, false);
                    self.stack.push(item);
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
                b']' => {
                    let list = self.values.list(&[]);
                    self.stack.push(list);
                }
                b'l' => {
                    let start = self.mark(malformed)?;
                    let list = self.values.list(&self.stack[start..]);
                    self.stack.truncate(start);
                    self.stack.push(list);
                }
                b'd' | b'o' | b'i' | 0x91 => {
                    if code == b'i' {
                        self.line(malformed.clone())?;
                        self.line(malformed.clone())?;
                    }
                    let start = self.mark(malformed)?;
                    self.stack.truncate(start);
                    self.stack.push(Item::Other);
                }
                b'e' => {
                    let start = self.mark(malformed.clone())?;
                    let list = self.stack[..start].last().copied().ok_or(malformed)?;
                    let list = self.values.extended(list, &self.stack[start..]);
                    self.stack.truncate(start);
                    self.replace_top(list);
                }
                b'a' => {
                    let item = self.pop(malformed.clone())?;
                    let list = self.stack.last().copied().ok_or(malformed)?;
                    let list = self.values.extended(list, &[item]);
                    self.replace_top(list);
                }
                b'u' | 0x90 => {
                    let start = self.mark(malformed)?;
                    self.stack.truncate(start);
                }
                b'b' => drop(self.pop(malformed)?),
                b's' => {
                    self.pop(malformed.clone())?;
                    self.pop(malformed)?;
                }
                // Classes and calls.
                b'c' => {
                    let module = self.line(malformed.clone())?;
                    let name = self.line(malformed)?;
                    self.stack.push(Values::global(module, name));
                }
                0x82 => self.opaque(1)?,
                0x83 => self.opaque(2)?,
                0x84 => self.opaque(4)?,
                b'R' | 0x81 | 0x93 => {
                    let second = self.pop(malformed.clone())?;
                    let first = self.pop(malformed)?;
                    let made = match code {
                        0x93 => self.values.named(first, second),
                        _ => self.values.call(first, second),
                    };
                    self.stack.push(made);
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
                        _ => self.memo.len,
                    };
                    let top = *self.stack.last().ok_or(malformed.clone())?;
                    let top = self.values.shared(top);
                    self.replace_top(top);
                    if !self.memo.put(key, top, self.bytes.len().saturating_add(NUMBERS_BEFORE)) {
                        return Err(malformed);
                    }
                }
                b'h' | b'j' | b'g' => {
                    let key = match code {
                        b'h' => u32::from(self.take(1)?[0]),
                        b'j' => self.length(4)? as u32,
                        _ => self.number(malformed.clone())?,
                    };
                    let kept = self.memo.get(key).ok_or(malformed)?;
                    self.stack.push(kept);
                }
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                _ => return Err(DecodeError::Unsupported { code, at }),
            }
        }
    }

    fn refer(
        &mut self,
        target: Option<Target>,
        at: usize,
        each: &mut dyn FnMut([u8; 8]),
    ) -> Result<(), DecodeError> {
        if let Target::Strong(oid) = target.ok_or(DecodeError::PersistentId(at))? {
            each(oid);
        }
        self.stack.push(Item::Other);
        Ok(())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
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

    fn string(&mut self, length_of_length: usize, is_text: bool) -> Result<(), DecodeError> {
        let len = self.length(length_of_length)?;
        let start = self.at;
        self.take(len)?;
        self.stack.push(Values::string(start, len, is_text));
        Ok(())
    }

    fn opaque(&mut self, len: usize) -> Result<(), DecodeError> {
        self.take(len)?;
        self.stack.push(Item::Other);
        Ok(())
    }

    fn tuple(&mut self, start: usize) {
        let tuple = self.values.tuple(&self.stack[start..]);
        self.stack.truncate(start);
        self.stack.push(tuple);
    }

    fn replace_top(&mut self, item: Item) {
        if let Some(top) = self.stack.last_mut() {
            *top = item;
        }
    }

    fn pop(&mut self, malformed: DecodeError) -> Result<Item, DecodeError> {
        self.stack.pop().ok_or(malformed)
    }

    /// Where the innermost mark is.
    fn mark(&mut self, malformed: DecodeError) -> Result<usize, DecodeError> {
        self.marks.pop().filter(|start| *start <= self.stack.len()).ok_or(malformed)
    }

    fn line(&mut self, malformed: DecodeError) -> Result<&'a [u8], DecodeError> {
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

/// The byte string of a literal of protocol 0. Source: `codecs.escape_decode`.
pub(crate) fn literal(line: &[u8]) -> Vec<u8> {
    let mut rest = match line {
        [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] => inner,
        other => other,
    };
    let mut bytes = Vec::new();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let [code, after @ ..] = tail else {
            bytes.push(*first);
            continue;
        };
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        rest = after;
        match code {
            b'x' => match hexadecimal(after, 2).and_then(|code| u8::try_from(code).ok()) {
                Some(byte) => {
                    bytes.push(byte);
                    rest = &after[2..];
                }
                None => bytes.extend_from_slice(b"\\x"),
            },
            b'0'..=b'7' => {
                let digits = tail.iter().take(3).take_while(|byte| (b'0'..=b'7').contains(byte));
                let (len, octal) = digits.fold((0, 0u32), |(len, code), byte| {
                    (len + 1, code * 8 + u32::from(byte - b'0'))
                });
                bytes.push(octal as u8);
                rest = &tail[len..];
            }
            b'\\' | b'\'' | b'"' => bytes.push(*code),
            b'a' => bytes.push(7),
            b'b' => bytes.push(8),
            b't' => bytes.push(b'\t'),
            b'n' => bytes.push(b'\n'),
            b'v' => bytes.push(11),
            b'f' => bytes.push(12),
            b'r' => bytes.push(b'\r'),
            other => bytes.extend([b'\\', *other]),
        }
    }
    bytes
}

/// The text of a line of protocol 0: Latin-1 with the escapes of `raw-unicode-escape`.
pub(crate) fn raw_unicode(line: &[u8]) -> String {
    let mut rest = line;
    let mut text = String::new();
    while let [first, tail @ ..] = rest {
        rest = tail;
        let digits = match (first, tail) {
            (b'\\', [b'u', ..]) => 4,
            (b'\\', [b'U', ..]) => 8,
            // An escaped backslash stays as it is, and escapes nothing.
            (b'\\', [b'\\', after @ ..]) => {
                text.push('\\');
                rest = after;
                0
            }
            _ => 0,
        };
        let code = if digits > 0 { hexadecimal(&tail[1..], digits) } else { None };
        match code.and_then(char::from_u32) {
            Some(char) => {
                text.push(char);
                rest = &tail[1 + digits..];
            }
            None => text.push(char::from(*first)),
        }
    }
    text
}

fn hexadecimal(bytes: &[u8], digits: usize) -> Option<u32> {
    let text = std::str::from_utf8(bytes.get(..digits)?).ok()?;
    u32::from_str_radix(text, 16).ok()
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

    #[test]
    fn oids_that_are_made_by_a_call() {
        let class = b"(Vm\nVC\nt.";
        let state = |pickle: &[u8]| found(&[&class[..], pickle, b"Q."].concat());
        let high = [0, 0, 0, 0, 0, 0, 0x48, 0xe7];
        // Python 3 at protocols 1 and 2.
        let made = b"c_codecs\nencode\n(X\x09\0\0\0\0\0\0\0\0\0H\xc3\xa7U\x06latin1tR".as_slice();
        assert_eq!(state(made), Ok(vec![high]));
        assert_eq!(state(&[b"(", made, b"cm\nC\nt"].concat()), Ok(vec![high]));
        assert_eq!(state(&[b"(", made, b"l"].concat()), Ok(vec![]));
        assert_eq!(
            state(b"\x8c\x07_codecs\x8c\x06encode\x93X\x08\0\0\0ABCDEFGHX\x07\0\0\0latin-1\x86R"),
            Ok(vec![*b"ABCDEFGH"])
        );
        // zodbpickle of Python 2.
        let made = b"(ccopy_reg\n_reconstructor\n(czodbpickle\nbinary\nc__builtin__\nstr\n\
            U\x08\0\0\0\0\0\0H\xe7tRcm\nC\nt";
        assert_eq!(state(made), Ok(vec![high]));
        assert_eq!(state(b"czodbpickle\nbinary\nU\x08ABCDEFGH\x85\x81"), Ok(vec![*b"ABCDEFGH"]));
        // Lists that are filled later.
        assert_eq!(state(b"]q\x01U\x01wa(U\x08ABCDEFGHtaU\x010h\x01"), Ok(vec![]));
    }

    #[test]
    fn what_is_no_persistent_id_is_an_error() {
        let class = b"(Vm\nVC\nt.";
        let state = |pickle: &[u8]| found(&[&class[..], pickle, b"."].concat());
        let cases = [
            b"NQ".as_slice(),
            b"(NtQ",
            b")Q",
            b"(cm\nC\ntQ",
            b"U\x07ABCDEFGQ",
            b"PABCDEFG\n",
            b"X\x09\0\0\0\0\0\0\0\0\0H\xc3\xa7Q",
            b"c_codecs\nencode\n(X\x08\0\0\0ABCDEFGHU\x05rot13tRQ",
            b"cm\nf\n(U\x08ABCDEFGHtRQ",
            b"]Q",
            b"(U\x01xl(U\x08ABCDEFGHtaQ",
            b"(U\x01x(U\x08ABCDEFGHtlQ",
            b"(U\x01wU\x08ABCDEFGHlQ",
            b"}Q",
        ];
        for case in cases {
            let told = state(case);
            assert!(matches!(told, Err(DecodeError::PersistentId(_))), "{case:?} {told:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = found(&bytes);
        }
    }
}
