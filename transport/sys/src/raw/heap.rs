//! The heap as a whole.

#[cfg(target_env = "gnu")]
mod glibc {
    // SAFETY: declared as in malloc.h; it only gives back pages that hold nothing, under the
    // allocator's own locks, and may be called at any time.
    unsafe extern "C" {
        pub(super) safe fn malloc_trim(pad: usize) -> core::ffi::c_int;
    }
}

/// Gives memory that is free back to the system. The allocator of glibc keeps it otherwise, as long
/// as anything is in use behind it. Does nothing with other C libraries. Takes some milliseconds for
/// each 100,000 pieces that have been freed.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    glibc::malloc_trim(0);
}
