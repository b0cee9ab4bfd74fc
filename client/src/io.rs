//! The connection that the clones of a client share.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_lite::{AsyncRead, AsyncWrite};
use xenstore_protocol::{ClientConnection, ServerMessage};
use xenstore_protocol::{Operation, Request, RequestId, TxId};

use crate::error::Error;

/// A reply that has arrived.
#[derive(Debug)]
pub(crate) struct Answer {
    op: Operation,
    pub(crate) is_error: bool,
    pub(crate) payload: Vec<u8>,
}

/// Unread events of one watch. Further ones are replaced by one event with the path of the watch.
const EVENTS_MAX: usize = 4096;

/// The unread events of one watch.
#[derive(Debug)]
pub(crate) struct Mailbox {
    path: Vec<u8>,
    events: VecDeque<Vec<u8>>,
}

/// The tasks that wait. All are woken, since any of them can read and write for the others.
#[derive(Default)]
struct Waiting(Mutex<Vec<Waker>>);

impl Waiting {
    fn register(&self, waker: &Waker) {
        let mut wakers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        let wakers = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for waker in wakers {
            waker.wake();
        }
    }
}

/// The stream of a client.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// A connection, and the replies and events that have arrived.
pub(crate) struct Shared {
    state: Mutex<State>,
    waiting: Arc<Waiting>,
}

struct State {
    stream: Box<dyn ByteStream>,
    connection: ClientConnection,
    /// Requests that a task waits for, with their reply once it has arrived.
    answers: BTreeMap<RequestId, Option<Answer>>,
    mailboxes: BTreeMap<Vec<u8>, Mailbox>,
    last_token: u64,
    buffer: Vec<u8>,
    /// Why the connection has ended.
    broken: Option<Error>,
}

impl Shared {
    pub(crate) fn new(stream: impl ByteStream + 'static) -> Shared {
        let state = State {
            stream: Box::new(stream),
            connection: ClientConnection::default(),
            answers: BTreeMap::new(),
            mailboxes: BTreeMap::new(),
            last_token: 0,
            buffer: vec![0; 16 * 1024],
            broken: None,
        };
        Shared { state: Mutex::new(state), waiting: Arc::default() }
    }

    /// The state is consistent between two calls, so a poisoned lock can be used.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request whose reply a task will wait for.
    pub(crate) fn start(&self, tx_id: TxId, request: &Request<'_>) -> Result<RequestId, Error> {
        let mut state = self.lock();
        let id = state.send(tx_id, request)?;
        state.answers.insert(id, None);
        Ok(id)
    }

    /// Queues a request whose reply is discarded. It is sent with the next request that a task waits for.
    pub(crate) fn start_and_forget(&self, tx_id: TxId, request: &Request<'_>) {
        // An error of the connection is returned by the next request.
        let _ = self.lock().send(tx_id, request);
    }

    /// Returns the reply to a request, once.
    pub(crate) fn poll_answer(
        &self,
        cx: &mut Context<'_>,
        id: RequestId,
    ) -> Poll<Result<Answer, Error>> {
        self.poll(cx, |state| {
            let answer = state.answers.get_mut(&id)?.take()?;
            state.answers.remove(&id);
            Some(answer)
        })
    }

    /// Discards the reply to a request, now or when it arrives.
    pub(crate) fn forget(&self, id: RequestId) {
        let mut state = self.lock();
        if let Some(Some(answer)) = state.answers.remove(&id) {
            state.abandon(&answer);
        }
    }

    /// Returns a token that no other watch of this client has. Creates the mailbox for its events.
    pub(crate) fn open_mailbox(&self, path: &[u8]) -> Vec<u8> {
        let mut state = self.lock();
        state.last_token += 1;
        let token = format!("{}", state.last_token).into_bytes();
        let mailbox = Mailbox { path: path.to_vec(), events: VecDeque::new() };
        state.mailboxes.insert(token.clone(), mailbox);
        token
    }

    pub(crate) fn close_mailbox(&self, token: &[u8]) {
        self.lock().mailboxes.remove(token);
    }

    /// Returns the next event of a watch.
    pub(crate) fn poll_event(
        &self,
        cx: &mut Context<'_>,
        token: &[u8],
    ) -> Poll<Result<Vec<u8>, Error>> {
        self.poll(cx, |state| state.mailboxes.get_mut(token)?.events.pop_front())
    }

    /// Reads and writes as long as that is possible, then returns what `ready` finds.
    fn poll<R>(
        &self,
        cx: &mut Context<'_>,
        mut ready: impl FnMut(&mut State) -> Option<R>,
    ) -> Poll<Result<R, Error>> {
        let mut state = self.lock();
        self.waiting.register(cx.waker());
        let waker = self.waiting.clone().into();
        let arrived = state.drive(&mut Context::from_waker(&waker));
        let found = ready(&mut state);
        let broken = state.broken.clone();
        drop(state);
        if arrived || found.is_some() {
            // Other tasks may have got a reply, or one of them must read next.
            self.waiting.clone().wake();
            self.waiting.register(cx.waker());
        }
        match (found, broken) {
            (Some(found), _) => Poll::Ready(Ok(found)),
            (None, Some(error)) => Poll::Ready(Err(error)),
            (None, None) => Poll::Pending,
        }
    }
}

