//! The daemon's life: start, serve, stop.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smol::channel::Sender;
use smol::lock::Mutex;
use tracing::{error, info, warn};
use xenstore_store::{Config, Host};
use xenstore_transport::driver::Driver;
use xenstore_transport::inherit;
use xenstore_transport::socket::Listener;

use crate::clock::Clock;
use crate::journal::{self, Journal};
use crate::log::{self, GUEST, Trace};
use crate::options::{Options, Settings};
use crate::pid_file::PidFile;
use crate::place::{chosen_journal, journal_of, look_for_earlier, run_dir, socket_path};
use crate::server::Server;
use crate::surroundings::Surroundings;
use crate::systemd::{self, Given, Keep};
use crate::tasks::Tasks;
use crate::update::{self, Incoming, Outgoing, Taken, Updatable, Update};
use crate::worker;
use crate::xen;

/// Set for the process in the background by the one that started it.
const DETACHED: &str = "XENSTORED_DETACHED";
/// How long a process that ends waits for those who read its log and its trace.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// Those that stop the daemon, that which opens the trace again, and others that would end a process by
/// default and that somebody may send by mistake: they are ignored. SIGPIPE is from the start.
const SIGNALS: [Signal; 6] =
    [Signal::Term, Signal::Int, Signal::Hup, Signal::Usr1, Signal::Usr2, Signal::Alarm];
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
    if settings.options.check_state {
        return check_state(&settings.config);
    }
    let detached = std::env::var_os(DETACHED).is_some();
    // A socket from systemd is for this very process.
    let activated = std::env::var_os("LISTEN_PID").is_some();
    let options = &settings.options;
    // One that goes on is in the place of one that is where it should be.
    let goes_on = options.resume.is_some() || options.live_update || options.live;
    let background = options.pid_file.is_some() && !options.no_fork && !goes_on;
    if background && !activated && !detached {
        return detach();
    }
    if detached {
        let _ = rustix::process::setsid();
    }
    if let Err(line) = log::start() {
        return complain(&line, 1);
    }
    // Also if it panics.
    let _flush = Flush;
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => complain(&line, 1),
    }
}

/// Writes the rest of the log at its end.
struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        log::flush(FLUSH_LIMIT);
    }
}

/// A mistake as clap tells it, in one line.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

fn complain(line: &str, status: u8) -> ExitCode {
    log::plain(&format!("xenstored: {line}"));
    ExitCode::from(status)
}

