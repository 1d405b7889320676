//! Pickles to values: protocols 0 to 5 as far as data goes. Source of the opcodes: CPython's
//! `pickletools.py`.

use std::collections::HashMap;

use bytes::Bytes;

use crate::references::{literal, raw_unicode};
use crate::{Object, Value};

/// How deep values may be nested.
pub const MAX_DEPTH: u16 = 200;
/// What a pickle may become in memory: so many bytes, and so many for each byte of it. What clients
/// send is far below that; a set takes one byte in a pickle, and some hundreds in memory.
const MEMORY: (usize, usize) = (4 << 20, 32);
/// What an entry of the memo takes, about.
const MEMO_ENTRY: usize = 128;
/// What a set takes, about.
const SET: usize = 512;

/// Why bytes are not a pickle that this crate reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum DecodeError {
    /// The bytes end within an opcode, or before `STOP`.
    #[error("the pickle is cut off at byte {0}")]
    Truncated(usize),
    /// The stack machine cannot do what the opcode asks.
    #[error("opcode 0x{code:02x} at byte {at} does not fit what precedes it")]
    Malformed {
        code: u8,
        /// Where it stands.
        at: usize,
    },
    /// An opcode that data does not need.
    #[error("unsupported opcode 0x{code:02x} at byte {at}")]
    Unsupported {
        code: u8,
        /// Where it stands.
        at: usize,
    },
    /// What the opcode at this byte takes as a persistent id has no form that ZODB knows.
    #[error(
        "the persistent id that byte {0} takes is neither an oid, nor a tuple that begins with \
         one, nor a list for a weak or cross-database reference"
    )]
    PersistentId(usize),
    /// A class that the caller does not allow.
    #[error("the global {0} is not allowed")]
    Forbidden(String),
    /// More nesting than [`MAX_DEPTH`], or references that multiply.
    #[error("the pickle is nested too deeply or expands too much")]
    TooLarge,
}

/// Reads the pickle that `bytes` consist of. `allow(module, name)` says which globals may be named.
pub fn decode(bytes: &Bytes, allow: impl Fn(&str, &str) -> bool) -> Result<Value, DecodeError> {
    decode_first(bytes, allow).map(|(value, _)| value)
}

/// As [`decode`], but a byte string of Python 2 (`STRING` and its kind) is a text if it is ASCII,
/// as ZODB reads it on Python 3.
pub fn decode_with_texts(
    bytes: &Bytes,
    allow: impl Fn(&str, &str) -> bool,
) -> Result<Value, DecodeError> {
    let machine = Machine { texts: true, ..Machine::new(bytes) };
    machine.run(&allow).map(|(value, _)| value)
}

/// Reads the pickle that `bytes` begin with; also returns its length.
pub fn decode_first(
    bytes: &Bytes,
    allow: impl Fn(&str, &str) -> bool,
) -> Result<(Value, usize), DecodeError> {
    Machine::new(bytes).run(&allow)
}

/// The class of a ZODB record, `module.Class`, read from its first pickle as
/// `ZODB.utils.get_pickle_metadata` does; `None` if it cannot be told.
pub fn class_name(record: &Bytes) -> Option<String> {
    let (value, _) = decode_first(record, |_, _| true).ok()?;
    let dotted = |value: &Value| match value {
        Value::Global { module, name } => Some(format!("{module}.{name}")),
        Value::Tuple(pair) => match pair.as_slice() {
            [Value::Str(module), Value::Str(name)] => Some(format!("{module}.{name}")),
            _ => None,
        },
        _ => None,
    };
    match &value {
        Value::Tuple(items) => items.first().and_then(dotted),
        other => dotted(other),
    }
}

/// A value on the stack, with what bounds its growth.
struct Slot {
    value: Value,
    depth: u16,
    nodes: usize,
}

