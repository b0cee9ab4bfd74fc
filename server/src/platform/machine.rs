//! Access to the hypervisor, or with the feature `test-doubles` to a pretend Xen made of files.

use std::io;

use xenstore_transport::driver::Driver;
#[cfg(any(test, feature = "test-doubles"))]
use xenstore_transport::xen::pretend;
use xenstore_transport::xen::{self, Inherited, Machine};

use crate::daemon::options::Options;

/// Opens the devices of Xen.
///
/// # Errors
///
/// Fails if this is not a Xen host, or a device cannot be used.
pub(crate) fn open(
    options: &Options,
    driver: &Driver,
    inherited: Option<Inherited>,
) -> io::Result<Machine> {
    match options.pretend_xen() {
        #[cfg(any(test, feature = "test-doubles"))]
        Some(dir) => pretend::open(dir, driver, inherited),
        _ => xen::host(driver, inherited),
    }
}

/// Checks that the devices can be opened. Binds and changes nothing.
///
/// # Errors
///
/// Fails if [`open`] would fail.
pub(crate) fn probe(options: &Options) -> io::Result<()> {
    match options.pretend_xen() {
        #[cfg(any(test, feature = "test-doubles"))]
        Some(dir) => pretend::probe(dir),
        _ => xen::probe(),
    }
}
