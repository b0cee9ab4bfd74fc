//! A store and the connections to it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_lite::future::yield_now;
use smol::Timer;
use tracing::{debug, warn};
use xenstore_protocol::{Deframer, DomId, Header, Operation};
use xenstore_store::{Caller, Config, ConnId, Engine, Host, Millis, Outcome};
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::Listener;
use xenstore_transport::{Failure, Peer, Transport};

use crate::connection::{Connection, End, READ_MAX};
use crate::log::Trace;
use crate::tasks::Tasks;

/// How long accepting rests after it failed, so that a process without free descriptors does not
/// spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Requests that are answered in one turn, when nobody else has anything to do and at least.
const TURN: u32 = 128;
const TURN_MIN: u32 = 8;

/// Where the time comes from.
#[derive(Debug)]
pub enum Clock {
    /// The machine's monotonic clock, from this moment on.
    Real(Instant),
    /// Whatever it was set to.
    Manual(Cell<Millis>),
}

impl Clock {
    /// Milliseconds.
    pub fn now(&self) -> Millis {
        match self {
            Clock::Real(start) => {
                let time = start.elapsed();
                time.as_secs() * 1000 + u64::from(time.subsec_millis())
            }
            Clock::Manual(now) => now.get(),
        }
    }
}

/// A store and the connections to it, on one thread. Cheap to clone; all clones are the same.
#[derive(Debug)]
pub struct Server<H: Host>(Rc<Shared<H>>);

impl<H: Host> Clone for Server<H> {
    fn clone(&self) -> Self {
        Server(self.0.clone())
    }
}

#[derive(Debug)]
struct Shared<H: Host> {
    engine: RefCell<Engine>,
    host: RefCell<H>,
    clock: Clock,
    /// Tasks of connections, to be woken when events wait for them, a request
    /// that was put off may be answered, or their domain is gone.
    wakers: RefCell<BTreeMap<ConnId, Waker>>,
    /// What all tasks read into; nothing is kept here between two polls.
    buffer: RefCell<Box<[u8]>>,
    trace: Option<Trace>,
    driver: Driver,
}

