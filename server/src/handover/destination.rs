//! Going on with what another program has left.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
use crate::daemon::options::Options;
use crate::journal::{Recovered, RingResume, move_to};
use crate::paths::run_dir;
use crate::platform::Resumed;
use crate::serve::{Server, Tasks};

/// How long the reply to the requester of an update waits for the end of the guard, at most.
const GUARD_END: Duration = Duration::from_secs(1);
/// Who has left what comes from a journal.
const JOURNAL: &str = "a process that ended unexpectedly";

/// Everything that another program has left, sound, with nothing taken of it yet.
pub(crate) struct ReceivedState {
    /// Who has left it, for people.
    pub(crate) from: &'static str,
    pub(crate) state: State,
    pub(crate) engine: Engine,
    /// What goes with it, if the other was one of ours.
    pub(crate) errand: Option<Envelope>,
    /// The state as it was written, if it has not changed since.
    stream: Option<Sealed>,
    /// The file to be removed once it has been taken over.
    file: Option<PathBuf>,
    /// When reading it began, for a program that does not say when it stopped.
    begun: Instant,
}

/// Makes an engine of a state, and looks for mistakes in it unless that has just been done with a
/// copy. The reason against it is one line.
fn engine_of(config: &Config, bytes: &[u8], check: bool) -> Result<(State, Engine), String> {
    let make = || {
        let state = State::decode(bytes).map_err(|error| error.to_string())?;
        let (engine, _) = Engine::restore(config, &state).map_err(|error| error.to_string())?;
        if check {
            engine.check().map_err(|violation| violation.to_string())?;
        }
        Ok((state, engine))
    };
    catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|_| Err("panic while reading it".into()))
}

/// `--check-state`: checks the state on standard input. Returns how long that took and whether the state
/// is one of a Xen host. The error is one line.
pub(crate) fn check(config: &Config) -> Result<(Duration, bool), String> {
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let bytes =
        input.and_then(envelope::read).map_err(|error| format!("standard input: {error}"))?;
    let begun = Instant::now();
    let (state, _) = engine_of(config, &bytes, true)?;
    Ok((begun.elapsed(), state.io.evtchn.is_some()))
}

