//! Crash injection: a process that ends between any two visible operations, for tests.
//!
//! An operation is visible if other processes can observe it, or if it consumes what they have sent: a
//! word of a ring page, an event, bytes of a file. Each calls [`point`] first. With the feature
//! `crash-points`, a test limits their number, and all later operations are skipped. Without the feature
//! all are executed, at no cost.

/// Returns true if the next operation is to be executed.
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

    /// Starts a process on this thread that executes `limit` operations.
    pub fn start(limit: u64) {
        COUNT.set(0);
        LIMIT.set(limit);
    }

    /// Returns true if the next operation is to be executed.
    pub fn point() -> bool {
        COUNT.set(COUNT.get() + 1);
        !is_over()
    }

    /// The number of operations so far, executed or not.
    pub fn count() -> u64 {
        COUNT.get()
    }

    /// Returns true if an operation was skipped.
    pub fn is_over() -> bool {
        COUNT.get() > LIMIT.get()
    }
}

/// Calls `write` with all bytes and offset 0; with `crash-points`, with two parts and their offsets,
/// between which the process can end.
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
