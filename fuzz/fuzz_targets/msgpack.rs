//! A call in msgpack.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use standby_zeo::Encoding;

fuzz_target!(|data: &[u8]| {
    let _ = Encoding::Msgpack.decode(&Bytes::copy_from_slice(data));
});
