//! The daemon's life: start, serve, stop.

use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use smol::channel::Sender;
use tracing::{error, info, warn};
use xenstore_protocol::DomId;
use xenstore_store::{Config, Host};
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::Listener;
use xenstore_transport::xen::XenRing;

use crate::log::Trace;
use crate::options::{Options, Settings};
use crate::pid_file::PidFile;
use crate::place::socket_path;
use crate::server::{Clock, Server};
use crate::standalone::Standalone;
use crate::tasks::Tasks;
use crate::xen::{self, Xen};

/// Set for the process in the background by the one that started it.
const DETACHED: &str = "XENSTORED_DETACHED";
/// Exit status for a mistake on the command line or in the configuration.
const USAGE: u8 = 2;

/// The whole program. Returns its exit status: 0, 1 for trouble, 2 for a mistake in the options.
pub fn main() -> ExitCode {
    let options = match Options::parse_from_args(std::env::args_os()) {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return complain(&one_line(&error), USAGE),
    };
    let settings = match options.settle() {
        Ok(settings) => settings,
        Err(line) => return complain(&line, USAGE),
    };
    if settings.options.config_test {
        return ExitCode::SUCCESS;
    }
    let detached = std::env::var_os(DETACHED).is_some();
    // A socket from systemd is for this very process.
    let activated = std::env::var_os("LISTEN_PID").is_some();
    let background = settings.options.pid_file.is_some() && !settings.options.no_fork;
    if background && !activated && !detached {
        return detach();
    }
    if detached {
        let _ = rustix::process::setsid();
    }
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false);
    // A log that cannot be written is no reason to end.
    let subscriber = subscriber.log_internal_errors(false);
    subscriber.with_max_level(tracing::Level::INFO).init();
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => complain(&line, 1),
    }
}

/// A mistake as clap tells it, in one line.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

#[allow(clippy::print_stderr)] // the log is not set up yet, and a user is to read it
fn complain(line: &str, status: u8) -> ExitCode {
    eprintln!("xenstored: {line}");
    ExitCode::from(status)
}

/// Starts the daemon again in the background and waits until it answers. A process with threads
/// cannot simply fork.
fn detach() -> ExitCode {
    let start = || -> std::io::Result<ExitCode> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(DETACHED, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let ready = child.stdout.take().map(std::io::BufReader::new);
        if ready.map_or(Ok(0), |mut out| out.read_line(&mut line))? > 0 {
            return Ok(ExitCode::SUCCESS);
        }
        let status = child.wait()?.code().and_then(|code| u8::try_from(code).ok());
        Ok(ExitCode::from(status.unwrap_or(1)))
    };
    start().unwrap_or_else(|error| complain(&format!("cannot go to the background: {error}"), 1))
}

/// Serves until a signal says to stop. An error is one line.
fn run(settings: Settings) -> Result<(), String> {
    let Settings { options, config, remarks } = settings;
    for remark in remarks {
        warn!("{remark}");
    }
    // Before anything else has one of the descriptors.
    let activated = activated()?;
    raise_descriptor_limit();
    let _pid_file = options.pid_file.as_deref().map(PidFile::create).transpose()?;
    let trace = Trace::new();
    for switch in &options.trace_control {
        trace.switch(switch);
    }
    if let Some(path) = &options.trace_file {
        trace.open(path).map_err(|e| format!("--trace-file {}: {e}", path.display()))?;
    }
    let driver = Driver::new().map_err(|error| format!("epoll: {error}"))?;
    let (fresh, rings) = smol::channel::unbounded();
    let Surroundings { host, kind, events, waiting } =
        surroundings(&options, &config, fresh, &trace, &driver)?;
    let server = Server::new(&config, host, Clock::Real(Instant::now()))
        .driven(driver.clone())
        .traced(trace.clone());
    let tasks = Tasks::new();
    driver.block_on(tasks.run(async {
        let mut signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup])
            .map_err(|error| format!("cannot wait for signals: {error}"))?;
        xen::introduce_all(&server, &waiting);
        let listener = listen(&options, activated, &driver)?;
        announce(listener.as_ref().map(|(_, place)| place.as_str()), &kind);
        let accept = async {
            match &listener {
                Some((listener, _)) => server.accept(listener, &tasks).await,
                None => future::pending().await,
            }
        };
        let stop = async {
            while let Some(Ok(signal)) = signals.next().await {
                if signal != Signal::Hup {
                    info!(?signal, "stopping");
                    return;
                }
                if let Err(error) = trace.reopen() {
                    error!(%error, "cannot open the trace file again");
                }
            }
        };
        if let Some(events) = events {
            tasks.spawn(events.deliver(&server));
        }
        let serve_rings = async {
            while let Ok(ring) = rings.recv().await {
                tasks.spawn(server.serve(ring));
            }
            future::pending().await
        };
        future::or(future::or(accept, stop), serve_rings).await;
        Ok(())
    }))
}

