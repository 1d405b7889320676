//! Bytes as hexadecimal digits.

/// Two digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a string of digits; `None` if it is none.
pub fn unhex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| match std::str::from_utf8(pair) {
            Ok(pair) if pair.len() == 2 && !pair.starts_with('+') => {
                u8::from_str_radix(pair, 16).ok()
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_travel() {
        assert_eq!(hex(&[0, 0xa7, 255]), "00a7ff");
        assert_eq!(unhex("00a7ff"), Some(vec![0, 0xa7, 255]));
        for wrong in ["0", "0g", "+1", "é0"] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }
}
