//! A store and the connections to it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_lite::future::yield_now;
use smol::Timer;
use tracing::{debug, info, warn};
use xenstore_protocol::{Frame, HEADER_LEN, Header, Operation};
use xenstore_store::{Caller, Config, ConnId, ConnectionIo, Engine, Host, Outcome};
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::Listener;
use xenstore_transport::{Failure, Peer, Transport};

use crate::handover::{Quiesce, Update, position};
use crate::journal::{Journal, RequestBatch};
use crate::log::{GUEST, Trace};
use crate::serve::connection::{Connection, End, READ_MAX};
use crate::serve::{Clock, Tasks};

/// Pause after a failed accept, so that a process without free descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Units of work of the engine after which a turn ends: about two milliseconds.
pub(crate) const TURN_COST: u64 = 8192;

/// Requests in one turn: while no other connection is ready, and at least.
const TURN: u32 = 128;
pub(crate) const TURN_MIN: u32 = 32;

/// A store and the connections to it, on one thread. Cheap to clone; all clones are the same.
#[derive(Debug)]
pub struct Server<H: Host>(pub(super) Rc<Shared<H>>);

impl<H: Host> Clone for Server<H> {
    fn clone(&self) -> Self {
        Server(self.0.clone())
    }
}

#[derive(Debug)]
pub(super) struct Shared<H: Host> {
    pub(super) engine: RefCell<Engine>,
    pub(super) host: RefCell<H>,
    pub(super) clock: Clock,
    /// Tasks of connections. They are woken when the connection has queued events, a deferred
    /// request may be executed, or the domain is gone.
    pub(super) wakers: RefCell<BTreeMap<ConnId, Waker>>,
    /// The task that executes deferred work of the engine.
    pub(super) worker: RefCell<Option<Waker>>,
    /// The read buffer of all tasks; empty between two polls.
    pub(super) buffer: RefCell<Box<[u8]>>,
    pub(super) trace: Option<Trace>,
    pub(super) driver: Driver,
    /// State of a live update: the paused connections.
    pub(super) update: Update,
    /// The journal from which the next process recovers.
    pub(super) journal: RefCell<Option<Journal>>,
}

