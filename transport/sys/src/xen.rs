//! Calls of the Xen devices of Linux: `evtchn`, `gntdev` and `privcmd`.
//!
//! Numbers are those of the kernel's and the hypervisor's headers. Each function fails with the error
//! of the kernel or the hypervisor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::Opcode;

use crate::raw::{Mapping, call, hypercall};

pub use crate::raw::map_frame;

/// The event channel device; it exists on every Xen host.
pub const EVTCHN_DEVICE: &str = "/dev/xen/evtchn";
/// The device that maps grants.
pub const GNTDEV_DEVICE: &str = "/dev/xen/gntdev";
/// The device for hypercalls and mappings of frames.
pub const PRIVCMD_DEVICE: &str = "/dev/xen/privcmd";
/// Memory for arguments of hypercalls that stays in place; since Linux 4.18.
const HYPERCALL_DEVICE: &str = "/dev/xen/hypercall";
const PAGE_SIZE: usize = 4096;

/// `IOCTL_EVTCHN_*` of `xen/evtchn.h`.
const BIND_VIRQ: Opcode = 0x0004_4500;
const BIND_INTERDOMAIN: Opcode = 0x0008_4501;
const UNBIND: Opcode = 0x0004_4503;
const NOTIFY: Opcode = 0x0004_4504;
const RESET: Opcode = 0x0000_4505;
/// `IOCTL_GNTDEV_*` of `xen/gntdev.h`.
const MAP_GRANT_REF: Opcode = 0x0018_4700;
const UNMAP_GRANT_REF: Opcode = 0x0010_4701;

/// `__HYPERVISOR_event_channel_op`, and its command `EVTCHNOP_status`.
const EVENT_CHANNEL_OP: u32 = 32;
const STATUS: u32 = 5;
/// `__HYPERVISOR_domctl`.
const DOMCTL: u32 = 36;
/// `DOMID_SELF`.
const SELF: u16 = 0x7ff0;

/// Bytes of `struct xen_domctl`: command, interface version, domid, and from byte 16 on the argument of
/// the command.
pub const DOMCTL_SIZE: usize = 16 + 128;
/// Bytes of `struct evtchn_status`: domid, port, status, vCPU, and from byte 16 on the remote end.
pub const STATUS_SIZE: usize = 24;

/// Opens a device for reading and writing.
///
/// # Errors
///
/// The error names the device.
pub fn open(device: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(device);
    file.map_err(|error| io::Error::new(error.kind(), format!("{device}: {error}")))
}

fn bound(port: i32) -> io::Result<u32> {
    u32::try_from(port).map_err(|_| io::Error::other(format!("the kernel returned port {port}")))
}

/// Binds a local port to a port of a domain; returns the local port.
///
/// # Errors
///
/// `EINVAL` if the remote port is not open to this domain or is bound already.
pub fn bind_interdomain(evtchn: impl AsFd, domid: u16, remote: u32) -> io::Result<u32> {
    bound(call(evtchn, BIND_INTERDOMAIN, &mut [domid.into(), remote])?)
}

/// Binds a local port to a virtual interrupt; returns the port.
///
/// # Errors
///
/// `EEXIST` if another port is bound to it.
pub fn bind_virq(evtchn: impl AsFd, virq: u32) -> io::Result<u32> {
    bound(call(evtchn, BIND_VIRQ, &mut [virq, 0])?)
}

/// Closes a port.
///
/// # Errors
///
/// `ENOTCONN` or `EINVAL` if this device has not bound the port.
pub fn unbind(evtchn: impl AsFd, port: u32) -> io::Result<()> {
    call(evtchn, UNBIND, &mut [port]).map(drop)
}

/// Sends an event to the remote end of a port.
///
/// # Errors
///
/// `ENOTCONN` if this device has not bound the port.
pub fn notify(evtchn: impl AsFd, port: u32) -> io::Result<()> {
    call(evtchn, NOTIFY, &mut [port]).map(drop)
}

/// Empties the queue of events after an overflow.
///
/// # Errors
///
/// Fails if the descriptor is not the device.
pub fn reset(evtchn: impl AsFd) -> io::Result<()> {
    call(evtchn, RESET, &mut []).map(drop)
}

