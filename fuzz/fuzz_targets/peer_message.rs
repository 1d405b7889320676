//! What comes from other nodes: messages of consensus, and what their entries mean.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use standby_consensus::{Command, decode_message};
use standby_filestorage::{record_len, take_meta, take_record};

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(message) = decode_message(bytes.clone()) {
        for closing in message.closings_with_blobs() {
            let _ = take_meta(&mut closing.head.clone());
        }
    }
    if let Ok(command) = Command::decode(bytes.clone()) {
        assert_eq!(Command::decode(command.encode()), Ok(command));
    }
    let _ = take_meta(&mut bytes.clone());
    if let Ok(Some(len)) = record_len(&bytes)
        && len <= bytes.len()
    {
        let _ = take_record(&mut bytes.slice(..len));
    }
});