impl<H: Host + 'static> Server<H> {
    /// A server with an empty store.
    pub fn new(config: &Config, host: H, clock: Clock) -> Self {
        Server(Rc::new(Shared {
            engine: RefCell::new(Engine::new(config)),
            host: RefCell::new(host),
            clock,
            wakers: RefCell::default(),
            buffer: RefCell::new(vec![0; READ_MAX].into()),
            trace: None,
            driver: Driver::any_executor(),
        }))
    }

    /// The same, on the loop of this driver, to be called before there are connections.
    pub(crate) fn driven(mut self, driver: Driver) -> Self {
        if let Some(shared) = Rc::get_mut(&mut self.0) {
            shared.driver = driver;
        }
        self
    }

    /// The same with a line for each request, to be called before there are connections.
    pub(crate) fn traced(mut self, trace: Trace) -> Self {
        if let Some(shared) = Rc::get_mut(&mut self.0) {
            shared.trace = Some(trace);
        }
        self
    }

    /// Answers one client until it or its domain is gone. One whose connection fails but whose
    /// domain lives, as on a ring, is not heard until it starts anew; nobody is told (XSA-325).
    /// The connection is there from this call on, also if the future is polled later.
    pub fn serve<'a>(&'a self, transport: impl Transport + 'a) -> impl Future<Output = ()> + 'a {
        let peer = transport.peer();
        let caller = match peer {
            Peer::Process(_) => Caller::Socket,
            Peer::Domain(domid) => Caller::Domain(DomId(domid)),
        };
        let conn = self.0.engine.borrow_mut().connect(caller);
        debug!(%conn, ?peer, "connected");
        // Disconnects also when the future is dropped half-way.
        self.answer_all(Disconnect { server: self, conn }, peer, transport)
    }

    async fn answer_all(
        &self,
        guard: Disconnect<'_, H>,
        peer: Peer,
        mut transport: impl Transport,
    ) {
        let conn = guard.conn;
        let mut told = false;
        loop {
            let failure = match Connection::new(self, conn, &mut transport).await {
                End::Closed => return debug!(%conn, "disconnected"),
                End::Released => return debug!(%conn, "its domain is gone"),
                End::Io(error) => {
                    debug!(%conn, ?peer, %error, "connection lost");
                    Failure::Transport
                }
                End::Violation(error) => {
                    // A guest can do this as often as it likes: the log must not grow with it.
                    match std::mem::replace(&mut told, true) {
                        false => warn!(%conn, ?peer, %error, "connection ended: protocol error"),
                        true => debug!(%conn, ?peer, %error, "protocol error again"),
                    }
                    Failure::Protocol
                }
                End::Panic => {
                    warn!(%conn, ?peer, "connection ended: the request could not be answered");
                    Failure::Protocol
                }
            };
            self.0.engine.borrow_mut().restart(conn);
            if !poll_fn(|cx| self.poll_recover(cx, conn, &mut transport, failure)).await {
                return;
            }
            debug!(%conn, ?peer, "starts anew");
            // A guest that does nothing else must not keep others from their turn.
            yield_now().await;
        }
    }

    /// Waits for a failed connection to start anew; false if that will not happen.
    fn poll_recover(
        &self,
        cx: &mut Context<'_>,
        conn: ConnId,
        transport: &mut impl Transport,
        failure: Failure,
    ) -> Poll<bool> {
        match self.register(conn, cx.waker()) {
            true => transport.poll_recover(cx, failure),
            false => Poll::Ready(false),
        }
    }

    /// Accepts clients for ever and answers each in a task of its own.
    pub async fn accept<'a>(&'a self, listener: &Listener, tasks: &Tasks<'a>) {
        loop {
            match listener.accept().await {
                Ok(socket) => {
                    tasks.spawn(self.serve(socket));
                    // Those who connect without end must not keep others from their turn.
                    yield_now().await;
                }
                Err(error) => {
                    warn!(%error, "cannot accept a client; trying again");
                    Timer::after(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Runs a request of the machine's own, on behalf of the store's domain. The reply's type and
    /// payload.
    pub fn request(&self, op: Operation, payload: &[u8]) -> (u32, Vec<u8>) {
        let conn = self.0.engine.borrow_mut().connect(Caller::Socket);
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let header = Header { ty: op.as_wire(), len, ..Header::default() };
        let mut out = Vec::new();
        // The machine does not wait: it is as if the time were up at once.
        let mut time = 0;
        while let Outcome::Later(until) = self.handle(conn, &header, payload, time, &mut out) {
            time = until;
        }
        self.0.engine.borrow_mut().disconnect(conn);
        let ty = out.first_chunk().map_or(0, |header| Header::parse(header).ty);
        (ty, out.split_off(xenstore_protocol::HEADER_LEN.min(out.len())))
    }

    /// Answers one frame, unless it is put off, and wakes those whom it concerns. `time` is what the
    /// time is at least: of a frame that was put off until then.
    pub(crate) fn handle(
        &self,
        conn: ConnId,
        header: &Header,
        payload: &[u8],
        time: Millis,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let shared = &self.0;
        let now = shared.clock.now().max(time);
        let start = out.len();
        let outcome = {
            let mut host = shared.host.borrow_mut();
            shared.engine.borrow_mut().handle(conn, header, payload, now, &mut *host, out)
        };
        if outcome != Outcome::Answered {
            return outcome;
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
        outcome
    }

    /// Lets the engine and the machine change together, then wakes those whom it concerns.
    pub fn with<T>(&self, change: impl FnOnce(&mut Engine, &mut H) -> T) -> T {
        let result = change(&mut self.0.engine.borrow_mut(), &mut self.0.host.borrow_mut());
        self.wake();
        result
    }

    /// Where the time comes from.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    fn wake(&self) {
        let mut engine = self.0.engine.borrow_mut();
        let wakers = self.0.wakers.borrow();
        while let Some(conn) = engine.pop_ready() {
            if let Some(waker) = wakers.get(&conn) {
                waker.wake_by_ref();
            }
        }
        while let Some(conn) = engine.pop_closed() {
            if let Some(waker) = wakers.get(&conn) {
                waker.wake_by_ref();
            }
        }
    }

    /// Remembers whom to wake for `conn`. Is the connection still there?
    pub(crate) fn register(&self, conn: ConnId, waker: &Waker) -> bool {
        let mut wakers = self.0.wakers.borrow_mut();
        match wakers.get_mut(&conn) {
            Some(known) => known.clone_from(waker),
            None => {
                wakers.insert(conn, waker.clone());
            }
        }
        self.0.engine.borrow().is_connected(conn)
    }

    /// Appends some of the events that wait for `conn`. Are there more?
    pub(crate) fn emit_events(&self, conn: ConnId, out: &mut Vec<u8>) -> bool {
        let limit = out.len() + xenstore_protocol::server::Connection::HIGH_WATER;
        self.0.engine.borrow_mut().emit_events(conn, limit, out)
    }

    /// How many requests a connection may have answered before it is the turn of others: many while
    /// it is alone, few in a crowd, so that nobody waits long for a turn.
    pub(crate) fn turn(&self) -> u32 {
        (TURN / self.0.driver.crowd().max(1)).max(TURN_MIN)
    }

    /// Asks for another turn, after those for whom something has come.
    pub(crate) fn later(&self, waker: &Waker) {
        self.0.driver.later(waker);
    }

    /// What all tasks read into.
    pub(crate) fn buffer(&self) -> std::cell::RefMut<'_, Box<[u8]>> {
        self.0.buffer.borrow_mut()
    }

    /// Looks for damage after a request could not be answered.
    pub(crate) fn check(&self) {
        if let Err(violation) = self.0.engine.borrow().check() {
            tracing::error!(%violation, "the store is damaged; please report this");
        }
    }
}

struct Disconnect<'a, H: Host> {
    server: &'a Server<H>,
    conn: ConnId,
}

impl<H: Host> Drop for Disconnect<'_, H> {
    fn drop(&mut self) {
        self.server.0.engine.borrow_mut().disconnect(self.conn);
        self.server.0.wakers.borrow_mut().remove(&self.conn);
    }
}
