//! The `format` of a `<logfile>`: a format string of Python's `logging`, for sites whose tools read
//! the log. Source: `logging.LogRecord`, `ZConfig/components/logger/formatter.py`.

use std::fmt::{self, Write};
use std::sync::OnceLock;
use std::time::Instant;

use chrono::{DateTime, Local};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// The default of `dateformat`.
const DATE_FORMAT: &str = "%Y-%m-%dT%H:%M:%S";
/// What log lines are said to come from.
const LOGGER: &str = "standby";

/// A format that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    pieces: Vec<Piece>,
    date: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Field { name: String, left: bool, zero: bool, width: usize, precision: Option<usize> },
}

/// The names that a format may use.
const NAMES: [&str; 17] = [
    "name",
    "levelno",
    "levelname",
    "pathname",
    "filename",
    "module",
    "lineno",
    "funcName",
    "created",
    "asctime",
    "msecs",
    "relativeCreated",
    "thread",
    "threadName",
    "process",
    "processName",
    "message",
];

/// Those that are no whole numbers.
const FRACTIONS: [&str; 3] = ["created", "msecs", "relativeCreated"];

impl Format {
    /// Reads a format string and a date format (of `strftime`).
    pub fn parse(text: &str, date: Option<&str>) -> Result<Format, String> {
        let date = date.unwrap_or(DATE_FORMAT).to_owned();
        let items = chrono::format::StrftimeItems::new(&date);
        if items.into_iter().any(|item| item == chrono::format::Item::Error) {
            return Err(format!("{date:?} is not a date format of strftime"));
        }
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            literal.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let (field, after) = field(after)?;
            pieces.push(Piece::Text(std::mem::take(&mut literal)));
            pieces.push(field);
            rest = after;
        }
        literal.push_str(rest);
        pieces.push(Piece::Text(literal));
        for piece in &mut pieces {
            if let Piece::Text(text) = piece {
                *text = with_control_characters(text);
            }
        }
        Ok(Format { pieces, date })
    }

    fn write(&self, out: &mut impl Write, line: &Line<'_>) -> fmt::Result {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.write_str(text)?,
                Piece::Field { name, left, zero, width, precision } => {
                    let mut value = line.value(name, &self.date);
                    match precision {
                        Some(digits) if FRACTIONS.contains(&name.as_str()) => {
                            let number: f64 = value.parse().unwrap_or_default();
                            value = format!("{number:.digits$}");
                        }
                        Some(length) => value = value.chars().take(*length).collect(),
                        None => {}
                    }
                    match (left, zero) {
                        (true, _) => write!(out, "{value:<width$}")?,
                        (false, true) => write!(out, "{value:0>width$}")?,
                        (false, false) => write!(out, "{value:>width$}")?,
                    }
                }
            }
        }
        Ok(())
    }
}

/// `(NAME)`, flags, width, precision and type of a field; and what follows it.
fn field(text: &str) -> Result<(Piece, &str), String> {
    let wrong = || format!("\"%{text}\" does not begin with a field such as %(message)s");
    let (name, after) = text.strip_prefix('(').and_then(|t| t.split_once(')')).ok_or_else(wrong)?;
    if !NAMES.contains(&name) {
        return Err(format!("there is no field {name:?}; the fields are {}", NAMES.join(", ")));
    }
    let end = after.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
    let (options, kind) = (&after[..end], &after[end..=end]);
    let number = !matches!(kind, "s" | "r" | "a");
    let numeric = ["levelno", "lineno", "created", "msecs", "relativeCreated", "thread", "process"];
    if !"srdiufFeEgG".contains(kind) || number && !numeric.contains(&name) {
        return Err(format!("\"%({name}){options}{kind}\": type {kind:?} is not possible here"));
    }
    let digits = options.trim_start_matches(['-', '+', ' ', '#', '0']);
    let flags = &options[..options.len() - digits.len()];
    let (width, precision) = digits.split_once('.').map_or((digits, None), |(w, p)| (w, Some(p)));
    let size = |text: &str| match text {
        "" => Ok(0),
        text => text.parse::<u8>().map(usize::from).map_err(|_| wrong()),
    };
    let given = precision.map(size).transpose()?;
    let precision = match kind {
        // A whole number has no digits to cut.
        "d" | "i" | "u" if !FRACTIONS.contains(&name) => None,
        "d" | "i" | "u" => given.or(Some(0)),
        _ if number => given.or(Some(6)),
        _ => given,
    };
    let piece = Piece::Field {
        name: name.into(),
        left: flags.contains('-'),
        zero: flags.contains('0') && number,
        width: size(width)?,
        precision,
    };
    Ok((piece, &after[end + 1..]))
}

