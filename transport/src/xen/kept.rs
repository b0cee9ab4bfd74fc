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
#[derive(Debug, Default)]
pub struct Kept {
    /// By domid: nobody has two to a domain.
    channels: BTreeMap<u16, Channel>,
    domain_exc: Option<u32>,
    /// All that have not been taken.
    rest: BTreeSet<u32>,
    taken: usize,
    /// Why it is not known of all what they are connected to.
    error: Option<io::Error>,
}

impl Kept {
    /// This port of ours is bound, to that if it is of any use.
    pub(super) fn add(&mut self, port: u32, end: Option<OtherEnd>) {
        self.rest.insert(port);
        match end {
            Some(OtherEnd::DomainExc) => self.domain_exc = Some(port),
            Some(OtherEnd::Domain(domid, remote)) => {
                self.channels.insert(domid, Channel { port, remote });
            }
            None => {}
        }
    }

    /// The channel to a domain.
    pub fn take(&mut self, domid: u16) -> Option<Channel> {
        let channel = self.channels.remove(&domid)?;
        self.is_taken(channel.port);
        Some(channel)
    }

    /// The port of `VIRQ_DOM_EXC`.
    pub fn take_domain_exc(&mut self) -> Option<u32> {
        let port = self.domain_exc.take()?;
        self.is_taken(port);
        Some(port)
    }

    fn is_taken(&mut self, port: u32) {
        self.rest.remove(&port);
        self.taken += 1;
    }

    /// Gives back whatever nobody has taken: a domain's end can be bound once, and so can
    /// `VIRQ_DOM_EXC`. How many have been taken and given back; an error says why more could not be
    /// taken.
    pub fn give_back(self, evtchn: &dyn Evtchn) -> (usize, usize, Option<io::Error>) {
        for port in &self.rest {
            let _ = evtchn.unbind(*port);
        }
        (self.taken, self.rest.len(), self.error)
    }

    /// What is bound in this device of the real hypervisor.
    pub(super) fn find(evtchn: &dyn Evtchn) -> Kept {
        let (mut kept, mut calls) = (Kept::default(), Hypercalls::open());
        for port in 1..PORTS {
            let end = match calls.as_mut().map(|calls| status(calls, port)) {
                Ok(Ok(status)) => OtherEnd::of(&status),
                // There are no more.
                Ok(Err(error)) if is(&error, Errno::INVAL) => break,
                // One of the hypervisor's own, or it is not to be told.
                Ok(Err(error)) if is(&error, Errno::ACCESS) => None,
                Ok(Err(error)) => {
                    calls = Err(error);
                    None
                }
                Err(_) => None,
            };
            // The hypervisor tells of all ports of the domain; the device notifies only its own.
            if evtchn.notify(port).is_ok() {
                kept.add(port, end);
            }
        }
        kept.error = calls.err();
        kept
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn status(calls: &mut Hypercalls, port: u32) -> io::Result<[u8; STATUS_SIZE]> {
    let mut status = question(port);
    calls.call(EVENT_CHANNEL_OP, Some(STATUS), &mut status)?;
    Ok(status)
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
