//! An engine and the connections to it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use xenstore_protocol::{DomId, Errno, Frame, Header, Operation, Reply, ServerConnection as Io};
use xenstore_store::{AllDomains, Caller, Config, ConnId, Engine, Host, Millis, Outcome};

/// Unexecuted bytes of one connection above which its writer waits.
const INPUT_MAX: usize = 64 * 1024;

/// Units of deferred work that are done at once.
const PIECE: u32 = 4096;

/// A state that several threads share.
pub(crate) trait Shared {
    /// Changes the state, then wakes the tasks that can proceed.
    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R;
}

impl Shared for Arc<Mutex<State>> {
    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        state.settle();
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        result
    }
}

#[derive(Debug)]
pub(crate) struct State {
    engine: Engine,
    domains: AllDomains,
    now: Millis,
    connections: BTreeMap<ConnId, Served>,
    /// Tasks to wake when the lock is released.
    wakers: Vec<Waker>,
    /// This state, for the threads that wait for a deadline.
    shared: Weak<Mutex<State>>,
}

/// One connection.
#[derive(Debug, Default)]
struct Served {
    io: Io,
    /// Bytes that were written and not executed.
    input: Vec<u8>,
    /// A request that is deferred, and until when. No other of its connection is executed before.
    deferred: Option<(Vec<u8>, Millis)>,
    /// Replies since everything was last read.
    unread: u32,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    pub(crate) fn new(config: &Config, shared: Weak<Mutex<State>>) -> State {
        State {
            engine: Engine::new(config),
            domains: AllDomains::default(),
            now: 0,
            connections: BTreeMap::new(),
            wakers: Vec::new(),
            shared,
        }
    }

    pub(crate) fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    pub(crate) fn connect(&mut self, domid: DomId) -> ConnId {
        let id = self.engine.connect(Caller::Domain(domid));
        self.connections.insert(id, Served::default());
        id
    }

    /// Ends a connection. Replies that it has not read remain readable.
    pub(crate) fn close(&mut self, id: ConnId) {
        if let Some(served) = self.connections.get_mut(&id).filter(|served| !served.ended) {
            served.ended = true;
            served.deferred = None;
            self.wakers.extend(served.reader.take());
            self.wakers.extend(served.writer.take());
            self.engine.disconnect(id);
        }
    }

    pub(crate) fn remove(&mut self, id: ConnId) {
        self.close(id);
        self.connections.remove(&id);
    }