/// Where the daemon runs.
struct Surroundings {
    host: Box<dyn Host>,
    /// For people.
    kind: String,
    events: Option<xen::Events>,
    /// Domains that were there before, and their ports.
    waiting: Vec<(DomId, u32)>,
}

/// Xen, a pretend one, or none: then every domain exists and there are no rings.
fn surroundings(
    options: &Options,
    config: &Config,
    fresh: Sender<XenRing>,
    trace: &Trace,
    driver: &Driver,
) -> Result<Surroundings, String> {
    let machine = match &options.pretend_xen {
        Some(dir) => xenstore_transport::xen::pretend(dir, driver),
        None => xenstore_transport::xen::host(driver),
    };
    let machine = match machine {
        Ok(machine) => machine,
        Err(error) if options.require_xen => return Err(format!("--require-xen: {error}")),
        Err(error) => {
            return Ok(Surroundings {
                host: Box::new(Standalone::with_trace(trace.clone())),
                kind: format!("standalone store (no Xen here: {error})"),
                events: None,
                waiting: Vec::new(),
            });
        }
    };
    let (mut host, events) = Xen::new(machine, fresh, trace.clone())?;
    host.connect_own_kernel(config.store)?;
    let waiting = host.built_before(config.store);
    Ok(Surroundings { host: Box::new(host), kind: "store".into(), events: Some(events), waiting })
}

/// A socket from systemd, or one of our own; and how to name it.
fn listen(
    options: &Options,
    activated: Option<OwnedFd>,
    driver: &Driver,
) -> Result<Option<(Listener, String)>, String> {
    if options.disable_socket {
        return Ok(None);
    }
    if let Some(socket) = activated {
        let listener = Listener::adopt(socket, driver);
        let listener = listener.map_err(|error| format!("socket from systemd: {error}"))?;
        let place = listener.path().map_or("?".into(), |path| path.display().to_string());
        return Ok(Some((listener, place)));
    }
    let path = socket_path(options.socket.as_deref())?;
    let listener = Listener::bind(&path, 0o600, driver);
    let listener = listener.map_err(|error| format!("socket {}: {error}", path.display()))?;
    Ok(Some((listener, path.display().to_string())))
}

/// The socket that systemd has opened for us, if any.
fn activated() -> Result<Option<OwnedFd>, String> {
    let mut descriptors = listenfd::ListenFd::from_env();
    if descriptors.len() > 1 {
        return Err(format!("systemd gave {} sockets, one is wanted", descriptors.len()));
    }
    let socket = descriptors.take_unix_listener(0);
    let socket = socket.map_err(|error| format!("socket from systemd: {error}"))?;
    Ok(socket.map(OwnedFd::from))
}

/// Whoever waits for the start is told; then one line says where, and what to do next. The line
/// comes last because it lets the process in the foreground end, and systemd counts a start as
/// failed that ends before it was told.
fn announce(place: Option<&str>, kind: &str) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut out = std::io::stdout();
    let _ = match place {
        Some(place) => writeln!(
            out,
            "xenstored: {kind} on {place} - try: XENSTORED_PATH={place} xenstore-ls -fp, or: xs --socket {place} ls"
        ),
        None => writeln!(out, "xenstored: {kind}, without a socket"),
    };
    let _ = out.flush();
}

/// A host has a connection and a ring for each domain; 1,024 descriptors do not go far.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "cannot raise the limit of open descriptors");
    }
}
