//! Random names.

use anyhow::bail;
use standby_types::hex::hex;

use crate::platform;

/// A random hexadecimal string of `bytes` bytes; never all zeros.
pub fn random_hex(bytes: usize) -> anyhow::Result<String> {
    let mut random = vec![0; bytes];
    platform::fill_random(&mut random)?;
    if random.iter().all(|byte| *byte == 0) {
        bail!("the system's randomness is broken: it gives zeros only");
    }
    Ok(hex(&random))
}
