//! Memory that somebody else writes as well.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, mremap, munmap,
};

/// Bytes populated by one system call. Until it returns, no thread can change mappings, which a thread
/// that allocates may need.
const PIECE: usize = 256 << 10;

/// Memory mapped from a file or device, or anonymous memory, readable and writable. Unmapped when
/// dropped. All access is through atomics, bytes one by one or eight at a time in no particular
/// order, words in the order that the caller asks for; but for [`Mapping::put`].
#[derive(Debug)]
pub struct Mapping {
    /// Page-aligned, valid for `len` bytes until the value is dropped.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory is shared with other processes in any case, and is only touched by atomics,
// which threads may use together, or by `put`, during which nobody else has the value; nothing else
// in a `Mapping` changes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, shared with everybody who maps them.
    pub fn shared(file: impl AsFd, offset: u64, len: usize) -> io::Result<Mapping> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses a place that is free, and nobody knows of it but the value
        // that is made here.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, flags, file, offset)? };
        Mapping::new(start, len)
    }

    /// Maps `len` bytes of zeroes of our own, which stay where they are.
    pub fn locked(len: usize) -> io::Result<Mapping> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: as in `shared`.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags)? };
        let mapping = Mapping::new(start, len)?;
        // SAFETY: the range is that of the mapping.
        unsafe { mlock(start, len)? };
        Ok(mapping)
    }

    /// Asks the kernel to have this range at hand, which must be of whole pages and inside: cheaper at
    /// once than page by page when they are touched. Kernels before 5.14 do not.
    pub fn populate(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} at {offset}");
        for at in (offset..offset + len).step_by(PIECE) {
            let piece = PIECE.min(offset + len - at);
            // SAFETY: the range is inside of the mapping by the check above, and what is in it stays.
            let _ = unsafe {
                madvise(self.start.as_ptr().add(at).cast(), piece, Advice::LinuxPopulateWrite)
            };
        }
    }

    /// Makes it this long, at this or another place. What is mapped and not in the file, which must
    /// have been made long enough, is not to be touched.
    pub fn resize(&mut self, len: usize) -> io::Result<()> {
        // SAFETY: the range is that of the mapping. No reference into it exists, since all of them borrow
        // `self`, which is borrowed mutably here. The old address is not used if the mapping moves.
        let start =
            unsafe { mremap(self.start.as_ptr().cast(), self.len, len, MremapFlags::MAYMOVE)? };
        self.start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.len = len;
        Ok(())
    }

    /// Bytes that are mapped.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn new(start: *mut c_void, len: usize) -> io::Result<Mapping> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapping { start, len })
    }

    /// Where it is, for calls that take an address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// The word at `offset`, which must be a multiple of 4 and inside.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len, "word at {offset}");
        // SAFETY: inside of the mapping by the check above, aligned since its start is aligned to
        // a page, valid as long as `self` is borrowed, and only touched by atomics.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The two words at `offset`, which must be a multiple of 8 and inside.
    pub fn pair(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len, "two words at {offset}");
        self.eight(offset)
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < self.len);
        // SAFETY: callers have checked that it is inside; otherwise as in `word`.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }

    fn eight(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: callers have checked that it is inside and aligned; otherwise as in `word`.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// How many bytes of a copy come before the first eight that are aligned, and how many are in
    /// such.
    fn eights(&self, offset: usize, len: usize) -> (usize, usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} at {offset}");
        let head = (offset.next_multiple_of(8) - offset).min(len);
        (head, (len - head) / 8 * 8)
    }

    /// Copies bytes from `offset` on out of the mapping.
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

    /// Copies bytes into the mapping from `offset` on.
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

    /// The same where nobody else writes: in a file of one's own.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(end.is_some_and(|end| end <= self.len), "{} at {offset}", bytes.len());
        // SAFETY: inside of the mapping by the check above. No thread of ours touches it meanwhile: all
        // that is given out borrows `self`, which this has alone, and `bytes` is not in it for the
        // same reason. No other process writes it: the caller says so.
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
        // SAFETY: the range was mapped by us, and every reference into it has ended with `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a byte is copied to the wrong place, at any alignment.
    #[test]
    fn copies_at_any_alignment_touch_only_what_they_should() {
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

    // Fails if a mapping that has been made longer or shorter is not that of its file, or its bound is
    // not checked any more.
    #[test]
    fn a_mapping_follows_its_file() {
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

    // Fails if two mappings of one file are not the same memory, or a bound is not checked.
    #[test]
    fn mappings_of_a_file_are_shared() {
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
