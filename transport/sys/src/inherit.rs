//! Descriptors that one program hands to the next, which takes its place by exec.
//!
//! Everything that is opened here is close-on-exec. What the next program is to have is named, let
//! through right before, and close-on-exec again as soon as that program has taken it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, fstat, stat};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use crate::xen::EVTCHN_DEVICE;

/// Lets descriptors through to the next program, or no longer. All or none.
pub fn set_inheritable(numbers: &[RawFd], through: bool) -> io::Result<()> {
    all_or_none(numbers, through, crate::raw::set_inheritable)
}

/// Changes something of each descriptor; if one cannot be changed, those before it are changed back.
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

/// Has reads and writes of descriptors wait, for a program that does not make them so itself; or no
/// longer. All or none.
pub fn set_blocking(numbers: &[RawFd], waits: bool) -> io::Result<()> {
    all_or_none(numbers, waits, crate::raw::set_blocking)
}

/// Takes any descriptor that was let through, by its number, once.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    crate::raw::take(number)
}

fn wrong(descriptor: &OwnedFd, what: &str) -> io::Error {
    let number = descriptor.as_raw_fd();
    io::Error::new(io::ErrorKind::InvalidData, format!("descriptor {number} is no {what}"))
}

/// Takes a unix socket: one that listens, or one that is connected.
pub fn adopt_socket(number: RawFd, listens: bool) -> io::Result<OwnedFd> {
    let taken = adopt(number)?;
    let what = if listens { "listening unix socket" } else { "connected unix socket" };
    let is_unix =
        socket_domain(&taken).is_ok_and(|family| family == rustix::net::AddressFamily::UNIX);
    let as_wanted = socket_acceptconn(&taken).is_ok_and(|found| found == listens);
    if is_unix && as_wanted { Ok(taken) } else { Err(wrong(&taken, what)) }
}

/// Is this the event channel device?
pub fn evtchn(taken: OwnedFd) -> io::Result<OwnedFd> {
    let (found, device) = (fstat(&taken)?, stat(EVTCHN_DEVICE)?);
    let same = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == device.st_rdev;
    if same { Ok(taken) } else { Err(wrong(&taken, "event channel device")) }
}
