//! Where log lines go: the `<eventlog>` section, or standard error.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::Config;

/// Sends log lines where the configuration says. The environment variable `STANDBY_LOG` (for
/// example `debug`) overrides the level.
pub fn start(config: &Config) -> anyhow::Result<()> {
    let level = config.eventlog.as_ref().map_or(tracing::Level::INFO, |log| log.level);
    let filter = EnvFilter::try_from_env("STANDBY_LOG")
        .unwrap_or_else(|_| EnvFilter::new(level.to_string()));
    let mut targets = Vec::new();
    for file in config.eventlog.iter().flat_map(|log| &log.files) {
        targets.push(match file.path.as_str() {
            "STDOUT" => Target::Stdout,
            "STDERR" => Target::Stderr,
            path => {
                let opened = OpenOptions::new().create(true).append(true).open(path);
                Target::File(opened.with_context(|| format!("cannot open the log file {path}"))?)
            }
        });
    }
    if targets.is_empty() {
        targets.push(Target::Stderr);
    }
    let color = matches!(targets[..], [Target::Stderr]) && io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(color)
        .with_writer(Writers(Arc::new(Mutex::new(targets))))
        .try_init()
        .map_err(|error| anyhow::anyhow!("{error}"))
}

enum Target {
    Stdout,
    Stderr,
    File(std::fs::File),
}

#[derive(Clone)]
struct Writers(Arc<Mutex<Vec<Target>>>);

impl Write for Writers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for target in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            // A log that cannot be written must not stop the server.
            let _ = match target {
                Target::Stdout => io::stdout().write_all(bytes),
                Target::Stderr => io::stderr().write_all(bytes),
                Target::File(file) => file.write_all(bytes),
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
