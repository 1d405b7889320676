//! Errors in words.

/// An error with its causes, for a person to read. Many say their cause themselves: what was just
/// said is not repeated.
pub fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Context;
    use standby_filestorage::StorageError;

    use super::*;

    #[test]
    fn nothing_is_said_twice() {
        let source = std::io::Error::other("the cable is out");
        let (path, action) = (Path::new("/Data.fs").to_owned(), "read");
        let error = Err::<(), _>(StorageError::Io { path, action, source }).context("it failed");
        let expected = "it failed: /Data.fs: cannot read: the cable is out";
        assert_eq!(with_causes(&error.unwrap_err()), expected);
    }
}
