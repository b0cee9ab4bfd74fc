//! The guard: a process of the old program that resumes the daemon if the new program does not serve.
//!
//! The guard is started right before the new program is executed in place of this one. It has copies of
//! the same descriptors and of the state, and is a client of the store with a request already sent. The
//! new program answers this request first. If the new program ends or is late, the guard kills it and
//! executes the old program with the state. Only the pid of the daemon changes.

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
use xenstore_sys::inherit;

use super::child::{children_of, ends_within};
use super::destination::resume_options;
use super::envelope::{self, Envelope};
use super::error::ReceiveError;
use super::source::own_args;
use crate::daemon::options::Options;
use crate::daemon::systemd;

/// How long the new program may take to answer, in addition to the time that the state takes.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a killed program may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);

/// The process that guards this one.
pub(super) struct Guard(Child);

/// Accepts this descriptor as the connection of a new client.
pub(crate) type Welcome<'a> = &'a dyn Fn(OwnedFd) -> io::Result<()>;

/// Makes the connection of the guard, before all connections are paused. Returns the guard's end.
pub(super) fn connect(welcome: Welcome<'_>) -> io::Result<UnixStream> {
    let (client, server) = UnixStream::pair()?;
    welcome(server.into())?;
    Ok(client)
}

/// What the guard needs.
pub(super) struct GuardSetup<'a> {
    pub(super) program: &'a File,
    pub(super) client: &'a UnixStream,
    pub(super) stream: &'a File,
    pub(super) envelope: Envelope,
    /// The descriptors that the state names.
    pub(super) descriptors: &'a [RawFd],
    /// How long it took to restore a store from the state.
    pub(super) expected: Duration,
}

impl Guard {
    /// Starts the guard, and announces it to systemd as the main process, so that the end of this process
    /// does not end the unit.
    ///
    /// # Errors
    ///
    /// Fails at the limit of descriptors or processes.
    pub(super) fn start(setup: GuardSetup<'_>) -> io::Result<Guard> {
        let GuardSetup { program, mut client, stream, envelope, descriptors, expected } = setup;
        let process = pidfd_open(getpid(), PidfdFlags::empty())?;
        let envelope = envelope::sealed("errand", &envelope.emit())?;
        let own =
            [client.as_raw_fd(), process.as_raw_fd(), stream.as_raw_fd(), envelope.as_raw_fd()];
        let through = [descriptors, &own].concat();
        let limit = (ANSWER_LIMIT + 4 * expected).as_millis();
        let pid = std::process::id();
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.args(own_args()).args(resume_options(stream, &envelope)).stdin(Stdio::null());
        command.arg(format!("--guard={},{},{pid},{limit}", own[0], own[1]));
        let payload = b"/\0";
        let header = Header { ty: Operation::Read.as_wire(), len: 2, ..Header::default() };
        client.write_all(&[&header.emit()[..], payload].concat())?;
        inherit::set_inheritable(&through, true)?;
        let child = command.spawn();
        inherit::set_inheritable(&through, false)?;
        let child = child?;
        systemd::is_to_be_replaced(child.id());
        Ok(Guard(child))
    }

    /// Ends the guard: the other program was not executed, and this process continues to serve.
    pub(super) fn stop(mut self) {
        systemd::serves(std::process::id());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `--guard`: the process to watch.
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
        let take = |number| inherit::adopt(i32::try_from(number).unwrap_or(-1));
        let (pid, limit) = (u32::try_from(pid).ok()?, Duration::from_millis(limit));
        let both = take(client).and_then(|client| Ok((client.into(), take(process)?)));
        Some(both.map(|(client, process)| Watched { client, process, pid, limit }))
    }

    /// Waits for the reply. Returns `None` if it has come, otherwise the reason why it will not come.
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
            let [replied, ended] = both.map(|polled| !polled.revents().is_empty());
            // A reply sent before the end counts: the journal has its request.
            if replied && self.client.read(&mut [0; 64]).is_ok_and(|count| count > 0) {
                return Ok(None);
            }
            if ended {
                return Ok(Some("has ended before it answered".into()));
            }
            if replied {
                return Ok(Some("has closed the connection of the guard".into()));
            }
        }
    }

    /// Kills the other program and the processes that it has started.
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

/// `--guard`: waits until the guarded process has answered, or resumes in its place.
///
/// # Errors
///
/// Fails if the process cannot be guarded, or if it has ended and this program cannot resume.
pub(crate) fn guard(options: &Options, text: &str) -> Result<(), ReceiveError> {
    let wrong = |error| ReceiveError::Descriptor { option: "guard", error };
    let invalid = |reason| ReceiveError::Invalid { option: "guard", reason };
    let mut watched = match (Watched::parse(text), options.resume, options.errand) {
        (Some(watched), Some(state), Some(envelope)) => (watched.map_err(wrong)?, state, envelope),
        _ => return Err(invalid("not from a live update")),
    };
    let (watched, state, envelope) = (&mut watched.0, watched.1, watched.2);
    let envelope = inherit::adopt(envelope).and_then(envelope::read).map_err(wrong)?;
    let envelope = Envelope::parse(&envelope).ok_or_else(|| invalid("--errand is invalid"))?;
    let Some(reason) = watched.wait().map_err(wrong)? else {
        systemd::serves(watched.pid);
        systemd::wait_until_heard();
        return Ok(());
    };
    watched.end().map_err(wrong)?;
    let failed = Some(format!("the other program {reason}"));
    let envelope = Envelope { failed, ..envelope };
    let envelope = envelope::sealed("errand", &envelope.emit()).map_err(wrong)?;
    // The descriptors that the state names are inheritable already: this process has adopted none of them.
    inherit::set_inheritable(&[envelope.as_raw_fd()], true).map_err(wrong)?;
    let mut command = Command::new("/proc/self/exe");
    command.args(own_args()).args(resume_options(&state, &envelope));
    for name in ["LISTEN_PID", "WATCHDOG_PID"] {
        if std::env::var(name).is_ok_and(|pid| pid == watched.pid.to_string()) {
            command.env(name, OsString::from(std::process::id().to_string()));
        }
    }
    Err(wrong(command.exec()))
}
