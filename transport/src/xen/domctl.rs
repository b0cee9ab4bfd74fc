//! The domains of the host, by hypercalls (`xen/include/public/domctl.h`).
//!
//! Xen 4.21 and later have a stable call, `XEN_DOMCTL_get_domain_state`. Earlier versions have
//! `XEN_DOMCTL_getdomaininfo`, which refuses a caller that was built for another interface version. This
//! module tries the versions one after another, and reads only the fields that have the same place in
//! all of them.

use std::io;

use rustix::io::Errno;
use xenstore_protocol::DomId;
use xenstore_sys::xen::DomctlCommand::{GetDomainInfo, GetDomainState};
use xenstore_sys::xen::{DOMCTL_SIZE, Hypercalls};

use super::{DomainStatus, Domains, is};

/// Interface versions of `XEN_DOMCTL_getdomaininfo`: from that of Xen 4.10 to one far ahead.
const VERSIONS: std::ops::RangeInclusive<u32> = 0x0f..=0x40;

/// Bits of `XEN_DOMCTL_getdomaininfo`. "Dying" is set once a domain is dead.
const INFO_DYING: u32 = 1;
const INFO_SHUTDOWN: u32 = 1 << 2;
/// Bits of `XEN_DOMCTL_get_domain_state`.
const STATE_EXISTS: u16 = 1;
const STATE_SHUTDOWN: u16 = 2;
const STATE_DEAD: u16 = 8;
/// Capabilities in the same answer.
const CAP_CONTROL: u16 = 1;
const CAP_XENSTORE: u16 = 4;

/// The call that this hypervisor accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    State,
    Info { version: u32 },
}

/// Asks the hypervisor for domains.
#[derive(Debug)]
pub(crate) struct Hypervisor {
    calls: Hypercalls,
    interface: Interface,
}

impl Hypervisor {
    /// Opens the devices and finds out which call the hypervisor accepts.
    pub(crate) fn open() -> io::Result<Hypervisor> {
        let mut hypervisor = Hypervisor { calls: Hypercalls::open()?, interface: Interface::State };
        let interfaces = std::iter::once(Interface::State);
        let interfaces = interfaces.chain(VERSIONS.map(|version| Interface::Info { version }));
        let mut last = io::Error::from(io::ErrorKind::Unsupported);
        for interface in interfaces {
            hypervisor.interface = interface;
            match hypervisor.domain(DomId::DOM0) {
                Ok(_) => return Ok(hypervisor),
                Err(error) => last = error,
            }
        }
        Err(io::Error::new(last.kind(), format!("cannot query domain 0: {last}")))
    }

