//! Letting another program go on with everything.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::pin::{Pin, pin};
use std::process::Command;
use std::time::{Duration, Instant};

use futures_lite::future;
use smol::Timer;
use smol::lock::Mutex;
use tracing::{debug, error, info, warn};
use xenstore_protocol::{DomId, Features, Operation};
use xenstore_store::{Base, Caller, ConnId, ConnectionIo, Host, State};
use xenstore_sys::{inherit, own_file};
use xenstore_transport::socket::Listener;

use super::c_xenstored::{self, Target};
use super::child::on_thread;
use super::control::{BUSY, Order, Update, reply};
use super::destination::resume_options;
use super::envelope::{self, Envelope};
use super::guard::{self, Guard, Handover, Welcome};
use super::probe::{self, Kind};
use crate::daemon::start::unchangeable;
use crate::daemon::systemd::{self, Keep};
use crate::journal::{CatchUp, Journal, NewSegment, Retired};
use crate::paths::run_dir;
use crate::platform::xen::{Bound, Ringed, Rings};
use crate::serve::Server;
use crate::worker::unblock;

/// How long connections without a transaction stand still for those with one, at a time.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);

/// What this program has besides its store.
pub(crate) struct Source<'a> {
    pub(crate) server: &'a Server<Box<dyn Host>>,
    pub(crate) welcome: Welcome<'a>,
    pub(crate) update: &'a Update,
    pub(crate) listener: Option<&'a Listener>,
    /// On a Xen host.
    pub(crate) xen: Option<(Bound, Rings)>,
    /// Held by whoever makes all connections stand still.
    pub(crate) pausing: Mutex<()>,
    /// The program itself, however its file has changed since.
    pub(crate) program: File,
}

/// A state that has been written while everybody is served: what is left to be written when all
/// stand still is what has changed since.
struct Written {
    /// Not sealed yet.
    memory: File,
    bytes: u64,
    base: Base,
    /// How long it took.
    time: Duration,
}

impl Written {
    fn new(state: State) -> io::Result<Written> {
        let begun = Instant::now();
        let memory = envelope::memory("state")?;
        envelope::fill(&memory, |sink| state.encode_to(sink))?;
        let bytes = memory.metadata()?.len();
        Ok(Written { memory, bytes, base: state.into_base(), time: begun.elapsed() })
    }

    /// The same for somebody who is not to write there.
    fn to_read(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.memory.as_raw_fd()))
    }

    /// The same with what has come of it, for nobody to change any more.
    fn followed_by(&self, state: &State) -> io::Result<&File> {
        envelope::fill(&self.memory, |sink| state.encode_since(&self.base, sink))?;
        envelope::seal(&self.memory)?;
        Ok(&self.memory)
    }
}

/// What is known of a handover once all connections are paused.
struct Outgo<'a> {
    order: &'a Order,
    args: &'a [OsString],
    written: &'a Written,
    stopped: Duration,
    /// How long it took to make a store of the state.
    expected: Duration,
    client: UnixStream,
}

/// Options without those that name a state to resume from.
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

/// The lasting options of this process.
pub(super) fn own_args() -> Vec<OsString> {
    lasting(std::env::args_os().skip(1))
}

