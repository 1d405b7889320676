//! Values to pickles: protocol 3, no memo, as `zodbpickle` in its fast mode writes.

use bytes::{BufMut, BytesMut};

use crate::Value;

/// Appends the pickle of `value` to `out`.
pub fn encode(value: &Value, out: &mut BytesMut) {
    out.put_slice(b"\x80\x03");
    put(value, out);
    out.put_u8(b'.');
}

fn put(value: &Value, out: &mut BytesMut) {
    match value {
        Value::None => out.put_u8(b'N'),
        Value::Bool(true) => out.put_u8(0x88),
        Value::Bool(false) => out.put_u8(0x89),
        Value::Int(i) => put_int(*i, out),
        Value::Long(bytes) => put_long(bytes, out),
        Value::Float(f) => {
            out.put_u8(b'G');
            out.put_f64(*f);
        }
        Value::Str(s) => {
            out.put_u8(b'X');
            out.put_u32_le(s.len() as u32);
            out.put_slice(s.as_bytes());
        }
        Value::Bytes(b) => {
            match u8::try_from(b.len()) {
                Ok(short) => out.put_slice(&[b'C', short]),
                Err(_) => {
                    out.put_u8(b'B');
                    out.put_u32_le(b.len() as u32);
                }
            }
            out.put_slice(b);
        }
        Value::Tuple(items) => put_tuple(items, out),
        Value::List(items) => {
            out.put_u8(b']');
            if !items.is_empty() {
                out.put_u8(b'(');
                items.iter().for_each(|item| put(item, out));
                out.put_u8(b'e');
            }
        }
        Value::Dict(pairs) => {
            out.put_u8(b'}');
            if !pairs.is_empty() {
                out.put_u8(b'(');
                for (key, value) in pairs {
                    put(key, out);
                    put(value, out);
                }
                out.put_u8(b'u');
            }
        }
        Value::Global { module, name } => {
            out.put_u8(b'c');
            for part in [module, name] {
                out.put_slice(part.as_bytes());
                out.put_u8(b'\n');
            }
        }
        Value::Object(object) => {
            put(&object.callable, out);
            put(&object.args, out);
            out.put_u8(if object.by_new { 0x81 } else { b'R' });
            if let Some(state) = &object.state {
                put(state, out);
                out.put_u8(b'b');
            }
        }
    }
}

fn put_tuple(items: &[Value], out: &mut BytesMut) {
    let code = match items.len() {
        0 => b')',
        1 => 0x85,
        2 => 0x86,
        3 => 0x87,
        _ => {
            out.put_u8(b'(');
            b't'
        }
    };
    items.iter().for_each(|item| put(item, out));
    out.put_u8(code);
}

fn put_int(i: i64, out: &mut BytesMut) {
    if let Ok(byte) = u8::try_from(i) {
        out.put_slice(&[b'K', byte]);
    } else if let Ok(short) = u16::try_from(i) {
        out.put_u8(b'M');
        out.put_u16_le(short);
    } else if let Ok(int) = i32::try_from(i) {
        out.put_u8(b'J');
        out.put_i32_le(int);
    } else {
        let bytes = i.to_le_bytes();
        let sign = if i < 0 { 0xff } else { 0 };
        let mut len = 8;
        while len > 1 && bytes[len - 1] == sign && (bytes[len - 2] ^ sign) & 0x80 == 0 {
            len -= 1;
        }
        put_long(&bytes[..len], out);
    }
}

fn put_long(bytes: &[u8], out: &mut BytesMut) {
    match u8::try_from(bytes.len()) {
        Ok(short) => out.put_slice(&[0x8a, short]),
        Err(_) => {
            out.put_u8(0x8b);
            out.put_i32_le(bytes.len() as i32);
        }
    }
    out.put_slice(bytes);
}