    /// The first domain from `domid` on, and its flags.
    fn next_info(&mut self, version: u32, domid: DomId) -> io::Result<Option<(DomId, u32)>> {
        match self.calls.domctl(GetDomainInfo, version, domid.0) {
            Ok(answer) => Ok(info(&answer)),
            Err(error) if is(&error, Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The domains with a role in the host, as far as the hypervisor names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The first control domain.
    pub control: Option<DomId>,
    /// The domain that the XenStore daemon runs in.
    pub store: Option<DomId>,
}

impl Roles {
    /// Adds the roles that the answer gives this domain, as C xenstored does.
    fn add(&mut self, domid: DomId, answer: &[u8; DOMCTL_SIZE]) {
        let (exists, caps) = (half(answer, 16) & STATE_EXISTS != 0, half(answer, 18));
        if exists && caps & CAP_CONTROL != 0 {
            self.control.get_or_insert(domid);
        }
        if exists && caps & CAP_XENSTORE != 0 {
            self.store = Some(domid);
        }
    }
}

/// Finds the control domain and the store domain by the capabilities that Xen 4.21 and later report.
///
/// # Errors
///
/// Fails without a hypervisor and on earlier versions of Xen.
pub fn roles() -> io::Result<Roles> {
    let mut calls = Hypercalls::open()?;
    let mut roles = Roles::default();
    for domid in (0..DomId::FIRST_RESERVED.0).map(DomId) {
        match calls.domctl(GetDomainState, 0, domid.0) {
            Ok(answer) => roles.add(domid, &answer),
            Err(error) if is(&error, Errno::SRCH) => {}
            Err(error) => return Err(error),
        }
        // Domain 0 is usually both.
        if roles.control.is_some() && roles.store.is_some() {
            break;
        }
    }
    Ok(roles)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Domid and flags of `struct xen_domctl_getdomaininfo`. Its first eight bytes are the same in all
/// versions.
fn info(answer: &[u8; DOMCTL_SIZE]) -> Option<(DomId, u32)> {
    let domid = DomId(half(answer, 16));
    let flags = u32::from_le_bytes([answer[20], answer[21], answer[22], answer[23]]);
    domid.is_ordinary().then_some((domid, flags))
}

/// State and unique id of `struct xen_domctl_get_domain_state`.
fn state(answer: &[u8; DOMCTL_SIZE]) -> Option<DomainStatus> {
    let state = half(answer, 16);
    let id = answer[24..32].try_into().map(u64::from_le_bytes).unwrap_or_default();
    let alive = state & STATE_EXISTS != 0 && state & STATE_DEAD == 0;
    alive.then_some(DomainStatus { unique_id: Some(id), shutdown: state & STATE_SHUTDOWN != 0 })
}

impl Domains for Hypervisor {
    fn domain(&mut self, domid: DomId) -> io::Result<Option<DomainStatus>> {
        match self.interface {
            Interface::State => match self.calls.domctl(GetDomainState, 0, domid.0) {
                Ok(answer) => Ok(state(&answer)),
                Err(error) if is(&error, Errno::SRCH) => Ok(None),
                Err(error) => Err(error),
            },
            Interface::Info { version } => {
                let found = self.next_info(version, domid)?;
                // The answer is about the next domain if there is none with this domid.
                let flags = found.filter(|(found, _)| *found == domid).map(|(_, flags)| flags);
                let alive = flags.filter(|flags| flags & INFO_DYING == 0);
                let shutdown = |flags: u32| flags & INFO_SHUTDOWN != 0;
                Ok(alive.map(|flags| DomainStatus { unique_id: None, shutdown: shutdown(flags) }))
            }
        }
    }

    fn all(&mut self) -> io::Result<Vec<DomId>> {
        let mut found = Vec::new();
        match self.interface {
            // When VIRQ_DOM_EXC is bound, Xen marks all domains as changed.
            Interface::State => loop {
                match self.calls.domctl(GetDomainState, 0, DomId::INVALID.0) {
                    Ok(answer) => found.push(DomId(half(&answer, 8))),
                    Err(error) if is(&error, Errno::NOENT) => break,
                    Err(error) => return Err(error),
                }
                if found.len() > usize::from(DomId::FIRST_RESERVED.0) {
                    return Err(io::Error::other("the hypervisor returns domains without end"));
                }
            },
            Interface::Info { version } => {
                let mut next = DomId(0);
                while let Some((domid, _)) = self.next_info(version, next)? {
                    // An answer that does not advance would have no end.
                    if domid < next {
                        return Err(io::Error::other(format!("domain {domid} after {next}")));
                    }
                    found.push(domid);
                    next = DomId(domid.0 + 1);
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(bytes: &[(usize, u8)]) -> [u8; DOMCTL_SIZE] {
        let mut answer = [0; DOMCTL_SIZE];
        bytes.iter().for_each(|(at, byte)| answer[*at] = *byte);
        answer
    }

    // Fails if a field has another place than in domctl.h (state u16, caps u16, pad u32, unique_id u64,
    // from byte 16 on), or a dead domain is reported as alive.
    #[test]
    fn domain_state_has_the_layout_of_domctl() {
        let living = DomainStatus { unique_id: Some(0x0102), shutdown: false };
        assert_eq!(state(&answer(&[(16, 1), (24, 2), (25, 1)])), Some(living));
        let shut = DomainStatus { unique_id: Some(7), shutdown: true };
        assert_eq!(state(&answer(&[(16, 1 | 2), (18, 0xff), (24, 7)])), Some(shut));
        assert!(state(&answer(&[(16, 1 | 2 | 4), (24, 7)])).is_some(), "dying is not dead");
        assert_eq!(state(&answer(&[(16, 1 | 2 | 4 | 8), (24, 7)])), None);
        assert_eq!(state(&answer(&[])), None, "no answer is no domain");
    }

    // Fails if capabilities have another place, those of a missing domain count, or the control domain
    // is not the first one (C xenstored: `stubdom_init`).
    #[test]
    fn roles_follow_from_capabilities() {
        let mut roles = Roles::default();
        roles.add(DomId(0), &answer(&[(18, 7)]));
        assert_eq!(roles, Roles::default(), "no such domain");
        for (domid, caps) in [(1, 2), (2, 1), (3, 1), (4, 4)] {
            roles.add(DomId(domid), &answer(&[(16, 1), (18, caps)]));
        }
        assert_eq!(roles, Roles { control: Some(DomId(2)), store: Some(DomId(4)) });
    }

    // Fails if a field has another place than in domctl.h (domid u16 at 16, flags u32 at 20).
    #[test]
    fn domain_info_has_the_layout_of_domctl() {
        assert_eq!(info(&answer(&[(16, 5), (20, 4)])), Some((DomId(5), INFO_SHUTDOWN)));
        assert_eq!(info(&answer(&[(16, 0xf4), (17, 0x7f)])), None, "not a domain");
    }
}
