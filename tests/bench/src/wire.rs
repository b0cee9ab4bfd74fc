//! Requests and replies in bytes, fast enough for load.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use xenstore_tests::raw::{bytes, frame, op};

use crate::meter::Result;

/// How long a daemon may not answer before its row is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What is said then.
pub(crate) const SILENT: &str = "no answer any more";

/// When a row's time is over.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Deadline {
        Deadline { start: Instant::now(), limit }
    }

    pub(crate) fn passed(&self) -> bool {
        self.start.elapsed() > self.limit
    }

    /// An error once it is over, which ends up in the report.
    pub(crate) fn check(&self) -> Result<()> {
        match self.passed() {
            false => Ok(()),
            true => Err(self.text().into()),
        }
    }

    pub(crate) fn text(&self) -> String {
        format!("not within {:.0} s", self.limit.as_secs_f64())
    }
}

/// A message from a daemon.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    pub(crate) ty: u32,
    pub(crate) payload: &'a [u8],
}

impl Reply<'_> {
    /// It must answer a request of this type.
    pub(crate) fn expect(&self, ty: u32) -> Result<()> {
        match self.ty == ty {
            true => Ok(()),
            false => Err(format!(
                "request of type {ty}: got {} {:?}",
                self.ty,
                String::from_utf8_lossy(self.payload)
            )
            .into()),
        }
    }
}

/// Bytes that came, cut into messages.
pub(crate) struct Inbox {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Default for Inbox {
    fn default() -> Inbox {
        Inbox { bytes: vec![0; 16 * 1024].into(), from: 0, to: 0 }
    }
}

impl Inbox {
    /// Takes more bytes; the largest message always finds room.
    pub(crate) fn fill(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.from > 0 {
            self.bytes.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        let count = read(&mut self.bytes[self.to..])?;
        self.to += count;
        Ok(count)
    }

    /// Bytes of the next message, if it is there to its end.
    fn whole(&self) -> Option<usize> {
        let (header, rest) = self.bytes[self.from..self.to].split_first_chunk::<16>()?;
        let len = word(header, 12) as usize;
        (rest.len() >= len).then_some(16 + len)
    }

    /// The next message, if it is there to its end.
    pub(crate) fn next(&mut self) -> Option<Reply<'_>> {
        let len = self.whole()?;
        let message = &self.bytes[self.from..self.from + len];
        self.from += len;
        Some(Reply { ty: word(message, 0), payload: &message[16..] })
    }
}

/// A word of a header.
pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A connection that waits for its answers.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    inbox: Inbox,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Client> {
        Ok(Client { stream: connect(socket)?, inbox: Inbox::default() })
    }

    /// The next message.
    pub(crate) fn message(&mut self) -> Result<Reply<'_>> {
        while self.inbox.whole().is_none() {
            match self.inbox.fill(|room| self.stream.read(room)) {
                Ok(0) => return Err("the daemon closed the connection".into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(SILENT.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.inbox.next().ok_or_else(|| "no message".into())
    }

    /// Sends a request that must succeed, and waits for its reply; events are skipped.
    pub(crate) fn ask(&mut self, ty: u32, tx: u32, payload: &[u8]) -> Result<Vec<u8>> {
        self.stream.write_all(&frame(ty, 1, tx, payload))?;
        loop {
            let reply = self.message()?;
            if reply.ty != op::WATCH_EVENT {
                reply.expect(ty)?;
                return Ok(reply.payload.to_vec());
            }
        }
    }

    /// The same outside of transactions, with text whose `|` are NULs.
    pub(crate) fn ok(&mut self, ty: u32, payload: &str) -> Result<Vec<u8>> {
        self.ask(ty, 0, &bytes(payload))
    }

    /// Sends many requests, up to 64 at a time, of which all must succeed and each causes as many
    /// events. How many were done when they or the time were over.
    pub(crate) fn bulk(
        &mut self,
        requests: impl Iterator<Item = (u32, String)>,
        events_each: usize,
        deadline: Deadline,
    ) -> Result<usize> {
        let (mut requests, mut count) = (requests.peekable(), 0);
        while requests.peek().is_some() && !deadline.passed() {
            let (mut batch, mut sent) = (Vec::new(), 0);
            for (ty, payload) in requests.by_ref().take(64) {
                batch.extend(frame(ty, 1, 0, &bytes(&payload)));
                sent += 1;
            }
            self.stream.write_all(&batch)?;
            for _ in 0..sent * (1 + events_each) {
                let reply = self.message()?;
                if reply.ty == op::ERROR {
                    reply.expect(0)?;
                }
            }
            count += sent;
        }
        Ok(count)
    }
}

pub(crate) fn connect(socket: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Waits in the kernel until all bytes are there, so that a daemon that sends little by little does
/// not make the client work more.
pub(crate) fn receive_all(stream: &UnixStream, mut buffer: &mut [u8]) -> Result<()> {
    use rustix::net::{RecvFlags, recv};
    while !buffer.is_empty() {
        match recv(stream, &mut *buffer, RecvFlags::WAITALL)?.0 {
            0 => return Err("the daemon closed the connection".into()),
            count => buffer = &mut buffer[count..],
        }
    }
    Ok(())
}
