//! Frames of the conversations between nodes: a letter, and the content.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use standby_node::read_in_all_ways;

fuzz_target!(|data: &[u8]| {
    if let Some((kind, content)) = data.split_first() {
        read_in_all_ways(*kind, &Bytes::copy_from_slice(content)).unwrap();
    }
});
