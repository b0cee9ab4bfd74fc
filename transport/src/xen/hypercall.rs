//! Calls of the hypervisor, through `/dev/xen/privcmd`.

use std::fs::{File, OpenOptions};
use std::io;

use xenstore_sys::Mapping;
use xenstore_sys::ioctl::hypercall;

const PRIVCMD: &str = "/dev/xen/privcmd";
/// Memory that stays where it is, for hypercalls; Linux 4.18 and later.
const BUFFERS: &str = "/dev/xen/hypercall";
const PAGE_SIZE: usize = 4096;

/// Makes hypercalls, one at a time.
#[derive(Debug)]
pub(super) struct Hypercalls {
    privcmd: File,
    buffer: Mapping,
}

/// The error with a name before it.
pub(super) fn named(name: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

impl Hypercalls {
    /// An error says what is missing.
    pub(super) fn open() -> io::Result<Hypercalls> {
        let open = |path| OpenOptions::new().read(true).write(true).open(path);
        let privcmd = open(PRIVCMD).map_err(|error| named(PRIVCMD, error))?;
        let buffer = match open(BUFFERS) {
            Ok(device) => Mapping::shared(&device, 0, PAGE_SIZE),
            Err(_) => Mapping::locked(PAGE_SIZE),
        };
        let buffer = buffer.map_err(|error| named("memory for hypercalls", error))?;
        Ok(Hypercalls { privcmd, buffer })
    }

    /// Makes a call, with the number of its command if that does not belong to the argument, into
    /// which the hypervisor puts its answer.
    pub(super) fn call(
        &mut self,
        number: u32,
        command: Option<u32>,
        argument: &mut [u8],
    ) -> io::Result<()> {
        self.buffer.write(0, argument);
        hypercall(&self.privcmd, number, command, &self.buffer)?;
        self.buffer.read(0, argument);
        Ok(())
    }
}
