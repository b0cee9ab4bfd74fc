//! The one way into the engine: [`Engine::apply`].

use alloc::vec::Vec;

use xenstore_protocol::{Frame, HEADER_LEN};

use crate::domain::host::{Host, NoHost};
use crate::engine::Engine;
use crate::engine::deferred::BUDGET;
use crate::engine::fairness::Outcome;
use crate::engine::input::{Input, requests};
use crate::ids::{Caller, ConnId, Millis};

/// The result of an input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The connection that [`Input::Connect`] has opened.
    pub conn: Option<ConnId>,
    /// Bytes of the requests that were executed.
    pub executed: usize,
    /// When to retry the last deferred request at the latest; `None` if none was deferred.
    pub deferred: Option<Millis>,
    /// True if more events are queued after [`Input::Events`].
    pub more: bool,
}

impl Applied {
    /// Returns the outcome of an input with a single request.
    pub fn outcome(&self) -> Outcome {
        self.deferred.map_or(Outcome::Executed, Outcome::Deferred)
    }
}

impl Engine {
    /// Applies one input. Appends to `out` what the connection of the input receives: for each request
    /// the queued events of its sender, then exactly one reply.
    ///
    /// This is the only mutation. Engines that start from the same state, and apply the same inputs with
    /// the same replies of `host`, stay identical. A server that records its inputs can therefore
    /// rebuild its engine.
    pub fn apply(&mut self, input: &Input<'_>, host: &mut dyn Host, out: &mut Vec<u8>) -> Applied {
        let mut applied = Applied::default();
        // What exceeds the budget is deferred.
        self.deferred.begin(BUDGET);
        match *input {
            Input::Connect(caller) => applied.conn = Some(self.open(caller)),
            Input::Disconnect(conn) => self.close(conn),
            Input::Restart(conn) => self.reset_watches(conn),
            Input::Requests { conn, now, frames } => {
                for frame in requests(frames) {
                    self.deferred.begin(BUDGET);
                    match self.handle(conn, &frame, now, host, out) {
                        Outcome::Executed => applied.executed += HEADER_LEN + frame.payload.len(),
                        Outcome::Deferred(until) => applied.deferred = Some(until),
                    }
                }
            }
            Input::Events { conn, limit } => {
                let limit = usize::try_from(limit).unwrap_or(usize::MAX);
                applied.more = self.take_events(conn, out.len().saturating_add(limit), out);
            }
            Input::DomainsChanged => self.refresh_domains(host),
            Input::Work { budget } => self.advance_work(budget),
        }
        applied
    }

    /// Shorthand for [`Input::Connect`].
    pub fn connect(&mut self, caller: Caller) -> ConnId {
        let applied = self.apply(&Input::Connect(caller), &mut NoHost, &mut Vec::new());
        applied.conn.unwrap_or_default()
    }

    /// Shorthand for [`Input::Disconnect`].
    pub fn disconnect(&mut self, conn: ConnId) {
        self.apply(&Input::Disconnect(conn), &mut NoHost, &mut Vec::new());
    }

    /// Shorthand for [`Input::Restart`].
    pub fn restart(&mut self, conn: ConnId) {
        self.apply(&Input::Restart(conn), &mut NoHost, &mut Vec::new());
    }

    /// Shorthand for [`Input::Requests`] with one request, which is encoded first.
    pub fn request(
        &mut self,
        conn: ConnId,
        frame: &Frame<'_>,
        now: Millis,
        host: &mut dyn Host,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let frames = &[&frame.header.emit()[..], frame.payload].concat();
        self.apply(&Input::Requests { conn, now, frames }, host, out).outcome()
    }

    /// Shorthand for [`Input::Events`]. Appends events until `out` has `limit` bytes. Returns true if more
    /// events are queued.
    pub fn emit_events(&mut self, conn: ConnId, limit: usize, out: &mut Vec<u8>) -> bool {
        let limit = u32::try_from(limit.saturating_sub(out.len())).unwrap_or(u32::MAX);
        self.apply(&Input::Events { conn, limit }, &mut NoHost, out).more
    }

    /// Shorthand for [`Input::DomainsChanged`].
    pub fn domains_changed(&mut self, host: &mut dyn Host) {
        self.apply(&Input::DomainsChanged, host, &mut Vec::new());
    }

    /// Shorthand for [`Input::Work`].
    pub fn work(&mut self, budget: u32) {
        self.apply(&Input::Work { budget }, &mut NoHost, &mut Vec::new());
    }

    /// Applies [`Input::Work`] until no deferred work is left.
    pub fn finish_work(&mut self) {
        while self.has_work() {
            self.work(u32::MAX);
        }
    }
}