impl Source<'_> {
    /// Carries out updates, for ever: one that works does not come back.
    pub(crate) async fn run(&self) {
        loop {
            let order = self.update.ordered().await;
            info!(file = %order.file.display(), dry_run = order.dry_run, "live update: asked for");
            let text = match self.attempt(&order).await {
                Ok(report) => report,
                Err(reason) if reason == BUSY => reason,
                Err(reason) => {
                    warn!(reason, "live update: not done, everything goes on as before");
                    reason
                }
            };
            self.update.answer(&order, &text);
            self.server.wake_all();
        }
    }

    /// Has systemd keep the event channels, if the next process can go on with them.
    pub(crate) fn keep_channels(&self) {
        match &self.xen {
            Some((bound, _)) if self.server.with_journal(|_| ()).is_some() => {
                systemd::keep(Keep::Evtchn, bound.evtchn.descriptor());
            }
            Some(_) => systemd::forget(&[Keep::Evtchn]),
            None => {}
        }
    }

    /// Lets another XenStore of this host have them at once: it may take a moment until systemd
    /// closes them.
    pub(crate) fn end_channels(&self) {
        let Some((bound, rings)) = &self.xen else { return };
        rings.borrow().values().for_each(Ringed::unbind);
        if let Err(error) = bound.give_up_domain_exc() {
            debug!(%error, "VIRQ_DOM_EXC cannot be given back");
        }
    }

    /// Begins the journal anew, whenever it is full.
    pub(crate) async fn keep_journal(&self) {
        loop {
            self.server.journal_is_due().await;
            let alone = self.pausing.lock().await;
            let begun = Instant::now();
            let held = self.server.pause_all(false).await;
            self.server.finish_work().await;
            let state = self.state(held);
            let draft = self.server.with_journal(Journal::checkpoint);
            self.server.resume_all();
            drop(alone);
            let ms = begun.elapsed().as_secs_f64() * 1e3;
            let Some(draft) = draft else { return future::pending().await };
            let Some(draft) = draft else { continue };
            let write = move || draft.write(|sink| state.encode_to(sink)).with_memory();
            let retired = self.renew_journal(pin!(unblock(write))).await;
            if let Some(retired) = retired {
                let spare = unblock(|| retired.trim()).await.ok().flatten();
                self.server.with_journal(|journal| journal.recycle(spare));
            }
            debug!(ms, "the journal begins anew");
        }
    }

    /// Waits for the next file of the journal. Other connections are served meanwhile, as long as the
    /// current file has room.
    async fn renew_journal(
        &self,
        mut drafting: Pin<&mut impl Future<Output = io::Result<NewSegment>>>,
    ) -> Option<Retired> {
        let early = async { Some(drafting.as_mut().await) };
        let over = async {
            self.server.journal_is_due().await;
            None
        };
        let drafted = future::or(early, over).await;
        let waits = drafted.is_none();
        let _alone = if waits { Some(self.pausing.lock().await) } else { None };
        if waits {
            debug!("requests wait for the next file of the journal");
            self.server.pause_all(false).await;
        }
        let drafted = match drafted {
            Some(drafted) => drafted,
            None => drafting.await,
        };
        let drafted = drafted.unwrap_or_else(NewSegment::failed);
        self.server.with_journal(|journal| journal.accept(drafted));
        let retired = loop {
            match self.server.with_journal(Journal::catch_up) {
                Some(CatchUp::More) => self.server.next_turn().await,
                Some(CatchUp::Done(retired)) => break retired,
                None => break None,
            }
        };
        if waits {
            self.server.resume_all();
        }
        retired
    }

    /// A report about a dry run, or why nothing has come of it.
    async fn attempt(&self, order: &Order) -> Result<String, String> {
        let complain = |reason: String| format!("{}: {reason}", order.file.display());
        let (kind, help) = probe::kind(&order.file).await.map_err(complain)?;
        let args = match &order.cmdline {
            Some(cmdline) => lasting(cmdline.split_ascii_whitespace().map(OsString::from)),
            None => own_args(),
        };
        let target = match kind {
            Kind::Ours => None,
            Kind::C => Some(Target::of(&order.file, &help, order.version).map_err(complain)?),
        };
        if target.is_none() {
            let socket = self.listener.and_then(Listener::path);
            unchangeable(&args, &own_args(), socket.as_deref()).map_err(complain)?;
        }
        self.server.finish_work().await;
        let mut state = self.server.with(|engine, _| engine.dump());
        self.name_descriptors(&mut state);
        let lost = target.filter(|_| order.dry_run);
        let lost = lost.map(|target| state.encode_for_c(&target.format, target.version).1);
        let written = on_thread(move || Written::new(state)).await?;
        let written = written.map_err(|error| error.to_string())?;
        let mut expected = written.time;
        if target.is_none() {
            let state = written.to_read().map_err(|error| error.to_string())?;
            expected += probe::check(&order.file, &args, state).await.map_err(complain)?;
        }
        if order.dry_run {
            return Ok(self.report(target, written.bytes, expected, &lost.unwrap_or_default()));
        }
        let _alone = self.pausing.lock().await;
        self.update.check_not_cancelled()?;
        let client = guard::connect(self.welcome);
        let client = client.map_err(|error| complain(format!("no way back: {error}")))?;
        let stopped = envelope::now();
        let held = match kind {
            Kind::Ours => self.server.pause_all(false).await,
            Kind::C => self.hold_without_transactions(order).await?,
        };
        self.server.finish_work().await;
        let state = self.state(held);
        let handover = Outgo { order, args: &args, written: &written, stopped, expected, client };
        let failed = match target {
            None => self.go(&handover, &state),
            Some(target) => self.go_to_c(&handover, state, target),
        };
        self.server.resume_all();
        Err(complain(format!("cannot be run: {failed}")))
    }

    /// The report of a dry run. For C xenstored it has one line for each thing that is lost or prevents the
    /// update.
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

    /// Open transactions, one a line.
    fn transactions(&self) -> String {
        let (_, text) = self.server.request(Operation::Control, b"transactions\0");
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    }

    /// Holds all connections when none has a transaction open, which C xenstored cannot go on with.
    /// If that takes long, the requester is told to ask again, until its patience is over; then
    /// transactions are lost if it says so.
    async fn hold_without_transactions(
        &self,
        order: &Order,
    ) -> Result<BTreeMap<ConnId, ConnectionIo>, String> {
        let hold = async { Some(self.server.pause_all(true).await) };
        let late = async {
            Timer::after(DRAIN_LIMIT).await;
            None
        };
        if let Some(held) = future::or(hold, late).await {
            return Ok(held);
        }
        let open = self.transactions();
        if order.since.elapsed() >= order.patience && order.force {
            warn!(open, "live update: these transactions end, unfinished");
            return Ok(self.server.pause_all(false).await);
        }
        self.server.resume_all();
        if order.since.elapsed() < order.patience {
            return Err(BUSY.into());
        }
        Err(format!("Domains with long running transactions:\n{open}"))
    }

    /// Executes the other program in place of this one. Returns only if that fails, with the reason.
    fn go(&self, handover: &Outgo<'_>, state: &State) -> String {
        let Outgo { order, args, written, .. } = handover;
        let errand = Envelope { previous: Some(self.program.as_raw_fd()), ..self.errand(handover) };
        let run = || -> io::Result<()> {
            let errand = envelope::sealed("errand", &errand.emit())?;
            let stream = written.followed_by(state)?;
            let mut through = descriptors(state);
            let guard = self.guard(handover, stream, &through)?;
            through.extend([&errand, stream, &self.program].map(File::as_raw_fd));
            let mut command = Command::new(&order.file);
            command.args(*args).args(resume_options(stream, &errand));
            let failed = exec(command, &through);
            guard.stop();
            failed
        };
        run().err().map_or_else(String::new, |error| error.to_string())
    }

    /// The errand that goes with the state if there is no guard.
    fn errand(&self, handover: &Outgo<'_>) -> Envelope {
        Envelope {
            stopped: handover.stopped,
            clock: self.server.clock().now(),
            previous: None,
            asker: Some((handover.order.conn, handover.order.header)),
            failed: None,
            args: own_args(),
        }
    }

    /// Starts the guard, which resumes from `stream` if the other program does not answer.
    fn guard(
        &self,
        handover: &Outgo<'_>,
        stream: &File,
        descriptors: &[RawFd],
    ) -> io::Result<Guard> {
        let (errand, expected) = (self.errand(handover), handover.expected);
        let (program, client) = (&self.program, &handover.client);
        let guard = Handover { program, client, stream, errand, descriptors, expected };
        let started = Guard::start(guard);
        started.map_err(|error| io::Error::new(error.kind(), format!("no way back: {error}")))
    }

    /// Like [`Self::go`], for C xenstored, which reads the state from a file.
    fn go_to_c(&self, handover: &Outgo<'_>, mut state: State, target: Target) -> String {
        let Outgo { order, args, written, .. } = handover;
        // It does not know of the journal.
        self.server.with_journal(Journal::discard);
        let virq_port = state.io.virq_port.take();
        let for_us = written.followed_by(&state).map(File::try_clone).and_then(|copy| copy);
        state.io.virq_port = virq_port;
        let asker = state.connections.iter_mut().find(|connection| connection.id == order.conn);
        if let Some(asker) = asker {
            asker.io.unsent.extend_from_slice(&reply(&order.header, "OK"));
        }
        let (stream, lost) = state.encode_for_c(&target.format, target.version);
        lost.iter().for_each(|text| warn!("not carried over: {text}"));
        let path = run_dir().join("state_dump");
        let features = |domid| {
            let domain = state.domains.iter().find(|domain| domain.domid == domid);
            domain.map_or(Features::ALL, |domain| domain.features)
        };
        let run = || -> io::Result<()> {
            write_private(&path, &stream)?;
            let through = descriptors(&state);
            let bound = self.xen.as_ref().map(|(bound, _)| bound);
            bound.map_or(Ok(()), Bound::give_up_domain_exc)?;
            let guard = self.guard(handover, &for_us?, &through);
            let result = guard.and_then(|guard| {
                let mut command = Command::new(&order.file);
                command.args(c_xenstored::options(args));
                // When C xenstored ends, the ports must be free: systemd must not hold them.
                systemd::forget(&[Keep::Evtchn]);
                systemd::set_watchdog(false);
                // C xenstored does not write the feature word in the page.
                self.offer(|domid| target.format.offered(target.version, features(domid)));
                // C xenstored ends a connection at a read that would block.
                let result =
                    inherit::set_blocking(&through, true).and_then(|()| exec(command, &through));
                guard.stop();
                result
            });
            let _ = inherit::set_blocking(&through, false);
            self.offer(features);
            if let Some(Err(error)) = bound.map(Bound::bind_domain_exc) {
                error!(%error, "VIRQ_DOM_EXC cannot be bound again");
            }
            self.keep_channels();
            systemd::set_watchdog(true);
            result
        };
        let failed = run().err().map_or_else(String::new, |error| error.to_string());
        let _ = std::fs::remove_file(&path);
        failed
    }

    /// Tells all guests what they may use.
    fn offer(&self, features: impl Fn(DomId) -> Features) {
        let Some((_, rings)) = &self.xen else { return };
        rings.borrow().iter().for_each(|(domid, ring)| ring.offer(features(*domid)));
    }

    /// Adds the descriptors that do not belong to a connection.
    fn name_descriptors(&self, state: &mut State) {
        state.io.listener = self.listener.map(|listener| listener.as_fd().as_raw_fd());
        if let Some((bound, _)) = &self.xen {
            state.io.evtchn = Some(bound.evtchn.descriptor().as_raw_fd());
            state.io.virq_port = Some(bound.domain_exc.get());
        }
    }

    /// The whole state: that of the engine and that of the server.
    pub(crate) fn state(&self, mut held: BTreeMap<ConnId, ConnectionIo>) -> State {
        let mut state = self.server.with(|engine, _| engine.dump());
        self.name_descriptors(&mut state);
        state.io.other = self.server.clock().now().to_le_bytes().to_vec();
        for connection in &mut state.connections {
            let Some(held) = held.remove(&connection.id) else {
                error!(conn = %connection.id, "live update: a connection that nobody serves");
                continue;
            };
            connection.io = held;
            let io = &mut connection.io;
            if let (Caller::Domain(domid), Some((_, rings))) = (connection.caller, &self.xen) {
                let rings = rings.borrow();
                let ring = rings.get(&domid);
                io.port = ring.and_then(|ring| ring.port);
                io.gfn = ring.map(|ring| ring.gfn);
                io.remote_port = ring.and_then(|ring| ring.remote);
            }
        }
        state
    }
}

/// How long an update waits for its log to be written.
const LOG_LIMIT: Duration = Duration::from_millis(100);

/// A file that only we can read, written anew.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let _ = std::fs::remove_file(path);
    own_file::create(path)?.write_all(bytes)
}

/// The descriptors that a state names.
fn descriptors(state: &State) -> Vec<RawFd> {
    let sockets = state.connections.iter().filter_map(|connection| connection.io.fd);
    [state.io.listener, state.io.evtchn].into_iter().flatten().chain(sockets).collect()
}

/// Runs a program in place of this one, which is to have these descriptors. Comes back only if that
/// cannot be done, with everything as it was.
fn exec(mut command: Command, through: &[RawFd]) -> io::Result<()> {
    inherit::set_inheritable(through, true)?;
    crate::log::flush(LOG_LIMIT);
    let error = command.exec();
    inherit::set_inheritable(through, false)?;
    Err(error)
}
