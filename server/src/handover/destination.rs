//! The destination of a handover: this program continues with the state of another one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use futures_lite::future;
use smol::Timer;
use tracing::{debug, error, info, warn};
use xenstore_protocol::stream::Sink;
use xenstore_store::{Caller, Config, ConnId, ConnectionState, Engine, Host, Millis, State};
use xenstore_sys::own_file::{self, Access, Others};
use xenstore_sys::{Sealed, inherit};
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::Socket;
use xenstore_transport::xen::XenRing;
use xenstore_transport::{ResumePoint, Transport};

use super::child::reap;
use super::control::reply;
use super::envelope::{self, Envelope};
use super::error::ReceiveError;
use crate::daemon::options::Options;
use crate::journal::{self, Recovered, RecoveryError, RingResume, move_to};
use crate::paths::run_dir;
use crate::platform::Resumed;
use crate::serve::{Server, Tasks};

/// Maximum time for which the reply to the requester of an update waits for the end of the guard.
const GUARD_END: Duration = Duration::from_secs(1);

/// The program that has written a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// This daemon, in any version.
    Xenstored,
    CXenstored,
    Oxenstored,
    /// A process that has ended unexpectedly. Its descriptors are closed.
    Journal,
}

impl Origin {
    fn name(self) -> &'static str {
        match self {
            Origin::Xenstored => "xenstored",
            Origin::CXenstored => "C xenstored",
            Origin::Oxenstored => "oxenstored",
            Origin::Journal => "a process that ended unexpectedly",
        }
    }
}

/// The state of another program. It is valid; none of its descriptors is adopted yet.
pub(crate) struct ReceivedState {
    pub(crate) state: State,
    pub(crate) engine: Engine,
    received: Received,
}

/// What belongs to a received state.
struct Received {
    origin: Origin,
    envelope: Option<Envelope>,
    /// The state as it was written, if it has not changed since.
    stream: Option<Sealed>,
    /// The file of the state, which is removed when all is adopted.
    file: Option<PathBuf>,
    /// When this program began to read the state.
    begun: Instant,
}

/// Restores an engine from a state. With `check`, verifies the invariants of the engine.
fn restore(config: &Config, bytes: &[u8], check: bool) -> Result<(State, Engine), RecoveryError> {
    journal::no_panic(|| {
        let state = State::decode(bytes)?;
        let (engine, _) = Engine::restore(config, &state)?;
        if check {
            engine.check()?;
        }
        Ok((state, engine))
    })
}

/// `--check-state`: checks the state on standard input. Returns how long that took, and whether the state
/// is one of a Xen host.
///
/// # Errors
///
/// Fails if the state cannot be read or restored.
pub(crate) fn check(config: &Config) -> Result<(Duration, bool), ReceiveError> {
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let bytes = input.and_then(envelope::read).map_err(RecoveryError::Read);
    let bytes = bytes.map_err(ReceiveError::Input)?;
    let begun = Instant::now();
    let (state, _) = restore(config, &bytes, true).map_err(ReceiveError::Input)?;
    Ok((begun.elapsed(), state.io.evtchn.is_some()))
}

