//! The source of a handover: another program replaces this one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures_lite::future;
use smol::Timer;
use smol::lock::Mutex;
use tracing::{debug, error, info, warn};
use xenstore_protocol::{DomId, Features, Operation};
use xenstore_store::{ConnId, ConnectionIo, Host, State};
use xenstore_sys::{inherit, own_file};
use xenstore_transport::socket::Listener;

use super::c_xenstored::{self, Target};
use super::child::on_thread;
use super::control::{Update, UpdateRequest, reply};
use super::destination::resume_options;
use super::envelope::{self, Envelope};
use super::error::{HandoverError, ProgramError};
use super::guard::{self, Guard, GuardSetup, Welcome};
use super::probe::{self, ProgramKind};
use super::snapshot::Snapshot;
use crate::daemon::start::unchangeable;
use crate::daemon::systemd::{self, Keep};
use crate::journal::Journal;
use crate::paths::run_dir;
use crate::platform::xen::{Bound, Ringed, Rings};
use crate::serve::Server;

/// How long connections without a transaction pause for those with one, at a time.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);
/// How long an update waits for its log to be written.
const LOG_LIMIT: Duration = Duration::from_millis(100);

/// The server of this program, and what the destination gets besides.
pub(crate) struct Source<'a> {
    pub(crate) server: &'a Server<Box<dyn Host>>,
    pub(crate) welcome: Welcome<'a>,
    pub(crate) update: &'a Update,
    pub(crate) listener: Option<&'a Listener>,
    /// On a Xen host.
    pub(crate) xen: Option<(Bound, Rings)>,
    /// Locked by the task that pauses all connections.
    pub(crate) pausing: Mutex<()>,
    /// This program, also if its file has been replaced.
    pub(crate) program: File,
}

/// A handover whose connections are all paused.
struct Handover<'a> {
    request: &'a UpdateRequest,
    args: &'a [OsString],
    snapshot: &'a Snapshot,
    stopped: Duration,
    /// How long it took to restore a store from the state.
    expected: Duration,
    client: UnixStream,
}

/// Returns the options without those that name a state to resume from.
fn lasting(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut lasting = Vec::new();
    let mut all = args;
    while let Some(arg) = all.next() {
        match arg.to_str() {
            Some("--resume" | "--errand" | "--guard") => drop(all.next()),
            Some("-U" | "--live-update" | "--live" | "--restart" | "--check-state") => {}
            Some(guard) if guard.starts_with("--guard=") => {}
            _ => lasting.push(arg),
        }
    }
    lasting
}

/// Returns the lasting options of this process.
pub(super) fn own_args() -> Vec<OsString> {
    lasting(std::env::args_os().skip(1))
}

