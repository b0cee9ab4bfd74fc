//! One connection: bytes in, replies and events out.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use smol::Timer;
use xenstore_protocol::{Errno, Frame, FrameTooLong, HEADER_LEN, Reply, ServerConnection};
use xenstore_store::{ConnId, ConnectionIo, Host, Millis, Outcome};
use xenstore_transport::{ResumePoint, Transport};

use crate::handover::position;
use crate::journal::RequestBatch;
use crate::serve::Failed;
use crate::serve::server::{Server, TURN_COST};

/// Bytes that are read at once.
pub(crate) const READ_MAX: usize = 16 * 1024;

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client closed it.
    Closed,
    /// Its domain is gone.
    Released,
    /// Reading or writing failed.
    Io(io::Error),
    /// The client violated the protocol.
    Violation(FrameTooLong),
    /// A panic while executing a request or fetching events that could not be undone, or while
    /// transferring bytes.
    Panic,
}

/// What is left of a turn.
struct Budget {
    /// Requests, and batches of events.
    steps: u32,
    /// The value of [`Server::cost`] at which the turn ends.
    cost: u64,
}

impl Budget {
    /// Spends one step.
    fn spend(&mut self) {
        self.steps = self.steps.saturating_sub(1);
    }

    /// Returns true if the turn ends.
    fn is_spent(&self, cost: u64) -> bool {
        self.steps == 0 || cost >= self.cost
    }
}

/// A deferred request, and the time at which it is retried without a wake-up.
struct Held {
    bytes: Box<[u8]>,
    until: Millis,
    timer: Timer,
}

/// The future of one connection. Written by hand because it waits for several things at once:
/// input, room for output, events, and the time at which a deferred request is executed.
pub(crate) struct Connection<'a, H: Host, T> {
    server: &'a Server<H>,
    conn: ConnId,
    transport: T,
    state: ServerConnection,
    /// Unexecuted input, from `taken` on: it waits for the next turn, or for room for replies.
    waiting: Vec<u8>,
    taken: usize,
    /// The deferred request. While there is one, no other request is executed.
    held: Option<Held>,
    /// The time at the start of this turn. Reading the clock for each request would add 5 % to its
    /// cost.
    now: Millis,
    /// Replies since the output was last empty, and their limit (quota `outstanding`).
    unread: u32,
    unread_max: u32,
    /// The waker of this connection, as registered with the server.
    waker: Option<Waker>,
}

