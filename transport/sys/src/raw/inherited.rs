//! Descriptors that were open before this program started.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd, ioctl_fionbio};

/// Takes a descriptor, by its number, that whoever ran this program has left open, and sets its
/// close-on-exec flag. It can be taken once: what this program opens is close-on-exec from the
/// beginning, so that a number without that flag is nobody's yet. The standard ones are not given.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    let none =
        || io::Error::new(io::ErrorKind::NotFound, format!("no descriptor {number} is left"));
    if number <= 2 {
        return Err(none());
    }
    // SAFETY: borrowed for these two calls only, which do no harm to a number that is not open;
    // it is not -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    match fcntl_getfd(borrowed) {
        Ok(flags) if !flags.contains(FdFlags::CLOEXEC) => fcntl_setfd(borrowed, FdFlags::CLOEXEC)?,
        Ok(_) | Err(Errno::BADF) => return Err(none()),
        Err(error) => return Err(error.into()),
    }
    // SAFETY: it is open and was not close-on-exec, so it has been inherited; and it has not been
    // taken before, since it would be close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets a descriptor through to the next program, or no longer. Nobody takes it in this program: who
/// has it here keeps it.
pub(crate) fn set_inheritable(number: RawFd, through: bool) -> io::Result<()> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = if through { FdFlags::empty() } else { FdFlags::CLOEXEC };
    // SAFETY: borrowed for this call only, which changes a flag, and nothing of a number that is
    // not open.
    Ok(fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, flags)?)
}

/// Has reads and writes of a descriptor wait, or not.
pub(crate) fn set_blocking(number: RawFd, waits: bool) -> io::Result<()> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed for this call only, which changes a flag, and nothing of a number that is
    // not open.
    Ok(ioctl_fionbio(unsafe { BorrowedFd::borrow_raw(number) }, !waits)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    // Fails if a descriptor of this program's own can be taken, or one that is not open, or one
    // twice.
    #[test]
    fn only_what_was_inherited_is_given_and_once() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        assert!(take(number).is_err(), "one of our own");
        set_inheritable(number, true).unwrap();
        // Like one that has been inherited: nobody here answers for it.
        std::mem::forget(file);
        let taken = take(number).unwrap();
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        assert!(take(number).is_err(), "twice");
        for wrong in [-1, 0, 2, 99_999] {
            assert!(take(wrong).is_err(), "{wrong}");
        }
    }
}
