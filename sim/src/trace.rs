//! What simulated programs log, with the simulated time: hashed, and printed if somebody wants to
//! read it.

use std::cell::RefCell;
use std::io::Write;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

#[derive(Default)]
struct Trace {
    hash: u64,
    now: Duration,
    machine: String,
    panic: Option<String>,
    prints: bool,
}

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::default();
}

fn with<T>(work: impl FnOnce(&mut Trace) -> T) -> T {
    TRACE.with(|trace| work(&mut trace.borrow_mut()))
}

struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        let (seconds, machine) = with(|trace| (trace.now.as_secs_f64(), trace.machine.clone()));
        write!(writer, "{seconds:8.3} {machine:8}")
    }
}

struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let prints = with(|trace| {
            // FNV-1a.
            for byte in bytes {
                trace.hash = (trace.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
            trace.prints
        });
        if prints {
            std::io::stdout().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        Lines
    }
}

/// Takes the logs of this process from now on.
pub fn install(most: LevelFilter) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(most)
        .with_timer(Clock)
        .with_writer(Lines)
        .with_ansi(false)
        .with_target(false)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        if with(|trace| trace.prints || trace.machine.is_empty()) {
            eprintln!("{text}");
        }
        with(|trace| trace.panic.get_or_insert(text).len());
    }));
}

/// Prints what this thread logs, or not.
pub fn print(prints: bool) {
    with(|trace| trace.prints = prints);
}

/// A simulation begins.
pub fn begin() {
    with(|trace| {
        *trace = Trace { prints: trace.prints, hash: 0xcbf2_9ce4_8422_2325, ..Trace::default() }
    });
}

/// It is over; stands for all that was logged.
pub fn end() -> u64 {
    with(|trace| trace.hash)
}

/// The simulated time.
pub fn set_time(now: Duration) {
    with(|trace| trace.now = now);
}

/// The machine that runs.
pub fn set_machine(name: &str) {
    with(|trace| {
        trace.machine.clear();
        trace.machine.push_str(name);
    });
}

/// The first panic since this was last asked.
pub fn take_panic() -> Option<String> {
    with(|trace| trace.panic.take())
}
