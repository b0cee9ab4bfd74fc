//! What is bound in a descriptor of event channels that was kept while there was no process.
//!
//! Nobody has written it down: the process may have ended between binding a port and saying so. The
//! hypervisor knows (`xen/include/public/event_channel.h`, the same in all versions).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rustix::io::Errno;

use super::Evtchn;
use super::hypercall::Hypercalls;

/// `__HYPERVISOR_event_channel_op`, and its command `EVTCHNOP_status`.
const EVENT_CHANNEL_OP: u32 = 32;
const STATUS: u32 = 5;
/// `struct evtchn_status`: domid, port, status, processor, and from byte 16 on what the other end is.
const STATUS_SIZE: usize = 24;
/// The domain that asks (`DOMID_SELF`).
const SELF: u16 = 0x7ff0;
const INTERDOMAIN: u32 = 2;
const VIRQ: u32 = 4;
/// No domain has more ports (`EVTCHN_FIFO_NR_CHANNELS`).
const PORTS: u32 = 1 << 17;

/// An event channel to a domain: the ports at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// At ours.
    pub port: u32,
    /// At the domain's.
    pub remote: u32,
}

/// Ports that are bound. Each can be taken once; the others are to be given back.
#[derive(Debug)]
pub struct Kept {
    /// By domid: nobody has two to a domain.
    channels: BTreeMap<u16, Channel>,
    domain_exc: Option<u32>,
    /// All ports are below this.
    end: u32,
    /// Why nothing is known from some port on.
    error: Option<io::Error>,
    taken: BTreeSet<u32>,
}

impl Kept {
    /// Nothing is known yet, but that all ports are below this.
    pub(super) fn below(end: u32) -> Kept {
        let (channels, taken) = (BTreeMap::new(), BTreeSet::new());
        Kept { channels, domain_exc: None, end, error: None, taken }
    }

    /// This port of ours is connected to that.
    pub(super) fn add(&mut self, port: u32, end: OtherEnd) {
        match end {
            OtherEnd::DomainExc => self.domain_exc = Some(port),
            OtherEnd::Domain(domid, remote) => {
                self.channels.insert(domid, Channel { port, remote });
            }
        }
    }

    /// The channel to a domain.
    pub fn take(&mut self, domid: u16) -> Option<Channel> {
        let channel = self.channels.remove(&domid)?;
        self.taken.insert(channel.port);
        Some(channel)
    }

    /// The port of `VIRQ_DOM_EXC`.
    pub fn take_domain_exc(&mut self) -> Option<u32> {
        let port = self.domain_exc.take()?;
        self.taken.insert(port);
        Some(port)
    }

    /// Gives back whatever nobody has taken: a domain's end can be bound once, and so can
    /// `VIRQ_DOM_EXC`. How many have been taken; an error says why not more are known.
    pub fn give_back(self, evtchn: &dyn Evtchn) -> (usize, Option<io::Error>) {
        for port in (1..self.end).filter(|port| !self.taken.contains(port)) {
            // Of another program's, or of nobody's: nothing is done.
            let _ = evtchn.unbind(port);
        }
        (self.taken.len(), self.error)
    }

    /// What is bound in this device of the real hypervisor.
    pub(super) fn find(evtchn: &dyn Evtchn) -> Kept {
        let mut kept = Kept::below(PORTS);
        if let Err(error) = Hypercalls::open().and_then(|calls| kept.look(calls, evtchn)) {
            kept.error = Some(error);
        }
        kept
    }

    fn look(&mut self, mut calls: Hypercalls, evtchn: &dyn Evtchn) -> io::Result<()> {
        for port in 1..PORTS {
            let mut status = question(port);
            match calls.call(EVENT_CHANNEL_OP, Some(STATUS), &mut status) {
                Ok(()) => {}
                Err(error) if is(&error, Errno::INVAL) => {
                    self.end = port;
                    break;
                }
                // One of the hypervisor's own.
                Err(error) if is(&error, Errno::ACCESS) => continue,
                Err(error) => return Err(error),
            }
            let Some(end) = OtherEnd::of(&status) else { continue };
            // The ports of the whole domain are told; only its own can the device notify.
            if evtchn.notify(port).is_ok() {
                self.add(port, end);
            }
        }
        Ok(())
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn question(port: u32) -> [u8; STATUS_SIZE] {
    let mut status = [0; STATUS_SIZE];
    status[..2].copy_from_slice(&SELF.to_le_bytes());
    status[4..8].copy_from_slice(&port.to_le_bytes());
    status
}

/// What one of our ports can be connected to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OtherEnd {
    Domain(u16, u32),
    DomainExc,
}

impl OtherEnd {
    fn of(status: &[u8; STATUS_SIZE]) -> Option<OtherEnd> {
        let word = |at: usize| {
            u32::from_le_bytes([status[at], status[at + 1], status[at + 2], status[at + 3]])
        };
        match word(8) {
            INTERDOMAIN => {
                Some(OtherEnd::Domain(u16::from_le_bytes([status[16], status[17]]), word(20)))
            }
            VIRQ if word(16) == super::VIRQ_DOM_EXC => Some(OtherEnd::DomainExc),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the call is made or its answer read otherwise than `struct evtchn_status` lies in
    // memory: dom u16 at 0, port u32 at 4, status u32 at 8, vcpu u32 at 12, then dom u16 at 16 and
    // port u32 at 20, or virq u32 at 16.
    #[test]
    fn a_status_is_read_from_its_place() {
        let mut status = question(0x0102_0304);
        assert_eq!(status[..8], [0xf0, 0x7f, 0, 0, 4, 3, 2, 1]);
        assert_eq!(OtherEnd::of(&status), None, "closed");
        (status[8], status[12]) = (2, 9);
        status[16..].copy_from_slice(&[5, 1, 0xff, 0xff, 7, 0, 1, 0]);
        assert_eq!(OtherEnd::of(&status), Some(OtherEnd::Domain(0x0105, 0x0001_0007)));
        status[8] = 1;
        assert_eq!(OtherEnd::of(&status), None, "the other end is gone");
        status[8] = 4;
        status[16..].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(OtherEnd::of(&status), Some(OtherEnd::DomainExc));
        status[16] = 2;
        assert_eq!(OtherEnd::of(&status), None, "another interrupt");
    }
}