struct Machine<'a> {
    bytes: &'a Bytes,
    at: usize,
    stack: Vec<Slot>,
    marks: Vec<usize>,
    /// Only values that cannot change later; a reference to a list or a dict is refused.
    memo: HashMap<u32, Option<(Value, u16, usize)>>,
    /// Nodes that references to the memo have multiplied.
    budget: usize,
    /// Bytes of memory that were taken, about.
    made: usize,
    /// Byte strings of Python 2 are texts.
    texts: bool,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a Bytes) -> Machine<'a> {
        let (stack, marks, memo) = Default::default();
        Machine { bytes, at: 0, stack, marks, memo, budget: 0, made: 0, texts: false }
    }
    fn run(mut self, allow: &dyn Fn(&str, &str) -> bool) -> Result<(Value, usize), DecodeError> {
        loop {
            let at = self.at;
            let code = self.take(1)?[0];
            if code == b'.' {
                let slot = self.pop(code, at)?;
                return Ok((slot.value, self.at));
            }
            self.make(code)?;
            self.step(code, at, allow)?;
        }
    }

    /// Counts what an opcode may take in memory; what lies in the pickle itself is shared.
    fn make(&mut self, code: u8) -> Result<(), DecodeError> {
        self.made += match code {
            b'p' | b'q' | b'r' | 0x94 => MEMO_ENTRY,
            0x8f | 0x91 => SET,
            _ => size_of::<Slot>(),
        };
        let (floor, each) = MEMORY;
        match self.made > floor + each * self.bytes.len() {
            true => Err(DecodeError::TooLarge),
            false => Ok(()),
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table of opcodes")]
    fn step(
        &mut self,
        code: u8,
        at: usize,
        allow: &dyn Fn(&str, &str) -> bool,
    ) -> Result<(), DecodeError> {
        let malformed = DecodeError::Malformed { code, at };
        match code {
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => {
                let int = i64::from(self.take(1)?[0]);
                self.push(Value::Int(int));
            }
            b'M' => {
                let int = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(i64::from(int)));
            }
            b'J' => {
                let int = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(i64::from(int)));
            }
            0x8a | 0x8b => {
                let len =
                    if code == 0x8a { usize::from(self.take(1)?[0]) } else { self.length4()? };
                let long = long(&self.take(len)?);
                self.push(long);
            }
            b'I' | b'L' => {
                let line = self.line()?;
                let value = match line.as_str() {
                    "00" if code == b'I' => Value::Bool(false),
                    "01" if code == b'I' => Value::Bool(true),
                    digits => Value::Int(
                        digits.trim_end_matches('L').parse().map_err(|_| malformed.clone())?,
                    ),
                };
                self.push(value);
            }
            b'G' => {
                let float = f64::from_be_bytes(self.array()?);
                self.push(Value::Float(float));
            }
            b'F' => {
                let float = self.line()?.parse().map_err(|_| malformed)?;
                self.push(Value::Float(float));
            }
            b'X' | 0x8c | 0x8d => {
                let len = self.length(code, b'X', 0x8c)?;
                let text = self.take(len)?;
                let text = std::str::from_utf8(&text).map_err(|_| malformed)?.to_owned();
                self.push(Value::Str(text));
            }
            b'V' => {
                let text = raw_unicode(&self.line_of_bytes()?);
                self.push(Value::Str(text));
            }
            b'B' | b'C' | 0x8e => {
                let len = self.length(code, b'B', b'C')?;
                let bytes = self.take(len)?;
                self.push(Value::Bytes(bytes));
            }
            b'S' => {
                let bytes = literal(&self.line_of_bytes()?);
                self.push_old_string(bytes.into());
            }
            b'T' | b'U' => {
                let len = match code {
                    b'T' => self.length4()?,
                    _ => usize::from(self.take(1)?[0]),
                };
                let bytes = self.take(len)?;
                self.push_old_string(bytes);
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            0x85..=0x87 => {
                let n = usize::from(code - 0x84);
                let start = self.stack.len().checked_sub(n).ok_or(malformed)?;
                self.wrap(start, Value::Tuple)?;
            }
            b't' => {
                let start = self.mark(code, at)?;
                self.wrap(start, Value::Tuple)?;
            }
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let start = self.mark(code, at)?;
                self.wrap(start, Value::List)?;
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let start = self.mark(code, at)?;
                let items = self.stack.split_off(start);
                self.push(Value::Dict(Vec::new()));
                self.extend_dict(items, code, at)?;
            }
            b'a' => {
                let item = self.pop(code, at)?;
                self.extend_list(vec![item], code, at)?;
            }
            b'e' => {
                let start = self.mark(code, at)?;
                let items = self.stack.split_off(start);
                self.extend_list(items, code, at)?;
            }
            b's' | b'u' => {
                let start = match code {
                    b'u' => self.mark(code, at)?,
                    _ => self.stack.len().checked_sub(2).ok_or(malformed)?,
                };
                let items = self.stack.split_off(start);
                self.extend_dict(items, code, at)?;
            }
            0x8f => self.push_set("set"), // EMPTY_SET
            0x90 => {
                let start = self.mark(code, at)?;
                let items = self.stack.split_off(start);
                self.extend_set(items, code, at)?;
            }
            0x91 => {
                let start = self.mark(code, at)?;
                let items = self.stack.split_off(start);
                self.push_set("frozenset");
                self.extend_set(items, code, at)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop(code, at)?),
            b'1' => {
                let start = self.mark(code, at)?;
                self.stack.truncate(start);
            }
            b'2' => {
                let nodes = self.stack.last().ok_or(malformed.clone())?.nodes;
                self.spend(nodes)?;
                let top = self.stack.last().ok_or(malformed)?;
                let (value, depth) = (top.value.clone(), top.depth);
                self.stack.push(Slot { value, depth, nodes });
            }
            b'q' | b'r' | b'p' | 0x94 => {
                let key = match code {
                    b'q' => u32::from(self.take(1)?[0]),
                    b'r' => u32::from_le_bytes(self.array()?),
                    b'p' => self.line()?.parse().map_err(|_| malformed.clone())?,
                    _ => self.memo.len() as u32,
                };
                let top = self.stack.last().ok_or(malformed.clone())?;
                let mutable =
                    matches!(top.value, Value::List(_) | Value::Dict(_) | Value::Object(_));
                // Memoising copies: a chain of tuples, each memoised, must not grow quadratically.
                let nodes = top.nodes;
                self.spend(if mutable { 0 } else { nodes })?;
                let top = self.stack.last().ok_or(malformed)?;
                let kept = (!mutable).then(|| (top.value.clone(), top.depth, top.nodes));
                self.memo.insert(key, kept);
            }
            b'h' | b'j' | b'g' => {
                let key = match code {
                    b'h' => u32::from(self.take(1)?[0]),
                    b'j' => u32::from_le_bytes(self.array()?),
                    _ => self.line()?.parse().map_err(|_| malformed.clone())?,
                };
                let kept = self.memo.get(&key).ok_or(malformed.clone())?.as_ref();
                let nodes = kept.ok_or(DecodeError::Unsupported { code, at })?.2;
                self.spend(nodes)?;
                let kept = self.memo.get(&key).cloned().flatten();
                let (value, depth, nodes) = kept.ok_or(malformed)?;
                self.stack.push(Slot { value, depth, nodes });
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(module, name, allow)?;
            }
            0x93 => {
                let (name, module) = (self.pop(code, at)?.value, self.pop(code, at)?.value);
                let (Value::Str(module), Value::Str(name)) = (module, name) else {
                    return Err(malformed);
                };
                self.push_global(module, name, allow)?;
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop(code, at)?, self.pop(code, at)?);
                self.push_object(callable, args, code == 0x81)?;
            }
            b'b' => {
                let state = self.pop(code, at)?;
                let top = self.stack.last_mut().ok_or(malformed.clone())?;
                let Value::Object(object) = &mut top.value else {
                    return Err(malformed);
                };
                object.state = Some(state.value);
                top.depth = top.depth.max(state.depth + 1);
                top.nodes += state.nodes;
            }
            _ => return Err(DecodeError::Unsupported { code, at }),
        }
        self.check_depth()
    }

    fn take(&mut self, n: usize) -> Result<Bytes, DecodeError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(DecodeError::Truncated(self.at))?;
        let taken = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let at = self.at;
        self.take(N)?.as_ref().try_into().map_err(|_| DecodeError::Truncated(at))
    }

    fn length4(&mut self) -> Result<usize, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    /// The length that follows an opcode of a family: four bytes, one byte, or eight.
    fn length(&mut self, code: u8, four: u8, one: u8) -> Result<usize, DecodeError> {
        if code == four {
            self.length4()
        } else if code == one {
            Ok(usize::from(self.take(1)?[0]))
        } else {
            let at = self.at;
            usize::try_from(u64::from_le_bytes(self.array()?))
                .map_err(|_| DecodeError::Truncated(at))
        }
    }

    fn line(&mut self) -> Result<String, DecodeError> {
        Ok(String::from_utf8_lossy(&self.line_of_bytes()?).into_owned())
    }

    fn line_of_bytes(&mut self) -> Result<Bytes, DecodeError> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or(DecodeError::Truncated(self.at))?;
        let line = self.bytes.slice(self.at..self.at + len);
        self.at += len + 1;
        Ok(line)
    }

    fn push_old_string(&mut self, bytes: Bytes) {
        self.push(match std::str::from_utf8(&bytes) {
            Ok(text) if self.texts && text.is_ascii() => Value::Str(text.to_owned()),
            _ => Value::Bytes(bytes),
        });
    }

    fn push(&mut self, value: Value) {
        // What a copy of it costs. Copies of bytes share their memory.
        let len = match &value {
            Value::Str(text) => text.len(),
            Value::Long(bytes) => bytes.len(),
            Value::Global { module, name } => module.len() + name.len(),
            _ => 0,
        };
        self.stack.push(Slot { value, depth: 0, nodes: 1 + len / 8 });
    }

    /// Copies may cost as much as reading the pickle did, and a little.
    fn spend(&mut self, nodes: usize) -> Result<(), DecodeError> {
        self.budget += nodes;
        if self.budget > 10_000 + 8 * self.bytes.len() {
            Err(DecodeError::TooLarge)
        } else {
            Ok(())
        }
    }

    fn pop(&mut self, code: u8, at: usize) -> Result<Slot, DecodeError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(DecodeError::Malformed { code, at });
        }
        self.stack.pop().ok_or(DecodeError::Malformed { code, at })
    }

    /// Where the values since the last mark begin; removes the mark.
    fn mark(&mut self, code: u8, at: usize) -> Result<usize, DecodeError> {
        let start = self.marks.pop().ok_or(DecodeError::Malformed { code, at })?;
        if start > self.stack.len() { Err(DecodeError::Malformed { code, at }) } else { Ok(start) }
    }

    fn wrap(
        &mut self,
        start: usize,
        container: fn(Vec<Value>) -> Value,
    ) -> Result<(), DecodeError> {
        let slots = self.stack.split_off(start);
        let (depth, nodes) = measure(&slots);
        let value = container(slots.into_iter().map(|slot| slot.value).collect());
        self.stack.push(Slot { value, depth: depth + 1, nodes: nodes + 1 });
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Slot>, code: u8, at: usize) -> Result<(), DecodeError> {
        let malformed = DecodeError::Malformed { code, at };
        let (depth, nodes) = measure(&items);
        let top = self.stack.last_mut().ok_or(malformed.clone())?;
        let Value::List(list) = &mut top.value else {
            return Err(malformed);
        };
        list.extend(items.into_iter().map(|slot| slot.value));
        top.depth = top.depth.max(depth + 1);
        top.nodes += nodes;
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<Slot>, code: u8, at: usize) -> Result<(), DecodeError> {
        let malformed = DecodeError::Malformed { code, at };
        let (depth, nodes) = measure(&items);
        let top = self.stack.last_mut().ok_or(malformed.clone())?;
        let Value::Dict(dict) = &mut top.value else {
            return Err(malformed);
        };
        let mut values = items.into_iter().map(|slot| slot.value);
        while let Some(key) = values.next() {
            dict.push((key, values.next().ok_or(malformed.clone())?));
        }
        top.depth = top.depth.max(depth + 1);
        top.nodes += nodes;
        Ok(())
    }

    fn push_set(&mut self, name: &str) {
        let object = Object {
            callable: Value::Global { module: "builtins".into(), name: name.into() },
            args: Value::Tuple(vec![Value::List(Vec::new())]),
            by_new: false,
            state: None,
        };
        self.stack.push(Slot { value: Value::Object(Box::new(object)), depth: 3, nodes: 4 });
    }

    fn extend_set(&mut self, items: Vec<Slot>, code: u8, at: usize) -> Result<(), DecodeError> {
        let malformed = DecodeError::Malformed { code, at };
        let (depth, nodes) = measure(&items);
        let top = self.stack.last_mut().ok_or(malformed.clone())?;
        let Value::Object(object) = &mut top.value else {
            return Err(malformed);
        };
        let Value::Tuple(args) = &mut object.args else {
            return Err(malformed);
        };
        let Some(Value::List(members)) = args.first_mut() else {
            return Err(malformed);
        };
        members.extend(items.into_iter().map(|slot| slot.value));
        top.depth = top.depth.max(depth + 3);
        top.nodes += nodes;
        Ok(())
    }

    fn push_global(
        &mut self,
        module: String,
        name: String,
        allow: &dyn Fn(&str, &str) -> bool,
    ) -> Result<(), DecodeError> {
        if !allow(&module, &name) {
            return Err(DecodeError::Forbidden(format!("{module}.{name}")));
        }
        self.push(Value::Global { module, name });
        Ok(())
    }

    fn push_object(&mut self, callable: Slot, args: Slot, by_new: bool) -> Result<(), DecodeError> {
        let depth = callable.depth.max(args.depth) + 1;
        let nodes = callable.nodes + args.nodes + 1;
        let object = Object { callable: callable.value, args: args.value, by_new, state: None };
        self.stack.push(Slot { value: Value::Object(Box::new(object)), depth, nodes });
        Ok(())
    }

    fn check_depth(&self) -> Result<(), DecodeError> {
        match self.stack.last() {
            Some(top) if top.depth > MAX_DEPTH => Err(DecodeError::TooLarge),
            _ => Ok(()),
        }
    }
}

fn measure(slots: &[Slot]) -> (u16, usize) {
    slots.iter().fold((0, 0), |(depth, nodes), slot| (depth.max(slot.depth), nodes + slot.nodes))
}

fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Long(bytes.to_vec());
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut full = [if negative { 0xff } else { 0 }; 8];
    full[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(full))
}
