//! Guests on the pretend Xen, with their ring pages mapped, so that they cost the client little.
//!
//! What a guest does follows `tests/peers/README.md`. It has one request under way, which always
//! finds room.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::drive::Link;
use crate::meter::Result;
use crate::wire::{PATIENCE, SILENT};

/// The event channel port of all our guests.
pub(crate) const PORT: u32 = 1;

const RING: usize = 1024;
const REQUESTS: usize = 0;
const REPLIES: usize = 1024;
const REQ_CONS: usize = 2048;
const REQ_PROD: usize = 2052;
const RSP_CONS: usize = 2056;
const RSP_PROD: usize = 2060;
/// The event page: one word in each direction.
const TO_DAEMON: usize = 4096;
const TO_GUEST: usize = 4100;

/// Makes a domain, with all that belongs to one.
pub(crate) fn make_domain(xen: &Path, domid: u32) -> Result<()> {
    let dir = xen.join(domid.to_string());
    fs::create_dir_all(&dir)?;
    File::create(dir.join("ring"))?.set_len(8192)?;
    match mkfifoat(CWD, dir.join("events"), Mode::from(0o600)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The FIFO that all guests of a daemon ring it through.
pub(crate) fn doorbell(xen: &Path) -> Result<Arc<File>> {
    Ok(Arc::new(OpenOptions::new().read(true).write(true).open(xen.join("events"))?))
}

/// A guest's end of its ring.
pub(crate) struct Guest {
    record: [u8; 8],
    page: MmapRegion,
    events: File,
    doorbell: Arc<File>,
    req_prod: u32,
    rsp_cons: u32,
}

impl Guest {
    /// Takes up a domain that has been made.
    pub(crate) fn open(xen: &Path, domid: u32, doorbell: &Arc<File>) -> Result<Guest> {
        let dir = xen.join(domid.to_string());
        let ring = OpenOptions::new().read(true).write(true).open(dir.join("ring"))?;
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits())?;
        let mut options = OpenOptions::new();
        let events = options.read(true).write(true).custom_flags(nonblock).open(dir.join("events"));
        let mut record = [0; 8];
        record[..4].copy_from_slice(&domid.to_le_bytes());
        record[4..].copy_from_slice(&PORT.to_le_bytes());
        let mut guest = Guest {
            record,
            page: MmapRegion::from_file(FileOffset::new(ring, 0), 8192)?,
            events: events?,
            doorbell: doorbell.clone(),
            req_prod: 0,
            rsp_cons: 0,
        };
        guest.req_prod = guest.word(REQ_PROD)?.load(Ordering::Acquire);
        guest.rsp_cons = guest.word(RSP_CONS)?.load(Ordering::Acquire);
        Ok(guest)
    }

    fn word(&self, at: usize) -> io::Result<&AtomicU32> {
        self.page.get_atomic_ref(at).map_err(io::Error::other)
    }

    /// The two parts of a ring that bytes from an index on occupy.
    fn parts(ring: usize, index: u32, count: usize) -> [(usize, usize); 2] {
        let at = index as usize % RING;
        let first = count.min(RING - at);
        [(ring + at, first), (ring, count - first)]
    }

    fn kick(&self) -> io::Result<()> {
        if self.word(TO_DAEMON)?.swap(1, Ordering::SeqCst) == 0 {
            (&*self.doorbell).write_all(&self.record)?;
        }
        Ok(())
    }
}

impl Link for Guest {
    fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn wait(&self) -> Result<()> {
        let limit = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        match poll(&mut [PollFd::new(&self.events, PollFlags::IN)], Some(&limit))? {
            0 => Err(SILENT.into()),
            _ => Ok(()),
        }
    }

    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match (&self.events).read(&mut [0; 64]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        self.word(TO_GUEST)?.swap(0, Ordering::SeqCst); // before looking at the ring
        let there = self.word(RSP_PROD)?.load(Ordering::Acquire).wrapping_sub(self.rsp_cons);
        let count = there as usize;
        if count > RING || count > room.len() {
            return Err(io::Error::other("the daemon's index is out of range"));
        }
        if count == 0 {
            return Ok(0);
        }
        let mut to = 0;
        for (at, count) in Guest::parts(REPLIES, self.rsp_cons, count) {
            let part = self.page.get_slice(at, count).map_err(io::Error::other)?;
            part.copy_to(&mut room[to..to + count]);
            to += count;
        }
        self.rsp_cons = self.rsp_cons.wrapping_add(there);
        self.word(RSP_CONS)?.store(self.rsp_cons, Ordering::Release);
        self.kick()?;
        Ok(count)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = self.word(REQ_CONS)?.load(Ordering::Acquire);
        if self.req_prod.wrapping_sub(taken) as usize + bytes.len() > RING {
            return Err(io::Error::other("the ring has no room for the load"));
        }
        let mut from = 0;
        for (at, count) in Guest::parts(REQUESTS, self.req_prod, bytes.len()) {
            let part = self.page.get_slice(at, count).map_err(io::Error::other)?;
            part.copy_from(&bytes[from..from + count]);
            from += count;
        }
        let count = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.req_prod = self.req_prod.wrapping_add(count);
        self.word(REQ_PROD)?.store(self.req_prod, Ordering::Release);
        self.kick()
    }
}
