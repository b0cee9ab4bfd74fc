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

pub(crate) const RING: usize = 1024;
pub(crate) const REQUESTS: usize = 0;
pub(crate) const REPLIES: usize = 1024;
pub(crate) const REQ_CONS: usize = 2048;
pub(crate) const REQ_PROD: usize = 2052;
pub(crate) const RSP_CONS: usize = 2056;
pub(crate) const RSP_PROD: usize = 2060;
/// The event page: one word in each direction.
pub(crate) const TO_DAEMON: usize = 4096;
pub(crate) const TO_GUEST: usize = 4100;

/// Makes a domain, with all that belongs to one.
pub(crate) fn make_domain(xen: &Path, domid: u32) -> Result<()> {
    let dir = xen.join(domid.to_string());
    fs::create_dir_all(&dir)?;
    File::create(dir.join("ring"))?.set_len(8192)?;
    make_fifo(&dir.join("events"))
}

/// Makes a FIFO, if it is not there.
pub(crate) fn make_fifo(path: &Path) -> Result<()> {
    match mkfifoat(CWD, path, Mode::from(0o600)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The FIFO that all guests of a daemon ring it through.
pub(crate) fn doorbell(xen: &Path) -> Result<Arc<File>> {
    Ok(Arc::new(OpenOptions::new().read(true).write(true).open(xen.join("events"))?))
}

/// Two pages that a guest and its daemon have in common: its ring, and words for events.
pub(crate) struct Pages(MmapRegion);

impl Pages {
    /// Those of a domain that has been made.
    pub(crate) fn open(xen: &Path, domid: u32) -> Result<Pages> {
        let ring = xen.join(domid.to_string()).join("ring");
        let ring = OpenOptions::new().read(true).write(true).open(ring)?;
        Ok(Pages(MmapRegion::from_file(FileOffset::new(ring, 0), 8192)?))
    }

    pub(crate) fn word(&self, at: usize) -> io::Result<&AtomicU32> {
        self.0.get_atomic_ref(at).map_err(io::Error::other)
    }

    /// The two parts of a ring that bytes from an index on occupy.
    fn parts(ring: usize, index: u32, count: usize) -> [(usize, usize); 2] {
        let at = index as usize % RING;
        let first = count.min(RING - at);
        [(ring + at, first), (ring, count - first)]
    }

    pub(crate) fn read(&self, ring: usize, index: u32, bytes: &mut [u8]) -> io::Result<()> {
        let mut to = 0;
        for (at, count) in Pages::parts(ring, index, bytes.len()) {
            let part = self.0.get_slice(at, count).map_err(io::Error::other)?;
            part.copy_to(&mut bytes[to..to + count]);
            to += count;
        }
        Ok(())
    }

    pub(crate) fn write(&self, ring: usize, index: u32, bytes: &[u8]) -> io::Result<()> {
        let mut from = 0;
        for (at, count) in Pages::parts(ring, index, bytes.len()) {
            let part = self.0.get_slice(at, count).map_err(io::Error::other)?;
            part.copy_from(&bytes[from..from + count]);
            from += count;
        }
        Ok(())
    }
}

/// The FIFO through which the guest of a domain is rung.
pub(crate) fn events(xen: &Path, domid: u32) -> io::Result<File> {
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(nonblock);
    options.open(xen.join(domid.to_string()).join("events"))
}

/// A guest's end of its ring.
pub(crate) struct Guest {
    record: [u8; 8],
    pages: Pages,
    events: File,
    doorbell: Arc<File>,
    req_prod: u32,
    rsp_cons: u32,
}

impl Guest {
    /// Takes up a domain that has been made.
    pub(crate) fn open(xen: &Path, domid: u32, doorbell: &Arc<File>) -> Result<Guest> {
        let mut record = [0; 8];
        record[..4].copy_from_slice(&domid.to_le_bytes());
        record[4..].copy_from_slice(&PORT.to_le_bytes());
        let pages = Pages::open(xen, domid)?;
        let req_prod = pages.word(REQ_PROD)?.load(Ordering::Acquire);
        let rsp_cons = pages.word(RSP_CONS)?.load(Ordering::Acquire);
        let (events, doorbell) = (events(xen, domid)?, doorbell.clone());
        Ok(Guest { record, pages, events, doorbell, req_prod, rsp_cons })
    }

    fn kick(&self) -> io::Result<()> {
        if self.pages.word(TO_DAEMON)?.swap(1, Ordering::SeqCst) == 0 {
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
        self.pages.word(TO_GUEST)?.swap(0, Ordering::SeqCst); // before looking at the ring
        let produced = self.pages.word(RSP_PROD)?.load(Ordering::Acquire);
        let there = produced.wrapping_sub(self.rsp_cons);
        let count = there as usize;
        if count > RING || count > room.len() {
            return Err(io::Error::other("the daemon's index is out of range"));
        }
        if count == 0 {
            return Ok(0);
        }
        self.pages.read(REPLIES, self.rsp_cons, &mut room[..count])?;
        self.rsp_cons = produced;
        self.pages.word(RSP_CONS)?.store(self.rsp_cons, Ordering::Release);
        self.kick()?;
        Ok(count)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = self.pages.word(REQ_CONS)?.load(Ordering::Acquire);
        if self.req_prod.wrapping_sub(taken) as usize + bytes.len() > RING {
            return Err(io::Error::other("the ring has no room for the load"));
        }
        self.pages.write(REQUESTS, self.req_prod, bytes)?;
        let count = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.req_prod = self.req_prod.wrapping_add(count);
        self.pages.word(REQ_PROD)?.store(self.req_prod, Ordering::Release);
        self.kick()
    }
}
