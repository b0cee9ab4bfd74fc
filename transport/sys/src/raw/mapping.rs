//! Memory that other processes write as well.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, mremap, munmap,
};

/// Bytes populated by one system call, which holds the lock of the address space: other threads cannot
/// change mappings, and so may not be able to allocate, until it returns.
const PIECE: usize = 256 << 10;

/// Readable and writable memory, mapped from a file or device, or anonymous. Unmapped when dropped.
///
/// All access is through atomics, except for files that only this process writes: bytes with relaxed
/// ordering, words with the ordering of the caller. Functions panic if a range is not inside the mapping.
#[derive(Debug)]
pub struct Mapping {
    /// Page-aligned, valid for `len` bytes until the value is dropped.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: threads access the memory by atomics, or by `put`, which borrows the value mutably; no other
// part of a `Mapping` changes without a mutable borrow.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, shared with all processes that map them.
    ///
    /// # Errors
    ///
    /// Fails if the file or device cannot be mapped, or the address space is full.
    pub fn shared(file: impl AsFd, offset: u64, len: usize) -> io::Result<Mapping> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses a free range, which only the new value refers to.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, flags, file, offset)? };
        Mapping::new(start, len)
    }

    /// Maps `len` bytes of zeroes, locked into memory.
    ///
    /// # Errors
    ///
    /// Fails if `RLIMIT_MEMLOCK` is reached or there is no memory.
    pub fn locked(len: usize) -> io::Result<Mapping> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: as in `shared`.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags)? };
        let mapping = Mapping::new(start, len)?;
        // SAFETY: the range is that of the mapping.
        unsafe { mlock(start, len)? };
        Ok(mapping)
    }

    /// Populates a range of whole pages, which is cheaper than a page fault for each. Does nothing before
    /// Linux 5.14.
    pub fn populate(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} at {offset}");
        for at in (offset..offset + len).step_by(PIECE) {
            let piece = PIECE.min(offset + len - at);
            // SAFETY: the range is inside the mapping by the check above; its content does not change.
            let _ = unsafe {
                madvise(self.start.as_ptr().add(at).cast(), piece, Advice::LinuxPopulateWrite)
            };
        }
    }

    /// Changes the length; the address may change. The file must have the new length: access beyond its
    /// end raises SIGBUS.
    ///
    /// # Errors
    ///
    /// Fails if the address space is full; the mapping is unchanged then.
    pub fn resize(&mut self, len: usize) -> io::Result<()> {
        // SAFETY: the range is that of the mapping. References into it borrow `self`, which is borrowed
        // mutably here. The old address is not used after a move.
        let start =
            unsafe { mremap(self.start.as_ptr().cast(), self.len, len, MremapFlags::MAYMOVE)? };
        self.start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.len = len;
        Ok(())
    }

    /// The number of mapped bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn new(start: *mut c_void, len: usize) -> io::Result<Mapping> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapping { start, len })
    }

    /// The address, for system calls.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// The word at `offset`, which must be a multiple of 4.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len, "word at {offset}");
        // SAFETY: inside the mapping by the check above, aligned because the start is aligned to a page,
        // valid while `self` is borrowed, and accessed only by atomics.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The two words at `offset`, which must be a multiple of 8.
    pub fn pair(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "two words at {offset}");
        self.eight(offset)
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < self.len);
        // SAFETY: inside by the check of the caller; otherwise as in `word`.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }

    fn eight(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: inside and aligned by the check of the caller; otherwise as in `word`.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The number of bytes of a copy before the first aligned eight, and in aligned eights.
    fn eights(&self, offset: usize, len: usize) -> (usize, usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} at {offset}");
        let head = (offset.next_multiple_of(8) - offset).min(len);
        (head, (len - head) / 8 * 8)
    }

    /// Copies bytes out of the mapping, from `offset` on.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let (head, middle) = self.eights(offset, bytes.len());
        let (head, rest) = bytes.split_at_mut(head);
        let (middle, tail) = rest.split_at_mut(middle);
        let mut at = offset;
        for byte in head {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
        for bytes in middle.as_chunks_mut::<8>().0 {
            *bytes = self.eight(at).load(Ordering::Relaxed).to_ne_bytes();
            at += 8;
        }
        for byte in tail {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
    }

    /// Copies bytes into the mapping, from `offset` on.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let (head, middle) = self.eights(offset, bytes.len());
        let (head, rest) = bytes.split_at(head);
        let (middle, tail) = rest.split_at(middle);
        let mut at = offset;
        for byte in head {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
        for bytes in middle.as_chunks::<8>().0 {
            self.eight(at).store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
            at += 8;
        }
        for byte in tail {
            self.byte(at).store(*byte, Ordering::Relaxed);
            at += 1;
        }
    }

    /// Copies bytes into the mapping without atomics. No other process may write to the file: the caller
    /// has created it for its owner alone, and locked it.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= self.len), "{} at {offset}", bytes.len());
        // SAFETY: inside the mapping by the check above. References into it, and `bytes` if it were one,
        // borrow `self`, which is borrowed mutably here. No other process writes (see above).
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.start.as_ptr().add(offset),
                bytes.len(),
            );
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the range, and references into it borrow the value.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a copy writes or reads another byte than its own.
    #[test]
    fn copy_at_any_alignment_touches_only_its_range() {
        let mapping = Mapping::locked(4096).unwrap();
        let sent: Vec<u8> = (1..=60).collect();
        for offset in 0..20 {
            for len in 0..40 {
                mapping.write(0, &[0; 80]);
                mapping.write(offset, &sent[..len]);
                let mut all = [0xff; 80];
                mapping.read(0, &mut all);
                assert_eq!(&all[offset..offset + len], &sent[..len]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|b| *b == 0));
                let mut part = vec![0; len];
                mapping.read(offset, &mut part);
                assert_eq!(part, &sent[..len]);
            }
        }
    }

    // Fails if a resized mapping is not that of its file, or its bounds are those of before.
    #[test]
    fn resized_mapping_follows_its_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mut mapping = Mapping::shared(&file, 0, 4096).unwrap();
        mapping.put(0, b"begin");
        file.set_len(64 << 20).unwrap();
        mapping.resize(64 << 20).unwrap();
        mapping.put((64 << 20) - 3, b"end");
        mapping.resize(4096).unwrap();
        let mut bytes = [0; 5];
        mapping.read(0, &mut bytes);
        assert_eq!((bytes, mapping.len()), (*b"begin", 4096));
        let read = || mapping.read(4095, &mut [0; 2]);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err());
    }

    // Fails if two mappings of one file differ, or a bound is not checked.
    #[test]
    fn mappings_of_one_file_share_memory() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let (a, b) = (Mapping::shared(&file, 0, 8192), Mapping::shared(&file, 4096, 4096));
        let (a, b) = (a.unwrap(), b.unwrap());
        a.word(4096).store(7, Ordering::Release);
        assert_eq!(b.word(0).load(Ordering::Acquire), 7);
        for wrong in [4096, 4093, 2] {
            let read = || b.word(wrong).load(Ordering::Relaxed);
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err());
        }
        let read = || b.read(4090, &mut [0; 7]);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err());
    }
}
