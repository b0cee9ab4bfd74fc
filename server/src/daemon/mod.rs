//! The program: start, serve, stop.

pub(crate) mod options;
mod oxenstored_conf;
mod pid_file;
pub(crate) mod start;
pub(crate) mod systemd;

use std::ffi::OsString;
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
use xenstore_sys::inherit;
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::{Listener, Socket};

use crate::handover::{self, Adoption, ReceivedState, Source, UpdatableHost, Update};
use crate::journal::{self, Journal};
use crate::log::{self, GUEST, Trace};
use crate::paths::socket_path;
use crate::platform::Platform;
use crate::platform::xen;
use crate::serve::{Clock, Server, Tasks};
use crate::worker;
use options::{Options, Settings};
use start::{Mode, Resources};
use systemd::{Given, Keep};

/// Set for the process in the background by the one that started it.
const DETACHED: &str = "XENSTORED_DETACHED";
/// How long a process waits at exit for its log and its trace to be written, each.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// Exit status for a mistake on the command line or in the configuration.
const USAGE: u8 = 2;

/// The whole program. Returns its exit status: 0, 1 for trouble, 2 for a mistake in the options.
pub fn main() -> ExitCode {
    let settings = match settings() {
        Ok(settings) => settings,
        Err(status) => return status,
    };
    let options = &settings.options;
    if let Some(watched) = &options.guard {
        let guarded = handover::guard(options, watched);
        return guarded
            .map_or_else(|error| complain(&error.to_string(), 1), |()| ExitCode::SUCCESS);
    }
    // A process that resumes has replaced the running daemon: it must not exit after a check.
    let resumes = options.resume.is_some() || options.live_update || options.live;
    if options.config_test && !resumes {
        return ExitCode::SUCCESS;
    }
    if options.check_state && !resumes {
        return check_state(&settings);
    }
    let detached = std::env::var_os(DETACHED).is_some();
    // A socket from systemd is for this very process.
    let activated = std::env::var_os("LISTEN_PID").is_some();
    let background = options.pid_file.is_some() && !options.no_fork && !resumes;
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

/// What the command line says. Otherwise the exit status, once the user has been told.
fn settings() -> Result<Settings, ExitCode> {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(checked) = start::check_of_oxenstored(&args) {
        let status = checked.map_or_else(|line| complain(&line, 1), |()| ExitCode::SUCCESS);
        return Err(status);
    }
    let parsed = Options::parse_from_args(args.iter().cloned());
    let settled = match parsed {
        Ok(options) => options.settle(),
        Err(error) if !error.use_stderr() && !start::takes_over(&args) => {
            let _ = error.print();
            return Err(ExitCode::SUCCESS);
        }
        Err(error) => Err(one_line(&error)),
    };
    let settled = match settled {
        Err(_) if start::takes_over(&args) => start::salvage(&args),
        settled => settled,
    };
    let settings = settled.map_err(|line| complain(&line, USAGE))?;
    if settings.options.pretend_xen().is_some() {
        return Ok(settings);
    }
    // An error: there is no Xen, or an earlier one, which says nothing about that.
    Ok(settings.with_roles(xenstore_transport::xen::roles().unwrap_or_default()))
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

/// Says how long it takes to make a store of the state on standard input, or why a start with it and
/// these options would not succeed.
fn check_state(settings: &Settings) -> ExitCode {
    let checked = handover::check(&settings.config)
        .map_err(|error| error.to_string())
        .and_then(|(time, of_xen)| start::rehearse(settings, of_xen).map(|()| time));
    match checked {
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
    let Settings { mut options, config, remarks } = settings;
    for remark in remarks {
        warn!("{remark}");
    }
    // Before anything else has one of the descriptors.
    let handed_over = handover::receive(&options, &config).map_err(|error| error.to_string())?;
    let given = if handed_over.is_none() { systemd::given()? } else { Given::default() };
    let mode = if handed_over.is_some() { Mode::TakenOver } else { Mode::Fresh };
    if mode == Mode::TakenOver && options.resume.is_none() && options.socket.take().is_some() {
        warn!("--socket: ignored, the socket of the other program is kept");
    }
    let journal = start::journal_dir(&options, mode)?;
    let mut incoming = match (handed_over, &journal) {
        (None, Some(dir)) => {
            let recovered = journal::recover(dir, &config).map_err(|error| error.to_string())?;
            recovered.map(ReceivedState::recovered)
        }
        (handed_over, _) => handed_over,
    };
    let resources = Resources::acquire(&options, mode)?;
    let Resources { mut signals, program, pid_file: _pid_file, trace, driver } = resources;
    // The check before the takeover has seen to that.
    options.require_xen &= mode == Mode::Fresh;
    let (fresh, rings) = smol::channel::unbounded();
    let of_c = incoming.as_ref().and_then(ReceivedState::evtchn_of_c);
    let platform = Platform::find(
        &options,
        &config,
        incoming.as_ref().map(|incoming| &incoming.state),
        given.evtchn.or(of_c.and_then(|number| inherit::adopt(number).ok())),
        (fresh, &trace, &driver),
    )?;
    let Platform { host, kind, events, waiting, resumed, rings: all_rings } = platform;
    if let Some(incoming) = incoming.as_mut().filter(|incoming| !incoming.is_handed_over()) {
        incoming.apply_pages(&resumed);
    }
    let listener = match &incoming {
        Some(incoming) if incoming.is_handed_over() => {
            let inherited = inherited_listener(incoming.state.io.listener, &driver);
            match mode.tolerate(inherited)? {
                Some(inherited) => inherited,
                None => mode.tolerate(listen(&options, None, &driver))?.flatten(),
            }
        }
        _ => listen(&options, given.listener, &driver)?,
    };
    let update = Update::default();
    let host: Box<dyn Host> = Box::new(UpdatableHost { host, update: update.clone() });
    let (server, taken) = serving(incoming, host, &config, journal);
    let server = server.driven(driver.clone()).traced(trace.clone()).updated(update.clone());
    let bound = events.as_ref().map(|events| events.bound.clone());
    let tasks = Tasks::new();
    driver.block_on(tasks.run(async {
        if let Some(taken) = taken {
            if taken.requester_asks_again() {
                update.set_done();
            }
            taken.adopt(&server, resumed, &tasks, &driver);
            // No client waits for this.
            worker::dispose(taken);
            tasks.spawn(handover::reap(&driver));
        }
        xen::introduce_all(&server, &waiting);
        let place = listener.as_ref().map(|(_, place)| place.as_str());
        let listener = listener.as_ref().map(|(listener, _)| listener);
        if let Some(listener) = listener {
            systemd::keep(Keep::Listener, listener.as_fd());
        }
        let welcome = |client| {
            tasks.spawn(server.serve(Socket::adopt(client, &driver)?));
            Ok(())
        };
        let outgoing = Source {
            server: &server,
            welcome: &welcome,
            update: &update,
            listener,
            xen: bound.map(|bound| (bound, all_rings)),
            pausing: Mutex::default(),
            program,
        };
        outgoing.keep_channels();
        // Behind what systemd keeps: it reads messages in order, so that a unit that has started has
        // its descriptors stored.
        announce(place, &kind, mode);
        tasks.spawn(systemd::keep_watchdog());
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
        // In a separate task, since each wait for a signal is a system call.
        let (stop, stopped) = smol::channel::bounded(1);
        tasks.spawn(until_stopped(&mut signals, &trace, stop));
        let stopped = async { _ = stopped.recv().await };
        let keep = future::or(outgoing.run(), outgoing.keep_journal());
        future::or(future::or(accept, stopped), future::or(serve_rings, keep)).await;
        // On a Xen host the next process recovers, since the guests still run. It must not see that their
        // connections end with this process.
        server.leave_journal(outgoing.xen.is_some());
        // The socket file is removed, and the next process binds ports again.
        systemd::forget(&[Keep::Listener, Keep::Evtchn]);
        outgoing.end_channels();
        Ok(())
    }))
}

/// The server: empty, or as another program has left it, with what is to be done with the rest of
/// that. All that it does from now on is in the journal, if there is to be one.
pub(crate) fn serving(
    incoming: Option<ReceivedState>,
    host: Box<dyn Host>,
    config: &Config,
    journal: Option<PathBuf>,
) -> (Server<Box<dyn Host>>, Option<Adoption>) {
    let (server, taken) = match incoming {
        Some(incoming) => {
            let (engine, taken) = incoming.split();
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

/// The socket that a program before this one has listened on.
fn inherited_listener(
    number: Option<i32>,
    driver: &Driver,
) -> Result<Option<(Listener, String)>, String> {
    let Some(number) = number else { return Ok(None) };
    let listener = inherit::adopt_socket(number, true).and_then(|fd| Listener::adopt(fd, driver));
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

/// Notifies systemd, then prints one line with the socket and the next command. The line comes last,
/// because it ends the process in the foreground, and systemd treats a start as failed that ends before
/// the notification.
fn announce(place: Option<&str>, kind: &str, mode: Mode) {
    match mode {
        // The guard has been it meanwhile.
        Mode::TakenOver => systemd::serves(std::process::id()),
        _ => systemd::is_ready(),
    }
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