/// What another program has left, if the options say that there is something. An error is one line.
pub(crate) fn receive(options: &Options, config: &Config) -> Result<Option<ReceivedState>, String> {
    match (options.resume, options.errand) {
        (Some(state), Some(errand)) => {
            let refuse = options.refuse_state.then_some("--refuse-state");
            receive_ours(config, state, errand, refuse).map(Some)
        }
        (Some(_), None) | (None, Some(_)) => Err("--resume and --errand go together".into()),
        (None, None) if options.live_update => {
            receive_file(config, "state_dump", "C xenstored").map(Some)
        }
        (None, None) if options.live && options.restart => {
            receive_file(config, "db", OXENSTORED).map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn receive_ours(
    config: &Config,
    state: i32,
    errand: i32,
    refuse: Option<&str>,
) -> Result<ReceivedState, String> {
    let begun = Instant::now();
    let wrong = |what: &str, error: &dyn std::fmt::Display| format!("--{what}: {error}");
    let errand = inherit::adopt(errand).and_then(envelope::read);
    let errand = errand.map_err(|error| wrong("errand", &error))?;
    let errand = Envelope::parse(&errand).ok_or_else(|| wrong("errand", &"not one of ours"))?;
    let memory = inherit::adopt(state).map_err(|error| wrong("resume", &error))?;
    let stream = Sealed::map(&memory).map_err(|error| error.to_string());
    let stream = refuse.map_or(stream, |reason| Err(reason.to_owned()));
    let make = |stream: Sealed| Ok((engine_of(config, &stream, false)?, stream));
    match stream.and_then(make) {
        Ok(((state, engine), stream)) => {
            if let Some(previous) = errand.previous {
                // It has been needed up to here.
                let _ = inherit::adopt(previous);
            }
            let (from, file, stream) = ("xenstored", None, Some(stream));
            let mut incoming =
                ReceivedState { from, state, engine, errand: Some(errand), stream, file, begun };
            incoming.answer();
            Ok(incoming)
        }
        Err(reason) => Err(wrong("resume", &go_back(&errand, memory, reason))),
    }
}

/// Runs the program before this one again, with the same state, once. Comes back only if that cannot
/// be done; the reasons.
fn go_back(errand: &Envelope, state: OwnedFd, reason: String) -> String {
    let Some(previous) = errand.previous else { return reason };
    let back = Envelope { previous: None, failed: Some(reason.clone()), ..errand.clone() };
    let go = || {
        let previous = inherit::adopt(previous)?;
        let errand = envelope::sealed("errand", &back.emit())?;
        inherit::set_inheritable(&[state.as_raw_fd(), errand.as_raw_fd()], true)?;
        let mut command = Command::new(format!("/proc/self/fd/{}", previous.as_raw_fd()));
        command.args(&back.args).args(resume_options(&state, &errand));
        Err::<(), _>(command.exec())
    };
    match go() {
        Ok(()) => reason,
        Err(error) => format!("{reason}; and the program before cannot be run: {error}"),
    }
}

/// Options with which a program of ours goes on.
pub(super) fn resume_options(state: &impl AsRawFd, errand: &impl AsRawFd) -> [OsString; 4] {
    let number = |descriptor: RawFd| OsString::from(descriptor.to_string());
    let [state, errand] = [state.as_raw_fd(), errand.as_raw_fd()].map(number);
    ["--resume".into(), state, "--errand".into(), errand]
}

const OXENSTORED: &str = "oxenstored";

fn receive_file(config: &Config, name: &str, from: &'static str) -> Result<ReceivedState, String> {
    let begun = Instant::now();
    let path = run_dir().join(name);
    let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut bytes = Vec::new();
    let file = own_file::open(&path, Access::Read, Others::Read);
    file.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(|error| wrong(&error))?;
    let (state, engine) = engine_of(config, &bytes, true).map_err(|error| wrong(&error))?;
    let (errand, stream, file) = (None, None, Some(path));
    Ok(ReceivedState { from, state, engine, errand, stream, file, begun })
}

impl ReceivedState {
    /// What the last process has left in its journal.
    pub(crate) fn recovered(recovered: Recovered) -> ReceivedState {
        let Recovered { state, engine } = recovered;
        let (errand, stream, file, begun) = (None, None, None, Instant::now());
        ReceivedState { from: JOURNAL, state, engine, errand, stream, file, begun }
    }

    /// Gives whoever asked for this its answer.
    fn answer(&mut self) {
        let Some(errand) = &self.errand else { return };
        let Some((asker, header)) = &errand.asker else { return };
        let asker = self.state.connections.iter_mut().find(|connection| connection.id == *asker);
        let Some(asker) = asker else { return };
        let text = errand.failed.as_deref().unwrap_or("OK");
        asker.io.unsent.extend_from_slice(&reply(header, text));
        if asker.caller != Caller::Socket {
            // On a ring it counts where the next process goes on.
            self.stream = None;
        }
    }

    /// A state from a program of this process, with nobody to be answered.
    #[cfg(test)]
    pub(crate) fn handed_over(config: &Config, bytes: &[u8], clock: Millis) -> ReceivedState {
        let (state, engine) = engine_of(config, bytes, true).unwrap();
        let stopped = envelope::now();
        let (previous, asker, failed, args) = (None, None, None, Vec::new());
        let errand = Some(Envelope { stopped, previous, clock, asker, failed, args });
        let (stream, file, begun) = (None, None, Instant::now());
        ReceivedState { from: "xenstored", state, engine, errand, stream, file, begun }
    }

    /// Did another program hand it over? Otherwise a process ended, and its descriptors with it.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.from != JOURNAL
    }

    /// The event channel device, if C xenstored had taken it over and did not serve. C xenstored may or
    /// may not have bound `VIRQ_DOM_EXC` in it.
    pub(crate) fn evtchn_of_c(&self) -> Option<RawFd> {
        let io = &self.state.io;
        let undone = self.errand.as_ref().is_some_and(|errand| errand.failed.is_some());
        io.evtchn.filter(|_| undone && io.virq_port.is_none())
    }

    /// Applies what the pages of the rings show about their connections. A connection whose page is
    /// invalid restarts here, so that a journal that begins with this state contains the restart.
    pub(crate) fn apply_pages(&mut self, rings: &Resumed) {
        let mut restarts = false;
        for connection in &mut self.state.connections {
            // Both are in the order of connections.
            let at = rings.binary_search_by_key(&connection.id, |(id, ..)| *id);
            if let Ok(at) = at
                && let (_, ring, settled) = &rings[at]
                && let ResumePoint::Ring(indices) = ring.resume_point()
            {
                move_to(&mut connection.io, indices, *settled);
                if *settled == RingResume::Restarted {
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

    /// The engine, and what is to be done with the rest.
    pub(crate) fn take(self) -> (Engine, Adoption) {
        let ReceivedState { from, state, engine, errand, stream, file, begun } = self;
        (engine, Adoption { from, state, errand, stream, file, begun })
    }
}

/// The same without its engine, which a server has.
pub(crate) struct Adoption {
    from: &'static str,
    state: State,
    errand: Option<Envelope>,
    stream: Option<Sealed>,
    file: Option<PathBuf>,
    begun: Instant,
}

impl Adoption {
    /// Gives the state as a stream, in pieces: for a journal to begin with.
    pub(crate) fn write(&self, sink: &mut Sink<'_>) {
        match &self.stream {
            Some(stream) => sink(stream),
            None => self.state.encode_to(sink),
        }
    }

    /// What the clock of the other said, in milliseconds.
    pub(crate) fn clock(&self) -> Millis {
        match &self.errand {
            Some(errand) => errand.clock,
            None => crate::journal::clock(&self.state),
        }
    }

    /// Has the process before ended unexpectedly?
    pub(crate) fn is_after_crash(&self) -> bool {
        self.from == JOURNAL
    }

    /// Does the requester ask once more whether it is done? oxenstored has said that it is busy.
    pub(crate) fn requester_asks_again(&self) -> bool {
        self.from == OXENSTORED
    }

    /// Goes on with all connections. One that cannot be had ends.
    pub(crate) fn adopt<'a>(
        &self,
        server: &'a Server<Box<dyn Host>>,
        rings: Resumed,
        tasks: &Tasks<'a>,
        driver: &Driver,
    ) {
        let rings = rings.into_iter().map(|(id, ring, settled)| (id, (ring, settled)));
        let mut rings: BTreeMap<ConnId, (XenRing, RingResume)> = rings.collect();
        let mut lost = 0;
        // The reply to the requester means that the guard has ended: from then on there is no way back.
        let asker = self.errand.as_ref().and_then(|errand| errand.asker).map(|(id, _)| id);
        // The newest connection first: it is that of the guard, which must get its reply before this
        // program changes anything that is not in the state.
        for connection in self.state.connections.iter().rev() {
            let (id, io) = (connection.id, connection.io.clone());
            if let Some((ring, settled)) = rings.remove(&id) {
                match settled {
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
                Ok(socket) if asker == Some(id) => {
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
        // Deaths that nobody has heard of. After everybody's first turn: asking about all takes time.
        tasks.spawn(async { server.domains_changed() });
        self.finish(lost, server.with(|engine, _| engine.node_count()));
    }

    /// All has been taken over; says so.
    fn finish(&self, lost: usize, nodes: i64) {
        if let Some(path) = &self.file
            && let Err(error) = std::fs::remove_file(path)
        {
            warn!(path = %path.display(), %error, "cannot remove the state that was left");
        }
        for text in &self.state.lost {
            warn!("not carried over: {text}");
        }
        let stopped = self.errand.as_ref().map(|errand| errand.stopped);
        let pause = stopped.map_or(self.begun.elapsed(), |at| envelope::now().saturating_sub(at));
        let connections = &self.state.connections;
        let is_ring = |c: &&ConnectionState| matches!(c.caller, Caller::Domain(_));
        let rings = connections.iter().filter(is_ring).count();
        let bytes: usize = connections.iter().map(|c| c.io.unread.len() + c.io.unsent.len()).sum();
        info!(
            from = self.from,
            rings,
            sockets = connections.len() - rings,
            lost,
            watches = connections.iter().map(|c| c.watches.len()).sum::<usize>(),
            nodes,
            bytes,
            ms = pause.as_secs_f64() * 1e3,
            "taken over"
        );
        if let Some(reason) = self.errand.as_ref().and_then(|errand| errand.failed.as_ref()) {
            error!(reason, "live update: the other program could not go on; this one does");
        }
    }
}
