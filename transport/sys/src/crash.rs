//! A process that ends between any two operations, for tests.
//!
//! Whatever others can see of a process, or it takes from them — a word in a page, an event, bytes
//! of a file — asks here first. With the feature `crash-points` a test says how many are to happen;
//! after these, nothing does. Without it all happen, and nothing is asked.

/// Does the next operation happen?
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub const fn point() -> bool {
    true
}

#[cfg(feature = "crash-points")]
pub use counted::{count, is_over, point, start};

#[cfg(feature = "crash-points")]
mod counted {
    use std::cell::Cell;

    thread_local! {
        static COUNT: Cell<u64> = const { Cell::new(0) };
        static LIMIT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Another process begins on this thread, of which so many operations happen.
    pub fn start(limit: u64) {
        COUNT.set(0);
        LIMIT.set(limit);
    }

    /// Does the next operation happen?
    pub fn point() -> bool {
        COUNT.set(COUNT.get() + 1);
        !is_over()
    }

    /// How many have been asked for.
    pub fn count() -> u64 {
        COUNT.get()
    }

    /// Has one not happened?
    pub fn is_over() -> bool {
        COUNT.get() > LIMIT.get()
    }
}

/// Writes bytes, given their place among all, at once; or in a test in two parts, between which a
/// process can end.
pub fn in_parts(bytes: &[u8], mut write: impl FnMut(usize, &[u8])) {
    let middle = if cfg!(feature = "crash-points") { bytes.len() / 2 } else { 0 };
    let (first, second) = bytes.split_at(middle);
    if !first.is_empty() && point() {
        write(0, first);
    }
    if point() {
        write(middle, second);
    }
}
