//! A XenStore client in bytes.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Limit for a reply.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// Message types by their numbers, as in `xs_wire.h`.
#[allow(missing_docs)]
pub mod op {
    pub const CONTROL: u32 = 0;
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const GET_PERMS: u32 = 3;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const INTRODUCE: u32 = 8;
    pub const RELEASE: u32 = 9;
    pub const GET_DOMAIN_PATH: u32 = 10;
    pub const WRITE: u32 = 11;
    pub const MKDIR: u32 = 12;
    pub const RM: u32 = 13;
    pub const SET_PERMS: u32 = 14;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
    pub const IS_DOMAIN_INTRODUCED: u32 = 17;
    pub const RESUME: u32 = 18;
    pub const SET_TARGET: u32 = 19;
    pub const RESET_WATCHES: u32 = 21;
    pub const DIRECTORY_PART: u32 = 22;
    pub const GET_FEATURE: u32 = 23;
    pub const SET_FEATURE: u32 = 24;
    pub const GET_QUOTA: u32 = 25;
    pub const SET_QUOTA: u32 = 26;
}

/// Bytes in both directions, with a limit on waiting.
pub trait Link: Send {
    /// Sends all of `bytes`.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Waits for bytes and returns their number; 0 is the end. Fails with `TimedOut` or
    /// `WouldBlock` after `limit`.
    fn receive(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize>;
}

impl Link for UnixStream {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.set_write_timeout(Some(PATIENCE))?;
        self.write_all(bytes)
    }

    fn receive(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
        self.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        self.read(buffer)
    }
}

/// A received message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Type.
    pub ty: u32,
    /// Request id.
    pub req_id: u32,
    /// Transaction id.
    pub tx_id: u32,
    /// Payload.
    pub payload: Vec<u8>,
}

/// The bytes of a payload in the notation of tests: `|` is a NUL. No valid path contains either.
pub fn bytes(text: &str) -> Vec<u8> {
    text.replace('|', "\0").into_bytes()
}

/// The reverse of [`bytes`].
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "|")
}

/// The bytes of a message.
pub fn frame(ty: u32, req_id: u32, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a payload of test size");
    let header = [ty, req_id, tx_id, len].map(u32::to_le_bytes).concat();
    [&header, payload].concat()
}

/// A connection.
pub struct Conn {
    link: Box<dyn Link>,
    input: Vec<u8>,
    /// Events received while waiting for a reply.
    pub events: VecDeque<String>,
    /// Types of the messages received since the last request, in order.
    pub order: Vec<u32>,
    /// Limit for a reply.
    pub patience: Duration,
    last_id: u32,
}

impl Conn {
    /// Creates a connection over a link.
    pub fn new(link: impl Link + 'static) -> Conn {
        Conn {
            link: Box::new(link),
            input: Vec::new(),
            events: VecDeque::new(),
            order: Vec::new(),
            patience: PATIENCE,
            last_id: 0,
        }
    }

    /// Connects to a socket.
    pub fn connect(path: &Path) -> io::Result<Conn> {
        UnixStream::connect(path).map(Conn::new)
    }

