//! Random names.

use crate::platform;

/// A random hexadecimal string of `bytes` bytes; never all zeros.
pub(crate) fn random_hex(bytes: usize) -> anyhow::Result<String> {
    platform::for_start().random_hex(bytes)
}