impl<H: Host + 'static> Server<H> {
    /// A server with an empty store.
    pub fn new(config: &Config, host: H, clock: Clock) -> Self {
        Server::with_engine(Engine::new(config), host, clock)
    }

    /// A server with a restored engine, whose connections are not served yet.
    pub(crate) fn with_engine(engine: Engine, host: H, clock: Clock) -> Self {
        Server(Rc::new(Shared {
            engine: RefCell::new(engine),
            host: RefCell::new(host),
            clock,
            wakers: RefCell::default(),
            worker: RefCell::default(),
            buffer: RefCell::new(vec![0; READ_MAX].into()),
            trace: None,
            driver: Driver::any_executor(),
            update: Update::default(),
            journal: RefCell::default(),
        }))
    }

    /// The same, which records all inputs from now on in this journal.
    pub(crate) fn journaled(self, journal: Option<Journal>) -> Self {
        *self.0.journal.borrow_mut() = journal;
        self
    }

    /// The same, with this state of a live update. Call it before the first connection.
    pub(crate) fn updated(mut self, update: Update) -> Self {
        if let Some(shared) = Rc::get_mut(&mut self.0) {
            shared.update = update;
        }
        self
    }

    /// The same, on the loop of this driver. Call it before the first connection.
    pub(crate) fn driven(mut self, driver: Driver) -> Self {
        if let Some(shared) = Rc::get_mut(&mut self.0) {
            shared.driver = driver;
        }
        self
    }

    /// The same, with a trace of each request. Call it before the first connection.
    pub(crate) fn traced(mut self, trace: Trace) -> Self {
        if let Some(shared) = Rc::get_mut(&mut self.0) {
            shared.trace = Some(trace);
        }
        self
    }

    /// Serves one client until its connection ends or its domain is gone. If the connection of a ring
    /// fails while its domain lives, it is not served until the guest reconnects, and no watch fires
    /// (XSA-325). The connection exists from this call on, also before the future is polled.
    pub fn serve<'a>(&'a self, transport: impl Transport + 'a) -> impl Future<Output = ()> + 'a {
        let peer = transport.peer();
        let caller = match peer {
            Peer::Process(_) => Caller::Socket,
            Peer::Domain(domid) => Caller::Domain(domid),
        };
        let served = self.connect(caller).map(|conn| {
            debug!(%conn, ?peer, "connected");
            self.serve_as(conn, transport, ConnectionIo::default())
        });
        async {
            if let Some(served) = served {
                served.await;
            }
        }
    }

    /// Serves a connection of a restored engine. Otherwise like [`Server::serve`].
    pub(crate) fn serve_as<'a>(
        &'a self,
        conn: ConnId,
        transport: impl Transport + 'a,
        io: ConnectionIo,
    ) -> impl Future<Output = ()> + 'a {
        // Disconnects also when the future is dropped.
        self.answer_all(Disconnect { server: self, conn }, transport, io)
    }

    async fn answer_all(
        &self,
        guard: Disconnect<'_, H>,
        mut transport: impl Transport,
        mut io: ConnectionIo,
    ) {
        let (conn, peer) = (guard.conn, transport.peer());
        let mut told = false;
        if io.failed
            && !poll_fn(|cx| self.poll_recover(cx, conn, &mut transport, Failure::Protocol)).await
        {
            return;
        }
        loop {
            let io = std::mem::take(&mut io);
            let end = Connection::new(self, conn, &mut transport).with(io).await;
            match end {
                End::Closed => return debug!(%conn, "disconnected"),
                End::Released => return debug!(%conn, "its domain is gone"),
                End::Io(_) | End::Violation(_) | End::Panic => {}
            }
            if let Some(fault) = fault(&end, peer) {
                // A guest can cause this repeatedly, so only the first one is a warning.
                match std::mem::replace(&mut told, true) {
                    false => warn!(target: GUEST, %conn, ?peer, "connection ended: {fault}"),
                    true => debug!(%conn, ?peer, fault, "failed again"),
                }
                self.0.update.failed(conn, fault);
            } else {
                debug!(%conn, ?peer, ?end, "connection lost");
            }
            let failure = match end {
                End::Io(_) => Failure::Transport,
                _ => Failure::Protocol,
            };
            self.restart(conn);
            if !poll_fn(|cx| self.poll_recover(cx, conn, &mut transport, failure)).await {
                return;
            }
            self.0.update.recovered(conn);
            debug!(%conn, ?peer, "reconnected");
            // A guest that reconnects repeatedly must not prevent the turns of other connections.
            yield_now().await;
        }
    }

    /// Waits for the guest of a failed connection to reconnect. Returns false if it cannot.
    fn poll_recover(
        &self,
        cx: &mut Context<'_>,
        conn: ConnId,
        transport: &mut impl Transport,
        failure: Failure,
    ) -> Poll<bool> {
        self.register(conn, cx.waker());
        if !self.is_connected(conn) {
            return Poll::Ready(false);
        }
        let recovered = transport.poll_recover(cx, failure);
        if recovered.is_pending() && self.must_pause(conn) {
            let io = position(transport.resume_point());
            self.quiesce().paused(conn, || ConnectionIo { failed: true, ..io });
        }
        recovered
    }

    /// Accepts clients without end, and serves each in a separate task.
    pub async fn accept<'a>(&'a self, listener: &Listener, tasks: &Tasks<'a>) {
        let mut failing = None;
        loop {
            while self.quiesce().is_active() {
                yield_now().await;
            }
            match listener.accept().await {
                Ok(socket) => {
                    if failing.take().is_some() {
                        info!("accepting clients again");
                    }
                    tasks.spawn(self.serve(socket));
                    // Clients that connect without end must not prevent the turns of other
                    // connections.
                    yield_now().await;
                }
                Err(error) => {
                    // Logged once for a sequence of failures.
                    if failing.replace(error.kind()) != Some(error.kind()) {
                        warn!(target: GUEST, %error, retry_ms = ACCEPT_PAUSE.as_millis(),
                            "cannot accept a client, and others have to wait; is the limit of open descriptors reached?");
                    }
                    Timer::after(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Executes a request of the host, on behalf of the store's domain. Returns type and payload of
    /// the reply.
    pub fn request(&self, op: Operation, payload: &[u8]) -> (u32, Vec<u8>) {
        let eio = (Operation::Error.as_wire(), b"EIO\0".to_vec());
        let Some(conn) = self.connect(Caller::Socket) else { return eio };
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let header = Header { ty: op.as_wire(), len, ..Header::default() };
        let bytes = [&header.emit()[..], payload].concat();
        let (frame, mut out) = (Frame { header, payload }, Vec::new());
        // The host does not wait: the deferral ends at once.
        let mut now = self.0.clock.now();
        loop {
            let mut batch = RequestBatch::new(conn, now, &bytes);
            let outcome = self.handle(&mut batch, 0..bytes.len(), &frame, &mut out);
            self.flush(&mut batch);
            match outcome {
                Ok(Outcome::Deferred(until)) => {
                    now = until;
                    self.work();
                }
                Ok(Outcome::Executed) => break,
                Err(_) => {
                    self.disconnect(conn);
                    return eio;
                }
            }
        }
        self.disconnect(conn);
        let ty = out.first_chunk().map_or(0, |header| Header::parse(header).ty);
        (ty, out.split_off(HEADER_LEN.min(out.len())))
    }

    /// Records executed requests in the journal. Call [`Server::commit`] before a reply or event is sent.
    pub(crate) fn flush(&self, batch: &mut RequestBatch<'_>) {
        self.with_journal(|journal| batch.flush(journal));
    }

    /// Makes all records available to the next process. Call it before a reply or event is sent.
    pub(crate) fn commit(&self) {
        if let Some(journal) = self.0.journal.borrow_mut().as_mut() {
            journal.commit();
        }
    }

    /// Records bytes that were read from a ring and are not executed yet. Call [`Server::commit`] before the
    /// guest is notified that they were consumed.
    pub(crate) fn left_over(&self, conn: ConnId, bytes: impl FnOnce() -> Vec<u8>) {
        if let Some(journal) = self.0.journal.borrow_mut().as_mut()
            && matches!(self.0.engine.borrow().caller(conn), Some(Caller::Domain(_)))
        {
            journal.unread(conn, &bytes());
        }
    }

    /// Records that the indices of a ring are 0 from here on. Of the requests that were read only the
    /// deferred one remains, of the replies the last `unsent` bytes. [`Server::commit`] must follow before
    /// anything is copied from or to the ring.
    pub(crate) fn zeroed(&self, conn: ConnId, deferred: impl FnOnce() -> Vec<u8>, unsent: usize) {
        self.left_over(conn, deferred);
        self.with_journal(|journal| journal.zeroed(conn, unsent));
    }

    /// Waits until the next file of the journal is due or, while that is being written, until no input
    /// may be executed before it is complete.
    pub(crate) async fn journal_is_due(&self) {
        let due = poll_fn(|cx| match self.0.journal.borrow_mut().as_mut() {
            Some(journal) => journal.poll_due(cx),
            None => Poll::Pending,
        });
        let begin = due.await;
        if begin > Instant::now() {
            Timer::at(begin).await;
        }
    }

    /// Ends recording. The journal remains for the next process if `stays`, otherwise it is removed.
    pub(crate) fn leave_journal(&self, stays: bool) {
        let Some(mut journal) = self.0.journal.borrow_mut().take() else { return };
        match stays {
            true => journal.commit(),
            false => journal.end(),
        }
    }

    /// Changes the journal, if there is one.
    pub(crate) fn with_journal<T>(&self, change: impl FnOnce(&mut Journal) -> T) -> Option<T> {
        self.0.journal.borrow_mut().as_mut().map(change)
    }

    /// Changes engine and host together, then wakes the affected connections. The change is not
    /// recorded in the journal.
    pub fn with<T>(&self, change: impl FnOnce(&mut Engine, &mut H) -> T) -> T {
        let result = change(&mut self.0.engine.borrow_mut(), &mut self.0.host.borrow_mut());
        self.wake();
        result
    }

    /// The clock.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    pub(super) fn wake(&self) {
        let mut engine = self.0.engine.borrow_mut();
        while let Some(line) = engine.pop_warning() {
            warn!(target: GUEST, "{line}");
        }
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
        if engine.has_work()
            && let Some(worker) = &*self.0.worker.borrow()
        {
            worker.wake_by_ref();
        }
        if engine.has_shrunk() {
            xenstore_sys::trim_heap();
        }
    }

    /// Registers the waker of `conn`.
    pub(crate) fn register(&self, conn: ConnId, waker: &Waker) {
        self.0.wakers.borrow_mut().insert(conn, waker.clone());
    }

    /// Returns true if the connection exists.
    pub(crate) fn is_connected(&self, conn: ConnId) -> bool {
        self.0.engine.borrow().is_connected(conn)
    }

    /// Returns how many replies a connection may leave unread.
    pub(crate) fn outstanding(&self, conn: ConnId) -> u32 {
        self.0.engine.borrow().outstanding(conn)
    }

    /// Returns the number of requests in a turn: the more connections are ready, the fewer, so that no
    /// connection waits long for its turn.
    pub(crate) fn turn(&self) -> u32 {
        (TURN / self.0.driver.load().max(1)).max(TURN_MIN)
    }

    /// Returns the units of work that the engine has done so far.
    pub(crate) fn cost(&self) -> u64 {
        self.0.engine.borrow().cost()
    }

    /// Requests another turn, after those of tasks with new input.
    pub(crate) fn later(&self, waker: &Waker) {
        self.0.driver.defer(waker);
    }

    /// Waits for such a turn, so that tasks with new input run first.
    pub(crate) async fn next_turn(&self) {
        let mut asked = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            self.later(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Returns the paused connections.
    pub(crate) fn quiesce(&self) -> &Quiesce {
        self.0.update.quiesce()
    }

    /// Returns true if this connection must pause.
    pub(crate) fn must_pause(&self, conn: ConnId) -> bool {
        self.quiesce().must_pause(conn, || self.0.engine.borrow().in_transaction(conn))
    }

    /// Pauses all connections until [`Server::resume_all`], and returns the state of each. If
    /// `patient`, waits for the end of open transactions.
    pub(crate) async fn pause_all(&self, patient: bool) -> BTreeMap<ConnId, ConnectionIo> {
        self.quiesce().set_all(true, patient);
        self.wake_all();
        poll_fn(|cx| {
            let conns = self.0.engine.borrow().connections();
            self.quiesce()
                .all_paused(conns.into_iter(), cx.waker())
                .map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Resumes all connections.
    pub(crate) fn resume_all(&self) {
        self.quiesce().set_all(false, false);
        self.wake_all();
    }

    /// Gives every connection a turn.
    pub(crate) fn wake_all(&self) {
        self.0.wakers.borrow().values().for_each(Waker::wake_by_ref);
    }

    /// The read buffer of all tasks.
    pub(crate) fn buffer(&self) -> std::cell::RefMut<'_, Box<[u8]>> {
        self.0.buffer.borrow_mut()
    }
}

/// Returns why a connection failed: an error of its peer, or an internal one. `None` if it was
/// closed or has restarted.
fn fault(end: &End, peer: Peer) -> Option<String> {
    match (end, peer) {
        (End::Violation(error), _) => Some(format!("protocol error: {error}")),
        (End::Panic, _) => Some("an internal error".into()),
        (End::Io(error), Peer::Domain(_)) if error.kind() == io::ErrorKind::InvalidData => {
            Some("the indices of its ring make no sense".into())
        }
        _ => None,
    }
}

struct Disconnect<'a, H: Host + 'static> {
    server: &'a Server<H>,
    conn: ConnId,
}

impl<H: Host + 'static> Drop for Disconnect<'_, H> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The process ends, and the next one restores this connection.
            return;
        }
        self.server.disconnect(self.conn);
        self.server.0.wakers.borrow_mut().remove(&self.conn);
        self.server.0.update.gone(self.conn);
    }
}
