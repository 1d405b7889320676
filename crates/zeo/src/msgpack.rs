//! Values in msgpack, as the Python package writes them with `use_bin_type` and reads them
//! with `raw=False, use_list=False`.

use bytes::{BufMut, Bytes, BytesMut};
use rmp::{Marker, encode};
use standby_pickle::{MAX_DEPTH, Value};

/// The bytes are not msgpack, or nested too deeply, or of a kind that ZEO does not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed msgpack at byte {0}")]
pub(crate) struct Malformed(pub usize);

/// Appends `value` to `out`. What msgpack cannot express (instances) becomes nil.
pub(crate) fn write(value: &Value, out: &mut BytesMut) {
    // Writing to memory cannot fail.
    let _ = put(value, &mut out.writer());
}

fn put(value: &Value, out: &mut bytes::buf::Writer<&mut BytesMut>) -> std::io::Result<()> {
    match value {
        Value::None | Value::Global { .. } | Value::Object(_) => encode::write_nil(out)?,
        Value::Bool(b) => encode::write_bool(out, *b)?,
        Value::Int(i) => {
            encode::write_sint(out, *i)?;
        }
        Value::Long(bytes) => match unsigned(bytes) {
            Some(u) => {
                encode::write_uint(out, u)?;
            }
            None => encode::write_nil(out)?,
        },
        Value::Float(f) => encode::write_f64(out, *f)?,
        Value::Str(s) => encode::write_str(out, s)?,
        Value::Bytes(b) => encode::write_bin(out, b)?,
        Value::Tuple(items) | Value::List(items) => {
            encode::write_array_len(out, items.len() as u32)?;
            for item in items {
                put(item, out)?;
            }
        }
        Value::Dict(pairs) => {
            encode::write_map_len(out, pairs.len() as u32)?;
            for (key, value) in pairs {
                put(key, out)?;
                put(value, out)?;
            }
        }
    }
    Ok(())
}

/// A non-negative integer of at most 64 bits from its two's complement.
fn unsigned(bytes: &[u8]) -> Option<u64> {
    let (low, rest) = bytes.split_at_checked(8)?;
    rest.iter().all(|b| *b == 0).then(|| u64::from_le_bytes(low.try_into().unwrap_or_default()))
}

/// Reads the one value that `bytes` consist of; shares their memory.
pub(crate) fn read(bytes: &Bytes) -> Result<Value, Malformed> {
    let mut reader = Reader { bytes, at: 0, values: 0 };
    let value = reader.value(0)?;
    if reader.at == bytes.len() { Ok(value) } else { Err(Malformed(reader.at)) }
}

/// What a message may become in memory: so many bytes, and so many for each byte of it.
const MEMORY: (usize, usize) = (4 << 20, 16);

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
    /// How many were read.
    values: usize,
}

