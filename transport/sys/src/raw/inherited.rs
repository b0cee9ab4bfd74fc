//! Inherited descriptors.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd, ioctl_fionbio};

/// Adopts an inherited descriptor and makes it close-on-exec. The missing flag proves that the
/// descriptor has no owner: all descriptors that this program opens or adopts are close-on-exec. The
/// standard descriptors (0 to 2) are never adopted.
pub(crate) fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    let none =
        || io::Error::new(io::ErrorKind::NotFound, format!("descriptor {number} is not inherited"));
    if number <= 2 {
        return Err(none());
    }
    // SAFETY: not -1; borrowed for two calls that fail if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    match fcntl_getfd(borrowed) {
        Ok(flags) if !flags.contains(FdFlags::CLOEXEC) => fcntl_setfd(borrowed, FdFlags::CLOEXEC)?,
        Ok(_) | Err(Errno::BADF) => return Err(none()),
        Err(error) => return Err(error.into()),
    }
    // SAFETY: open and not close-on-exec until now, so it was inherited and has no owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes a descriptor inheritable or close-on-exec. Its owner in this program remains the owner.
pub(crate) fn set_inheritable(number: RawFd, inheritable: bool) -> io::Result<()> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = if inheritable { FdFlags::empty() } else { FdFlags::CLOEXEC };
    // SAFETY: not -1; borrowed for one call, which changes a flag or fails if the number is not open.
    Ok(fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, flags)?)
}

/// Makes a descriptor blocking or non-blocking.
pub(crate) fn set_blocking(number: RawFd, blocking: bool) -> io::Result<()> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: not -1; borrowed for one call, which changes a flag or fails if the number is not open.
    Ok(ioctl_fionbio(unsafe { BorrowedFd::borrow_raw(number) }, !blocking)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    // Fails if a descriptor with an owner can be adopted, or one that is not open.
    #[test]
    fn inherited_descriptor_is_adopted_once() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        assert!(adopt(number).is_err(), "it has an owner");
        set_inheritable(number, true).unwrap();
        // An inherited descriptor has no owner in this program.
        std::mem::forget(file);
        let adopted = adopt(number).unwrap();
        assert!(fcntl_getfd(&adopted).unwrap().contains(FdFlags::CLOEXEC));
        assert!(adopt(number).is_err(), "twice");
        for wrong in [-1, 0, 2, 99_999] {
            assert!(adopt(wrong).is_err(), "{wrong}");
        }
    }
}