    /// Sends bytes unchanged.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.link.send(bytes).map_err(|error| format!("cannot send: {error}"))
    }

    /// Returns the next message; `None` at the end of the stream.
    pub fn message(&mut self, limit: Duration) -> Result<Option<Message>, String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(message) = self.take() {
                self.order.push(message.ty);
                return Ok(Some(message));
            }
            let mut buffer = [0; 8192];
            let left = deadline.saturating_duration_since(Instant::now());
            match self.link.receive(&mut buffer, left) {
                Ok(0) => return Ok(None),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => {
                    let waiting =
                        matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                    return Err(match waiting {
                        true => format!("nothing came within {limit:?}"),
                        false => format!("cannot receive: {error}"),
                    });
                }
            }
        }
    }

    fn take(&mut self) -> Option<Message> {
        let word = |at: usize| {
            let bytes = self.input.get(at * 4..at * 4 + 4)?;
            Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let (ty, req_id, tx_id, len) = (word(0)?, word(1)?, word(2)?, word(3)?);
        let end = 16 + usize::try_from(len).ok()?;
        if self.input.len() < end {
            return None;
        }
        let payload = self.input[16..end].to_vec();
        self.input.drain(..end);
        Some(Message { ty, req_id, tx_id, payload })
    }

    /// Sends a request and returns its id.
    pub fn start(&mut self, ty: u32, tx_id: u32, payload: &[u8]) -> Result<u32, String> {
        self.last_id += 1;
        self.order.clear();
        self.send(&frame(ty, self.last_id, tx_id, payload))?;
        Ok(self.last_id)
    }

    /// Waits for the next reply, and queues events.
    pub fn reply(&mut self) -> Result<Message, String> {
        loop {
            match self.message(self.patience)? {
                None => return Err("the daemon closed the connection".into()),
                Some(event) if event.ty == op::WATCH_EVENT => {
                    self.events.push_back(text(&event.payload));
                }
                Some(message) => return Ok(message),
            }
        }
    }

    /// Sends a request and waits for its reply, which must have its type and ids. Returns the
    /// payload, or the name of the error.
    pub fn ask(
        &mut self,
        ty: u32,
        tx_id: u32,
        payload: &[u8],
    ) -> Result<Result<Vec<u8>, String>, String> {
        let id = self.start(ty, tx_id, payload)?;
        let reply = self.reply()?;
        let what = format!("type {ty} {:?}", text(&payload[..payload.len().min(60)]));
        if (reply.req_id, reply.tx_id) != (id, tx_id) {
            return Err(format!("{what}: reply has ids {} {}", reply.req_id, reply.tx_id));
        }
        match reply.ty {
            op::ERROR => match reply.payload.strip_suffix(b"\0") {
                Some(name) => Ok(Err(text(name))),
                None => Err(format!("{what}: error {:?} lacks its NUL", text(&reply.payload))),
            },
            got if got == ty => Ok(Ok(reply.payload)),
            got => Err(format!("{what}: reply of type {got}")),
        }
    }

    /// Like [`Conn::ask`], with text in both directions.
    pub fn tx(
        &mut self,
        tx: u32,
        ty: u32,
        payload: &str,
    ) -> Result<Result<String, String>, String> {
        Ok(self.ask(ty, tx, &bytes(payload))?.map(|reply| text(&reply)))
    }

    /// Sends a request outside of transactions, which must succeed.
    pub fn ok(&mut self, ty: u32, payload: &str) -> Result<String, String> {
        self.tx(0, ty, payload)?.map_err(|name| format!("type {ty} {payload:.60}: {name}"))
    }

    /// Sends a request, which must get this reply.
    pub fn gives(&mut self, ty: u32, payload: &str, expected: &str) -> Result<(), String> {
        self.gives_in(0, ty, payload, expected)
    }

    /// The same in a transaction.
    pub fn gives_in(
        &mut self,
        tx: u32,
        ty: u32,
        payload: &str,
        expected: &str,
    ) -> Result<(), String> {
        let got = self.tx(tx, ty, payload)?;
        match got.as_deref() == Ok(expected) {
            true => Ok(()),
            false => Err(format!("type {ty} {payload:.60}: got {got:?}, expected {expected:?}")),
        }
    }

    /// Sends a request, which must fail with this error.
    pub fn fails(&mut self, ty: u32, payload: &str, name: &str) -> Result<(), String> {
        self.fails_in(0, ty, payload, name)
    }

    /// The same in a transaction.
    pub fn fails_in(&mut self, tx: u32, ty: u32, payload: &str, name: &str) -> Result<(), String> {
        let got = self.tx(tx, ty, payload)?;
        match &got {
            Err(error) if error == name => Ok(()),
            _ => Err(format!("type {ty} {payload:.60}: got {got:?}, expected {name}")),
        }
    }

    /// Starts a transaction.
    pub fn begin(&mut self) -> Result<u32, String> {
        let id = self.ok(op::TRANSACTION_START, "|")?;
        id.trim_end_matches('|').parse().map_err(|_| format!("transaction id {id:?}"))
    }

    /// Ends a transaction. The reply must be `OK|` or this error.
    pub fn end(&mut self, tx: u32, how: &str, expected: &str) -> Result<(), String> {
        let got = self.tx(tx, op::TRANSACTION_END, how)?.unwrap_or_else(|name| name);
        match got == expected {
            true => Ok(()),
            false => Err(format!("end of transaction: got {got}, expected {expected}")),
        }
    }

    /// Registers a watch and consumes its first event.
    pub fn watch(&mut self, payload: &str) -> Result<(), String> {
        self.gives(op::WATCH, payload, "OK|")?;
        let path_and_token: Vec<&str> = payload.split('|').take(2).collect();
        self.event(&format!("{}|", path_and_token.join("|")))
    }

    /// Returns an error unless the next event is `path|token|`.
    pub fn event(&mut self, expected: &str) -> Result<(), String> {
        let got = match self.events.pop_front() {
            Some(event) => event,
            None => match self.message(PATIENCE).map_err(|e| format!("{expected}: {e}"))? {
                Some(event) if event.ty == op::WATCH_EVENT && event.req_id == 0 => {
                    text(&event.payload)
                }
                other => return Err(format!("expected event {expected}, got {other:?}")),
            },
        };
        match got == expected {
            true => Ok(()),
            false => Err(format!("got event {got}, expected {expected}")),
        }
    }

    /// Returns an error unless exactly these events come, in this order, before the reply to a
    /// request that is sent now.
    pub fn events(&mut self, expected: &[&str]) -> Result<(), String> {
        // A round trip: queued events come before its reply.
        self.ask(op::GET_DOMAIN_PATH, 0, b"0\0")?.map_err(|e| format!("GET_DOMAIN_PATH: {e}"))?;
        let got: Vec<String> = self.events.drain(..).collect();
        match got == expected {
            true => Ok(()),
            false => Err(format!("got events {got:?}, expected {expected:?}")),
        }
    }

    /// Returns an error unless the daemon ends the connection.
    pub fn ends(&mut self) -> Result<(), String> {
        match self.message(PATIENCE)? {
            None => Ok(()),
            Some(message) => Err(format!("expected the end, got {message:?}")),
        }
    }
}
