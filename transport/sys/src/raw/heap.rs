//! The heap of the C library.

#[cfg(target_env = "gnu")]
mod glibc {
    // SAFETY: declared as in malloc.h. It releases only unused pages, takes the locks of the allocator,
    // and may be called at any time.
    unsafe extern "C" {
        pub(super) safe fn malloc_trim(pad: usize) -> core::ffi::c_int;
    }
}

/// Returns free heap memory to the system (`malloc_trim`). Otherwise glibc retains free memory below
/// memory that is in use. Takes some milliseconds for each 100,000 freed allocations; does nothing with
/// other C libraries.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    glibc::malloc_trim(0);
}
