//! Letting another program go on with everything.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use tracing::{error, info, warn};
use xenstore_protocol::DomId;
use xenstore_store::{Caller, ConnId, Host, State};
use xenstore_transport::socket::Listener;
use xenstore_transport::{Place, inherit};

use super::candidate::{self, Kind};
use super::errand::{self, Errand};
use super::hold::Held;
use super::incoming::resume_options;
use super::session::{Order, Update};
use crate::server::Server;
use crate::xen::{Bound, Rings};

/// What this program has besides its store.
pub(crate) struct Outgoing<'a> {
    pub(crate) server: &'a Server<Box<dyn Host>>,
    pub(crate) update: &'a Update,
    pub(crate) listener: Option<&'a Listener>,
    /// On a Xen host.
    pub(crate) xen: Option<(Bound, Rings)>,
    /// The program itself, however its file has changed since.
    pub(crate) program: File,
}

/// Our options, without those that say where to go on from.
fn own_args() -> Vec<OsString> {
    let mut args = Vec::new();
    let mut all = std::env::args_os().skip(1);
    while let Some(arg) = all.next() {
        match arg.to_str() {
            Some("--resume" | "--errand") => drop(all.next()),
            Some("-U" | "--live-update" | "--live" | "--restart") => {}
            _ => args.push(arg),
        }
    }
    args
}

impl Outgoing<'_> {
    /// Carries out updates, for ever: one that works does not come back.
    pub(crate) async fn run(&self) {
        loop {
            let order = self.update.ordered().await;
            info!(file = %order.file.display(), dry_run = order.dry_run, "live update: asked for");
            let text = match self.attempt(&order).await {
                Ok(report) => report,
                Err(reason) => {
                    warn!(reason, "live update: not done, everything goes on as before");
                    reason
                }
            };
            self.update.answer(&order, &text);
            self.server.wake_all();
        }
    }

    /// A report about a dry run, or why nothing has come of it.
    async fn attempt(&self, order: &Order) -> Result<String, String> {
        let complain = |reason: String| format!("{}: {reason}", order.file.display());
        let kind = candidate::kind(&order.file).await.map_err(complain)?;
        let args = order.cmdline.as_ref().map_or_else(own_args, |cmdline| {
            cmdline.split_ascii_whitespace().map(OsString::from).collect()
        });
        let begun = Instant::now();
        let bytes = self.server.with(|engine, _| engine.dump()).encode();
        let mut expected = begun.elapsed();
        if kind == Kind::Ours {
            let state = errand::sealed("state", &bytes).map_err(|error| error.to_string())?;
            let check = candidate::check(&order.file, &args, state);
            expected += check.await.map_err(complain)?;
        }
        if order.dry_run {
            let ms = expected.as_secs_f64() * 1e3;
            return Ok(format!("state: {} bytes\npause: about {ms:.1} ms\n", bytes.len()));
        }
        self.update.still_wanted()?;
        let stopped = errand::now();
        let held = self.server.hold_all().await;
        let failed = self.go(order, &args, held, stopped);
        self.server.let_go();
        Err(complain(failed))
    }

    /// Runs the other program in place of this one. Comes back only if that cannot be done.
    fn go(
        &self,
        order: &Order,
        args: &[OsString],
        held: BTreeMap<ConnId, Held>,
        stopped: std::time::Duration,
    ) -> String {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Reloading]);
        let state = self.state(held);
        let errand = Errand {
            stopped,
            clock: self.server.clock().now(),
            previous: Some(self.program.as_raw_fd()),
            asker: Some((order.conn, order.header)),
            failed: None,
            args: own_args(),
        };
        let exec = || -> std::io::Result<()> {
            let errand = errand::sealed("errand", &errand.emit())?;
            let stream = errand::sealed("state", &state.encode())?;
            let mut through = descriptors(&state);
            through.extend([&errand, &stream].map(OwnedFd::as_raw_fd));
            through.push(self.program.as_raw_fd());
            let mut command = Command::new(&order.file);
            command.args(args).args(resume_options(&stream, &errand));
            exec(command, &through)
        };
        let reason = exec().err().map_or_else(String::new, |error| error.to_string());
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        format!("cannot be run: {reason}")
    }

    /// The whole state, with what the server knows of it.
    pub(crate) fn state(&self, mut held: BTreeMap<ConnId, Held>) -> State {
        let mut state = self.server.with(|engine, _| engine.dump());
        state.io.other = self.server.clock().now().to_le_bytes().to_vec();
        state.io.listener = self.listener.map(|listener| listener.as_fd().as_raw_fd());
        if let Some((bound, _)) = &self.xen {
            state.io.evtchn = Some(bound.evtchn.descriptor().as_raw_fd());
            state.io.virq_port = Some(bound.domain_exc);
        }
        for connection in &mut state.connections {
            let Some(held) = held.remove(&connection.id) else {
                error!(conn = %connection.id, "live update: a connection that nobody serves");
                continue;
            };
            let io = &mut connection.io;
            match held.place {
                Place::Descriptor(number) => io.fd = Some(number),
                Place::Ring(indices) => io.indices = Some((indices.req_cons, indices.rsp_prod)),
                Place::Nowhere | Place::Over => {}
            }
            (io.input, io.output) = (held.input, held.output);
            // A message is at most 4,112 bytes.
            io.output_rest = u16::try_from(held.rest).unwrap_or(0);
            io.broken = held.failed.is_some();
            if let (Caller::Domain(domid), Some((_, rings))) = (connection.caller, &self.xen) {
                let rings = rings.borrow();
                let ring = rings.get(&DomId(domid.0));
                io.port = ring.and_then(|ring| ring.port);
                io.gfn = ring.map(|ring| ring.gfn);
                io.remote_port = ring.map(|ring| ring.remote);
            }
        }
        state
    }
}

/// The descriptors that a state names.
fn descriptors(state: &State) -> Vec<RawFd> {
    let sockets = state.connections.iter().filter_map(|connection| connection.io.fd);
    [state.io.listener, state.io.evtchn].into_iter().flatten().chain(sockets).collect()
}

/// Runs a program in place of this one, which is to have these descriptors. Comes back only if that
/// cannot be done, with everything as it was.
fn exec(mut command: Command, through: &[RawFd]) -> std::io::Result<()> {
    inherit::let_through(through, true)?;
    let error = command.exec();
    inherit::let_through(through, false)?;
    Err(error)
}
