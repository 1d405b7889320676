//! Connections: between nodes, and with clients.

pub(crate) mod blob_files;
pub(crate) mod certificate;
pub(crate) mod frames;
pub(crate) mod handshake;
pub(crate) mod sealed;
pub(crate) mod stream;
pub(crate) mod tls;

#[cfg(not(feature = "simulated"))]
pub(crate) mod socket;
#[cfg(feature = "simulated")]
#[path = "simulated_socket.rs"]
pub(crate) mod socket;
