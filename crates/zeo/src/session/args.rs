//! The arguments of a call, with the errors that wrong ones get.

use bytes::Bytes;
use standby_pickle::Value;
use standby_types::{Oid, Tid, TransactionToken};

use crate::error::ClientError;

#[derive(Clone, Copy)]
pub(super) struct Args<'a> {
    pub method: &'a str,
    pub args: &'a [Value],
}

impl<'a> Args<'a> {
    pub fn wrong(&self) -> ClientError {
        ClientError::arguments(self.method)
    }

    pub fn none(&self) -> Result<(), ClientError> {
        if self.args.is_empty() { Ok(()) } else { Err(self.wrong()) }
    }

    pub fn one(&self) -> Result<&'a Value, ClientError> {
        match self.args {
            [value] => Ok(value),
            _ => Err(self.wrong()),
        }
    }

    /// An oid of another length than eight bytes is simply one that does not exist.
    pub fn oid(&self, value: &Value) -> Result<Oid, ClientError> {
        match value {
            Value::Bytes(bytes) => {
                Oid::from_slice(bytes).ok_or_else(|| ClientError::PosKey(value.clone()))
            }
            _ => Err(ClientError::Other("builtins.AssertionError", vec![])),
        }
    }

    /// An oid; what is none is one that does not exist.
    pub fn key(&self, value: &Value) -> Result<Oid, ClientError> {
        match value {
            Value::Bytes(_) => self.oid(value),
            _ => Err(ClientError::PosKey(value.clone())),
        }
    }

    pub fn tid(&self, value: &Value) -> Result<Tid, ClientError> {
        match value {
            Value::Bytes(bytes) => Tid::from_slice(bytes).ok_or_else(|| self.wrong()),
            _ => Err(self.wrong()),
        }
    }

    pub fn token(&self, value: &Value) -> Result<TransactionToken, ClientError> {
        let bytes = value.as_bytes().ok_or_else(|| self.wrong())?;
        TransactionToken::from_slice(&bytes).ok_or_else(|| {
            ClientError::storage(format!(
                "a transaction token has {} bytes, this one has {}",
                TransactionToken::LEN,
                bytes.len()
            ))
        })
    }

    /// The arguments of `transaction_outcome(token, since)`.
    pub fn outcome(&self) -> Result<(TransactionToken, Tid), ClientError> {
        match self.args {
            [token, since] => Ok((self.token(token)?, self.tid(since)?)),
            _ => Err(self.wrong()),
        }
    }

    pub fn tid_or_none(&self, value: &Value) -> Result<Option<Tid>, ClientError> {
        if *value == Value::None { Ok(None) } else { self.tid(value).map(Some) }
    }

    /// The serial of a change. Any text will do for a new object; one that is no serial is that of
    /// no revision.
    pub fn serial(&self, value: &Value) -> Result<Tid, ClientError> {
        if *value == Value::None {
            return Ok(Tid::NONE);
        }
        let bytes = value.as_bytes().ok_or_else(|| self.wrong())?;
        Ok(Tid::from_slice(&bytes).unwrap_or(Tid::MAX))
    }

    pub fn oid_and_tid(&self) -> Result<(Oid, Tid), ClientError> {
        match self.args {
            [oid, tid] => Ok((self.oid(oid)?, self.tid(tid)?)),
            _ => Err(self.wrong()),
        }
    }

    /// `data`, or `None` for an object that is gone.
    pub fn data_or_none(&self, value: &Value) -> Result<Option<Bytes>, ClientError> {
        match value {
            Value::None => Ok(None),
            Value::Bytes(data) => Ok(Some(data.clone())),
            _ => Err(self.wrong()),
        }
    }

    pub fn int(&self, value: &Value) -> Result<i64, ClientError> {
        match value {
            Value::Int(n) => Ok(*n),
            Value::Bool(b) => Ok(i64::from(*b)),
            _ => Err(self.wrong()),
        }
    }

    /// How many oids: 1 to 100, 100 if nothing is said.
    pub fn count(&self) -> Result<usize, ClientError> {
        match self.args {
            [] => Ok(100),
            [Value::Int(n)] => Ok((*n).clamp(1, 100) as usize),
            _ => Err(self.wrong()),
        }
    }

    /// The time of a pack, and whether the client waits for it.
    pub fn pack(&self) -> Result<(f64, bool), ClientError> {
        let (time, wait) = match self.args {
            [time] => (time, true),
            [time, wait] => (time, wait.truth()),
            _ => return Err(self.wrong()),
        };
        match time {
            Value::Float(time) => Ok((*time, wait)),
            Value::Int(time) => Ok((*time as f64, wait)),
            _ => Err(self.wrong()),
        }
    }

    /// `first, last` of an undo log, as a range of indexes: a negative last is a number of entries.
    pub fn range(
        &self,
        first: &Value,
        last: &Value,
    ) -> Result<std::ops::Range<usize>, ClientError> {
        let (first, last) = (self.int(first)?.max(0), self.int(last)?);
        let last = if last < 0 { first.saturating_sub(last) } else { last };
        Ok(first as usize..last as usize)
    }
}
