//! Resources that a start needs besides the store, and what happens if one is missing.
//!
//! A fresh start, the check before a live update, and a start with the state of another program acquire
//! their resources by the same function, so that the check covers what the start does.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use async_signal::{Signal, Signals};
use rustix::fs::{FlockOperation, flock};
use tracing::{error, warn};
use xenstore_sys::own_file::{self, Access, Others};
use xenstore_transport::driver::Driver;

use crate::daemon::options::{Complaint, Options, Settings};
use crate::daemon::pid_file::PidFile;
use crate::log::Trace;
use crate::paths::{chosen_journal, journal_of, look_for_earlier, run_dir, socket_path};
use crate::platform::machine;
use crate::worker;

/// Signals that stop the daemon (TERM, INT), the one that reopens the trace (HUP), and those that the
/// daemon ignores because their default action would end it. The Rust runtime ignores SIGPIPE.
const SIGNALS: [Signal; 6] =
    [Signal::Term, Signal::Int, Signal::Hup, Signal::Usr1, Signal::Usr2, Signal::Alarm];

/// What a start does if a resource is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A fresh start: it fails.
    Fresh,
    /// `--check-state`: it fails. Resources that the running daemon holds are not acquired.
    Check,
    /// A start with the state of another program: it continues without optional resources, since
    /// exiting would lose that state.
    TakenOver,
}

impl Mode {
    /// The value, or `None` and a log line if this start continues without it.
    pub(crate) fn tolerate<T>(self, result: Result<T, Complaint>) -> Result<Option<T>, Complaint> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(reason) if self == Mode::TakenOver => {
                error!(reason, "live update: continuing without this");
                Ok(None)
            }
            Err(reason) => Err(reason),
        }
    }
}

/// Resources that a start needs besides the store.
pub(crate) struct Resources {
    pub(crate) signals: Signals,
    /// The file of the running program, even if its path is replaced later.
    pub(crate) program: File,
    /// Removed when dropped.
    pub(crate) pid_file: Option<PidFile>,
    pub(crate) trace: Trace,
    pub(crate) driver: Driver,
}

impl Resources {
    /// Acquires all resources. From then on signals are queued until they are read.
    ///
    /// # Errors
    ///
    /// One line that names the missing resource and the reason.
    pub(crate) fn acquire(options: &Options, mode: Mode) -> Result<Resources, Complaint> {
        raise_descriptor_limit();
        // The library that waits for signals starts a thread as well, and panics if it cannot.
        worker::start().map_err(|error| {
            format!(
                "cannot make a thread: {error}; raise the limit of processes (TasksMax, ulimit -u)"
            )
        })?;
        let signals =
            Signals::new(SIGNALS).map_err(|error| format!("cannot wait for signals: {error}"))?;
        let program = File::open("/proc/self/exe").map_err(|e| format!("/proc/self/exe: {e}"))?;
        let pid_file = match options.pid_file.as_deref() {
            Some(path) if mode == Mode::Check && path.exists() => {
                check_pid_file(path)
                    .map_err(|error| format!("--pid-file {}: {error}", path.display()))?;
                None
            }
            Some(path) => mode.tolerate(PidFile::create(path))?,
            None => None,
        };
        let trace = open_trace(options, mode)?;
        let driver = Driver::new().map_err(|error| format!("epoll: {error}"))?;
        Ok(Resources { signals, program, pid_file, trace, driver })
    }
}

/// Checks that the pid file could be written, and leaves its content unchanged. Fails if a daemon other
/// than the one that runs this check has it locked.
fn check_pid_file(path: &Path) -> io::Result<()> {
    let file = own_file::open_or_create(path, Access::Write, Others::Read)?;
    let pid = std::fs::read_to_string(path)?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if parent.is_none() || pid.trim().parse().ok() != parent {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    }
    Ok(())
}

