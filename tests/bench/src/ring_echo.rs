//! The floor of rings: a server that takes what is in a ring and answers it, and does nothing else.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;

use crate::echo::answers;
use crate::meter::Result;
use crate::ring::{
    PORT, Pages, REPLIES, REQ_CONS, REQ_PROD, REQUESTS, RING, RSP_CONS, RSP_PROD, TO_DAEMON,
    TO_GUEST, events, make_fifo,
};

/// The rings of all domains that have rung; none has to be introduced.
pub(crate) struct Rings {
    xen: PathBuf,
    doorbell: File,
    served: BTreeMap<u32, Served>,
    buffer: Vec<u8>,
}

struct Served {
    pages: Pages,
    events: File,
    req_cons: u32,
    rsp_prod: u32,
}

impl Rings {
    /// Those of a pretend Xen in this directory.
    pub(crate) fn new(xen: &Path) -> Result<Rings> {
        std::fs::create_dir_all(xen)?;
        make_fifo(&xen.join("events"))?;
        let doorbell = rustix::fs::open(
            xen.join("events"),
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let (served, buffer) = (BTreeMap::new(), vec![0; 4096]);
        Ok(Rings { xen: xen.to_owned(), doorbell: doorbell.into(), served, buffer })
    }

    /// Can be read when a guest has rung.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }

    /// Answers those who have rung.
    pub(crate) fn answer(&mut self) -> Result<()> {
        let count = (&self.doorbell).read(&mut self.buffer)?;
        for record in self.buffer[..count].as_chunks::<8>().0 {
            let domid = u32::from_le_bytes([record[0], record[1], record[2], record[3]]);
            if !self.served.contains_key(&domid) {
                let (pages, events) = (Pages::open(&self.xen, domid)?, events(&self.xen, domid)?);
                self.served.insert(domid, Served { pages, events, req_cons: 0, rsp_prod: 0 });
            }
            if let Some(served) = self.served.get_mut(&domid) {
                served.answer()?;
            }
        }
        Ok(())
    }
}

impl Served {
    fn answer(&mut self) -> io::Result<()> {
        let mut bytes = [0; RING];
        self.pages.word(TO_DAEMON)?.swap(0, Ordering::SeqCst); // before looking at the ring
        let produced = self.pages.word(REQ_PROD)?.load(Ordering::Acquire);
        let count = produced.wrapping_sub(self.req_cons) as usize;
        if count == 0 || count > RING {
            return Ok(());
        }
        self.pages.read(REQUESTS, self.req_cons, &mut bytes[..count])?;
        let answers = answers(&bytes[..count]);
        let len = u32::try_from(answers.len()).map_err(io::Error::other)?;
        let taken = self.pages.word(RSP_CONS)?.load(Ordering::Acquire);
        if self.rsp_prod.wrapping_sub(taken) as usize + answers.len() > RING {
            return Err(io::Error::other("the ring has no room for the load"));
        }
        self.pages.write(REPLIES, self.rsp_prod, &answers)?;
        (self.req_cons, self.rsp_prod) = (produced, self.rsp_prod.wrapping_add(len));
        self.pages.word(RSP_PROD)?.store(self.rsp_prod, Ordering::Release);
        self.pages.word(REQ_CONS)?.store(self.req_cons, Ordering::Release);
        if self.pages.word(TO_GUEST)?.swap(1, Ordering::SeqCst) == 0 {
            (&self.events).write_all(&PORT.to_le_bytes())?;
        }
        Ok(())
    }
}
