//! What a line says, in a form that nobody can abuse who chose a part of it: a name that a client
//! sent, a reply of a peer, a path.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

/// The longest message with its fields, in bytes. Lists of nodes and of causes are shorter.
const MOST: usize = 8 << 10;

/// Formats `message key=value …` on one line: control characters are escaped, and what is longer
/// than [`MOST`] is cut.
pub(super) struct SafeFields;

impl<'w> FormatFields<'w> for SafeFields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut line = Line::default();
        fields.record(&mut line);
        writer.write_str(&line.text)?;
        match line.cut {
            0 => Ok(()),
            bytes => write!(writer, "… [{bytes} bytes more]"),
        }
    }
}

#[derive(Default)]
struct Line {
    text: String,
    /// Bytes that did not fit.
    cut: usize,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.field(field, format_args!("{value:?}"));
    }

    // Debug would show the quotes and escapes of a text twice.
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.field(field, format_args!("{value}"));
    }
}

impl Line {
    fn field(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let name = field.name();
        // Writing to a Line never fails.
        let _ = match (self.text.is_empty(), name) {
            (true, "message") => self.write_fmt(value),
            (false, "message") => write!(self, " {value}"),
            (true, _) => write!(self, "{name}={value}"),
            (false, _) => write!(self, " {name}={value}"),
        };
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            if self.cut > 0 || self.text.len() >= MOST {
                self.cut += char.len_utf8();
            } else if is_harmless(char) {
                self.text.push(char);
            } else {
                self.text.extend(char.escape_default());
            }
        }
        Ok(())
    }
}

/// A text of several lines for a terminal: what could do more there than be read is escaped.
pub fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        if is_harmless(char) || matches!(char, '\n' | '\t') {
            out.push(char);
        } else {
            out.extend(char.escape_default());
        }
    }
    out
}

/// False for what moves a terminal's cursor, ends a line, or turns the direction of what follows.
fn is_harmless(char: char) -> bool {
    !char.is_control()
        && !matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use standby_types::lock::lock;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(log: impl FnOnce()) -> String {
        let kept = Kept::default();
        let to = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .fmt_fields(SafeFields)
            .with_writer(move || to.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = lock(&kept.0).clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn fields_stand_behind_the_message() {
        let error = io::Error::other("no \"room\"");
        let line =
            logged(|| tracing::info!(storage = "1", percent = 10, %error, "packing {}", "ä"));
        assert_eq!(line, " INFO packing ä storage=\"1\" percent=10 error=no \"room\"\n");
    }

    #[test]
    fn nobody_writes_lines_or_escapes() {
        let peer = "x\n ERROR all is lost\r\x1b[2J\u{7}\u{9b}1m\u{202e}\u{2028}";
        let line = logged(|| tracing::warn!(peer = %peer, "{peer}"));
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.chars().all(|char| char == '\n' || is_harmless(char)), "{line:?}");
        assert!(line.contains("x\\n ERROR all is lost\\r\\u{1b}[2J"), "{line}");
    }

    #[test]
    fn a_line_has_an_end() {
        let line = logged(|| tracing::warn!(more = "y", "{}", "ü\n".repeat(1 << 20)));
        assert!(line.len() < MOST + 100, "{}", line.len());
        assert!(line.ends_with(" bytes more]\n"), "{}", &line[MOST..]);
    }
}
