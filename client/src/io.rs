//! The connection that all users of a client share.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_lite::{AsyncRead, AsyncWrite};
use xenstore_protocol::{ClientConnection, ServerMessage};
use xenstore_protocol::{Operation, Request, RequestId, TxId};

use crate::error::Error;

/// An answer that has arrived.
#[derive(Debug)]
pub(crate) struct Answer {
    op: Operation,
    pub(crate) is_error: bool,
    pub(crate) payload: Vec<u8>,
}

/// Different events that wait for one watch; beyond, they become one with the path of the watch.
const EVENTS_MAX: usize = 4096;

/// Events of one watch that have not been taken yet.
#[derive(Debug)]
pub(crate) struct Mailbox {
    path: Vec<u8>,
    events: VecDeque<Vec<u8>>,
}

/// Wakes everybody who waits: any of them can move the bytes on.
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

/// What a client speaks over.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// A connection and what has come over it.
pub(crate) struct Shared {
    state: Mutex<State>,
    waiting: Arc<Waiting>,
}

struct State {
    stream: Box<dyn ByteStream>,
    connection: ClientConnection,
    /// Requests that somebody waits for; with their answer once it is there.
    answers: BTreeMap<RequestId, Option<Answer>>,
    mailboxes: BTreeMap<Vec<u8>, Mailbox>,
    last_token: u64,
    buffer: Vec<u8>,
    /// Why nothing goes any more.
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

    /// The state is whole between two calls, so a panic elsewhere does not matter.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a request whose answer will be waited for.
    pub(crate) fn start(&self, tx_id: TxId, request: &Request<'_>) -> Result<RequestId, Error> {
        let mut state = self.lock();
        let id = state.send(tx_id, request)?;
        state.answers.insert(id, None);
        Ok(id)
    }

    /// Starts a request whose answer nobody wants; it goes out with the next that somebody does.
    pub(crate) fn start_and_forget(&self, tx_id: TxId, request: &Request<'_>) {
        // Nothing can be done about it here, and the next request will tell.
        let _ = self.lock().send(tx_id, request);
    }

    /// The answer to a request, once.
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

    /// Nobody waits for this answer any more.
    pub(crate) fn forget(&self, id: RequestId) {
        let mut state = self.lock();
        if let Some(Some(answer)) = state.answers.remove(&id) {
            state.abandon(&answer);
        }
    }

    /// A token that no other watch of this client has, and a mailbox for its events.
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

    /// The next event of a watch.
    pub(crate) fn poll_event(
        &self,
        cx: &mut Context<'_>,
        token: &[u8],
    ) -> Poll<Result<Vec<u8>, Error>> {
        self.poll(cx, |state| state.mailboxes.get_mut(token)?.events.pop_front())
    }

    /// Moves bytes until `ready` finds what it looks for, or nothing moves.
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
            // It may be for others, or others may have to go on reading in our place.
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
            Error::Argument(format!("{name} of more than {max} bytes"))
        })
    }

    /// Writes and reads until nothing moves any more. Did anything arrive?
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
                // What the server has said before it went can still be read, up to the end.
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
                    // One for a watch that is no more is not a mistake: it was under way.
                    if let Some(mailbox) = mailboxes.get_mut(event.token) {
                        mailbox.put(event.path);
                    }
                }
            }
        }
        abandoned.iter().for_each(|answer| self.abandon(answer));
        Ok(())
    }

    /// Nobody wants this answer. A transaction that it has opened would stay open for ever.
    fn abandon(&mut self, answer: &Answer) {
        if answer.op == Operation::TransactionStart
            && let Ok(xenstore_protocol::Reply::Transaction(id)) = reply(answer.op, answer)
        {
            let _ = self.send(id, &Request::TransactionEnd { commit: false });
        }
    }
}

/// A server that has gone is told as [`Error::Closed`], whether a read finds the end of the stream
/// first or a write finds nobody there.
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
            // "Look again at everything."
            self.events.clear();
            self.events.push_back(self.path.clone());
        }
    }
}

/// Reads the answer to a request of type `op`, or the error that it is.
pub(crate) fn reply(op: Operation, answer: &Answer) -> Result<xenstore_protocol::Reply<'_>, Error> {
    use xenstore_protocol::Reply;
    match Reply::parse(op, answer.is_error, &answer.payload) {
        Ok(Reply::Error(name)) => Err(Error::Store(name)),
        Ok(reply) => Ok(reply),
        Err(malformed) => Err(Error::Protocol(malformed.to_string())),
    }
}
