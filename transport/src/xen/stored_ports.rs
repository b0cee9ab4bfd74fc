//! The ports that are bound in an event channel device whose owner has exited.
//!
//! systemd stores the device while no daemon runs. The daemon can exit between binding a port and
//! recording it, so only the hypervisor knows which ports are bound: this module asks it with
//! `EVTCHNOP_status` (`xen/include/public/event_channel.h`, the same in all versions of Xen).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rustix::io::Errno;
use xenstore_protocol::{DomId, EvtchnPort};
use xenstore_sys::xen::{Hypercalls, STATUS_SIZE};

use super::{Evtchn, is};

/// States of a port in `struct evtchn_status`.
const INTERDOMAIN: u32 = 2;
const VIRQ: u32 = 4;
/// The limit of ports of a domain (`EVTCHN_FIFO_NR_CHANNELS`).
const PORTS: u32 = 1 << 17;

/// The two ports of an event channel to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// The local port.
    pub port: EvtchnPort,
    /// The port of the domain.
    pub remote: EvtchnPort,
}

/// What remains after [`StoredPorts::release`].
#[derive(Debug)]
pub struct Released {
    /// Ports that the daemon has adopted.
    pub adopted: usize,
    /// Ports that it has not adopted; they have been unbound.
    pub released: usize,
    /// Why the remote ends of some ports are unknown.
    pub error: Option<io::Error>,
}

/// The bound ports of an event channel device. Each can be adopted once; [`StoredPorts::release`]
/// unbinds the rest.
#[derive(Debug, Default)]
pub struct StoredPorts {
    /// By domid: at most one for each domain.
    channels: BTreeMap<DomId, Channel>,
    domain_exc: Option<EvtchnPort>,
    /// Ports that have not been adopted.
    rest: BTreeSet<EvtchnPort>,
    adopted: usize,
    error: Option<io::Error>,
}

impl StoredPorts {
    /// Adds a bound port with its remote end, if the daemon uses such channels.
    pub(super) fn add(&mut self, port: EvtchnPort, end: Option<RemoteEnd>) {
        self.rest.insert(port);
        match end {
            Some(RemoteEnd::DomainExc) => self.domain_exc = Some(port),
            Some(RemoteEnd::Domain(domid, remote)) => {
                self.channels.insert(domid, Channel { port, remote });
            }
            None => {}
        }
    }

    /// Returns the channel to a domain, once.
    pub fn adopt(&mut self, domid: DomId) -> Option<Channel> {
        let channel = self.channels.remove(&domid)?;
        self.mark_adopted(channel.port);
        Some(channel)
    }

    /// Returns the port that is bound to `VIRQ_DOM_EXC`, once.
    pub fn adopt_domain_exc(&mut self) -> Option<EvtchnPort> {
        let port = self.domain_exc.take()?;
        self.mark_adopted(port);
        Some(port)
    }

    fn mark_adopted(&mut self, port: EvtchnPort) {
        self.rest.remove(&port);
        self.adopted += 1;
    }

    /// Unbinds the ports that have not been adopted. A remote port and `VIRQ_DOM_EXC` can be bound
    /// only once, so the daemon could not bind them again otherwise.
    pub fn release(self, evtchn: &dyn Evtchn) -> Released {
        for port in &self.rest {
            let _ = evtchn.unbind(*port);
        }
        Released { adopted: self.adopted, released: self.rest.len(), error: self.error }
    }

    /// Finds the ports that are bound in a device of the host.
    pub(super) fn find(evtchn: &dyn Evtchn) -> StoredPorts {
        let (mut found, mut calls) = (StoredPorts::default(), Hypercalls::open());
        for port in (1..PORTS).map(EvtchnPort) {
            let end = match calls.as_mut().map(|calls| calls.evtchn_status(port.0)) {
                Ok(Ok(status)) => RemoteEnd::parse(&status),
                // Above the last port.
                Ok(Err(error)) if is(&error, Errno::INVAL) => break,
                // A port of the hypervisor, or XSM denies the call.
                Ok(Err(error)) if is(&error, Errno::ACCESS) => None,
                Ok(Err(error)) => {
                    calls = Err(error);
                    None
                }
                Err(_) => None,
            };
            // The hypervisor reports all ports of this domain; the device notifies only its own.
            if evtchn.notify(port).is_ok() {
                found.add(port, end);
            }
        }
        found.error = calls.err();
        found
    }
}

/// What a local port is connected to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RemoteEnd {
    /// A port of a domain.
    Domain(DomId, EvtchnPort),
    /// `VIRQ_DOM_EXC`.
    DomainExc,
}

impl RemoteEnd {
    fn parse(status: &[u8; STATUS_SIZE]) -> Option<RemoteEnd> {
        let word = |at: usize| {
            u32::from_le_bytes([status[at], status[at + 1], status[at + 2], status[at + 3]])
        };
        match word(8) {
            INTERDOMAIN => {
                let domid = u16::from_le_bytes([status[16], status[17]]);
                Some(RemoteEnd::Domain(DomId(domid), EvtchnPort(word(20))))
            }
            VIRQ if word(16) == super::VIRQ_DOM_EXC => Some(RemoteEnd::DomainExc),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the answer has another layout than `struct evtchn_status`: status u32 at 8, vcpu u32 at
    // 12, then dom u16 at 16 and port u32 at 20, or virq u32 at 16.
    #[test]
    fn status_has_the_layout_of_evtchn_status() {
        let mut status = [0; STATUS_SIZE];
        assert_eq!(RemoteEnd::parse(&status), None, "closed");
        (status[8], status[12]) = (2, 9);
        status[16..].copy_from_slice(&[5, 1, 0xff, 0xff, 7, 0, 1, 0]);
        let expected = RemoteEnd::Domain(DomId(0x0105), EvtchnPort(0x0001_0007));
        assert_eq!(RemoteEnd::parse(&status), Some(expected));
        status[8] = 1;
        assert_eq!(RemoteEnd::parse(&status), None, "unbound: the remote end is gone");
        status[8] = 4;
        status[16..].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(RemoteEnd::parse(&status), Some(RemoteEnd::DomainExc));
        status[16] = 2;
        assert_eq!(RemoteEnd::parse(&status), None, "another virtual interrupt");
    }
}
