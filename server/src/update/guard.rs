//! The way back from another program: a process of this one, which goes on with everything unless that
//! program answers.
//!
//! It is started right before the other program is run in place of this one, with the same descriptors
//! and the same state. It is a client of the store, with a request that has been sent already: whatever
//! program goes on, this is the first request that it answers. If it ends or is late, it is killed, and
//! the guard runs this program with the state. All that differs then is the number of the process.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open, pidfd_send_signal,
};
use xenstore_protocol::{Header, Operation};
use xenstore_transport::inherit;

use super::child::{children_of, ends_within};
use super::errand::{self, Errand};
use super::incoming::resume_options;
use super::outgoing::own_args;
use crate::options::Options;
use crate::systemd;

/// How long a program may take until it answers, besides what the state takes.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long one that is killed may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);

/// A process that guards this one.
pub(super) struct Guard(Child);

/// Takes on a client, whose end this is.
pub(crate) type Welcome<'a> = &'a dyn Fn(OwnedFd) -> io::Result<()>;

/// Makes the connection of the guard, before all connections stand still; the guard's end.
pub(super) fn connect(welcome: Welcome<'_>) -> io::Result<UnixStream> {
    let (client, server) = UnixStream::pair()?;
    welcome(server.into())?;
    Ok(client)
}

/// What the guard has to know of a handover.
pub(super) struct Handover<'a> {
    pub(super) program: &'a File,
    pub(super) client: &'a UnixStream,
    pub(super) stream: &'a File,
    pub(super) errand: Errand,
    /// What the state names.
    pub(super) descriptors: &'a [RawFd],
    /// How long making a store of the state has taken.
    pub(super) expected: Duration,
}

impl Guard {
    /// Starts it. From now on systemd takes it for the daemon, so that the end of this process is not
    /// that of the unit.
    ///
    /// # Errors
    ///
    /// There is no descriptor or process for it.
    pub(super) fn start(handover: Handover<'_>) -> io::Result<Guard> {
        let Handover { program, mut client, stream, errand, descriptors, expected } = handover;
        let process = pidfd_open(getpid(), PidfdFlags::empty())?;
        let errand = errand::sealed("errand", &errand.emit())?;
        let own = [client.as_raw_fd(), process.as_raw_fd(), stream.as_raw_fd(), errand.as_raw_fd()];
        let through = [descriptors, &own].concat();
        let limit = (ANSWER_LIMIT + 4 * expected).as_millis();
        let pid = std::process::id();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.args(own_args()).args(resume_options(stream, &errand)).stdin(Stdio::null());
        command.arg(format!("--guard={},{},{pid},{limit}", own[0], own[1]));
        let payload = b"/\0";
        let header = Header { ty: Operation::Read.as_wire(), len: 2, ..Header::default() };
        client.write_all(&[&header.emit()[..], payload].concat())?;
        inherit::let_through(&through, true)?;
        let child = command.spawn();
        inherit::let_through(&through, false)?;
        let child = child?;
        systemd::is_to_be_replaced(child.id());
        Ok(Guard(child))
    }

    /// The other program has not been run; this one goes on.
    pub(super) fn stop(mut self) {
        systemd::serves(std::process::id());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `--guard`: what it is to watch.
struct Watched {
    client: UnixStream,
    process: OwnedFd,
    pid: u32,
    limit: Duration,
}

impl Watched {
    fn parse(text: &str) -> Option<io::Result<Watched>> {
        let numbers: Result<Vec<u64>, _> = text.split(',').map(str::parse).collect();
        let [client, process, pid, limit] = numbers.ok()?.try_into().ok()?;
        let take = |number| inherit::any(i32::try_from(number).unwrap_or(-1));
        let (pid, limit) = (u32::try_from(pid).ok()?, Duration::from_millis(limit));
        let both = take(client).and_then(|client| Ok((client.into(), take(process)?)));
        Some(both.map(|(client, process)| Watched { client, process, pid, limit }))
    }

    /// Waits for the answer. Returns `None` if it has come, otherwise why it will not.
    fn wait(&mut self) -> io::Result<Option<String>> {
        let deadline = std::time::Instant::now() + self.limit;
        loop {
            let rest = deadline.saturating_duration_since(std::time::Instant::now());
            let limit = Timespec::try_from(rest).map_err(io::Error::other)?;
            let client = PollFd::new(&self.client, PollFlags::IN);
            let mut both = [client, PollFd::new(&self.process, PollFlags::IN)];
            match poll(&mut both, Some(&limit)) {
                Ok(0) => {
                    let ms = self.limit.as_millis();
                    return Ok(Some(format!("has not answered within {ms} ms")));
                }
                Err(rustix::io::Errno::INTR) => continue,
                found => drop(found?),
            }
            let [answer, ended] = both.map(|polled| !polled.revents().is_empty());
            // What has been answered before the end counts: the journal has it.
            if answer && self.client.read(&mut [0; 64]).is_ok_and(|count| count > 0) {
                return Ok(None);
            }
            if ended {
                return Ok(Some("has ended before it answered".into()));
            }
            if answer {
                return Ok(Some("has closed the connection of the guard".into()));
            }
        }
    }

    /// Ends the other program, with what it has started.
    fn end(&self) -> io::Result<()> {
        let own = getpid();
        let mut all: Vec<Pid> = Vec::new();
        let mut next = children_of(&self.pid.to_string());
        while let Some(pid) = next.pop() {
            if pid != own {
                next.extend(children_of(&pid.to_string()));
                all.push(pid);
            }
        }
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        for pid in all {
            let _ = kill_process(pid, Signal::KILL);
        }
        match ends_within(&self.process, END_LIMIT)? {
            true => Ok(()),
            false => Err(io::Error::other("the other program cannot be killed")),
        }
    }
}

/// Waits until the process that is to be guarded has answered, or goes on in its place.
///
/// # Errors
///
/// It cannot be guarded, or it has ended and this program cannot go on; one line.
pub(crate) fn guard(options: &Options, text: &str) -> Result<(), String> {
    let wrong = |error: io::Error| format!("--guard: {error}");
    let mut watched = match (Watched::parse(text), options.resume, options.errand) {
        (Some(watched), Some(state), Some(errand)) => (watched.map_err(wrong)?, state, errand),
        _ => return Err("--guard: not from a live update".into()),
    };
    let (watched, state, errand) = (&mut watched.0, watched.1, watched.2);
    let errand = inherit::any(errand).and_then(errand::read).map_err(wrong)?;
    let errand = Errand::parse(&errand).ok_or("--guard: not an errand")?;
    let Some(reason) = watched.wait().map_err(wrong)? else {
        systemd::serves(watched.pid);
        systemd::wait_until_heard();
        return Ok(());
    };
    watched.end().map_err(wrong)?;
    let errand = Errand { failed: Some(format!("the other program {reason}")), ..errand };
    let errand = errand::sealed("errand", &errand.emit()).map_err(wrong)?;
    // All that the state names is let through already: this process has taken nothing of it.
    inherit::let_through(&[errand.as_raw_fd()], true).map_err(wrong)?;
    let mut command = Command::new("/proc/self/exe");
    command.args(own_args()).args(resume_options(&state, &errand));
    for name in ["LISTEN_PID", "WATCHDOG_PID"] {
        if std::env::var(name).is_ok_and(|pid| pid == watched.pid.to_string()) {
            command.env(name, OsString::from(std::process::id().to_string()));
        }
    }
    Err(wrong(command.exec()))
}
