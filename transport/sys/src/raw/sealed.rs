//! Memory that does not change while it is read.

use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

const PAGE: usize = 4096;

/// The bytes of a sealed `memfd`, or of a file of our own, where the kernel has them. Unmapped when
/// dropped.
#[derive(Debug)]
pub struct Sealed {
    /// Valid for `len` bytes until the value is dropped; nobody writes there.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: nothing in it changes.
unsafe impl Send for Sealed {}
// SAFETY: as above.
unsafe impl Sync for Sealed {}

impl Sealed {
    /// Maps all of it. Fails if it is not sealed against writing and shrinking, or empty.
    pub fn map(memory: impl AsFd) -> io::Result<Sealed> {
        let seals = fcntl_get_seals(&memory)?;
        if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it can be changed"));
        }
        // Private, since older kernels refuse to share what is sealed; nothing is written either way.
        Sealed::all_of(memory, MapFlags::PRIVATE | MapFlags::POPULATE)
    }

    /// Maps all of a file that no other user may open and that this process has locked; it must not
    /// write to the file while this value exists. Fails if the file is empty.
    pub fn map_own(file: impl AsFd) -> io::Result<Sealed> {
        Sealed::all_of(file, MapFlags::SHARED)
    }

    fn all_of(memory: impl AsFd, flags: MapFlags) -> io::Result<Sealed> {
        let len = usize::try_from(fstat(&memory)?.st_size).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses a place that is free, and nobody knows of it but the value
        // that is made here.
        let start = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, &memory, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Sealed { start, len })
    }

    /// What lies before this byte is not needed soon: it does not count as memory of this process until
    /// it is read again. Of a file of our own.
    pub fn set_aside(&self, end: usize) {
        let len = end.min(self.len) / PAGE * PAGE;
        // SAFETY: the range is inside of the mapping, which is shared, so that its content stays.
        let _ = unsafe { madvise(self.start.as_ptr().cast(), len, Advice::LinuxDontNeed) };
    }
}

impl Deref for Sealed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped and readable as long as `self` is borrowed. The seals, which cannot
        // be removed, prevent any process from writing to the memory or shortening it. A file of this
        // daemon is not written by other users (mode), by another daemon (lock), or by this process,
        // which the caller of `map_own` guarantees.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us, and every reference into it has ended with `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::*;

    // Fails if memory that somebody can still change is taken for constant.
    #[test]
    fn only_what_is_sealed_is_mapped() {
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