fn open_trace(options: &Options, mode: Mode) -> Result<Trace, Complaint> {
    let trace = Trace::new();
    for switch in &options.trace_control {
        if trace.switch(switch).is_err() {
            warn!(switch, "this trace switch does nothing here: only io does");
        }
    }
    if let Some(path) = &options.trace_file {
        let is_new = mode == Mode::Check && !path.exists();
        let opened = trace.open(path).map_err(|e| format!("--trace-file {}: {e}", path.display()));
        mode.tolerate(opened)?;
        if is_new {
            // A check leaves no file behind.
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(trace)
}

/// The directory of the journal: `--journal`, or the default for the socket. Without that option, or
/// with the state of another program, a directory that cannot be used is logged, and the daemon has no
/// journal.
///
/// # Errors
///
/// One line, if the directory of `--journal` cannot be used, or there is no place for the socket; in a
/// check also if another directory cannot be used.
pub(crate) fn journal_dir(options: &Options, mode: Mode) -> Result<Option<PathBuf>, Complaint> {
    let found = match &options.journal {
        Some(none) if none.as_os_str() == "none" => return Ok(None),
        Some(dir) => chosen_journal(dir),
        None if options.disable_socket => journal_of(&run_dir().join("xenstored")),
        None => match mode.tolerate(socket_path(options.socket.as_deref()))? {
            Some(socket) => {
                if mode != Mode::Check {
                    look_for_earlier(&socket);
                }
                journal_of(&socket)
            }
            None => journal_of(&run_dir().join("xenstored")),
        },
    };
    let is_needed = mode == Mode::Check || mode == Mode::Fresh && options.journal.is_some();
    match found {
        Err(reason) if !is_needed => {
            error!(
                reason,
                "there is no journal: a crash loses the store; choose a directory with --journal"
            );
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// Does what a start with a state does, except for acquiring what the running daemon holds. `of_xen` is
/// true if the state is one of a Xen host.
///
/// # Errors
///
/// One line that names the missing resource.
pub(crate) fn rehearse(settings: &Settings, of_xen: bool) -> Result<(), Complaint> {
    let options = &settings.options;
    if let Some(dir) = journal_dir(options, Mode::Check)? {
        let probe = dir.join(format!("check.{}", std::process::id()));
        let written = File::options().write(true).create_new(true).open(&probe);
        written
            .map_err(|error| format!("journal {}: cannot be written: {error}", dir.display()))?;
        let _ = std::fs::remove_file(probe);
    }
    Resources::acquire(options, Mode::Check)?;
    if of_xen || options.require_xen {
        let probed = machine::probe(options);
        let why = if of_xen { "the state is one of a Xen host" } else { "--require-xen" };
        probed.map_err(|error| format!("{why}: {error}"))?;
    }
    Ok(())
}

/// Fails if options would change what a live update cannot change. Compares them with those of the
/// running daemon, which listens at `socket`.
pub(crate) fn unchangeable(
    args: &[OsString],
    own: &[OsString],
    socket: Option<&Path>,
) -> Result<(), Complaint> {
    let parse = |args: &[OsString]| {
        let args = std::iter::once(OsString::from("xenstored")).chain(args.iter().cloned());
        Options::parse_from_args(args).ok()
    };
    // The check reports what is wrong with them.
    let (Some(new), Some(own)) = (parse(args), parse(own)) else { return Ok(()) };
    if let (Some(new), Some(listens)) = (&new.socket, socket)
        && new != listens
        && Some(new) != own.socket.as_ref()
    {
        let (new, listens) = (new.display(), listens.display());
        return Err(format!("--socket {new}: a live update keeps the socket, {listens}"));
    }
    if new.disable_socket && socket.is_some() {
        return Err("--disable-socket: a live update keeps the socket".into());
    }
    let domid = own.master_domid.unwrap_or(0);
    if new.master_domid.unwrap_or(0) != domid {
        return Err(format!("--master-domid: a live update keeps the domain, {domid}"));
    }
    Ok(())
}

/// Returns true if these arguments ask for a start with the state of another program.
pub(crate) fn takes_over(args: &[OsString]) -> bool {
    let says = |arg: &OsString| {
        matches!(arg.to_str(), Some("-U" | "--live-update" | "--live" | "--resume"))
    };
    args.iter().skip(1).any(says)
}

/// Before a live update, oxenstored runs the new program with all its options followed by `--help`, and
/// expects exit status 0. Returns the result of the check if these are such arguments.
pub(crate) fn check_of_oxenstored(args: &[OsString]) -> Option<Result<(), Complaint>> {
    let (last, rest) = args.split_last()?;
    (last == "--help" && rest.iter().any(|arg| arg == "--live")).then(|| {
        let options = Options::parse_from_args(rest.iter().cloned());
        let settings = options.map_err(|error| crate::daemon::one_line(&error))?.settle()?;
        rehearse(&settings, true)
    })
}

/// The settings of these arguments. Invalid ones are ignored, with one log line each: exiting because of
/// them would lose the state of another program.
pub(crate) fn salvage(args: &[OsString]) -> Result<Settings, Complaint> {
    let parse = |args: &[OsString]| {
        let options = Options::parse_from_args(args.iter().cloned());
        options.map_err(|error| crate::daemon::one_line(&error))?.settle()
    };
    let (program, mut rest) = args.split_at(1.min(args.len()));
    let mut accepted = program.to_vec();
    let mut dropped = Vec::new();
    while let Some(arg) = rest.first() {
        // Drops the option, or the option with its value.
        let lengths = [1, 2].into_iter().filter(|length| *length <= rest.len());
        let fits = |length: &usize| parse(&[&accepted, &rest[..*length]].concat()).is_ok();
        let length = lengths.into_iter().find(fits);
        match length {
            Some(length) => accepted.extend_from_slice(&rest[..length]),
            None => dropped.push(format!("live update: ignored: {}", arg.to_string_lossy())),
        }
        rest = &rest[length.unwrap_or(1)..];
    }
    let mut settings = parse(&accepted)?;
    settings.remarks.extend(dropped);
    Ok(settings)
}

/// Raises the soft limit of descriptors: each domain has a connection and a ring, and the usual 1,024 do
/// not suffice.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "cannot raise the limit of open descriptors");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if invalid options keep a program that takes over from its state, or if valid options are
    // ignored with them.
    #[test]
    fn a_mistake_in_the_options_does_not_end_a_takeover() {
        for (args, pid_file, dropped) in [
            ("-N --pid-file /p -U", Some("/p"), 0),
            ("-N --bogus --pid-file /p -U", Some("/p"), 1),
            ("--bogus=1 -E many --pid-file /p extra -Q nodes -Q nodes=x -U -E 5", Some("/p"), 8),
            ("--help --version -U --config-file /nonexistent", None, 4),
            ("-U -E", None, 1),
            ("--pid-file /p --resume 7 --errand 8 --trace-control=+bogus", Some("/p"), 1),
        ] {
            let args = format!("xenstored {args}");
            let args: Vec<OsString> = args.split_ascii_whitespace().map(OsString::from).collect();
            assert!(takes_over(&args));
            let settings = salvage(&args).unwrap();
            let options = &settings.options;
            assert!(options.live_update || (options.resume, options.errand) == (Some(7), Some(8)));
            assert_eq!(options.pid_file.as_deref(), pid_file.map(Path::new), "{args:?}");
            assert_eq!(settings.remarks.len(), dropped, "{:?}", settings.remarks);
        }
    }
}
