//! Execution of inputs by the engine: every input is recorded, and a panic in it is repaired.
//!
//! [`Server::apply`] executes an input. Its record is in the journal before it has an effect outside of
//! the engine. If executing it panics, the engine is restored from the journal as it was before, and the
//! input is refused; `journal/recovery.rs` defines what that means for each kind.
//!
//! A new kind of [`Input`] needs an arm there.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Poll;

use futures_lite::future::yield_now;
use tracing::error;
use xenstore_protocol::{Deframer, Frame, Header, Operation, ServerConnection};
use xenstore_store::{Applied, Caller, ConnId, Engine, Host, Input, Outcome, Recorded};

use super::server::Server;
use crate::journal::{Entry, Journal, RequestBatch};
use crate::log::GUEST;

/// Units of deferred work that are done between the turns of connections: about a millisecond.
const PIECE: u32 = 4096;

/// Why an input has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The input was refused and has no effect.
    Refused,
    /// It may have been done in part: there is no journal from which to restore the engine.
    InPart,
}

impl<H: Host + 'static> Server<H> {
    /// Applies an input to the engine, and records it in the journal.
    fn apply(&self, entry: Entry<'_, '_>, out: &mut Vec<u8>) -> Result<Applied, Failed> {
        let input = entry.input();
        self.record(entry, |engine, host| engine.apply(&input, host, out))
    }

    /// Runs `change`, which applies the input of `entry`, between the two halves of its record.
    pub(crate) fn record<T>(
        &self,
        mut entry: Entry<'_, '_>,
        change: impl FnOnce(&mut Engine, &mut dyn Host) -> T,
    ) -> Result<T, Failed> {
        let shared = &self.0;
        let result = {
            let mut engine = shared.engine.borrow_mut();
            let mut host = shared.host.borrow_mut();
            let mut journal = shared.journal.borrow_mut();
            let mut journal = journal.as_mut().filter(|_| entry.is_recorded());
            let mut answers = Vec::new();
            if let Some(journal) = &mut journal {
                entry.begin(journal);
                if journal.refuses(|| entry.input()) {
                    return Err(Failed::Refused);
                }
            }
            let result = catch_unwind(AssertUnwindSafe(|| match &journal {
                Some(_) => {
                    change(&mut engine, &mut Recorded { host: &mut *host, answers: &mut answers })
                }
                None => change(&mut engine, &mut *host),
            }));
            if let (Ok(_), Some(journal)) = (&result, journal) {
                entry.end(journal, &answers);
            }
            result
        };
        result.map_err(|_| {
            log_panic(&entry.input());
            self.repair(|journal| entry.leave_open(journal))
        })
    }

    /// To be called after a panic in serving a connection, outside of the engine. The inputs of this turn
    /// may be missing in the journal. They had no effect outside of the engine, which is restored without
    /// them.
    pub(crate) fn take_back(&self) {
        self.repair(|_| ());
    }

    /// Applies an input outside of the turn of a connection. `None` if it is refused, which is logged.
    fn apply_now(&self, input: Input<'_>) -> Option<Applied> {
        let result = self.apply(Entry::Alone(input), &mut Vec::new());
        self.commit();
        result.ok()
    }

    /// Executes one frame, unless it is deferred, and wakes the affected connections. `at` is its position
    /// in `batch`, which [`Server::flush`] appends to the journal.
    pub(crate) fn handle(
        &self,
        batch: &mut RequestBatch<'_>,
        at: std::ops::Range<usize>,
        frame: &Frame<'_>,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, Failed> {
        let shared = &self.0;
        let (start, conn) = (out.len(), batch.conn());
        let Frame { header, payload } = frame;
        shared.update.set_requester(conn);
        let recorded = is_journaled(&shared.engine.borrow(), conn, header);
        let entry = Entry::Request { batch, range: at, recorded };
        let outcome = self.apply(entry, out)?.outcome();
        if outcome != Outcome::Executed {
            return Ok(outcome);
        }
        let withheld = shared.update.withhold_reply(header, out);
        if withheld > 0 {
            self.flush(batch);
            self.with_journal(|journal| journal.replace_reply(conn, withheld, &[]));
        }
        if let Some(trace) = shared.trace.as_ref().filter(|trace| trace.is_on()) {
            let who = format!("conn {conn}");
            trace.frame("IN", &who, header, payload);
            let mut written = &out[start..];
            let mut deframer = Deframer::default();
            while let Ok(Some(frame)) = deframer.next(&mut written) {
                trace.frame("OUT", &who, &frame.header, frame.payload);
            }
        }
        self.wake();
        Ok(outcome)
    }

    /// Queries the hypervisor for every domain.
    pub(crate) fn domains_changed(&self) {
        self.apply_now(Input::DomainsChanged);
        self.wake();
    }

    /// Does the deferred work of the engine, in pieces between the turns of connections. Never returns.
    pub async fn do_work(&self) {
        loop {
            poll_fn(|cx| {
                *self.0.worker.borrow_mut() = Some(cx.waker().clone());
                if self.0.engine.borrow().has_work() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            self.work();
            yield_now().await;
        }
    }

    /// Does all deferred work. To be called before the state of the engine is taken.
    pub(crate) async fn finish_work(&self) {
        while self.0.engine.borrow().has_work() {
            self.work();
            yield_now().await;
        }
    }

    /// Does a piece of the deferred work.
    pub(crate) fn work(&self) {
        self.apply_now(Input::Work { budget: PIECE });
        self.wake();
    }

    /// Begins a connection, which no task serves yet. `None` if that is refused, which is logged.
    pub(crate) fn connect(&self, caller: Caller) -> Option<ConnId> {
        self.apply_now(Input::Connect(caller))?.conn
    }

    /// Restarts a connection.
    pub(crate) fn restart(&self, conn: ConnId) {
        self.apply_now(Input::Restart(conn));
    }

    /// Ends a connection.
    pub(crate) fn disconnect(&self, conn: ConnId) {
        self.apply_now(Input::Disconnect(conn));
    }

    /// Appends some of the events that are queued for `conn`. Returns true if there are more.
    pub(crate) fn emit_events(&self, conn: ConnId, out: &mut Vec<u8>) -> Result<bool, Failed> {
        if !self.0.engine.borrow().has_events(conn) {
            return Ok(false);
        }
        let (start, room) = (out.len(), ServerConnection::HIGH_WATER);
        let limit = u32::try_from(room).unwrap_or(u32::MAX);
        let applied = self.apply(Entry::Alone(Input::Events { conn, limit }), out);
        applied.map(|applied| applied.more).inspect_err(|_| out.truncate(start))
    }

    /// Restores the engine from the journal, without the input that `open` makes its last. Without a
    /// journal, checks the invariants of the engine.
    fn repair(&self, open: impl FnOnce(&mut Journal)) -> Failed {
        let rebuilt = self.with_journal(|journal| {
            open(journal);
            journal.rebuild()
        });
        match rebuilt {
            Some(Ok(engine)) => {
                *self.0.engine.borrow_mut() = engine;
                self.wake();
                return Failed::Refused;
            }
            Some(Err(reason)) => {
                error!(%reason, "the store cannot be restored from the journal");
                // Records of this engine must not follow those in the journal.
                self.with_journal(Journal::invalidate);
            }
            None => {}
        }
        if let Err(violation) = self.0.engine.borrow().check() {
            error!(%violation, "the store is damaged; please report this");
        }
        Failed::InPart
    }
}

fn log_panic(input: &Input<'_>) {
    let Input::Requests { conn, frames, .. } = input else {
        return error!(target: GUEST, ?input, "panic in this input, which is refused; please report it");
    };
    let Some((Frame { header, payload }, _)) = Frame::split_first(frames) else { return };
    let name = header.operation().map(Operation::name);
    let payload = String::from_utf8_lossy(payload);
    error!(target: GUEST, %conn, ?header, name, %payload,
        "panic while answering this request; please report it");
}

/// Returns true if this request must be in the journal. On a socket, which does not outlive the
/// process, a request that only reads and brings no events is left out.
fn is_journaled(engine: &Engine, conn: ConnId, header: &Header) -> bool {
    header.operation().is_none_or(|op| op.is_journaled(header.tx_id))
        || engine.caller(conn) != Some(Caller::Socket)
        || engine.has_events(conn)
}
