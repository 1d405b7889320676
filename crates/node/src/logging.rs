//! Where log lines go: the `<eventlog>` section, or standard error.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::Config;

/// The log files, to open them anew after somebody has moved them away.
#[derive(Clone)]
pub struct LogFiles(Writers);

impl LogFiles {
    /// Opens all files again; one that cannot be opened is written to as before.
    pub fn reopen(&self) {
        for target in self.0.lock().iter_mut() {
            if let Target::File(path, file) = target {
                match open(path) {
                    Ok(opened) => *file = opened,
                    Err(error) => eprintln!("standby: cannot open {path} again: {error}"),
                }
            }
        }
    }
}

fn open(path: &str) -> io::Result<std::fs::File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Sends log lines where the configuration says. The environment variable `STANDBY_LOG` (for
/// example `debug`) overrides the level.
pub fn start(config: &Config) -> anyhow::Result<LogFiles> {
    let level = config.eventlog.as_ref().map_or(tracing::Level::INFO, |log| log.level);
    let filter = EnvFilter::try_from_env("STANDBY_LOG")
        .unwrap_or_else(|_| EnvFilter::new(level.to_string()));
    let mut targets = Vec::new();
    for file in config.eventlog.iter().flat_map(|log| &log.files) {
        targets.push(match file.path.as_str() {
            "STDOUT" => Target::Stdout,
            "STDERR" => Target::Stderr,
            path => {
                let file =
                    open(path).with_context(|| format!("cannot open the log file {path}"))?;
                Target::File(path.to_owned(), file)
            }
        });
    }
    if targets.is_empty() {
        targets.push(Target::Stderr);
    }
    let color = matches!(targets[..], [Target::Stderr]) && io::stderr().is_terminal();
    let writers = Writers(Arc::new(Mutex::new(targets)));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(color)
        .with_writer(writers.clone())
        .try_init()
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(LogFiles(writers))
}

enum Target {
    Stdout,
    Stderr,
    File(String, std::fs::File),
}

#[derive(Clone)]
struct Writers(Arc<Mutex<Vec<Target>>>);

impl Writers {
    fn lock(&self) -> MutexGuard<'_, Vec<Target>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Writers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for target in self.lock().iter_mut() {
            // A log that cannot be written must not stop the server.
            let _ = match target {
                Target::Stdout => io::stdout().write_all(bytes),
                Target::Stderr => io::stderr().write_all(bytes),
                Target::File(_, file) => file.write_all(bytes),
            };
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Writers {
    type Writer = Writers;

    fn make_writer(&'a self) -> Writers {
        self.clone()
    }
}
