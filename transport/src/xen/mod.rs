//! The parts of Xen that a XenStore daemon needs, behind traits: event channels, ring pages, and the
//! domains of the host.
//!
//! [`host`] uses the devices of Linux, without the libraries of Xen, on Xen 4.14 and later. With the
//! feature `test-doubles`, `pretend` is a Xen of files, for tests on machines without Xen.

mod domctl;
mod doorbell;
mod evtchn;
mod memory;
#[cfg(any(test, feature = "test-doubles"))]
pub mod pretend;
mod stored_ports;

use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::io::Errno;
use xenstore_protocol::{DomId, EvtchnPort, Gfn};
pub use xenstore_sys::xen::EVTCHN_DEVICE;

use crate::driver::Driver;
use crate::ring::{Ring, RingChannel};

pub use domctl::{Roles, roles};
pub use doorbell::EvtchnDoorbell;
pub use memory::SharedPage;
pub use stored_ports::{Channel, Released, StoredPorts};

/// The virtual interrupt for a domain that changes its state.
const VIRQ_DOM_EXC: u32 = 3;

/// The channel of a domain's ring.
pub type XenRingChannel = RingChannel<SharedPage, EvtchnDoorbell>;
/// The ring of a domain.
pub type XenRing = Ring<SharedPage, EvtchnDoorbell>;

/// The event channels of this domain.
pub trait Evtchn: Debug + Send + Sync {
    /// Binds a local port to a port of a domain; returns the local port.
    ///
    /// # Errors
    ///
    /// Fails if the remote port does not exist, is not open to this domain, or is bound already.
    fn bind(&self, domid: DomId, remote: EvtchnPort) -> io::Result<EvtchnPort>;

    /// Binds a local port to `VIRQ_DOM_EXC`; returns the port.
    ///
    /// # Errors
    ///
    /// Fails if another port is bound to it.
    fn bind_domain_exc(&self) -> io::Result<EvtchnPort>;

    /// Closes a local port.
    ///
    /// # Errors
    ///
    /// Fails if the port is not bound.
    fn unbind(&self, port: EvtchnPort) -> io::Result<()>;

    /// Sends an event to the remote end of a port.
    ///
    /// # Errors
    ///
    /// Fails if the port is not bound.
    fn notify(&self, port: EvtchnPort) -> io::Result<()>;

    /// Waits for events and appends their ports to `out`. The ports are masked until [`Evtchn::unmask`].
    ///
    /// # Errors
    ///
    /// Fails with [`FileTooLarge`](io::ErrorKind::FileTooLarge) if the queue has overflowed: any port may
    /// have an event.
    fn poll_ports(&self, cx: &mut Context<'_>, out: &mut Vec<EvtchnPort>) -> Poll<io::Result<()>>;

    /// The descriptor of the device, for the next process.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Unmasks ports.
    ///
    /// # Errors
    ///
    /// Fails if a port is not bound.
    fn unmask(&self, ports: &[EvtchnPort]) -> io::Result<()>;
}

/// The ring pages of domains.
pub trait Memory: Debug {
    /// Maps the ring page of this domain's kernel; returns it with the port of the kernel.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not export the page (`/proc/xen/xsd_kva`).
    fn own_ring(&mut self) -> io::Result<(SharedPage, EvtchnPort)>;

    /// Maps the ring page of a domain: by the reserved grant, or by its frame if the domain builder has
    /// made no grant. Frame 0 means unknown.
    ///
    /// # Errors
    ///
    /// Fails if neither can be mapped.
    fn map_ring(&mut self, domid: DomId, gfn: Gfn) -> io::Result<SharedPage>;
}

/// The status of a domain that exists and is not dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainStatus {
    /// Distinguishes domains with the same domid. `None` on Xen before 4.21.
    pub unique_id: Option<u64>,
    /// The domain has shut down or crashed.
    pub shutdown: bool,
}

/// The domains of the host.
pub trait Domains: Debug {
    /// Returns the status of a domain, or `None` if it does not exist or is dead.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor refuses the call.
    fn domain(&mut self, domid: DomId) -> io::Result<Option<DomainStatus>>;

    /// Returns all domains, in any order. `VIRQ_DOM_EXC` must be bound.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor refuses the call.
    fn all(&mut self) -> io::Result<Vec<DomId>>;
}

/// A Xen host.
#[derive(Debug)]
pub struct Machine {
    /// Event channels.
    pub evtchn: Arc<dyn Evtchn>,
    /// Ring pages.
    pub memory: Box<dyn Memory>,
    /// Domains.
    pub domains: Box<dyn Domains>,
    /// The ports that are bound in a device from systemd ([`Inherited::Stored`]).
    pub stored_ports: Option<StoredPorts>,
}

/// An event channel device from an earlier process. All ports that it has bound are still bound.
#[derive(Debug)]
pub enum Inherited {
    /// From a process that says which ports are bound.
    HandedOver(OwnedFd),
    /// From the descriptor store of systemd: the bound ports have to be found out.
    Stored(OwnedFd),
}

/// Opens the devices of this host: with no ports bound, or with an inherited event channel device.
///
/// # Errors
///
/// The error names the device that is missing or refuses.
pub fn host(driver: &Driver, inherited: Option<Inherited>) -> io::Result<Machine> {
    let is_stored = matches!(inherited, Some(Inherited::Stored(_)));
    let evtchn = match inherited {
        Some(Inherited::HandedOver(device) | Inherited::Stored(device)) => {
            evtchn::Device::adopt(device, driver)?
        }
        None => evtchn::Device::open(driver)?,
    };
    let stored_ports = is_stored.then(|| StoredPorts::find(&evtchn));
    Ok(Machine {
        evtchn: Arc::new(evtchn),
        memory: Box::new(memory::Devices::open()?),
        domains: Box::new(domctl::Hypervisor::open()?),
        stored_ports,
    })
}

/// Checks that the devices that [`host`] uses can be opened. Binds and changes nothing.
///
/// # Errors
///
/// The error names the device that is missing or cannot be opened.
pub fn probe() -> io::Result<()> {
    evtchn::Device::open(&Driver::new()?)?;
    memory::Devices::open()?;
    domctl::Hypervisor::open().map(drop)
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}
