//! Where log lines go: the `<eventlog>` section, or standard error.

pub mod error_text;
mod fields;
pub mod file;
pub mod format;

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};

use anyhow::Context;
use standby_types::lock::lock;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::fields::SafeFields;
pub use crate::fields::harmless;
use crate::file::{LogFile, Rotation};
use crate::format::Format;

/// `<eventlog>`
#[derive(Debug, Clone)]
pub struct EventLog {
    /// The least level that is logged.
    pub level: tracing::Level,
    /// Where to.
    pub files: Vec<LogFileSection>,
}

/// `<logfile>`
#[derive(Debug, Clone)]
pub struct LogFileSection {
    /// A path, `STDOUT` or `STDERR`.
    pub path: String,
    /// The least level that is written there; `None` for that of the `<eventlog>`.
    pub level: Option<tracing::Level>,
    /// How lines look; `None` for Standby's own way.
    pub format: Option<Format>,
    /// When the file is moved away, and how many old ones are kept.
    pub rotation: Option<(Rotation, usize)>,
    /// The file is made by its first line.
    pub delay: bool,
}

impl LogFileSection {
    /// Where lines go without an `<eventlog>`.
    pub fn stderr() -> LogFileSection {
        let (level, format, rotation) = (None, None, None);
        LogFileSection { path: "STDERR".into(), level, format, rotation, delay: false }
    }
}

/// The log files, to open them anew after somebody has moved them away.
pub struct LogFiles(Vec<Target>);

impl LogFiles {
    /// Opens all files again; one that cannot be opened is written to as before.
    pub fn reopen(&self) {
        for target in &self.0 {
            if let Output::File(file) = &mut *lock(&target.0)
                && let Err(error) = file.reopen()
            {
                eprintln!("standby: cannot open {} again: {error}", file.path().display());
            }
        }
    }
}

/// Sends log lines where the configuration says. The environment variable `STANDBY_LOG` (for
/// example `debug`) overrides the levels.
pub fn start(eventlog: Option<&EventLog>) -> anyhow::Result<LogFiles> {
    let level = eventlog.map_or(tracing::Level::INFO, |log| log.level);
    let from_environment = EnvFilter::try_from_env("STANDBY_LOG");
    let overridden = from_environment.is_ok();
    let filter = from_environment.unwrap_or_else(|_| EnvFilter::new(level.to_string()));
    let stderr = [LogFileSection::stderr()];
    let sections = match eventlog {
        Some(log) if !log.files.is_empty() => &log.files[..],
        _ => &stderr,
    };
    let color = sections.len() == 1 && sections[0].path == "STDERR" && io::stderr().is_terminal();
    let mut targets = Vec::new();
    let mut layers = Vec::new();
    for section in sections {
        let target = Target::open(section)?;
        let most = section.level.filter(|_| !overridden);
        layers.push(layer(section, target.clone(), color, most));
        targets.push(target);
    }
    Registry::default()
        .with(layers)
        .with(filter)
        .try_init()
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(LogFiles(targets))
}

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn layer(
    section: &LogFileSection,
    target: Target,
    color: bool,
    most: Option<tracing::Level>,
) -> BoxedLayer {
    let layer = tracing_subscriber::fmt::layer()
        .fmt_fields(SafeFields)
        .with_ansi(color)
        .with_writer(target);
    let most = most.map_or(LevelFilter::TRACE, LevelFilter::from_level);
    match &section.format {
        None => layer.with_target(false).with_filter(most).boxed(),
        Some(format) => layer.event_format(format.clone()).with_filter(most).boxed(),
    }
}

enum Output {
    Stdout,
    Stderr,
    File(LogFile),
}

/// A place for log lines.
#[derive(Clone)]
struct Target(Arc<Mutex<Output>>);

impl Target {
    fn open(section: &LogFileSection) -> anyhow::Result<Target> {
        let output = match section.path.as_str() {
            "STDOUT" => Output::Stdout,
            "STDERR" => Output::Stderr,
            path => {
                let opened = LogFile::open(path.as_ref(), section.rotation, section.delay);
                Output::File(opened.with_context(|| format!("cannot open the log file {path}"))?)
            }
        };
        Ok(Target(Arc::new(Mutex::new(output))))
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A log that cannot be written must not stop the server.
        let _ = match &mut *lock(&self.0) {
            Output::Stdout => io::stdout().write_all(bytes),
            Output::Stderr => io::stderr().write_all(bytes),
            Output::File(file) => file.write(bytes),
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Target {
    type Writer = Target;

    fn make_writer(&'a self) -> Target {
        self.clone()
    }
}
