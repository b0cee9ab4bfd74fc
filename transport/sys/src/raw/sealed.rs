//! Memory that does not change while it is mapped.

use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

const PAGE: usize = 4096;

/// The mapped bytes of a sealed `memfd`, or of a file that only this process writes. Unmapped when
/// dropped.
#[derive(Debug)]
pub struct Sealed {
    /// Valid for `len` bytes until the value is dropped; never written.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory and the fields do not change.
unsafe impl Send for Sealed {}
// SAFETY: as above.
unsafe impl Sync for Sealed {}

impl Sealed {
    /// Maps a sealed `memfd`.
    ///
    /// # Errors
    ///
    /// Fails if it is empty, or not sealed against writing and shrinking.
    pub fn map(memory: impl AsFd) -> io::Result<Sealed> {
        let seals = fcntl_get_seals(&memory)?;
        if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not sealed against changes"));
        }
        // Private: kernels before 6.7 refuse a shared mapping of a write-sealed memfd.
        Sealed::all_of(memory, MapFlags::PRIVATE | MapFlags::POPULATE)
    }

    /// Maps a file that only this user can access and that this process has locked. The caller must not
    /// write to the file while this value exists.
    ///
    /// # Errors
    ///
    /// Fails if the file is empty.
    pub fn map_own(file: impl AsFd) -> io::Result<Sealed> {
        Sealed::all_of(file, MapFlags::SHARED)
    }

    fn all_of(memory: impl AsFd, flags: MapFlags) -> io::Result<Sealed> {
        let len = usize::try_from(fstat(&memory)?.st_size).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses a free range, which only the new value refers to.
        let start = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, &memory, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Sealed { start, len })
    }

    /// Removes the pages before this byte from the memory of this process until they are read again.
    /// Only for a file ([`Sealed::map_own`]).
    pub fn set_aside(&self, end: usize) {
        let len = end.min(self.len) / PAGE * PAGE;
        // SAFETY: the range is inside the mapping. The content is in the file, or in the memfd.
        let _ = unsafe { madvise(self.start.as_ptr().cast(), len, Advice::LinuxDontNeed) };
    }
}

impl Deref for Sealed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped and readable while `self` is borrowed. Seals cannot be removed; they
        // prevent all processes from writing to the memory or shortening it. A file of this daemon is
        // not written by other users (mode), by another daemon (lock), or by this process (the caller of
        // `map_own`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: this value owns the range, and references into it borrow the value.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::*;

    // Fails if memory that a process can still change is mapped.
    #[test]
    fn memory_without_both_seals_is_refused() {
        let memory = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let mut file = File::from(memory.unwrap());
        file.write_all(b"state").unwrap();
        for seals in [SealFlags::empty(), SealFlags::WRITE] {
            fcntl_add_seals(&file, seals).unwrap();
            assert!(Sealed::map(&file).is_err(), "{seals:?}");
        }
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let mapped = Sealed::map(&file).unwrap();
        drop(file);
        assert_eq!(&*mapped, b"state");
        assert!(Sealed::map(tempfile::tempfile().unwrap()).is_err(), "a file");
    }
}
