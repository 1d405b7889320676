//! A pickle; what can be read is written and read again.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use standby_pickle::{decode, encode};

fuzz_target!(|data: &[u8]| {
    let _ = standby_pickle::class_name(&Bytes::copy_from_slice(data));
    if let Ok(value) = decode(&Bytes::copy_from_slice(data), |_, _| true) {
        let mut out = BytesMut::new();
        encode(&value, &mut out);
        let again = decode(&out.freeze(), |_, _| true).expect("our own pickle can be read");
        // A float may be no number, which equals nothing.
        let _ = again == value;
    }
});
