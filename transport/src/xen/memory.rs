//! Pages of domains: by grant through `/dev/xen/gntdev`, by frame number through
//! `/dev/xen/privcmd`, and that of our own kernel through xenfs.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::ioctl::Opcode;
use xenstore_sys::Mapping;
use xenstore_sys::ioctl::{call, map_frame};

use super::{Memory, SharedPage};

const GNTDEV: &str = "/dev/xen/gntdev";
const PRIVCMD: &str = "/dev/xen/privcmd";
const OWN_PAGE: &str = "/proc/xen/xsd_kva";
const OWN_PORT: &str = "/proc/xen/xsd_port";

/// Calls of `xen/gntdev.h`.
const MAP_GRANT_REF: Opcode = 0x0018_4700;
const UNMAP_GRANT_REF: Opcode = 0x0010_4701;

/// The grant that domain builders reserve for the ring page (`GNTTAB_RESERVED_XENSTORE`).
const RESERVED_XENSTORE: u32 = 1;
const PAGE_SIZE: usize = 4096;

#[derive(Debug)]
pub(crate) struct Devices {
    gntdev: Arc<File>,
}

/// The kernel's side of a mapped grant.
#[derive(Debug)]
pub(crate) struct Grant {
    gntdev: Arc<File>,
    index: [u32; 2],
}

fn open(path: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(Path::new(path));
    file.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

impl Devices {
    pub(crate) fn open() -> io::Result<Devices> {
        Ok(Devices { gntdev: Arc::new(open(GNTDEV)?) })
    }

    fn map_grant(&self, domid: u16) -> io::Result<SharedPage> {
        // Count, padding, index (from the kernel), domid and reference of the only grant.
        let mut argument = [1, 0, 0, 0, domid.into(), RESERVED_XENSTORE];
        call(&*self.gntdev, MAP_GRANT_REF, &mut argument)?;
        let index = [argument[2], argument[3]];
        // From here on the kernel is told when it is over.
        let grant = Grant { gntdev: self.gntdev.clone(), index };
        let offset = u64::from(index[1]) << 32 | u64::from(index[0]);
        let mapping = Mapping::shared(&*self.gntdev, offset, PAGE_SIZE)?;
        Ok(SharedPage { mapping, _grant: Some(grant) })
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let _ = call(&*self.gntdev, UNMAP_GRANT_REF, &mut [self.index[0], self.index[1], 1, 0]);
    }
}

impl Memory for Devices {
    fn own_ring(&mut self) -> io::Result<(SharedPage, u32)> {
        let port = std::fs::read_to_string(OWN_PORT)
            .map_err(|error| io::Error::new(error.kind(), format!("{OWN_PORT}: {error}")))?;
        let port = port.trim().parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{OWN_PORT}: not a port: {port:?}"))
        })?;
        let mapping = Mapping::shared(&open(OWN_PAGE)?, 0, PAGE_SIZE)?;
        Ok((SharedPage { mapping, _grant: None }, port))
    }

    fn map_ring(&mut self, domid: u16, gfn: u64) -> io::Result<SharedPage> {
        let by_grant = self.map_grant(domid);
        let Err(error) = by_grant else { return by_grant };
        if gfn == 0 {
            return Err(error);
        }
        // Builders before Xen 4.2, and some of other makers, leave no grant.
        let by_frame = open(PRIVCMD).and_then(|privcmd| map_frame(&privcmd, domid, gfn));
        match by_frame {
            Ok(mapping) => Ok(SharedPage { mapping, _grant: None }),
            Err(_) => Err(error),
        }
    }
}