/// Returns the state of another program, if the options name one.
///
/// # Errors
///
/// Fails if the state cannot be read or restored. The other program is executed again before that, if it
/// is this daemon.
pub(crate) fn receive(
    options: &Options,
    config: &Config,
) -> Result<Option<ReceivedState>, ReceiveError> {
    match (options.resume, options.errand) {
        (Some(state), Some(envelope)) => {
            receive_memory(config, state, envelope, options.refuse_state()).map(Some)
        }
        (Some(_), None) | (None, Some(_)) => Err(ReceiveError::OptionsApart),
        (None, None) if options.live_update => {
            receive_file(config, "state_dump", Origin::CXenstored).map(Some)
        }
        (None, None) if options.live && options.restart => {
            receive_file(config, "db", Origin::Oxenstored).map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn receive_memory(
    config: &Config,
    state: RawFd,
    envelope: RawFd,
    refuse: bool,
) -> Result<ReceivedState, ReceiveError> {
    let begun = Instant::now();
    let wrong = |option| move |error| ReceiveError::Descriptor { option, error };
    let envelope = inherit::adopt(envelope).and_then(envelope::read).map_err(wrong("errand"))?;
    let envelope = Envelope::parse(&envelope)
        .ok_or(ReceiveError::Invalid { option: "errand", reason: "not written by this daemon" })?;
    let memory = inherit::adopt(state).map_err(wrong("resume"))?;
    let read = || {
        if refuse {
            return Err(RecoveryError::Refused);
        }
        let stream = Sealed::map(&memory)?;
        Ok((restore(config, &stream, false)?, stream))
    };
    match read() {
        Ok(((state, engine), stream)) => {
            if let Some(previous) = envelope.previous {
                // It is not needed any more.
                let _ = inherit::adopt(previous);
            }
            let (origin, envelope, stream) = (Origin::Xenstored, Some(envelope), Some(stream));
            let received = Received { origin, envelope, stream, file: None, begun };
            let mut received = ReceivedState { state, engine, received };
            received.queue_reply();
            Ok(received)
        }
        Err(error) => {
            let fallback = run_previous(&envelope, &memory, &error).err();
            Err(ReceiveError::Resume { error, fallback })
        }
    }
}

/// Executes the program that has written the state again. Returns only if that fails, or with `Ok` if the
/// envelope does not name it.
fn run_previous(
    envelope: &Envelope,
    state: &OwnedFd,
    error: &RecoveryError,
) -> Result<(), io::Error> {
    let Some(previous) = envelope.previous else { return Ok(()) };
    let back = Envelope { previous: None, failed: Some(error.to_string()), ..envelope.clone() };
    let previous = inherit::adopt(previous)?;
    let envelope = envelope::sealed("errand", &back.emit())?;
    inherit::set_inheritable(&[state.as_raw_fd(), envelope.as_raw_fd()], true)?;
    let mut command = Command::new(format!("/proc/self/fd/{}", previous.as_raw_fd()));
    command.args(&back.args).args(resume_options(state, &envelope));
    Err(command.exec())
}

/// Returns the options with which a version of this daemon resumes.
pub(super) fn resume_options(state: &impl AsRawFd, envelope: &impl AsRawFd) -> [OsString; 4] {
    let number = |descriptor: RawFd| OsString::from(descriptor.to_string());
    let [state, envelope] = [state.as_raw_fd(), envelope.as_raw_fd()].map(number);
    ["--resume".into(), state, "--errand".into(), envelope]
}

fn receive_file(
    config: &Config,
    name: &str,
    origin: Origin,
) -> Result<ReceivedState, ReceiveError> {
    let begun = Instant::now();
    let path = run_dir().join(name);
    let read = || {
        let mut bytes = Vec::new();
        own_file::open(&path, Access::Read, Others::Read)?.read_to_end(&mut bytes)?;
        restore(config, &bytes, true)
    };
    match read() {
        Ok((state, engine)) => {
            let file = Some(path);
            let received = Received { origin, envelope: None, stream: None, file, begun };
            Ok(ReceivedState { state, engine, received })
        }
        Err(error) => Err(ReceiveError::File { path, error }),
    }
}

impl ReceivedState {
    /// The state that was recovered from a journal.
    pub(crate) fn recovered(recovered: Recovered) -> ReceivedState {
        let Recovered { state, engine } = recovered;
        let (origin, begun) = (Origin::Journal, Instant::now());
        let received = Received { origin, envelope: None, stream: None, file: None, begun };
        ReceivedState { state, engine, received }
    }

    /// Queues the reply to the requester of the update.
    fn queue_reply(&mut self) {
        let Some(envelope) = &self.received.envelope else { return };
        let Some((requester, header)) = &envelope.requester else { return };
        let mut connections = self.state.connections.iter_mut();
        let Some(requester) = connections.find(|known| known.id == *requester) else { return };
        let text = envelope.failed.as_deref().unwrap_or("OK");
        requester.io.unsent.extend_from_slice(&reply(header, text));
        if requester.caller != Caller::Socket {
            // The journal of this process must begin with the reply, which counts in the ring.
            self.received.stream = None;
        }
    }

    /// A state from this process, without a requester.
    #[cfg(test)]
    pub(crate) fn handed_over(config: &Config, bytes: &[u8], clock: Millis) -> ReceivedState {
        let (state, engine) = restore(config, bytes, true).unwrap();
        let stopped = envelope::now();
        let (previous, requester, failed, args) = (None, None, None, Vec::new());
        let envelope = Some(Envelope { stopped, previous, clock, requester, failed, args });
        let (origin, begun) = (Origin::Xenstored, Instant::now());
        let received = Received { origin, envelope, stream: None, file: None, begun };
        ReceivedState { state, engine, received }
    }

    /// Returns true if a running program handed over the state. Otherwise its process has ended, and its
    /// descriptors are closed.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.received.origin != Origin::Journal
    }

    /// Returns the event channel device, if C xenstored was executed and did not serve. It may or may not
    /// have bound `VIRQ_DOM_EXC` there.
    pub(crate) fn evtchn_of_c(&self) -> Option<RawFd> {
        let (io, envelope) = (&self.state.io, &self.received.envelope);
        let has_failed = envelope.as_ref().is_some_and(|envelope| envelope.failed.is_some());
        io.evtchn.filter(|_| has_failed && io.virq_port.is_none())
    }

    /// Moves the connections of domains to where their pages say. A connection whose page is invalid is
    /// restarted here, so that the restart is in the state with which the journal begins.
    pub(crate) fn apply_pages(&mut self, rings: &Resumed) {
        let mut restarts = false;
        for connection in &mut self.state.connections {
            // Both are sorted by connection.
            let at = rings.binary_search_by_key(&connection.id, |(id, ..)| *id);
            if let Ok(at) = at
                && let (_, ring, resume) = &rings[at]
                && let ResumePoint::Ring(indices) = ring.resume_point()
            {
                move_to(&mut connection.io, indices, *resume);
                if *resume == RingResume::Restarted {
                    self.engine.restart(connection.id);
                    restarts = true;
                }
            }
        }
        if restarts {
            let before = std::mem::replace(&mut self.state, self.engine.dump());
            self.state.io = before.io;
            for (now, before) in self.state.connections.iter_mut().zip(before.connections) {
                now.io = before.io;
            }
        }
    }

    /// Splits the state into the engine and the rest, which [`Adoption::adopt`] adopts.
    pub(crate) fn split(self) -> (Engine, Adoption) {
        let ReceivedState { state, engine, received } = self;
        (engine, Adoption { state, received })
    }
}

/// A received state whose engine a server has.
pub(crate) struct Adoption {
    state: State,
    received: Received,
}

impl Adoption {
    /// Passes the state as a stream to `sink`, in pieces: a journal begins with it.
    pub(crate) fn write(&self, sink: &mut Sink<'_>) {
        match &self.received.stream {
            Some(stream) => sink(stream),
            None => self.state.encode_to(sink),
        }
    }

    /// Returns the clock of the other program, in milliseconds.
    pub(crate) fn clock(&self) -> Millis {
        match &self.received.envelope {
            Some(envelope) => envelope.clock,
            None => journal::clock(&self.state),
        }
    }

    /// Returns true if the previous process ended unexpectedly.
    pub(crate) fn is_after_crash(&self) -> bool {
        self.received.origin == Origin::Journal
    }

    /// Returns true if the requester asks again for the result. oxenstored has replied that it is busy.
    pub(crate) fn requester_asks_again(&self) -> bool {
        self.received.origin == Origin::Oxenstored
    }

    /// Adopts the descriptors of all connections and serves them. A connection whose descriptor cannot be
    /// used ends.
    pub(crate) fn adopt<'a>(
        &self,
        server: &'a Server<Box<dyn Host>>,
        rings: Resumed,
        tasks: &Tasks<'a>,
        driver: &Driver,
    ) {
        let rings = rings.into_iter().map(|(id, ring, resume)| (id, (ring, resume)));
        let mut rings: BTreeMap<ConnId, (XenRing, RingResume)> = rings.collect();
        let mut lost = 0;
        // The reply to the requester means that the guard has ended: from then on there is no way back.
        let envelope = self.received.envelope.as_ref();
        let requester = envelope.and_then(|envelope| envelope.requester).map(|(id, _)| id);
        // The newest connection first: it is that of the guard, which must get its reply before this
        // program changes anything that is not in the state.
        for connection in self.state.connections.iter().rev() {
            let (id, io) = (connection.id, connection.io.clone());
            if let Some((ring, resume)) = rings.remove(&id) {
                match resume {
                    RingResume::Continued => {}
                    RingResume::Zeroed => {
                        debug!(conn = %id, who = ?connection.caller, "the guest has set its ring to 0");
                    }
                    RingResume::Restarted => {
                        warn!(conn = %id, who = ?connection.caller, "this ring restarts");
                    }
                }
                tasks.spawn(server.serve_as(id, ring, io));
                continue;
            }
            let none = || io::Error::from(io::ErrorKind::NotFound);
            let socket = connection.io.fd.ok_or_else(none);
            let socket = socket.and_then(|number| inherit::adopt_socket(number, false));
            match socket.and_then(|socket| Socket::adopt(socket, driver)) {
                Ok(socket) if requester == Some(id) => {
                    let (serve, driver) = (server.serve_as(id, socket, io), driver.clone());
                    tasks.spawn(async move {
                        future::or(reap(&driver), async { _ = Timer::after(GUARD_END).await })
                            .await;
                        serve.await;
                    });
                }
                Ok(socket) => tasks.spawn(server.serve_as(id, socket, io)),
                Err(error) => {
                    warn!(conn = %id, who = ?connection.caller, %error, "lost a connection");
                    server.disconnect(id);
                    lost += 1;
                }
            }
        }
        // Domains may have died meanwhile. After the first turn of all connections: the queries take time.
        tasks.spawn(async { server.domains_changed() });
        self.finish(lost, server.with(|engine, _| engine.node_count()));
    }

    /// Removes the file of the state and logs what was adopted.
    fn finish(&self, lost: usize, nodes: i64) {
        let Received { origin, envelope, file, begun, .. } = &self.received;
        if let Some(path) = file
            && let Err(error) = std::fs::remove_file(path)
        {
            warn!(path = %path.display(), %error, "cannot remove the file of the state");
        }
        for text in &self.state.lost {
            warn!("not carried over: {text}");
        }
        let stopped = envelope.as_ref().map(|envelope| envelope.stopped);
        let pause = stopped.map_or(begun.elapsed(), |at| envelope::now().saturating_sub(at));
        let connections = &self.state.connections;
        let is_ring = |c: &&ConnectionState| matches!(c.caller, Caller::Domain(_));
        let rings = connections.iter().filter(is_ring).count();
        let bytes: usize = connections.iter().map(|c| c.io.unread.len() + c.io.unsent.len()).sum();
        info!(
            from = origin.name(),
            rings,
            sockets = connections.len() - rings,
            lost,
            watches = connections.iter().map(|c| c.watches.len()).sum::<usize>(),
            nodes,
            bytes,
            ms = pause.as_secs_f64() * 1e3,
            "taken over"
        );
        if let Some(reason) = envelope.as_ref().and_then(|envelope| envelope.failed.as_ref()) {
            error!(reason, "live update: the other program failed, and this one resumed");
        }
    }
}
