//! Ring pages: by grant through `/dev/xen/gntdev`, by frame through `/dev/xen/privcmd`, and that of
//! this domain's kernel through xenfs.

use std::fs::File;
use std::io;
use std::sync::Arc;

use xenstore_protocol::ring::{Side, Word};
use xenstore_protocol::{DomId, EvtchnPort, Gfn};
use xenstore_sys::xen::{self, GNTDEV_DEVICE, PRIVCMD_DEVICE};
use xenstore_sys::{Mapping, crash};

use super::Memory;
use crate::ring::{self, Page};

const OWN_PAGE: &str = "/proc/xen/xsd_kva";
const OWN_PORT: &str = "/proc/xen/xsd_port";

/// The grant that domain builders reserve for the ring page (`GNTTAB_RESERVED_XENSTORE`).
const RESERVED_XENSTORE: u32 = 1;
const PAGE_SIZE: usize = 4096;

/// A ring page, mapped and shared with its guest.
#[derive(Debug)]
pub struct SharedPage {
    mapping: Mapping,
    /// Dropped after the mapping: the kernel refuses to release a grant that is mapped.
    _grant: Option<Grant>,
}

impl SharedPage {
    /// A page that is mapped without a grant.
    pub(super) fn new(mapping: Mapping) -> SharedPage {
        SharedPage { mapping, _grant: None }
    }
}

impl Page for SharedPage {
    fn load(&self, word: Word) -> u32 {
        self.mapping.word(word.offset()).load(ring::READ)
    }

    fn store(&self, word: Word, value: u32) {
        if crash::point() {
            self.mapping.word(word.offset()).store(value, ring::WRITE);
        }
    }

    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        self.mapping.read(side.offset() + at, bytes);
    }

    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        crash::in_parts(bytes, |from, part| self.mapping.write(side.offset() + at + from, part));
    }
}

/// The kernel's record of a mapped grant; released when dropped.
#[derive(Debug)]
struct Grant {
    gntdev: Arc<File>,
    offset: u64,
}

impl Drop for Grant {
    fn drop(&mut self) {
        let _ = xen::unmap_grant_ref(&*self.gntdev, self.offset);
    }
}

/// The devices that map ring pages.
#[derive(Debug)]
pub(crate) struct Devices {
    gntdev: Arc<File>,
}

impl Devices {
    pub(crate) fn open() -> io::Result<Devices> {
        Ok(Devices { gntdev: Arc::new(xen::open(GNTDEV_DEVICE)?) })
    }

    fn map_grant(&self, domid: DomId) -> io::Result<SharedPage> {
        let offset = xen::map_grant_ref(&*self.gntdev, domid.0, RESERVED_XENSTORE)?;
        let grant = Grant { gntdev: self.gntdev.clone(), offset };
        let mapping = Mapping::shared(&*self.gntdev, offset, PAGE_SIZE)?;
        Ok(SharedPage { mapping, _grant: Some(grant) })
    }
}

impl Memory for Devices {
    fn own_ring(&mut self) -> io::Result<(SharedPage, EvtchnPort)> {
        let port = std::fs::read_to_string(OWN_PORT)
            .map_err(|error| io::Error::new(error.kind(), format!("{OWN_PORT}: {error}")))?;
        let port = port.trim().parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{OWN_PORT}: not a port: {port:?}"))
        })?;
        let mapping = Mapping::shared(&xen::open(OWN_PAGE)?, 0, PAGE_SIZE)?;
        Ok((SharedPage::new(mapping), EvtchnPort(port)))
    }

    fn map_ring(&mut self, domid: DomId, gfn: Gfn) -> io::Result<SharedPage> {
        let by_grant = self.map_grant(domid);
        let Err(error) = by_grant else { return by_grant };
        if gfn == Gfn(0) {
            return Err(error);
        }
        // Domain builders before Xen 4.2, and some of other projects, make no grant.
        let privcmd = xen::open(PRIVCMD_DEVICE);
        let by_frame = privcmd.and_then(|privcmd| xen::map_frame(&privcmd, domid.0, gfn.0));
        by_frame.map(SharedPage::new).map_err(|_| error)
    }
}
