//! Descriptors passed from one program to the next through `exec`.
//!
//! All descriptors of the daemon are close-on-exec. Before `exec` it makes those of the next program
//! inheritable, and the next program makes each close-on-exec when it adopts it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, fstat, stat};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use crate::xen::EVTCHN_DEVICE;

/// Makes descriptors inheritable or close-on-exec: all of them, or none if one fails.
///
/// # Errors
///
/// `EBADF` if a descriptor is not open.
pub fn set_inheritable(numbers: &[RawFd], inheritable: bool) -> io::Result<()> {
    all_or_none(numbers, inheritable, crate::raw::set_inheritable)
}

/// Changes each descriptor; if one fails, changes the ones before it back.
fn all_or_none(
    numbers: &[RawFd],
    to: bool,
    change: fn(RawFd, bool) -> io::Result<()>,
) -> io::Result<()> {
    for (done, number) in numbers.iter().enumerate() {
        if let Err(error) = change(*number, to) {
            for undone in &numbers[..done] {
                let _ = change(*undone, !to);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Makes descriptors blocking, for a program that expects them so, or non-blocking: all of them, or none
/// if one fails.
///
/// # Errors
///
/// `EBADF` if a descriptor is not open.
pub fn set_blocking(numbers: &[RawFd], blocking: bool) -> io::Result<()> {
    all_or_none(numbers, blocking, crate::raw::set_blocking)
}

/// Adopts an inherited descriptor, once, and makes it close-on-exec.
///
/// # Errors
///
/// Fails if the descriptor is not open or not inheritable: then this program has opened or adopted it.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    crate::raw::adopt(number)
}

fn wrong(descriptor: &OwnedFd, what: &str) -> io::Error {
    let number = descriptor.as_raw_fd();
    io::Error::new(io::ErrorKind::InvalidData, format!("descriptor {number} is not a {what}"))
}

/// Adopts a unix socket that listens, or one that is connected.
///
/// # Errors
///
/// Fails like [`adopt`], or if the descriptor is something else; it is closed then.
pub fn adopt_socket(number: RawFd, listens: bool) -> io::Result<OwnedFd> {
    let socket = adopt(number)?;
    let what = if listens { "listening unix socket" } else { "connected unix socket" };
    let is_unix =
        socket_domain(&socket).is_ok_and(|family| family == rustix::net::AddressFamily::UNIX);
    let as_wanted = socket_acceptconn(&socket).is_ok_and(|found| found == listens);
    if is_unix && as_wanted { Ok(socket) } else { Err(wrong(&socket, what)) }
}

/// Checks that an inherited descriptor is the event channel device.
///
/// # Errors
///
/// Fails if it is not, or if there is no such device.
pub fn evtchn(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    let (found, device) = (fstat(&descriptor)?, stat(EVTCHN_DEVICE)?);
    let same = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == device.st_rdev;
    if same { Ok(descriptor) } else { Err(wrong(&descriptor, "event channel device")) }
}