impl<'a, H: Host + 'static, T: Transport> Connection<'a, H, T> {
    pub(crate) fn new(server: &'a Server<H>, conn: ConnId, transport: T) -> Self {
        let state = ServerConnection::default();
        Connection {
            server,
            conn,
            transport,
            state,
            waiting: Vec::new(),
            taken: 0,
            held: None,
            now: 0,
            unread: 0,
            unread_max: u32::MAX,
            waker: None,
        }
    }

    /// Continues from the state of another process.
    pub(crate) fn with(mut self, io: ConnectionIo) -> Self {
        self.waiting = io.unread;
        self.state = ServerConnection::resume(io.unsent, io.partly_sent);
        self
    }

    fn has_unexecuted(&self) -> bool {
        self.held.is_some() || !self.waiting.is_empty() || !self.state.partial().is_empty()
    }

    /// Returns bytes that were read and not executed.
    fn unexecuted(&self) -> Vec<u8> {
        let held = self.held.as_ref().map_or(&[][..], |held| &held.bytes);
        [held, self.state.partial(), &self.waiting[self.taken..]].concat()
    }

    /// Pauses and reports the state of the connection, unless it is closed.
    fn pause(&self) -> Poll<End> {
        let point = self.transport.resume_point();
        if point == ResumePoint::Closed {
            return Poll::Ready(End::Io(io::ErrorKind::ConnectionReset.into()));
        }
        self.server.quiesce().paused(self.conn, || ConnectionIo {
            unread: self.unexecuted(),
            unsent: self.state.unsent().to_vec(),
            partly_sent: self.state.partly_sent(),
            ..position(point)
        });
        Poll::Pending
    }

    /// Writes queued output; pending while the transport has no room for all of it.
    fn flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.state.unsent().is_empty() {
            self.server.commit();
            let count = ready!(Pin::new(&mut self.transport).poll_write(cx, self.state.unsent()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.state.sent(count);
        }
        self.unread = 0;
        Poll::Ready(Ok(()))
    }

    /// Handles a guest that has set the indices of its ring to 0: drops partly read and partly
    /// written messages, and keeps complete ones. The journal records this before a reply or event
    /// is created for the new indices.
    fn zeroed(&mut self) {
        (self.waiting, self.taken) = (Vec::new(), 0);
        let rest = self.state.partly_sent();
        let unsent = self.state.unsent()[rest..].to_vec();
        self.server.zeroed(self.conn, || self.unexecuted_request(), unsent.len());
        self.state = ServerConnection::resume(unsent, 0);
        self.unread = 0;
    }

    /// Returns the bytes of the deferred request, empty if there is none.
    fn unexecuted_request(&self) -> Vec<u8> {
        self.held.as_ref().map_or_else(Vec::new, |held| held.bytes.to_vec())
    }

    /// Returns true if the client has so much unread output that its requests must wait.
    fn is_full(&self) -> bool {
        self.state.is_full() || self.unread >= self.unread_max
    }

    /// Executes the frames in `input`, within the budget and while there is room for replies.
    /// Returns the number of consumed bytes.
    fn answer(&mut self, input: &[u8], budget: &mut Budget) -> Result<usize, End> {
        let mut batch = RequestBatch::new(self.conn, self.now, input);
        let taken = self.answer_batch(&mut batch, budget);
        self.server.flush(&mut batch);
        taken
    }

    fn answer_batch(
        &mut self,
        batch: &mut RequestBatch<'_>,
        budget: &mut Budget,
    ) -> Result<usize, End> {
        let input = batch.bytes();
        let mut rest = input;
        while !budget.is_spent(self.server.cost())
            && !self.is_full()
            && self.held.is_none()
            && !self.server.must_pause(self.conn)
        {
            let start = input.len() - rest.len();
            match self.state.receive(&mut rest) {
                Err(too_long) => return Err(End::Violation(too_long)),
                Ok(None) => break,
                Ok(Some((frame, out))) => {
                    budget.spend();
                    self.unread += 1;
                    let at = start..input.len() - rest.len();
                    self.held = if at.len() == HEADER_LEN + frame.payload.len() {
                        answer_frame(self.server, batch, at, &frame, out)?
                    } else {
                        // The first frame, if a part of it was read before.
                        let bytes = [&frame.header.emit()[..], frame.payload].concat();
                        answer_alone(self.server, self.conn, self.now, &bytes, out)?
                    };
                }
            }
        }
        Ok(input.len() - rest.len())
    }

    /// Retries the deferred request; pending if it is still deferred.
    fn retry(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let Some(mut held) = self.held.take() else { return Poll::Ready(Ok(())) };
        // A timer may be early by less than a millisecond.
        let least = if Pin::new(&mut held.timer).poll(cx).is_ready() { held.until } else { 0 };
        let now = self.now.max(least);
        self.held = answer_alone(self.server, self.conn, now, &held.bytes, self.state.out())?;
        match &mut self.held {
            None => Poll::Ready(Ok(())),
            // A timer wakes only tasks that have polled it.
            Some(held) => Pin::new(&mut held.timer).poll(cx).map(|_| Ok(())),
        }
    }

    /// Executes waiting input, or else reads once and executes what was read; pending if there is
    /// nothing to do.
    fn advance(&mut self, cx: &mut Context<'_>, budget: &mut Budget) -> Poll<Result<(), End>> {
        if self.held.is_some() {
            return self.retry(cx);
        }
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            self.taken += self.answer(&waiting[self.taken..], budget)?;
            if self.taken < waiting.len() {
                self.waiting = waiting;
            } else {
                self.taken = 0;
            }
            return Poll::Ready(Ok(()));
        }
        let server = self.server;
        let mut buffer = server.buffer();
        match ready!(Pin::new(&mut self.transport).poll_read(cx, &mut buffer)) {
            Ok(0) => Poll::Ready(Err(End::Closed)),
            Ok(count) => {
                let taken = self.answer(&buffer[..count], budget)?;
                self.waiting.extend_from_slice(&buffer[taken..count]);
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(End::Io(error))),
        }
    }
}

/// Executes one frame, which is at this position in the batch. Returns `Some` if the frame is deferred.
/// A request that panics is refused with EIO. Fails, which ends the connection, if the request may
/// have been executed in part.
fn answer_frame<H: Host + 'static>(
    server: &Server<H>,
    batch: &mut RequestBatch<'_>,
    at: Range<usize>,
    frame: &Frame<'_>,
    out: &mut Vec<u8>,
) -> Result<Option<Held>, End> {
    let start = out.len();
    match server.handle(batch, at.clone(), frame, out) {
        Ok(Outcome::Executed) => Ok(None),
        Ok(Outcome::Deferred(until)) => {
            let timer = Timer::after(Duration::from_millis(until.saturating_sub(batch.now())));
            Ok(Some(Held { bytes: batch.bytes()[at].into(), until, timer }))
        }
        Err(Failed::Refused) => {
            out.truncate(start);
            Reply::Error(Errno::Eio).emit(&frame.header, out);
            Ok(None)
        }
        Err(Failed::InPart) => Err(End::Panic),
    }
}

/// The same for a frame outside of a batch.
fn answer_alone<H: Host + 'static>(
    server: &Server<H>,
    conn: ConnId,
    now: Millis,
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<Option<Held>, End> {
    let Some((frame, _)) = Frame::split_first(bytes) else { return Ok(None) };
    let mut batch = RequestBatch::new(conn, now, bytes);
    let held = answer_frame(server, &mut batch, 0..bytes.len(), &frame, out);
    server.flush(&mut batch);
    held
}