impl Reader<'_> {
    fn value(&mut self, depth: u16) -> Result<Value, Malformed> {
        self.values += 1;
        let (floor, each) = MEMORY;
        let large = self.values * size_of::<Value>() > floor + each * self.bytes.len();
        if depth > MAX_DEPTH || large {
            return Err(Malformed(self.at));
        }
        let at = self.at;
        let marker = Marker::from_u8(self.take(1)?[0]);
        Ok(match marker {
            Marker::Null => Value::None,
            Marker::True => Value::Bool(true),
            Marker::False => Value::Bool(false),
            Marker::FixPos(i) => Value::Int(i64::from(i)),
            Marker::FixNeg(i) => Value::Int(i64::from(i)),
            Marker::U8 => Value::Int(i64::from(self.array::<1>()?[0])),
            Marker::U16 => Value::Int(i64::from(u16::from_be_bytes(self.array()?))),
            Marker::U32 => Value::Int(i64::from(u32::from_be_bytes(self.array()?))),
            Marker::U64 => match u64::from_be_bytes(self.array()?) {
                u if u <= i64::MAX as u64 => Value::Int(u as i64),
                u => Value::Long([&u.to_le_bytes()[..], &[0]].concat()),
            },
            Marker::I8 => Value::Int(i64::from(i8::from_be_bytes(self.array()?))),
            Marker::I16 => Value::Int(i64::from(i16::from_be_bytes(self.array()?))),
            Marker::I32 => Value::Int(i64::from(i32::from_be_bytes(self.array()?))),
            Marker::I64 => Value::Int(i64::from_be_bytes(self.array()?)),
            Marker::F32 => Value::Float(f64::from(f32::from_be_bytes(self.array()?))),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.array()?)),
            Marker::FixStr(len) => self.string(usize::from(len))?,
            Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                let len = self.len(marker)?;
                self.string(len)?
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                let len = self.len(marker)?;
                Value::Bytes(self.take(len)?)
            }
            Marker::FixArray(len) => self.array_of(usize::from(len), depth)?,
            Marker::Array16 | Marker::Array32 => {
                let len = self.len(marker)?;
                self.array_of(len, depth)?
            }
            Marker::FixMap(len) => self.map_of(usize::from(len), depth)?,
            Marker::Map16 | Marker::Map32 => {
                let len = self.len(marker)?;
                self.map_of(len, depth)?
            }
            _ => return Err(Malformed(at)),
        })
    }

    fn len(&mut self, marker: Marker) -> Result<usize, Malformed> {
        Ok(match marker {
            Marker::Str8 | Marker::Bin8 => usize::from(self.array::<1>()?[0]),
            Marker::Str16 | Marker::Bin16 | Marker::Array16 | Marker::Map16 => {
                usize::from(u16::from_be_bytes(self.array()?))
            }
            _ => u32::from_be_bytes(self.array()?) as usize,
        })
    }

    fn take(&mut self, n: usize) -> Result<Bytes, Malformed> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(Malformed(self.at))?;
        let taken = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let at = self.at;
        self.take(N)?.as_ref().try_into().map_err(|_| Malformed(at))
    }

    fn string(&mut self, len: usize) -> Result<Value, Malformed> {
        let at = self.at;
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Malformed(at))?;
        Ok(Value::Str(text.to_owned()))
    }

    /// Every item takes a byte at least, so the length announced bounds nothing by itself.
    fn room(&self, items: usize) -> Result<usize, Malformed> {
        if items > self.bytes.len() - self.at { Err(Malformed(self.at)) } else { Ok(items) }
    }

    fn array_of(&mut self, len: usize, depth: u16) -> Result<Value, Malformed> {
        (0..self.room(len)?)
            .map(|_| self.value(depth + 1))
            .collect::<Result<_, _>>()
            .map(Value::Tuple)
    }

    fn map_of(&mut self, len: usize, depth: u16) -> Result<Value, Malformed> {
        (0..self.room(len)?)
            .map(|_| Ok((self.value(depth + 1)?, self.value(depth + 1)?)))
            .collect::<Result<_, _>>()
            .map(Value::Dict)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_takes_memory_in_proportion_to_its_length() {
        let nils =
            |count: u32| [&[0xdd][..], &count.to_be_bytes(), &vec![0xc0; count as usize]].concat();
        assert!(read(&nils(10_000).into()).is_ok());
        assert!(read(&nils(16 << 20).into()).is_err());
        let oids = Value::Tuple(vec![Value::Bytes(Bytes::from_static(&[7; 8])); 1 << 20]);
        assert_eq!(round_trip(&oids), oids);
    }

    fn round_trip(value: &Value) -> Value {
        let mut out = BytesMut::new();
        write(value, &mut out);
        read(&out.freeze()).unwrap()
    }

    #[test]
    fn values_come_back() {
        let value = Value::Tuple(vec![
            Value::None,
            Value::Bool(true),
            Value::Int(-1),
            Value::Int(i64::MAX),
            Value::Long(vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]),
            Value::Float(0.5),
            Value::str("text"),
            Value::bytes(&[0; 70_000]),
            Value::Dict(vec![(Value::str("key"), Value::Tuple(vec![]))]),
        ]);
        assert_eq!(round_trip(&value), value);
    }

    /// `msgpack.packb((1, False, 'loadBefore', (b'\0'*8, b'\x7f'+b'\xff'*7)), use_bin_type=True)`
    #[test]
    fn reads_what_python_writes() {
        let bytes = Bytes::from_static(
            b"\x94\x01\xc2\xaaloadBefore\x92\xc4\x08\0\0\0\0\0\0\0\0\xc4\x08\x7f\xff\xff\xff\xff\xff\xff\xff",
        );
        let Value::Tuple(parts) = read(&bytes).unwrap() else { panic!() };
        assert_eq!(parts[2], Value::str("loadBefore"));
        assert_eq!(parts[3].items().unwrap()[0], Value::bytes(&[0; 8]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&Bytes::from(bytes));
        }

        #[test]
        fn deep_nesting_is_refused(depth in 201usize..5000) {
            let bytes = Bytes::from(vec![0x91; depth]);
            prop_assert!(read(&bytes).is_err());
        }
    }
}