/// Prepares the mapping of one granted page; returns its offset in the device.
///
/// # Errors
///
/// Fails if the kernel has no room. An invalid grant fails when it is mapped.
pub fn map_grant_ref(gntdev: impl AsFd, domid: u16, reference: u32) -> io::Result<u64> {
    // Count, padding, offset (set by the kernel), domid and reference of the only grant.
    let mut argument = [1, 0, 0, 0, domid.into(), reference];
    call(gntdev, MAP_GRANT_REF, &mut argument)?;
    Ok(u64::from(argument[3]) << 32 | u64::from(argument[2]))
}

/// Releases the grant at an offset, after its mapping is gone.
///
/// # Errors
///
/// `ENOENT` if there is no grant.
pub fn unmap_grant_ref(gntdev: impl AsFd, offset: u64) -> io::Result<()> {
    let [low, high] = crate::raw::halves(offset);
    call(gntdev, UNMAP_GRANT_REF, &mut [low, high, 1, 0]).map(drop)
}

/// The commands of `__HYPERVISOR_domctl` that the daemon uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomctlCommand {
    /// `XEN_DOMCTL_getdomaininfo`.
    GetDomainInfo = 5,
    /// `XEN_DOMCTL_get_domain_state`, since Xen 4.21.
    GetDomainState = 90,
}

/// Makes hypercalls, one at a time.
#[derive(Debug)]
pub struct Hypercalls {
    privcmd: File,
    buffer: Mapping,
}

impl Hypercalls {
    /// Opens the devices.
    ///
    /// # Errors
    ///
    /// The error says which device cannot be opened, or that there is no memory that can be locked.
    pub fn open() -> io::Result<Hypercalls> {
        let privcmd = open(PRIVCMD_DEVICE)?;
        let buffer = match open(HYPERCALL_DEVICE) {
            Ok(device) => Mapping::shared(&device, 0, PAGE_SIZE),
            Err(_) => Mapping::locked(PAGE_SIZE),
        };
        let buffer = buffer.map_err(|error| {
            io::Error::new(error.kind(), format!("memory for hypercalls: {error}"))
        })?;
        Ok(Hypercalls { privcmd, buffer })
    }

    /// Makes a call about a domain; returns `struct xen_domctl` with the answer.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is no such domain, `EACCES` for another interface version, `EPERM` if this
    /// domain may not make the call.
    pub fn domctl(
        &mut self,
        command: DomctlCommand,
        version: u32,
        domid: u16,
    ) -> io::Result<[u8; DOMCTL_SIZE]> {
        let mut argument = [0; DOMCTL_SIZE];
        argument[..4].copy_from_slice(&(command as u32).to_le_bytes());
        argument[4..8].copy_from_slice(&version.to_le_bytes());
        argument[8..10].copy_from_slice(&domid.to_le_bytes());
        self.call(DOMCTL, None, &mut argument)?;
        Ok(argument)
    }

    /// Asks for the state of a port of this domain; returns `struct evtchn_status`.
    ///
    /// # Errors
    ///
    /// `EINVAL` above the last port of the domain, `EACCES` for a port of the hypervisor.
    pub fn evtchn_status(&mut self, port: u32) -> io::Result<[u8; STATUS_SIZE]> {
        let mut status = status_argument(port);
        self.call(EVENT_CHANNEL_OP, Some(STATUS), &mut status)?;
        Ok(status)
    }

    /// Makes a call, with a command unless it is part of the argument. The hypervisor writes its answer
    /// into the argument.
    fn call(&mut self, number: u32, command: Option<u32>, argument: &mut [u8]) -> io::Result<()> {
        self.buffer.write(0, argument);
        hypercall(&self.privcmd, number, command, &self.buffer)?;
        self.buffer.read(0, argument);
        Ok(())
    }
}

fn status_argument(port: u32) -> [u8; STATUS_SIZE] {
    let mut status = [0; STATUS_SIZE];
    status[..2].copy_from_slice(&SELF.to_le_bytes());
    status[4..8].copy_from_slice(&port.to_le_bytes());
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the argument has another layout than `struct evtchn_status`: dom u16 at 0, port u32 at 4.
    #[test]
    fn status_argument_has_the_layout_of_evtchn_status() {
        assert_eq!(status_argument(0x0102_0304)[..8], [0xf0, 0x7f, 0, 0, 4, 3, 2, 1]);
    }
}
