//! The references of a record.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = standby_pickle::references(data, |_| ());
});
