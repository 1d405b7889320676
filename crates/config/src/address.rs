//! Addresses, as a configuration writes them.

use std::fmt;
use std::path::PathBuf;

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Name or number; empty for all interfaces.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.is_empty() { "0.0.0.0" } else { &self.host };
        if host.contains(':') {
            write!(f, "[{host}]:{}", self.port)
        } else {
            write!(f, "{host}:{}", self.port)
        }
    }
}

impl Address {
    /// Reads `PORT`, `HOST:PORT` or `[HOST]:PORT`; the host `*` is none.
    pub fn parse(text: &str) -> Result<Address, String> {
        let wrong = || format!("{text:?} is not an address: HOST:PORT or PORT");
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host.trim(), port.trim()),
            None => ("", text),
        };
        let host = match host {
            "*" => "",
            other => other.trim_start_matches('[').trim_end_matches(']'),
        };
        Ok(Address { host: host.into(), port: port.parse().map_err(|_| wrong())? })
    }

    /// True if it can be reached from this machine only.
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<std::net::IpAddr>() {
            Ok(ip) => ip.is_loopback(),
            Err(_) => self.host == "localhost",
        }
    }
}

/// Where read-write clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ZeoAddress {
    /// A host and a port.
    Tcp(Address),
    /// A Unix socket: anything with a `/`.
    Unix(PathBuf),
}

impl fmt::Display for ZeoAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ZeoAddress::Tcp(address) => address.fmt(f),
            ZeoAddress::Unix(path) => path.display().fmt(f),
        }
    }
}
