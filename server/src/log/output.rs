//! The log on standard error. Every line, panics included, goes through a queue.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, error};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use super::queue::{Bucket, Queue, Room};

/// Target of lines that clients and guests can cause at will. Their rate is limited; lines over the
/// limit are counted.
pub(crate) const GUEST: &str = "guest";
const BURST: u32 = 100;
const EACH: Duration = Duration::from_millis(100);

/// Room of the queue for the log.
const LOG_ROOM: Room = Room { lines: 4096, bytes: 1 << 20 };
const TRACE_ROOM: Room = Room { lines: 1 << 16, bytes: 16 << 20 };

static LOG: OnceLock<Log> = OnceLock::new();
/// Room of the queue for the traces.
static TRACE: Mutex<Option<Queue>> = Mutex::new(None);

/// Standard error, written by another thread.
#[derive(Clone, Debug)]
struct Log {
    queue: Queue,
    file: Arc<File>,
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(self.file.clone(), line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Limits the rate of lines with target [`GUEST`].
struct Rate {
    queue: Queue,
    bucket: Bucket,
}

impl<S> Filter<S> for Rate {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        *metadata.level() <= LevelFilter::INFO
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let is_allowed = event.metadata().target() != GUEST || self.bucket.take(Instant::now());
        if !is_allowed {
            self.queue.hold_back();
        }
        is_allowed
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }
}

/// Writes the log to standard error from now on.
///
/// # Errors
///
/// Fails if the writing thread cannot be started or no descriptor is left. The error is one line.
pub(crate) fn start() -> Result<(), String> {
    let make = || {
        // Not through the standard library, whose lock would be held while the pipe is full.
        let file = Arc::new(File::from(io::stderr().as_fd().try_clone_to_owned()?));
        Ok(Log { queue: Queue::start("log", LOG_ROOM)?, file })
    };
    let log = make().map_err(|error: io::Error| format!("cannot start the log: {error}"))?;
    let rate = Rate { queue: log.queue.clone(), bucket: Bucket::new(BURST, EACH) };
    let log = LOG.get_or_init(|| log).clone();
    let lines = fmt::layer().with_writer(move || log.clone()).with_target(false);
    // The daemon runs on if the log cannot be written.
    let lines = lines.log_internal_errors(false).with_filter(rate);
    tracing_subscriber::registry().with(lines).init();
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload();
        let message = message
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| message.downcast_ref::<String>().map(String::as_str));
        let (at, backtrace) = (panic.location(), std::backtrace::Backtrace::capture());
        let at = at.map(ToString::to_string).unwrap_or_default();
        match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => {
                error!(target: GUEST, at, message, "panic\n{backtrace}");
            }
            _ => error!(target: GUEST, at, message, "panic"),
        }
    }));
    Ok(())
}

/// Writes a line to standard error unchanged, through the queue if there is one.
#[allow(clippy::print_stderr)] // the log is not set up yet, and a user is to read it
pub(crate) fn plain(line: &str) {
    match LOG.get() {
        Some(log) => log.queue.push(log.file.clone(), format!("{line}\n").into_bytes()),
        None => eprintln!("{line}"),
    }
}

/// The queue for traces. It is started at the first call.
///
/// # Errors
///
/// If its thread cannot be started.
pub(super) fn trace_queue() -> io::Result<Queue> {
    let mut known = TRACE.lock().unwrap_or_else(PoisonError::into_inner);
    let queue = known.clone().map_or_else(|| Queue::start("trace", TRACE_ROOM), Ok)?;
    *known = Some(queue.clone());
    Ok(queue)
}

/// Waits until log and traces have been written, at most `limit` for each. To be called before the process
/// exits or executes another program.
pub(crate) fn flush(limit: Duration) {
    if let Some(log) = LOG.get() {
        log.queue.flush(limit);
    }
    let trace = TRACE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    trace.map(|queue| queue.flush(limit));
}