impl State {
    fn send(&mut self, tx_id: TxId, request: &Request<'_>) -> Result<RequestId, Error> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.connection.request(tx_id, request).map_err(|_| {
            let name = request.operation().name();
            let max = xenstore_protocol::PAYLOAD_MAX;
            Error::Argument(format!("{name}: the payload exceeds {max} bytes"))
        })
    }

    /// Writes and reads as long as that is possible. Returns true if bytes arrived.
    fn drive(&mut self, cx: &mut Context<'_>) -> bool {
        let mut arrived = false;
        while self.broken.is_none() {
            match self.step(cx) {
                Ok(Poll::Ready(())) => arrived = true,
                Ok(Poll::Pending) => break,
                Err(error) => self.broken = Some(error),
            }
        }
        arrived
    }

    fn step(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Error> {
        while !self.connection.unsent().is_empty() {
            let unsent = self.connection.unsent();
            let all = unsent.len();
            match Pin::new(&mut self.stream).poll_write(cx, unsent).map_err(lost) {
                // The replies that the server sent before it closed can still be read.
                Poll::Ready(Ok(0) | Err(Error::Closed)) => self.connection.sent(all),
                Poll::Ready(Ok(count)) => self.connection.sent(count),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        // A stream may buffer what was written, or notify its other end only now.
        match Pin::new(&mut self.stream).poll_flush(cx).map_err(lost) {
            Poll::Ready(Err(error)) if error != Error::Closed => return Err(error),
            _ => {}
        }
        let count =
            match Pin::new(&mut self.stream).poll_read(cx, &mut self.buffer).map_err(lost)? {
                Poll::Ready(0) => return Err(Error::Closed),
                Poll::Ready(count) => count,
                Poll::Pending => return Ok(Poll::Pending),
            };
        let buffer = std::mem::take(&mut self.buffer);
        let result = self.take(&buffer[..count]);
        self.buffer = buffer;
        result.map(Poll::Ready)
    }

    fn take(&mut self, mut input: &[u8]) -> Result<(), Error> {
        let State { connection, answers, mailboxes, .. } = self;
        let broken = |error: &dyn ToString| Error::Protocol(error.to_string());
        let mut abandoned = Vec::new();
        while let Some(incoming) = connection.receive(&mut input).map_err(|e| broken(&e))? {
            match incoming {
                ServerMessage::Reply { req_id, op, is_error, payload } => {
                    let answer = Answer { op, is_error, payload: payload.to_vec() };
                    match answers.get_mut(&req_id) {
                        Some(slot) => *slot = Some(answer),
                        None => abandoned.push(answer),
                    }
                }
                ServerMessage::Event(event) => {
                    // The watch may have ended after the event was sent.
                    if let Some(mailbox) = mailboxes.get_mut(event.token) {
                        mailbox.put(event.path);
                    }
                }
            }
        }
        abandoned.iter().for_each(|answer| self.abandon(answer));
        Ok(())
    }

    /// Discards a reply. If it opened a transaction, that transaction is aborted.
    fn abandon(&mut self, answer: &Answer) {
        if answer.op == Operation::TransactionStart
            && let Ok(xenstore_protocol::Reply::Transaction(id)) = reply(answer.op, answer)
        {
            let _ = self.send(id, &Request::TransactionEnd { commit: false });
        }
    }
}

/// Maps the errors of a closed connection to [`Error::Closed`], as a read at the end of the stream.
fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
        _ => error.into(),
    }
}

impl Mailbox {
    fn put(&mut self, path: &[u8]) {
        if self.events.iter().any(|waiting| waiting == path) {
            return;
        }
        if self.events.len() < EVENTS_MAX {
            self.events.push_back(path.to_vec());
        } else {
            // The caller must read the whole watched tree again.
            self.events.clear();
            self.events.push_back(self.path.clone());
        }
    }
}

/// Parses the reply to a request of type `op`.
///
/// # Errors
///
/// Fails with the error that the reply carries, or [`Error::Protocol`] if it is malformed.
pub(crate) fn reply(op: Operation, answer: &Answer) -> Result<xenstore_protocol::Reply<'_>, Error> {
    use xenstore_protocol::Reply;
    match Reply::parse(op, answer.is_error, &answer.payload) {
        Ok(Reply::Error(name)) => Err(Error::Store(name)),
        Ok(reply) => Ok(reply),
        Err(malformed) => Err(Error::Protocol(malformed.to_string())),
    }
}
