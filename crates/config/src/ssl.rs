//! How connections are secured.

use std::path::PathBuf;

/// `<ssl>`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SslSection {
    /// The server's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key; the same file by default.
    pub key: PathBuf,
    /// The dotted name of a function of Python that gives the key's password.
    pub password_function: Option<String>,
    /// A file with certificates, or a folder of such files.
    pub authenticate: PathBuf,
}
