//! Segments of the log. The checksums are made right, so that what they protect is reached: the
//! input is a row of frames (length 1, number 1, content) and of raw bytes behind them.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use standby_consensus::recover;
use standby_types::Disk;
use standby_types::disk::Open;
use standby_types::memory::MemoryDisk;

fn segment(data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"SBYLOG01");
    for number in [1u64, 1, 0, 0] {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.push(0);
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
    bytes.resize(64, 0);
    let mut rest = data;
    let mut number = 1u64;
    while let [len, skip, content @ ..] = rest {
        let len = usize::from(*len).min(content.len());
        let (content, left) = content.split_at(len);
        rest = left;
        number += u64::from(*skip & 1);
        // An entry's item has a checksum of its own, over all of the rest of it.
        let mut content = content.to_vec();
        if content.first() == Some(&b'e') && content.len() >= 30 {
            let mut item = content[..26].to_vec();
            item.extend_from_slice(&content[30..]);
            content[26..30].copy_from_slice(&crc32c::crc32c(&item).to_be_bytes());
        }
        let mut summed = number.to_be_bytes().to_vec();
        summed.extend_from_slice(&content);
        bytes.extend_from_slice(&(content.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&summed).to_be_bytes());
        bytes.extend_from_slice(&summed);
        number += 1;
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let memory = MemoryDisk::new();
    let file = memory.open(Path::new("/log/0000000000000001.log"), Open::Create).unwrap();
    file.write_at(&segment(data), 0).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(memory);
    if let Ok(recovered) = recover(&disk, Path::new("/log")) {
        let first = recovered.first_index();
        let _ = recovered.data_after(&*disk, Path::new("/log"), first);
        assert!(recovered.last_index().0 + 1 >= first.0);
    }
});
