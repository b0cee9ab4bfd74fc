//! The part of Xen that a store needs, behind traits: event channels, pages of domains, and which
//! domains there are.
//!
//! [`host`] is the real one, through the devices of Linux and without the libraries of Xen, for any
//! version of Xen from 4.14 on. With the feature
//! `test-doubles`, `pretend` is a Xen of files, for tests on machines without Xen.

mod domctl;
mod evtchn;
mod hypercall;
mod memory;
#[cfg(any(test, feature = "test-doubles"))]
pub mod pretend;
mod stored_ports;

use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use xenstore_protocol::ring::{Side, Word};
use xenstore_sys::{Mapping, crash};

use crate::driver::Driver;
use crate::ring::{self, Doorbell, Page, Ring, RingChannel};

pub use xenstore_sys::inherit::EVTCHN_DEVICE;

/// The virtual interrupt that something has happened to a domain.
const VIRQ_DOM_EXC: u32 = 3;

/// Event channels of this domain.
pub trait Evtchn: Debug + Send + Sync {
    /// Connects to the port of a domain; the port at our end.
    fn bind(&self, domid: u16, remote: u32) -> io::Result<u32>;
    /// Asks to be told when something has happened to a domain (`VIRQ_DOM_EXC`); the port.
    fn bind_domain_exc(&self) -> io::Result<u32>;
    /// Gives a port back.
    fn unbind(&self, port: u32) -> io::Result<()>;
    /// Sends an event to the other end of a port.
    fn notify(&self, port: u32) -> io::Result<()>;
    /// Waits for events and appends the ports that got some. They get no more until they are
    /// unmasked. An error that is [`FileTooLarge`](io::ErrorKind::FileTooLarge) says that any port
    /// may have got one.
    fn poll_ports(&self, cx: &mut Context<'_>, ports: &mut Vec<u32>) -> Poll<io::Result<()>>;
    /// What all ports are bound to, to be handed on.
    fn descriptor(&self) -> BorrowedFd<'_>;
    /// Lets these ports get events again.
    fn unmask(&self, ports: &[u32]) -> io::Result<()>;
}

/// Pages of domains.
pub trait Memory: Debug {
    /// The ring page of this domain's own kernel, and the port that the kernel waits at.
    fn own_ring(&mut self) -> io::Result<(SharedPage, u32)>;
    /// The ring page of a domain: by the grant that is reserved for it, or by the number of its
    /// frame where the domain builder has left no grant; 0 is no frame.
    fn map_ring(&mut self, domid: u16, gfn: u64) -> io::Result<SharedPage>;
}

/// What is known of a domain that exists and is not dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainStatus {
    /// Tells it from an earlier one with this domid; none if this version of Xen does not say.
    pub unique_id: Option<u64>,
    /// It has shut down, for whatever reason.
    pub shutdown: bool,
}

/// Which domains there are.
pub trait Domains: Debug {
    /// Looks at a domain; none if there is no such domain or it is dead.
    fn domain(&mut self, domid: u16) -> io::Result<Option<DomainStatus>>;
    /// The domids of all domains, in any order. To be asked once `VIRQ_DOM_EXC` is bound.
    fn all(&mut self) -> io::Result<Vec<u16>>;
}

/// All of it.
#[derive(Debug)]
pub struct Machine {
    /// Event channels.
    pub evtchn: Arc<dyn Evtchn>,
    /// Pages.
    pub memory: Box<dyn Memory>,
    /// Domains.
    pub domains: Box<dyn Domains>,
    /// What is bound already, if that is to be found out.
    pub stored_ports: Option<StoredPorts>,
}

pub use domctl::{Roles, roles};
pub use stored_ports::{Channel, Released, StoredPorts};

/// An event channel device from an earlier process. All ports that it has bound are still bound.
#[derive(Debug)]
pub enum Inherited {
    /// From a process that says which ports are bound.
    HandedOver(OwnedFd),
    /// From the descriptor store of systemd: the bound ports have to be found out.
    Stored(OwnedFd),
}

/// The Xen that this machine runs on: with all ports free, or with those of a program before this
/// one. An error says which device is missing or refuses.
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

/// A page that a guest writes as well.
#[derive(Debug)]
pub struct SharedPage {
    mapping: Mapping,
    /// Must be told when the mapping is gone; dropped after it.
    _grant: Option<memory::Grant>,
}

impl Page for SharedPage {
    fn load(&self, word: Word) -> u32 {
        self.mapping.word(word.offset()).load(ring::READ)
    }

    fn store(&self, word: Word, value: u32) {
        if crash::point() {
            self.mapping.word(word.offset()).store(value, ring::WRITE);
        }
    }

    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        self.mapping.read(side.offset() + at, bytes);
    }

    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        crash::in_parts(bytes, |from, part| self.mapping.write(side.offset() + at + from, part));
    }
}

/// The doorbell of a domain: our end of an event channel to it, which may change or be gone. It is
/// given back when this is dropped.
#[derive(Debug)]
pub struct EvtchnDoorbell {
    evtchn: Arc<dyn Evtchn>,
    /// 0, which is no port, if there is no channel.
    port: AtomicU32,
}

impl EvtchnDoorbell {
    /// Connects to the port of a domain.
    pub fn bind(evtchn: &Arc<dyn Evtchn>, domid: u16, remote: u32) -> io::Result<EvtchnDoorbell> {
        Ok(EvtchnDoorbell::adopt(evtchn, Some(evtchn.bind(domid, remote)?)))
    }

    /// At the end of a channel that is connected already, at this port of ours, or for now of none.
    pub fn adopt(evtchn: &Arc<dyn Evtchn>, port: Option<u32>) -> EvtchnDoorbell {
        EvtchnDoorbell { evtchn: evtchn.clone(), port: port.unwrap_or(0).into() }
    }

    /// The port at our end, if there is a channel.
    pub fn port(&self) -> Option<u32> {
        Some(self.port.load(Ordering::Acquire)).filter(|port| *port != 0)
    }

    /// Gives the channel back and connects to another port of the domain; ours.
    pub fn rebind(&self, domid: u16, remote: u32) -> io::Result<u32> {
        self.unbind();
        let port = self.evtchn.bind(domid, remote)?;
        self.port.store(port, Ordering::Release);
        Ok(port)
    }

    /// Gives the channel back, if there is one.
    pub fn unbind(&self) {
        let port = self.port.swap(0, Ordering::AcqRel);
        if port != 0 {
            // A domain that is gone has taken its end along; ours is free either way.
            let _ = self.evtchn.unbind(port);
        }
    }
}

impl Drop for EvtchnDoorbell {
    fn drop(&mut self) {
        self.unbind();
    }
}

impl Doorbell for EvtchnDoorbell {
    fn notify(&self) {
        if let Some(port) = self.port() {
            let _ = self.evtchn.notify(port);
        }
    }
}

/// The channel to a domain.
pub type XenRingChannel = RingChannel<SharedPage, EvtchnDoorbell>;
/// The ring of a domain.
pub type XenRing = Ring<SharedPage, EvtchnDoorbell>;
