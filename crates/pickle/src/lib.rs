//! The pickles that travel in ZEO's protocol and stand at the head of ZODB's records.
//!
//! A pickle is a program for a small stack machine; Python's `pickle` runs it and may call
//! anything. Here it is only *read into data*: [`decode`] gives a [`Value`], in which a class is a
//! name and a call is a node, never executed. [`encode`] writes protocol 3 without memo, as ZEO
//! does. [`class_name`] tells the class of a ZODB record, [`references`] which objects it refers
//! to.
//!
//! Reading order: [`Value`], `decode.rs`, `encode.rs`, `references.rs` with `persistent.rs`.
//!
//! Bounds: nesting is at most [`MAX_DEPTH`], and what a pickle expands to is bounded by its
//! length, so no input can exhaust the stack or the memory.

mod decode;
mod encode;
mod persistent;
mod references;

pub use decode::{DecodeError, MAX_DEPTH, class_name, decode, decode_first, decode_with_texts};
pub use encode::encode;
pub use references::references;

use bytes::Bytes;

/// A Python value, as far as ZEO's messages need it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`
    None,
    /// `True`, `False`
    Bool(bool),
    /// An `int` of 64 bits.
    Int(i64),
    /// A larger `int`: two's complement, little-endian, shortest form.
    Long(Vec<u8>),
    /// `float`
    Float(f64),
    /// `str`
    Str(String),
    /// `bytes`; shares the memory of the message that it came in.
    Bytes(Bytes),
    /// `tuple`
    Tuple(Vec<Value>),
    /// `list`
    List(Vec<Value>),
    /// `dict`, in order of insertion.
    Dict(Vec<(Value, Value)>),
    /// A class or function, by name.
    Global {
        /// Dotted module name.
        module: String,
        /// Name in the module.
        name: String,
    },
    /// An instance: what `__reduce__` gave.
    Object(Box<Object>),
}

/// An instance of a class, as instructions to make it.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// The class or the factory, normally a [`Value::Global`].
    pub callable: Value,
    /// Its arguments, normally a [`Value::Tuple`].
    pub args: Value,
    /// Made by `callable.__new__` (`NEWOBJ`) instead of a call (`REDUCE`).
    pub by_new: bool,
    /// What `__setstate__` gets.
    pub state: Option<Value>,
}

impl Value {
    /// A `str`.
    pub fn str(text: impl Into<String>) -> Value {
        Value::Str(text.into())
    }

    /// A `bytes` copied from a slice.
    pub fn bytes(bytes: &[u8]) -> Value {
        Value::Bytes(Bytes::copy_from_slice(bytes))
    }

    /// The items of a tuple or a list.
    pub fn items(&self) -> Option<&[Value]> {
        match self {
            Value::Tuple(items) | Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// The bytes of a `bytes`, or the UTF-8 of a `str`.
    pub fn as_bytes(&self) -> Option<Bytes> {
        match self {
            Value::Bytes(b) => Some(b.clone()),
            Value::Str(s) => Some(Bytes::copy_from_slice(s.as_bytes())),
            _ => None,
        }
    }

    /// Python's truth value.
    pub fn truth(&self) -> bool {
        match self {
            Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(i) => *i != 0,
            Value::Long(bytes) => bytes.iter().any(|b| *b != 0),
            Value::Float(f) => *f != 0.0,
            Value::Str(s) => !s.is_empty(),
            Value::Bytes(b) => !b.is_empty(),
            Value::Tuple(v) | Value::List(v) => !v.is_empty(),
            Value::Dict(v) => !v.is_empty(),
            Value::Global { .. } | Value::Object(_) => true,
        }
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Value::Int(value)
    }
}
impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}
impl From<Bytes> for Value {
    fn from(value: Bytes) -> Self {
        Value::Bytes(value)
    }
}
impl From<[u8; 8]> for Value {
    fn from(value: [u8; 8]) -> Self {
        Value::bytes(&value)
    }
}

#[cfg(test)]
mod tests;
