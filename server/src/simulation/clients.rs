//! Guests and a tool that never wait: they do what can be done now.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use xenstore_protocol::ring::{SIZE, Side, Word, connection, filled, stretches};

/// Words behind the ring page: set while an event is on its way.
const TO_DAEMON: u64 = 4096;
const TO_GUEST: u64 = 4100;
pub(super) const PORT: u32 = 1;

/// A guest's end of its ring on the pretend Xen. It looks at the page only after it was rung for.
pub(super) struct Guest {
    domid: u32,
    page: File,
    daemon: File,
    unsent: Vec<u8>,
    /// All bytes that it has got.
    pub(super) seen: Vec<u8>,
    /// It takes answers out of the ring.
    pub(super) reads: bool,
    /// It waits for the daemon to ring for the first time.
    waits: bool,
    /// It has asked for a fresh start.
    resets: bool,
}

/// Creates the files of a domain, with its ring page.
fn page(xen: &Path, domid: u32) -> File {
    let dir = xen.join(domid.to_string());
    fs::create_dir_all(&dir).unwrap();
    for old in ["ring", "state"] {
        let _ = fs::remove_file(dir.join(old));
    }
    let mut open = OpenOptions::new();
    let page = open.read(true).write(true).create_new(true).open(dir.join("ring")).unwrap();
    page.set_len(8192).unwrap();
    page
}

/// Opens the file to which events for the daemon are written.
pub(super) fn daemon(xen: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(xen.join("events")).unwrap()
}

impl Guest {
    pub(super) fn new(xen: &Path, domid: u32) -> Guest {
        let (page, daemon) = (page(xen, domid), daemon(xen));
        let (unsent, seen) = (Vec::new(), Vec::new());
        let (reads, waits, resets) = (true, domid == 0, false);
        Guest { domid, page, daemon, unsent, seen, reads, waits, resets }
    }

    /// Another domain with this domid, with a page that says nothing.
    pub(super) fn reborn(&mut self, xen: &Path) {
        self.page = page(xen, self.domid);
        self.unsent.clear();
    }

    fn get(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        self.page.read_exact_at(&mut word, at).unwrap();
        u32::from_le_bytes(word)
    }

    fn put(&self, at: u64, word: u32) {
        self.page.write_all_at(&word.to_le_bytes(), at).unwrap();
    }

    fn word(&self, word: Word) -> u32 {
        self.get(word.offset() as u64)
    }

    fn kick(&mut self) {
        if self.get(TO_DAEMON) == 0 {
            self.put(TO_DAEMON, 1);
            let record = [self.domid, PORT].map(u32::to_le_bytes).concat();
            self.daemon.write_all(&record).unwrap();
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
        self.put_down();
    }

    /// Asks for a fresh start; what is under way is dropped.
    pub(super) fn reset(&mut self) {
        self.unsent.clear();
        self.resets = true;
        self.put(Word::Connection.offset() as u64, connection::RECONNECT);
        self.kick();
    }

    /// Sets all indices of its idle ring to 0, without a notification.
    pub(super) fn zero(&self) {
        assert!(self.unsent.is_empty(), "idle");
        for word in [Word::ReqProd, Word::ReqCons, Word::RspProd, Word::RspCons] {
            self.put(word.offset() as u64, 0);
        }
    }

    /// Puts down requests for which there is room.
    fn put_down(&mut self) {
        let (cons, prod) = (self.word(Word::ReqCons), self.word(Word::ReqProd));
        let room = (SIZE - prod.wrapping_sub(cons)) as usize;
        let count = room.min(self.unsent.len());
        if count == 0 || self.resets || self.waits {
            return;
        }
        let rest = self.unsent.split_off(count);
        let bytes = std::mem::replace(&mut self.unsent, rest);
        let count = u32::try_from(count).unwrap();
        let [first, second] = stretches(prod, count);
        let (head, tail) = bytes.split_at(first.len());
        for (part, at) in [(head, first.start), (tail, second.start)] {
            self.page.write_all_at(part, (Side::Requests.offset() + at) as u64).unwrap();
        }
        self.put(Word::ReqProd.offset() as u64, prod.wrapping_add(count));
        self.kick();
    }

    /// Looks at the page if it was rung for. Has it done anything?
    pub(super) fn look(&mut self) -> bool {
        if !self.reads || self.get(TO_GUEST) == 0 {
            return false;
        }
        self.put(TO_GUEST, 0);
        self.waits = false;
        if self.resets {
            self.resets = self.word(Word::Connection) != connection::CONNECTED;
            self.seen.extend_from_slice(if self.resets { b"" } else { b"<reconnects>" });
            return true;
        }
        let (cons, prod) = (self.word(Word::RspCons), self.word(Word::RspProd));
        for part in stretches(cons, filled(prod, cons).unwrap()) {
            let mut bytes = vec![0; part.len()];
            let place = (Side::Replies.offset() + part.start) as u64;
            self.page.read_exact_at(&mut bytes, place).unwrap();
            self.seen.extend(bytes);
        }
        if cons != prod {
            self.put(Word::RspCons.offset() as u64, prod);
            self.kick();
        }
        self.put_down();
        true
    }
}

/// A message that came: type, request id, payload.
pub(super) type Message = (u32, u32, Vec<u8>);

/// The messages in some bytes, and how long they are.
pub(super) fn messages(bytes: &[u8]) -> (Vec<Message>, usize) {
    let (mut found, mut at) = (Vec::new(), 0);
    let word = |at: usize| {
        let word = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(word))
    };
    while let (Some(ty), Some(id), Some(len)) = (word(at), word(at + 4), word(at + 12))
        && let Some(payload) = bytes.get(at + 16..at + 16 + len as usize)
    {
        found.push((ty, id, payload.to_vec()));
        at += 16 + payload.len();
    }
    (found, at)
}

/// A client of the socket.
#[derive(Default)]
pub(super) struct Tool {
    stream: Option<UnixStream>,
    input: Vec<u8>,
}

impl Tool {
    pub(super) fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    /// Connects; the other end.
    pub(super) fn connect(&mut self) -> OwnedFd {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (self.stream, self.input) = (Some(ours), Vec::new());
        theirs.into()
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        // One that has ended shows when it is read.
        let _ = self.stream.as_ref().map(|mut stream| stream.write_all(bytes));
    }

    /// The messages that have come. Has the connection ended?
    pub(super) fn receive(&mut self) -> Vec<Message> {
        let Some(mut stream) = self.stream.as_ref() else { return Vec::new() };
        let mut buffer = [0; 8192];
        match stream.read(&mut buffer) {
            Ok(0) => self.stream = None,
            Ok(count) => self.input.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.stream = None,
        }
        let (found, len) = messages(&self.input);
        self.input.drain(..len);
        found
    }
}
