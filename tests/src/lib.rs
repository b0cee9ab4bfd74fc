//! The project's tests, and tools to test any XenStore daemon.
//!
//! * [`raw`]: a client in bytes. It shares no code with the `protocol` crate, and so no bugs.
//! * [`peers`]: runs C xenstored, oxenstored and this project's daemon, without Xen.
//! * [`fake_guest`]: a guest on the pretend Xen, which uses its ring.
//! * [`fdstore`]: a test double for the descriptor store of systemd.
//! * [`served`]: the daemon's server over memory, in this process.
//! * [`target`]: one interface for all systems under test.
//! * [`attacks`]: guests that try to delay other guests.
//! * [`conformance`]: the cases, and the code that runs them.
//! * [`model`]: a naive XenStore as oracle, and [`fuzzing`], which compares the engine with it.
#![allow(clippy::print_stdout, clippy::print_stderr)] // test output

#[cfg(feature = "daemons")]
pub mod attacks;
#[cfg(feature = "daemons")]
pub mod conformance;
#[cfg(feature = "daemons")]
pub mod fake_guest;
#[cfg(feature = "daemons")]
pub mod fdstore;
pub mod fuzzing;
pub mod model;
#[cfg(feature = "daemons")]
pub mod peers;
pub mod raw;
#[cfg(feature = "daemons")]
pub mod served;
#[cfg(feature = "daemons")]
pub mod target;

/// Reports that a test is skipped. Panics if `XENSTORE_TESTS_REQUIRE` is set, as it is where all
/// needed packages are installed.
pub fn skip(what: &str, why: &str) {
    assert!(std::env::var_os("XENSTORE_TESTS_REQUIRE").is_none(), "{what} cannot run: {why}");
    eprintln!("SKIPPED {what}: {why}");
}
