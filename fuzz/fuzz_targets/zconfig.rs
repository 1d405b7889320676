//! A configuration.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use standby_config::Config;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        // The only key that opens a file.
        && !text.to_lowercase().contains("secret-file")
    {
        let _ = Config::parse(Path::new("zeo.conf"), text);
    }
});
