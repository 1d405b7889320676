//! Conversations between nodes.
//!
//! Each node dials every other one and sends over the connection it dialled; what it receives comes
//! over the connections that others dialled. Every connection begins with a handshake
//! (`transport/handshake.rs`) that refuses strangers; then it serves one purpose (`Purpose`): a
//! link for messages (`link.rs`), a catch-up (`catch_up.rs`), a blob (`blob.rs`), a client passed
//! on from another node, what an administrator asks for (`command.rs`), or a question whether a
//! cluster exists already.

pub(crate) mod blob;
pub(crate) mod blob_repair;
pub(crate) mod blob_source;
pub(crate) mod block;
pub(crate) mod catch_up;
pub(crate) mod command;
pub(crate) mod compare;
pub(crate) mod link;
