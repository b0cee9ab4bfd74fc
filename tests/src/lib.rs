//! What the project is tested with, and what anybody can test a XenStore daemon with.
//!
//! * [`raw`]: a client that speaks bytes. It shares no code with the `protocol` crate, so that it
//!   cannot share its mistakes.
//! * [`peers`]: runs C xenstored, oxenstored and our own daemon, without Xen.
//! * [`fake_guest`]: a guest on the pretend Xen of the peers, speaking over its ring.
//! * [`fdstore`]: keeps descriptors while there is no process, as systemd does.
//! * [`target`]: one face for all that can be tested.
//! * [`attacks`]: what guests can do to keep others waiting.
//! * [`conformance`]: the cases, and how they are run.
//! * [`model`]: a naive XenStore as oracle, and [`fuzzing`], which holds ours against it.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it reports to people

pub mod attacks;
pub mod conformance;
pub mod fake_guest;
pub mod fdstore;
pub mod fuzzing;
pub mod model;
pub mod peers;
pub mod raw;
pub mod target;

/// Says loudly that something is not tested here. With `XENSTORE_TESTS_REQUIRE` set, as where
/// everything needed has been installed, it is a failure.
pub fn skip(what: &str, why: &str) {
    assert!(std::env::var_os("XENSTORE_TESTS_REQUIRE").is_none(), "{what} cannot run: {why}");
    eprintln!("SKIPPED {what}: {why}");
}
