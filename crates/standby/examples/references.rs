//! The references of records that another program sends: for comparing with what ZODB follows.
//!
//! In: a record's length (four bytes, big-endian) and the record. Out: for each, one line: the oids
//! in hexadecimal, or `!` and why they cannot be told.

use std::io::{self, Read, Write};

fn main() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut len = [0; 4];
    while input.read_exact(&mut len).is_ok() {
        let mut record = vec![0; u32::from_be_bytes(len) as usize];
        input.read_exact(&mut record)?;
        let mut line = String::new();
        let each = |oid| line += &format!("{:016x} ", u64::from_be_bytes(oid));
        match standby_pickle::references(&record, each) {
            Ok(()) => writeln!(output, "{line}")?,
            Err(error) => writeln!(output, "! {error}")?,
        }
        output.flush()?;
    }
    Ok(())
}