/// Says how long it takes to make a store of the state on standard input, or why that cannot be.
fn check_state(config: &Config) -> ExitCode {
    match update::check(config) {
        Ok(time) => {
            let _ = writeln!(std::io::stdout(), "{} us", time.as_micros());
            ExitCode::SUCCESS
        }
        Err(line) => complain(&line, 1),
    }
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
    let handed_over = update::receive(&options, &config)?;
    let given = if handed_over.is_none() { systemd::given()? } else { Given::default() };
    let goes_on = handed_over.is_some();
    let journal = journal_dir(&options, goes_on)?;
    let mut incoming = match (handed_over, &journal) {
        (None, Some(dir)) => journal::recover(dir, &config)?.map(Incoming::recovered),
        (handed_over, _) => handed_over,
    };
    if let Err(error) = worker::start() {
        let reason = format!(
            "cannot make a thread: {error}; raise the limit of processes (TasksMax, ulimit -u)"
        );
        if !goes_on {
            return Err(reason);
        }
        error!(reason, "the main thread writes the journal as well: requests wait for that");
    }
    // From now on a signal is heard when there is time for it.
    let mut signals =
        Signals::new(SIGNALS).map_err(|error| format!("cannot wait for signals: {error}"))?;
    raise_descriptor_limit();
    let program = File::open("/proc/self/exe").map_err(|e| format!("/proc/self/exe: {e}"))?;
    let _pid_file = options.pid_file.as_deref().map(PidFile::create).transpose()?;
    let trace = open_trace(&options)?;
    let driver = Driver::new().map_err(|error| format!("epoll: {error}"))?;
    let (fresh, rings) = smol::channel::unbounded();
    let surroundings = Surroundings::find(
        &options,
        &config,
        incoming.as_ref().map(|incoming| &incoming.state),
        given.evtchn,
        (fresh, &trace, &driver),
    )?;
    let Surroundings { host, kind, events, waiting, resumed, rings: all_rings } = surroundings;
    if let Some(incoming) = incoming.as_mut().filter(|incoming| !incoming.is_handed_over()) {
        incoming.set_out(&resumed);
    }
    let listener = match &incoming {
        Some(incoming) if incoming.is_handed_over() => {
            inherited_listener(incoming.state.io.listener, &driver)?
        }
        _ => listen(&options, given.listener, &driver)?,
    };
    let update = Update::default();
    let host: Box<dyn Host> = Box::new(Updatable { host, update: update.clone() });
    let (server, taken) = serving(incoming, host, &config, journal);
    let server = server.driven(driver.clone()).traced(trace.clone()).updated(update.clone());
    let bound = events.as_ref().map(|events| events.bound.clone());
    let tasks = Tasks::new();
    driver.block_on(tasks.run(async {
        if let Some(taken) = taken {
            if taken.is_to_be_told() {
                update.is_done();
            }
            taken.adopt(&server, resumed, &tasks, &driver);
            // Nobody waits for that.
            worker::dispose(taken);
        }
        xen::introduce_all(&server, &waiting);
        announce(listener.as_ref().map(|(_, place)| place.as_str()), &kind);
        let listener = listener.as_ref().map(|(listener, _)| listener);
        if let Some(listener) = listener {
            systemd::keep(Keep::Listener, listener.as_fd());
        }
        let outgoing = Outgoing {
            server: &server,
            update: &update,
            listener,
            xen: bound.map(|bound| (bound, all_rings)),
            holding: Mutex::default(),
            program,
        };
        outgoing.keep_channels();
        let accept = async {
            match listener {
                Some(listener) => server.accept(listener, &tasks).await,
                None => future::pending().await,
            }
        };
        tasks.spawn(server.do_work());
        if let Some(events) = events {
            tasks.spawn(events.deliver(&server));
        }
        let serve_rings = async {
            while let Ok(ring) = rings.recv().await {
                tasks.spawn(server.serve(ring));
            }
            future::pending().await
        };
        // In a task of its own, since waiting for a signal takes a call of the kernel each time.
        let (stop, stopped) = smol::channel::bounded(1);
        tasks.spawn(until_stopped(&mut signals, &trace, stop));
        let stopped = async { _ = stopped.recv().await };
        let keep = future::or(outgoing.run(), outgoing.keep_journal());
        future::or(future::or(accept, stopped), future::or(serve_rings, keep)).await;
        // On a Xen host the next process goes on: its guests are still there. That their connections
        // end with this process is nothing that it is to know.
        server.leave_journal(outgoing.xen.is_some());
        // The socket's file goes, and ports are bound anew.
        systemd::forget(&[Keep::Listener, Keep::Evtchn]);
        outgoing.end_channels();
        Ok(())
    }))
}

fn open_trace(options: &Options) -> Result<Trace, String> {
    let trace = Trace::new();
    for switch in &options.trace_control {
        if trace.switch(switch).is_err() {
            tracing::warn!(switch, "this trace switch does nothing here: only io does");
        }
    }
    if let Some(path) = &options.trace_file {
        trace.open(path).map_err(|e| format!("--trace-file {}: {e}", path.display()))?;
    }
    Ok(trace)
}

/// The server: empty, or as another program has left it, with what is to be done with the rest of
/// that. All that it does from now on is in the journal, if there is to be one.
pub(crate) fn serving(
    incoming: Option<Incoming>,
    host: Box<dyn Host>,
    config: &Config,
    journal: Option<PathBuf>,
) -> (Server<Box<dyn Host>>, Option<Taken>) {
    let (server, taken) = match incoming {
        Some(incoming) => {
            let (engine, taken) = incoming.take();
            let ran = Duration::from_millis(taken.clock());
            let start = Instant::now().checked_sub(ran).unwrap_or_else(Instant::now);
            (Server::with_engine(engine, host, Clock::Real(start)), Some(taken))
        }
        None => (Server::new(config, host, Clock::Real(Instant::now())), None),
    };
    let journal = journal.map(|dir| match &taken {
        Some(taken) => {
            Journal::begin(dir, config, taken.is_after_crash(), |sink| taken.write(sink))
        }
        None => {
            let state = server.with(|engine, _| engine.dump());
            Journal::begin(dir, config, false, |sink| state.encode_to(sink))
        }
    });
    (server.journaled(journal), taken)
}

