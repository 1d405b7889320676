//! Conversations with ZEO clients.

pub(crate) mod connection;
pub(crate) mod encoding;
pub(crate) mod history_calls;
pub(crate) mod listener;
pub(crate) mod newcomer;
pub(crate) mod staged_blob;
pub(crate) mod status_calls;