impl<H: Host + 'static, T: Transport> Future for Connection<'_, H, T> {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = &mut *self;
        // A panic while serving one client must not end the other connections.
        catch_unwind(AssertUnwindSafe(|| this.turn_and_flush(cx))).unwrap_or_else(|_| {
            this.server.take_back();
            Poll::Ready(End::Panic)
        })
    }
}

impl<H: Host + 'static, T: Transport> Connection<'_, H, T> {
    fn turn_and_flush(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let end = self.turn(cx);
        if end.is_pending() && self.has_unexecuted() {
            self.server.left_over(self.conn, || self.unexecuted());
        }
        self.server.commit();
        // Once a turn, after all that has been read and written.
        match Pin::new(&mut self.transport).poll_flush(cx) {
            Poll::Ready(Err(error)) if end.is_pending() => Poll::Ready(End::Io(error)),
            _ => end,
        }
    }

    /// Executes requests until there is nothing to do or the turn ends.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            self.server.register(self.conn, cx.waker());
            self.waker = Some(cx.waker().clone());
        }
        if !self.server.is_connected(self.conn) {
            return Poll::Ready(End::Released);
        }
        self.now = self.server.clock().now();
        let mut budget = Budget { steps: self.server.turn(), cost: self.server.cost() + TURN_COST };
        if let Some(bytes) = self.server.quiesce().take_reply_on_resume(self.conn) {
            self.server.with_journal(|journal| journal.replace_reply(self.conn, 0, &bytes));
            self.state.out().extend_from_slice(&bytes);
        }
        self.unread_max = self.server.outstanding(self.conn);
        loop {
            if self.server.must_pause(self.conn) {
                return self.pause();
            }
            if self.transport.restarts_at_zero() {
                self.zeroed();
            }
            let more = self.state.is_full()
                || match self.server.emit_events(self.conn, self.state.out()) {
                    Ok(more) => more,
                    Err(_) => return Poll::Ready(End::Panic),
                };
            if let Poll::Ready(Err(error)) = self.flush(cx) {
                return Poll::Ready(End::Io(error));
            }
            if self.is_full() {
                // No more requests until the client reads; the write has registered the waker.
                return Poll::Pending;
            }
            // Events that were queued before wake no task.
            let again = more && self.state.unsent().is_empty();
            if again {
                budget.spend();
            }
            if budget.is_spent(self.server.cost()) {
                self.server.later(cx.waker());
                return Poll::Pending;
            }
            if again {
                continue;
            }
            match self.advance(cx, &mut budget) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => {
                    // Replies to earlier requests are still delivered, if there is room for them.
                    let _ = self.flush(cx);
                    return Poll::Ready(end);
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use futures_lite::future::yield_now;
    use xenstore_protocol::HEADER_LEN;
    use xenstore_store::Config;
    use xenstore_transport::driver::Driver;
    use xenstore_transport::socket::Socket;

    use crate::platform::Standalone;
    use crate::serve::server::{Server, TURN_MIN};
    use crate::serve::{Clock, Tasks};

    /// A client that does not wait. Its requests read the root, and their replies are headers.
    struct Client(UnixStream);

    impl Client {
        fn ask(&mut self, count: usize) {
            let mut request = [0; HEADER_LEN + 2];
            (request[0], request[12]) = (2, 2);
            request[HEADER_LEN..].copy_from_slice(b"/\0");
            self.0.write_all(&request.repeat(count)).unwrap();
        }

        /// Returns how many replies have come.
        fn answers(&mut self) -> usize {
            let mut bytes = vec![0; 1 << 16];
            self.0.read(&mut bytes).map_or(0, |count| count / HEADER_LEN)
        }
    }

    // Fails if a client with one request waits for more than one turn of clients with many
    // requests, which send more just before its own.
    #[test]
    fn who_asks_little_does_not_wait_for_those_who_ask_much() {
        let driver = Driver::new().unwrap();
        let server =
            Server::new(&Config::default(), Standalone::default(), Clock::Manual(0.into()))
                .driven(driver.clone());
        let tasks = Tasks::new();
        let client = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            tasks.spawn(server.serve(Socket::adopt(ours.into(), &driver).unwrap()));
            Client(theirs)
        };
        let (mut busy, mut quiet): (Vec<_>, _) = ((0..20).map(|_| client()).collect(), client());
        driver.block_on(tasks.run(async {
            busy.iter_mut().for_each(|client| client.ask(500));
            // All clients have had their first turn when the last has.
            while busy[19].answers() == 0 {
                yield_now().await;
            }
            busy.iter_mut().for_each(|client| _ = (client.ask(1), client.answers()));
            quiet.ask(1);
            while quiet.answers() == 0 {
                yield_now().await;
            }
            let before: usize = busy.iter_mut().map(Client::answers).sum();
            assert!(before <= 2 * TURN_MIN as usize, "{before} answers to others");
        }));
    }
}