fn with_control_characters(text: &str) -> String {
    [("\\n", "\n"), ("\\t", "\t"), ("\\b", "\u{8}"), ("\\f", "\u{c}"), ("\\r", "\r")]
        .into_iter()
        .fold(text.to_owned(), |text, (written, meant)| text.replace(written, meant))
}

/// What is known of a log line.
struct Line<'a> {
    message: &'a str,
    level: Level,
    module: &'a str,
    file: &'a str,
    line: u32,
    at: DateTime<Local>,
}

impl Line<'_> {
    fn value(&self, name: &str, date: &str) -> String {
        static STARTED: OnceLock<Instant> = OnceLock::new();
        let started = STARTED.get_or_init(Instant::now);
        let thread = std::thread::current();
        match name {
            "name" => LOGGER.into(),
            "levelno" => level_number(self.level).to_string(),
            "levelname" => level_name(self.level).into(),
            "pathname" => self.file.into(),
            "filename" => self.file.rsplit('/').next().unwrap_or_default().into(),
            "module" | "funcName" => self.module.into(),
            "lineno" => self.line.to_string(),
            "created" => format!("{}", self.at.timestamp_micros() as f64 / 1e6),
            "asctime" => self.at.format(date).to_string(),
            "msecs" => format!("{}", f64::from(self.at.timestamp_subsec_micros()) / 1e3),
            "relativeCreated" => format!("{}", started.elapsed().as_secs_f64() * 1e3),
            "thread" => format!("{:?}", thread.id()).chars().filter(char::is_ascii_digit).collect(),
            "threadName" => thread.name().unwrap_or("tokio").into(),
            "process" => std::process::id().to_string(),
            "processName" => "MainProcess".into(),
            _ => self.message.into(),
        }
    }
}

fn level_number(level: Level) -> u8 {
    match level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG => "DEBUG",
        Level::TRACE => "TRACE",
    }
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = FormattedFields::<N>::new(String::new());
        ctx.format_fields(fields.as_writer(), event)?;
        let metadata = event.metadata();
        let line = Line {
            message: &fields.fields,
            level: *metadata.level(),
            module: metadata.module_path().unwrap_or_default(),
            file: metadata.file().unwrap_or_default(),
            line: metadata.line().unwrap_or_default(),
            at: Local::now(),
        };
        self.write(&mut writer, &line)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;

    use super::*;

    fn written(format: &str, date: Option<&str>) -> String {
        let line = Line {
            message: "hello",
            level: Level::WARN,
            module: "standby_node::engine",
            file: "src/engine.rs",
            line: 7,
            at: Local.with_ymd_and_hms(2026, 11, 5, 3, 4, 5).unwrap(),
        };
        let mut out = String::new();
        Format::parse(format, date).unwrap().write(&mut out, &line).unwrap();
        out
    }

    #[test]
    fn lines_look_as_python_writes_them() {
        for (format, date, expected) in [
            (
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                None,
                "2026-11-05T03:04:05 WARNING standby hello",
            ),
            (
                "------\\n%(asctime)s %(message)s",
                Some("%d.%m.%y %H:%M"),
                "------\n05.11.26 03:04 hello",
            ),
            (
                "[%(levelname)-8s|%(levelname)9s|%(lineno)03d] %(message).3s 100%%",
                None,
                "[WARNING |  WARNING|007] hel 100%",
            ),
            ("%(levelno)d %(filename)s %(msecs)03d", None, "30 engine.rs 000"),
        ] {
            assert_eq!(written(format, date), expected);
        }
    }

    #[test]
    fn wrong_formats_are_explained() {
        for (format, expected) in [
            ("%(massage)s", "there is no field \"massage\"; the fields are name,"),
            ("%s", "does not begin with a field"),
            ("%(message", "does not begin with a field"),
            ("%(message)", "does not begin with a field"),
            ("%(message)d", "type \"d\" is not possible"),
            ("%(lineno)1234d", "does not begin with a field"),
        ] {
            let error = Format::parse(format, None).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(Format::parse("%(asctime)s", Some("%Q")).unwrap_err().contains("strftime"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(format: String, date: String) {
            let _ = Format::parse(&format, Some(&date));
        }
    }
}
