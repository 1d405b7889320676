//! Errors that reach the application: each becomes, in the stock client, the exception that ZODB
//! code expects.

use standby_pickle::Value;
use standby_types::{Oid, Tid};

/// An exception for the client.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "fields that say by their names what they are")]
pub enum ClientError {
    /// `POSKeyError(oid)`: no such object or revision.
    PosKey(Value),
    /// `ReadOnlyError`: a write on a read-only connection.
    ReadOnly,
    /// `StorageTransactionError`: the call does not fit the connection's transaction.
    StorageTransaction(Vec<Value>),
    /// `ConflictError`: the object was changed by another transaction.
    Conflict {
        oid: Oid,
        /// The committed serial, and the one that the client's change is based on.
        serials: (Tid, Tid),
        /// `module.Class` of the object.
        class_name: Option<String>,
    },
    /// `ReadConflictError`: an object that was only read is not current any more.
    ReadConflict {
        oid: Oid,
        /// The committed serial, and the one that the client read.
        serials: (Tid, Tid),
    },
    /// `UndoError`: the transaction cannot be undone.
    Undo(String),
    /// `MultipleUndoErrors`: objects that have changed since, with the reason for each.
    UndoConflicts(Vec<(Oid, &'static str)>),
    /// Any other exception: its dotted name and arguments.
    Other(&'static str, Vec<Value>),
}

impl ClientError {
    /// A `TypeError`: wrong arguments.
    pub fn arguments(method: &str) -> ClientError {
        ClientError::Other(
            "builtins.TypeError",
            vec![Value::Str(format!("{method}: wrong arguments"))],
        )
    }

    /// A `StorageError` of ZODB with a text for a person.
    pub fn storage(text: impl Into<String>) -> ClientError {
        ClientError::Other("ZODB.POSException.StorageError", vec![Value::Str(text.into())])
    }

    /// A `FileStorageError` with a text for a person.
    pub fn file_storage(text: impl Into<String>) -> ClientError {
        let name = "ZODB.FileStorage.FileStorage.FileStorageError";
        ClientError::Other(name, vec![Value::Str(text.into())])
    }

    /// The class name and the arguments, as they stand in an error reply.
    pub fn to_wire(&self) -> (String, Value) {
        let conflict = |message: &str, oid: Oid, class: Value, serials: (Tid, Tid)| {
            Value::Dict(vec![
                (Value::str("message"), Value::str(message)),
                (Value::str("oid"), oid.to_bytes().into()),
                (Value::str("class_name"), class),
                (Value::str("serials"), serial_pair(serials)),
            ])
        };
        match self {
            ClientError::PosKey(oid) => {
                ("ZODB.POSException.POSKeyError".into(), Value::Tuple(vec![oid.clone()]))
            }
            ClientError::ReadOnly => {
                ("ZODB.POSException.ReadOnlyError".into(), Value::Tuple(vec![]))
            }
            ClientError::StorageTransaction(args) => {
                ("ZODB.POSException.StorageTransactionError".into(), Value::Tuple(args.clone()))
            }
            ClientError::Conflict { oid, serials, class_name } => {
                let class = class_name.clone().map_or(Value::None, Value::Str);
                (
                    "ZODB.POSException.ConflictError".into(),
                    conflict("database conflict error", *oid, class, *serials),
                )
            }
            ClientError::ReadConflict { oid, serials } => (
                "ZODB.POSException.ReadConflictError".into(),
                conflict("database read conflict error", *oid, Value::None, *serials),
            ),
            ClientError::Undo(reason) => {
                ("ZODB.POSException.UndoError".into(), undo_state(reason, Value::None))
            }
            ClientError::UndoConflicts(conflicts) => {
                let errors = conflicts.iter().map(|(oid, reason)| {
                    Value::Tuple(vec![oid.to_bytes().into(), Value::str(*reason)])
                });
                let state = Value::Dict(vec![(Value::str("_errs"), Value::List(errors.collect()))]);
                ("ZODB.POSException.MultipleUndoErrors".into(), state)
            }
            ClientError::Other(class, args) => ((*class).into(), Value::Tuple(args.clone())),
        }
    }
}

/// The attributes of an `UndoError`.
fn undo_state(reason: &str, oid: Value) -> Value {
    Value::Dict(vec![(Value::str("_reason"), Value::str(reason)), (Value::str("_oid"), oid)])
}

/// `(committed, read)` as the client wants them.
pub(crate) fn serial_pair((committed, read): (Tid, Tid)) -> Value {
    Value::Tuple(vec![committed.to_bytes().into(), read.to_bytes().into()])
}
