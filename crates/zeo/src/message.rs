//! Messages: `(message id, flag, method, args)` in one of two encodings.

use bytes::{BufMut, Bytes, BytesMut};
use standby_pickle::{DecodeError, Value};

use crate::error::ClientError;
use crate::msgpack::{self, Malformed};

/// How a connection writes its messages. The first byte of the version names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `Z5`
    Pickle,
    /// `M5`
    Msgpack,
}

/// A message from the other side.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// A call.
    Call(Call),
    /// The answer to a call; clients get these.
    Reply(Reply),
    /// A sign of life; needs no answer.
    Heartbeat,
}

/// A method that the client calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Echoed in the reply exactly as it came.
    pub id: Value,
    /// No reply is expected, nor possible: if it fails, the connection is closed.
    pub one_way: bool,
    /// The method's name.
    pub method: String,
    /// Its arguments; normally a tuple.
    pub args: Value,
}

/// What a call returned, or raised.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The call's id.
    pub id: Value,
    /// The result, or (class name, arguments) of an exception.
    pub result: Result<Value, (String, Value)>,
}

/// A frame that is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a pickle, or one that asks for more than data.
    #[error("cannot decode a message: {0}")]
    Pickle(#[from] DecodeError),
    /// Not msgpack.
    #[error("cannot decode a message: {0}")]
    Msgpack(String),
    /// Something else than a tuple of four.
    #[error("a message is not a tuple of four parts")]
    NotAMessage,
    /// The method is not named by a string.
    #[error("a method's name is not a text (clients on Python 2 are not served)")]
    NoMethodName,
}

impl From<Malformed> for WireError {
    fn from(malformed: Malformed) -> Self {
        WireError::Msgpack(malformed.to_string())
    }
}

/// The only modules whose globals a message may name. Nothing of them is executed here either.
const ALLOWED_MODULES: [&str; 5] =
    ["ZopeUndo.Prefix", "zodbpickle", "builtins", "__builtin__", "copy_reg"];

impl Encoding {
    /// The encoding that a version such as `Z5` asks for.
    pub fn of_version(version: &[u8]) -> Option<Encoding> {
        match version {
            b"Z5" => Some(Encoding::Pickle),
            b"M5" => Some(Encoding::Msgpack),
            _ => None,
        }
    }

    /// The version that asks for this encoding.
    pub fn version(self) -> &'static [u8; 2] {
        match self {
            Encoding::Pickle => b"Z5",
            Encoding::Msgpack => b"M5",
        }
    }

    /// Reads the message in a frame.
    pub fn decode(self, frame: &Bytes) -> Result<Incoming, WireError> {
        let value = match self {
            Encoding::Pickle => {
                standby_pickle::decode(frame, |module, _| ALLOWED_MODULES.contains(&module))?
            }
            Encoding::Msgpack => msgpack::read(frame)?,
        };
        let parts = match value {
            Value::Tuple(parts) | Value::List(parts) => parts,
            _ => return Err(WireError::NotAMessage),
        };
        let [id, flag, method, args]: [Value; 4] =
            parts.try_into().map_err(|_| WireError::NotAMessage)?;
        if id == Value::Int(-1) {
            return Ok(Incoming::Heartbeat);
        }
        let Value::Str(method) = method else {
            return Err(WireError::NoMethodName);
        };
        if method != ".reply" {
            return Ok(Incoming::Call(Call { id, one_way: flag.truth(), method, args }));
        }
        if !flag.truth() {
            return Ok(Incoming::Reply(Reply { id, result: Ok(args) }));
        }
        match args.items() {
            Some([Value::Str(class), arguments]) => {
                let error = (class.clone(), arguments.clone());
                Ok(Incoming::Reply(Reply { id, result: Err(error) }))
            }
            _ => Err(WireError::NotAMessage),
        }
    }

    /// The frame of a reply.
    pub fn reply(self, id: &Value, result: Value) -> Bytes {
        self.message(id.clone(), Value::Int(0), ".reply", result)
    }

    /// The frame of an error reply.
    pub fn error(self, id: &Value, error: &ClientError) -> Bytes {
        let (class, args) = error.to_wire();
        let args = Value::Tuple(vec![Value::Str(class), args]);
        self.message(id.clone(), Value::Int(2), ".reply", args)
    }

    /// The frame of a call that expects no reply.
    pub fn notify(self, method: &str, args: Vec<Value>) -> Bytes {
        self.message(Value::Int(0), Value::Bool(true), method, Value::Tuple(args))
    }

    /// The frame of a call that expects a reply.
    pub fn call(self, id: &Value, method: &str, args: Vec<Value>) -> Bytes {
        self.message(id.clone(), Value::Bool(false), method, Value::Tuple(args))
    }

    fn message(self, id: Value, flag: Value, method: &str, args: Value) -> Bytes {
        let message = Value::Tuple(vec![id, flag, Value::str(method), args]);
        let mut out = BytesMut::with_capacity(256);
        out.put_u32(0);
        match self {
            Encoding::Pickle => standby_pickle::encode(&message, &mut out),
            Encoding::Msgpack => msgpack::write(&message, &mut out),
        }
        let len = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&len.to_be_bytes());
        out.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standby_types::Oid;

    fn content(frame: &Bytes) -> Bytes {
        frame.slice(4..)
    }

    /// As Python's server writes it.
    #[test]
    fn error_reply_in_msgpack() {
        let error = ClientError::PosKey(Value::bytes(&Oid(1).to_bytes()));
        let frame = Encoding::Msgpack.error(&Value::Int(14), &error);
        assert_eq!(
            content(&frame),
            Bytes::from_static(
                b"\x94\x0e\x02\xa6.reply\x92\xbdZODB.POSException.POSKeyError\x91\xc4\x08\0\0\0\0\0\0\0\x01"
            )
        );
    }

    #[test]
    fn message_ids_are_echoed_with_their_type() {
        for encoding in [Encoding::Pickle, Encoding::Msgpack] {
            let id = Value::Tuple(vec![Value::bytes(b"oid"), Value::bytes(b"tid")]);
            let frame = encoding.reply(&id, Value::None);
            let expected = Reply { id, result: Ok(Value::None) };
            assert_eq!(encoding.decode(&content(&frame)), Ok(Incoming::Reply(expected)));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let decode = |bytes: &'static [u8]| Encoding::Pickle.decode(&Bytes::from_static(bytes));
        assert_eq!(decode(b"\x80\x03N."), Err(WireError::NotAMessage));
        assert!(matches!(decode(b"garbage"), Err(WireError::Pickle(_))));
        assert!(matches!(decode(b"\x80\x03cos\nsystem\n."), Err(WireError::Pickle(_))));
        assert_eq!(decode(b"\x80\x03(K\x01K\x00K\x05)t."), Err(WireError::NoMethodName));
        assert_eq!(decode(b"\x80\x03(J\xff\xff\xff\xffK\x00NNt."), Ok(Incoming::Heartbeat));
    }
}