/// Waits for the signal to stop, and says so by dropping the sender.
async fn until_stopped(signals: &mut Signals, trace: &Trace, _stop: Sender<()>) {
    while let Some(Ok(signal)) = signals.next().await {
        match signal {
            Signal::Term | Signal::Int => {
                info!(?signal, "stopping");
                return;
            }
            Signal::Hup => {
                if let Err(error) = trace.reopen() {
                    error!(%error, "cannot open the trace file again");
                }
            }
            _ => info!(target: GUEST, ?signal, "this signal is ignored"),
        }
    }
}

/// Where the journal is kept: `--journal`, or beside the socket if that is memory. A directory that is
/// nobody's choice and cannot be had is no reason to end, nor is any for a program that goes on with
/// everything: there is no journal then, which is said.
fn journal_dir(options: &Options, goes_on: bool) -> Result<Option<PathBuf>, String> {
    let found = match &options.journal {
        Some(none) if none.as_os_str() == "none" => return Ok(None),
        Some(dir) => chosen_journal(dir),
        None if options.disable_socket => journal_of(&run_dir().join("xenstored")),
        None => {
            let socket = socket_path(options.socket.as_deref())?;
            look_for_earlier(&socket);
            journal_of(&socket)
        }
    };
    match found {
        Err(reason) if goes_on || options.journal.is_none() => {
            error!(
                reason,
                "there is no journal: a crash loses the store; choose a directory with --journal"
            );
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// The socket that a program before this one has listened on.
fn inherited_listener(
    number: Option<i32>,
    driver: &Driver,
) -> Result<Option<(Listener, String)>, String> {
    let Some(number) = number else { return Ok(None) };
    let listener = inherit::socket(number, true).and_then(|fd| Listener::adopt(fd, driver));
    let mut listener = listener.map_err(|error| format!("socket: {error}"))?;
    if !systemd::is_activated() {
        listener = listener.owns_file();
    }
    let place = listener.path().map_or("?".into(), |path| path.display().to_string());
    Ok(Some((listener, place)))
}

/// A socket from systemd, or one of our own; and how to name it.
fn listen(
    options: &Options,
    given: Option<systemd::Listener>,
    driver: &Driver,
) -> Result<Option<(Listener, String)>, String> {
    if options.disable_socket {
        return Ok(None);
    }
    let adopt = |socket| {
        let listener = Listener::adopt(socket, driver);
        listener.map_err(|error| format!("socket from systemd: {error}"))
    };
    let kept = match given {
        Some(systemd::Listener::Activated(socket)) => {
            let listener = adopt(socket)?;
            let place = listener.path().map_or("?".into(), |path| path.display().to_string());
            return Ok(Some((listener, place)));
        }
        Some(systemd::Listener::Kept(socket)) => Some(adopt(socket)?),
        None => None,
    };
    let path = socket_path(options.socket.as_deref())?;
    // One that clients do not find any more is of no use.
    let kept = kept.filter(|kept| {
        let is_found = kept.path().as_ref() == Some(&path) && path.exists();
        if !is_found {
            systemd::forget(&[Keep::Listener]);
        }
        is_found
    });
    let listener = match kept {
        Some(kept) => Ok(kept.owns_file()),
        None => Listener::bind(&path, 0o600, driver),
    };
    let listener = listener.map_err(|error| format!("socket {}: {error}", path.display()))?;
    Ok(Some((listener, path.display().to_string())))
}

/// Whoever waits for the start is told; then one line says where, and what to do next. The line
/// comes last because it lets the process in the foreground end, and systemd counts a start as
/// failed that ends before it was told.
fn announce(place: Option<&str>, kind: &str) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut out = std::io::stdout();
    // A pipe that is not read must not stop the start.
    let mut room = [PollFd::new(&out, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if !poll(&mut room, Some(&now)).is_ok_and(|ready| ready > 0) {
        return warn!("standard output is full: not told there that the start is done");
    }
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