impl Source<'_> {
    /// Handles requests for live updates. Never returns: a successful update replaces this program.
    pub(crate) async fn run(&self) {
        loop {
            let request = self.update.next_request().await;
            info!(file = %request.file.display(), dry_run = request.dry_run, "live update: asked for");
            let result = self.attempt(&request).await;
            match &result {
                Ok(_) | Err(HandoverError::Busy) => {}
                Err(error) => {
                    warn!(reason = %error, "live update: not done, this program continues");
                }
            }
            self.update.reply(&request, result);
            self.server.wake_all();
        }
    }

    /// Makes systemd store the event channels, if the next process can use them.
    pub(crate) fn keep_channels(&self) {
        match &self.xen {
            Some((bound, _)) if self.server.with_journal(|_| ()).is_some() => {
                systemd::keep(Keep::Evtchn, bound.evtchn.descriptor());
            }
            Some(_) => systemd::forget(&[Keep::Evtchn]),
            None => {}
        }
    }

    /// Unbinds the event channels, so that another XenStore of this host can bind them at once: systemd
    /// may take a moment to close the descriptor.
    pub(crate) fn end_channels(&self) {
        let Some((bound, rings)) = &self.xen else { return };
        rings.borrow().values().for_each(Ringed::unbind);
        if let Err(error) = bound.give_up_domain_exc() {
            debug!(%error, "VIRQ_DOM_EXC cannot be unbound");
        }
    }

    /// Executes the other program, or returns the report of a dry run.
    async fn attempt(&self, request: &UpdateRequest) -> Result<String, HandoverError> {
        let file = &request.file;
        let program = |error| HandoverError::Program { file: file.clone(), error };
        let (kind, help) = probe::kind(file).await.map_err(program)?;
        let args = match &request.cmdline {
            Some(cmdline) => lasting(cmdline.split_ascii_whitespace().map(OsString::from)),
            None => own_args(),
        };
        let target = match kind {
            ProgramKind::Xenstored => None,
            ProgramKind::CXenstored => {
                Some(Target::of(file, &help, request.version).map_err(program)?)
            }
        };
        if target.is_none() {
            let socket = self.listener.and_then(Listener::path);
            let checked = unchangeable(&args, &own_args(), socket.as_deref());
            checked.map_err(|reason| program(ProgramError::Options(reason.to_string())))?;
        }
        self.server.finish_work().await;
        let mut state = self.server.with(|engine, _| engine.dump());
        self.name_descriptors(&mut state);
        let lost = target.filter(|_| request.dry_run);
        let lost = lost.map(|target| state.encode_for_c(&target.format, target.version).1);
        let snapshot = on_thread(move || Snapshot::write(state)).await.map_err(program)?;
        let snapshot = snapshot.map_err(HandoverError::Snapshot)?;
        let mut expected = snapshot.time;
        if target.is_none() {
            let state = snapshot.read_only().map_err(HandoverError::Snapshot)?;
            expected += probe::check(file, &args, state).await.map_err(program)?;
        }
        if request.dry_run {
            return Ok(self.report(target, snapshot.bytes, expected, &lost.unwrap_or_default()));
        }
        let _alone = self.pausing.lock().await;
        self.update.check_not_cancelled()?;
        let client = guard::connect(self.welcome);
        let client = client.map_err(|error| program(ProgramError::Guard(error)))?;
        let stopped = envelope::now();
        let paused = match kind {
            ProgramKind::Xenstored => self.server.pause_all(false).await,
            ProgramKind::CXenstored => self.pause_without_transactions(request).await?,
        };
        self.server.finish_work().await;
        let state = self.state(paused);
        let (args, snapshot) = (&args[..], &snapshot);
        let handover = Handover { request, args, snapshot, stopped, expected, client };
        let Err(error) = match target {
            None => self.execute(&handover, &state),
            Some(target) => self.execute_c(&handover, state, target),
        };
        self.server.resume_all();
        Err(program(ProgramError::Run(error)))
    }

    /// Returns the report of a dry run. For C xenstored it has one line for each thing that is lost or
    /// prevents the update.
    fn report(
        &self,
        target: Option<Target>,
        bytes: u64,
        pause: Duration,
        lost: &[String],
    ) -> String {
        let ms = pause.as_secs_f64() * 1e3;
        let mut text = format!("state: {bytes} bytes\npause: about {ms:.1} ms\n");
        if let Some(Target { version, .. }) = target {
            text += &format!("stream version: {version}\n");
        }
        if lost.is_empty() {
            text += "lost: nothing\n";
        }
        lost.iter().for_each(|thing| text += &format!("lost: {thing}\n"));
        if target.is_some() {
            self.transactions().lines().for_each(|line| text += &format!("in the way: {line}\n"));
        }
        text
    }

    /// Returns the open transactions, one a line.
    fn transactions(&self) -> String {
        let (_, text) = self.server.request(Operation::Control, b"transactions\0");
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    }

    /// Pauses all connections when none has an open transaction: C xenstored cannot continue these.
    ///
    /// # Errors
    ///
    /// Fails if transactions stay open. The requester retries until its time limit; then they are lost
    /// if it has forced the update.
    async fn pause_without_transactions(
        &self,
        request: &UpdateRequest,
    ) -> Result<BTreeMap<ConnId, ConnectionIo>, HandoverError> {
        let pause = async { Some(self.server.pause_all(true).await) };
        let late = async {
            Timer::after(DRAIN_LIMIT).await;
            None
        };
        if let Some(paused) = future::or(pause, late).await {
            return Ok(paused);
        }
        let open = self.transactions();
        if request.since.elapsed() >= request.patience && request.force {
            warn!(open, "live update: these transactions end, unfinished");
            return Ok(self.server.pause_all(false).await);
        }
        self.server.resume_all();
        if request.since.elapsed() < request.patience {
            return Err(HandoverError::Busy);
        }
        Err(HandoverError::LongTransactions(open))
    }

    /// Executes another version of this daemon. Returns only if that fails.
    fn execute(&self, handover: &Handover<'_>, state: &State) -> io::Result<Never> {
        let Handover { request, args, snapshot, .. } = handover;
        let previous = Some(self.program.as_raw_fd());
        let envelope = Envelope { previous, ..self.envelope(handover) };
        let envelope = envelope::sealed("errand", &envelope.emit())?;
        let stream = snapshot.followed_by(state)?;
        let mut passed = descriptors(state);
        let guard = self.guard(handover, stream, &passed)?;
        passed.extend([&envelope, stream, &self.program].map(File::as_raw_fd));
        let mut command = Command::new(&request.file);
        command.args(*args).args(resume_options(stream, &envelope));
        let failed = exec(command, &passed);
        guard.stop();
        failed
    }

    /// Returns the envelope without a way back.
    fn envelope(&self, handover: &Handover<'_>) -> Envelope {
        Envelope {
            stopped: handover.stopped,
            clock: self.server.clock().now(),
            previous: None,
            requester: Some((handover.request.conn, handover.request.header)),
            failed: None,
            args: own_args(),
        }
    }

    /// Starts the guard, which resumes from `stream` if the other program does not serve.
    fn guard(
        &self,
        handover: &Handover<'_>,
        stream: &File,
        descriptors: &[RawFd],
    ) -> io::Result<Guard> {
        let (envelope, expected) = (self.envelope(handover), handover.expected);
        let (program, client) = (&self.program, &handover.client);
        let setup = GuardSetup { program, client, stream, envelope, descriptors, expected };
        let started = Guard::start(setup);
        started.map_err(|error| io::Error::new(error.kind(), ProgramError::Guard(error)))
    }

    /// Executes C xenstored, which reads the state from a file. Returns only if that fails.
    fn execute_c(
        &self,
        handover: &Handover<'_>,
        mut state: State,
        target: Target,
    ) -> io::Result<Never> {
        let Handover { request, args, snapshot, .. } = handover;
        // C xenstored does not write the journal.
        self.server.with_journal(Journal::discard);
        let virq_port = state.io.virq_port.take();
        let for_guard = snapshot.followed_by(&state).map(File::try_clone).and_then(|copy| copy);
        state.io.virq_port = virq_port;
        let mut connections = state.connections.iter_mut();
        if let Some(requester) = connections.find(|known| known.id == request.conn) {
            requester.io.unsent.extend_from_slice(&reply(&request.header, "OK"));
        }
        let (stream, lost) = state.encode_for_c(&target.format, target.version);
        lost.iter().for_each(|text| warn!("not carried over: {text}"));
        let path = run_dir().join("state_dump");
        let features = |domid| {
            let domain = state.domains.iter().find(|domain| domain.domid == domid);
            domain.map_or(Features::ALL, |domain| domain.features)
        };
        let run = || -> io::Result<Never> {
            write_private(&path, &stream)?;
            let passed = descriptors(&state);
            let bound = self.xen.as_ref().map(|(bound, _)| bound);
            bound.map_or(Ok(()), Bound::give_up_domain_exc)?;
            let guard = self.guard(handover, &for_guard?, &passed);
            let result = guard.and_then(|guard| {
                let mut command = Command::new(&request.file);
                command.args(c_xenstored::options(args));
                // When C xenstored exits, the ports must be free: systemd must not store them.
                systemd::forget(&[Keep::Evtchn]);
                systemd::set_watchdog(false);
                // C xenstored does not write the feature word in the page.
                self.offer(|domid| target.format.offered(target.version, features(domid)));
                // C xenstored ends a connection at a read that would block.
                let result =
                    inherit::set_blocking(&passed, true).and_then(|()| exec(command, &passed));
                guard.stop();
                result
            });
            let _ = inherit::set_blocking(&passed, false);
            self.offer(features);
            if let Some(Err(error)) = bound.map(Bound::bind_domain_exc) {
                error!(%error, "VIRQ_DOM_EXC cannot be bound again");
            }
            self.keep_channels();
            systemd::set_watchdog(true);
            result
        };
        let failed = run();
        let _ = std::fs::remove_file(&path);
        failed
    }

    /// Writes the features that each guest may use into its page.
    fn offer(&self, features: impl Fn(DomId) -> Features) {
        let Some((_, rings)) = &self.xen else { return };
        rings.borrow().iter().for_each(|(domid, ring)| ring.offer(features(*domid)));
    }
}

/// Has no value: a function that would return it returns only errors.
enum Never {}

/// Replaces a file by one that only its owner can read.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let _ = std::fs::remove_file(path);
    own_file::create(path)?.write_all(bytes)
}

/// Returns the descriptors that a state names.
fn descriptors(state: &State) -> Vec<RawFd> {
    let sockets = state.connections.iter().filter_map(|connection| connection.io.fd);
    [state.io.listener, state.io.evtchn].into_iter().flatten().chain(sockets).collect()
}

/// Executes a program in place of this one, with these descriptors. Returns only if that fails, with
/// everything unchanged.
fn exec(mut command: Command, passed: &[RawFd]) -> io::Result<Never> {
    inherit::set_inheritable(passed, true)?;
    crate::log::flush(LOG_LIMIT);
    let error = command.exec();
    inherit::set_inheritable(passed, false)?;
    Err(error)
}
