//! A guest on the pretend Xen: its ring in a file, its event channel in FIFOs.
//!
//! The ring file is in the page cache, which the daemon's mapping shares, so reads and writes of
//! the file suffice here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use self::word::{CONNECTION, REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD};
use crate::raw::{Link, PATIENCE};

const SIZE: u32 = 1024;
const REQUESTS: u64 = 0;
const REPLIES: u64 = 1024;
/// Words of the page, by their offset.
#[allow(missing_docs)] // the names are those of xs_wire.h
pub mod word {
    pub const REQ_CONS: u64 = 2048;
    pub const REQ_PROD: u64 = 2052;
    pub const RSP_CONS: u64 = 2056;
    pub const RSP_PROD: u64 = 2060;
    pub const SERVER_FEATURES: u64 = 2064;
    pub const CONNECTION: u64 = 2068;
    pub const ERROR: u64 = 2072;
    pub const EVTCHN_PORT: u64 = 2076;
}
/// The event page: one word in each direction, set while an event is in transit.
const TO_DAEMON: u64 = 4096;
const TO_GUEST: u64 = 4100;

/// The sender of the event for a change of a domain, and its port.
const VIRQ: [u32; 2] = [u32::MAX, 3];

/// A guest's end of its ring.
#[derive(Debug)]
pub struct FakeGuest {
    domid: u32,
    port: u32,
    ring: File,
    events: File,
    daemon: File,
}

/// The port of all fake guests.
pub const PORT: u32 = 1;

impl FakeGuest {
    /// Creates a domain in the directory of a pretend Xen, or opens an existing one.
    pub fn create(xen: &Path, domid: u16) -> io::Result<FakeGuest> {
        let dir = xen.join(domid.to_string());
        fs::create_dir_all(&dir)?;
        // The domain is alive, also if an earlier one with this domid is gone.
        let _ = fs::remove_file(dir.join("state"));
        let open = |path: &Path| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
        };
        let ring = open(&dir.join("ring"))?;
        ring.set_len(8192)?;
        // Either side may be first: a daemon may accept clients before it waits for events.
        let (fifo, daemon) = (dir.join("events"), xen.join("events"));
        for path in [&fifo, &daemon] {
            match rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::from(0o600)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        let events =
            OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(&fifo)?;
        let daemon = OpenOptions::new().read(true).write(true).open(daemon)?;
        Ok(FakeGuest { domid: domid.into(), port: PORT, ring, events, daemon })
    }

    /// Uses another port for its events from now on.
    pub fn use_port(&mut self, port: u32) {
        self.port = port;
    }

    /// Reads a word of its page.
    pub fn get(&self, at: u64) -> io::Result<u32> {
        let mut word = [0; 4];
        self.ring.read_exact_at(&mut word, at)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Writes a word of its page.
    pub fn put(&self, at: u64, word: u32) -> io::Result<()> {
        self.ring.write_all_at(&word.to_le_bytes(), at)
    }

    /// Writes requests into the ring from this index on, without an event.
    pub fn scribble(&self, at: u32, bytes: &[u8]) -> io::Result<()> {
        for (index, byte) in (at..).zip(bytes) {
            self.ring.write_all_at(&[*byte], REQUESTS + u64::from(index % SIZE))?;
        }
        Ok(())
    }

    /// Waits until the server has written `wanted` into a word of its page.
    pub fn await_word(&mut self, at: u64, wanted: u32) -> io::Result<()> {
        while self.get(at)? != wanted {
            self.wait(PATIENCE)?;
        }
        Ok(())
    }

    /// Sets all four indices to 0, as old firmware and crash kernels do.
    pub fn zero(&self) -> io::Result<()> {
        [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD].into_iter().try_for_each(|word| self.put(word, 0))
    }

    /// Requests a reconnection, and waits for it.
    pub fn reconnect(&mut self) -> io::Result<()> {
        self.put(CONNECTION, 1)?;
        self.kick()?;
        self.await_word(CONNECTION, 0)
    }

    /// Sends an event to the daemon.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.get(TO_DAEMON)? == 0 {
            self.put(TO_DAEMON, 1)?;
            let record = [self.domid, self.port].map(u32::to_le_bytes).concat();
            self.daemon.write_all(&record)?;
        }
        Ok(())
    }

    fn wait(&mut self, limit: Duration) -> io::Result<()> {
        let limit = Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        };
        if poll(&mut [PollFd::new(&self.events, PollFlags::IN)], Some(&limit))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut ports = [0; 4096];
        let _ = self.events.read(&mut ports)?;
        self.put(TO_GUEST, 0) // before looking at the ring
    }
}

impl Link for FakeGuest {
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (cons, prod) = (self.get(REQ_CONS)?, self.get(REQ_PROD)?);
            let room = SIZE - prod.wrapping_sub(cons);
            let at = prod % SIZE;
            let count = (room.min(SIZE - at) as usize).min(bytes.len());
            if count == 0 {
                self.wait(PATIENCE)?;
                continue;
            }
            let (now, rest) = bytes.split_at(count);
            self.ring.write_all_at(now, REQUESTS + u64::from(at))?;
            self.put(REQ_PROD, prod.wrapping_add(u32::try_from(count).expect("at most 1024")))?;
            self.kick()?;
            bytes = rest;
        }
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
        loop {
            let (cons, prod) = (self.get(RSP_CONS)?, self.get(RSP_PROD)?);
            let at = cons % SIZE;
            let there = prod.wrapping_sub(cons).min(SIZE - at);
            let count = (there as usize).min(buffer.len());
            if count == 0 {
                self.wait(limit)?;
                continue;
            }
            self.ring.read_exact_at(&mut buffer[..count], REPLIES + u64::from(at))?;
            self.put(RSP_CONS, cons.wrapping_add(u32::try_from(count).expect("at most 1024")))?;
            self.kick()?;
            return Ok(count);
        }
    }
}

/// Sets the state of a domain (`shutdown`, `dying`, `gone`) and notifies the daemon.
pub fn set_state(xen: &Path, domid: u16, state: &str) -> io::Result<()> {
    fs::write(xen.join(domid.to_string()).join("state"), state)?;
    let mut events = OpenOptions::new().read(true).write(true).open(xen.join("events"))?;
    events.write_all(&VIRQ.map(u32::to_le_bytes).concat())
}