    pub(crate) fn close_all(&mut self) {
        let ids: Vec<ConnId> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.close(id));
    }

    pub(crate) fn change_domains(&mut self, change: impl FnOnce(&mut AllDomains)) {
        change(&mut self.domains);
        self.engine.domains_changed(&mut self.domains);
    }

    pub(crate) fn set_time(&mut self, now: Millis) {
        self.now = now;
        let ids: Vec<ConnId> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.advance(id, now));
    }

    /// Executes a request of the control domain. It is not deferred: the time is taken as up.
    pub(crate) fn request(&mut self, op: Operation, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let conn = self.engine.connect(Caller::Socket);
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let header = Header { ty: op.as_wire(), len, ..Header::default() };
        let (mut out, mut now) = (Vec::new(), self.now);
        while let Outcome::Deferred(until) =
            self.engine.request(conn, &Frame { header, payload }, now, &mut self.domains, &mut out)
        {
            now = until;
            self.engine.work(PIECE);
        }
        self.engine.disconnect(conn);
        let Some((frame, _)) = Frame::split_first(&out) else { return Err(Errno::Eio) };
        let is_error = frame.header.ty == Operation::Error.as_wire();
        match Reply::parse(op, is_error, frame.payload) {
            Ok(Reply::Error(error)) => Err(error),
            Ok(_) => Ok(frame.payload.to_vec()),
            Err(_) => Err(Errno::Eio),
        }
    }

    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        id: ConnId,
        buf: &mut [u8],
    ) -> Poll<usize> {
        let Some(served) = self.connections.get_mut(&id) else { return Poll::Ready(0) };
        let unsent = served.io.unsent();
        if unsent.is_empty() {
            if served.ended || buf.is_empty() {
                return Poll::Ready(0);
            }
            served.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = unsent.len().min(buf.len());
        buf[..count].copy_from_slice(&unsent[..count]);
        served.io.sent(count);
        if served.io.unsent().is_empty() {
            served.unread = 0;
        }
        // There may be room again for replies and events.
        self.advance(id, self.now);
        Poll::Ready(count)
    }

    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        id: ConnId,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let served = self.connections.get_mut(&id).filter(|served| !served.ended);
        let Some(served) = served else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let count = buf.len().min(INPUT_MAX.saturating_sub(served.input.len()));
        if count == 0 && !buf.is_empty() {
            served.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        served.input.extend_from_slice(&buf[..count]);
        self.advance(id, self.now);
        Poll::Ready(Ok(count))
    }

    /// Drains the engine: delivers events, retries deferred requests, does deferred work.
    fn settle(&mut self) {
        loop {
            // There is no operator to read them.
            while self.engine.pop_warning().is_some() {}
            if let Some(id) = self.engine.pop_ready() {
                self.advance(id, self.now);
            } else if let Some(id) = self.engine.pop_closed() {
                self.close(id);
            } else if self.engine.has_work() {
                self.engine.work(PIECE);
            } else {
                return;
            }
        }
    }

    /// Executes what one connection has written, as long as it reads its replies.
    fn advance(&mut self, id: ConnId, now: Millis) {
        let Some(served) = self.connections.get_mut(&id).filter(|served| !served.ended) else {
            return;
        };
        let unread_max = self.engine.outstanding(id);
        let (engine, domains) = (&mut self.engine, &mut self.domains);
        let input = std::mem::take(&mut served.input);
        let mut rest = &input[..];
        let mut violated = false;
        loop {
            while !served.io.is_full() {
                let out = served.io.out();
                if !engine.emit_events(id, out.len() + Io::HIGH_WATER, out) {
                    break;
                }
            }
            if served.io.is_full() || served.unread >= unread_max {
                break;
            }
            let outcome = if let Some((bytes, _)) = &served.deferred {
                let Some((frame, _)) = Frame::split_first(bytes) else { break };
                execute(engine, id, &frame, now, domains, served.io.out())
            } else {
                match served.io.receive(&mut rest) {
                    Ok(None) => break,
                    Err(_) => {
                        violated = true;
                        break;
                    }
                    Ok(Some((frame, out))) => {
                        served.unread += 1;
                        let outcome = execute(engine, id, &frame, now, domains, out);
                        if let Outcome::Deferred(_) = outcome {
                            let bytes = [&frame.header.emit()[..], frame.payload].concat();
                            served.deferred = Some((bytes, 0));
                        }
                        outcome
                    }
                }
            };
            match (outcome, &mut served.deferred) {
                (Outcome::Deferred(until), Some((_, known))) => {
                    if std::mem::replace(known, until) != until {
                        expire_later(self.shared.clone(), id, until, until.saturating_sub(now));
                    }
                    break;
                }
                _ => served.deferred = None,
            }
        }
        served.input = rest.to_vec();
        if !served.io.unsent().is_empty() {
            self.wakers.extend(served.reader.take());
        }
        if served.input.len() < INPUT_MAX {
            self.wakers.extend(served.writer.take());
        }
        if violated {
            self.close(id);
        }
    }
}

fn execute(
    engine: &mut Engine,
    id: ConnId,
    frame: &Frame<'_>,
    now: Millis,
    domains: &mut AllDomains,
    out: &mut Vec<u8>,
) -> Outcome {
    engine.request(id, frame, now, domains as &mut dyn Host, out)
}

/// Executes a deferred request at its deadline in real time, unless it has been executed before. So a
/// test cannot hang on a transaction that never ends, although its clock stands.
fn expire_later(shared: Weak<Mutex<State>>, id: ConnId, until: Millis, wait: Millis) {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(wait));
        if let Some(shared) = shared.upgrade() {
            shared.change(|state| {
                let deferred = state.connections.get(&id).and_then(|conn| conn.deferred.as_ref());
                if deferred.is_some_and(|(_, deadline)| *deadline == until) {
                    state.advance(id, until.max(state.now));
                }
            });
        }
    });
}
