//! Which domains there are, by hypercalls (`xen/include/public/domctl.h`).
//!
//! Xen 4.21 and later have a call for this that stays as it is (`XEN_DOMCTL_get_domain_state`).
//! Earlier ones have `XEN_DOMCTL_getdomaininfo`, which refuses every caller that was not built for
//! that very version; of its answer only what has not moved between versions is looked at, and the
//! version is found by trying.

use std::io;

use rustix::io::Errno;

use super::hypercall::{Hypercalls, named};
use super::{DomainStatus, Domains};

/// `__HYPERVISOR_domctl`.
const DOMCTL: u32 = 36;
/// `struct xen_domctl`: command, interface version, domid, and from byte 16 on what belongs to the
/// command.
const DOMCTL_SIZE: usize = 16 + 128;
const GET_DOMAIN_INFO: u32 = 5;
const GET_DOMAIN_STATE: u32 = 90;
/// Interface versions of `XEN_DOMCTL_getdomaininfo`: that of Xen 4.10, and more than there are yet.
const VERSIONS: std::ops::RangeInclusive<u32> = 0x0f..=0x40;
/// Domids from here on have other meanings.
const FIRST_RESERVED: u16 = 0x7ff0;
/// In a question about any domain that has changed (`DOMID_INVALID`).
const INVALID: u16 = 0x7ff4;

/// Bits of `XEN_DOMCTL_getdomaininfo`. It says "dying" of domains that are dead.
const INFO_DYING: u32 = 1;
const INFO_SHUTDOWN: u32 = 1 << 2;
/// Bits of `XEN_DOMCTL_get_domain_state`.
const STATE_EXISTS: u16 = 1;
const STATE_SHUTDOWN: u16 = 2;
const STATE_DEAD: u16 = 8;
/// Capabilities in the same answer.
const CAP_CONTROL: u16 = 1;
const CAP_XENSTORE: u16 = 4;

/// How this hypervisor is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    State,
    Info { version: u32 },
}

#[derive(Debug)]
pub(crate) struct Hypervisor {
    calls: Hypercalls,
    way: Way,
}

impl Hypervisor {
    /// An error says what is missing.
    pub(crate) fn open() -> io::Result<Hypervisor> {
        let mut hypervisor = Hypervisor { calls: Hypercalls::open()?, way: Way::State };
        let ways = std::iter::once(Way::State);
        let ways = ways.chain(VERSIONS.map(|version| Way::Info { version }));
        let mut last = io::Error::from(io::ErrorKind::Unsupported);
        for way in ways {
            hypervisor.way = way;
            match hypervisor.domain(0) {
                Ok(_) => return Ok(hypervisor),
                Err(error) => last = error,
            }
        }
        Err(named("the hypervisor does not tell about domains", last))
    }

    /// Makes a call about a domain; what the hypervisor has put into the argument.
    fn domctl(&mut self, command: u32, version: u32, domid: u16) -> io::Result<[u8; DOMCTL_SIZE]> {
        let mut argument = [0; DOMCTL_SIZE];
        argument[..4].copy_from_slice(&command.to_le_bytes());
        argument[4..8].copy_from_slice(&version.to_le_bytes());
        argument[8..10].copy_from_slice(&domid.to_le_bytes());
        self.calls.call(DOMCTL, None, &mut argument)?;
        Ok(argument)
    }

    /// The first domain from `domid` on, and its flags.
    fn next_info(&mut self, version: u32, domid: u16) -> io::Result<Option<(u16, u32)>> {
        match self.domctl(GET_DOMAIN_INFO, version, domid) {
            Ok(answer) => Ok(info(&answer)),
            Err(error) if is(&error, Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Domains with a part of their own in a host, where the hypervisor names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The first domain that may manage others.
    pub control: Option<u16>,
    /// The domain that the XenStore daemon runs in.
    pub store: Option<u16>,
}

impl Roles {
    /// Takes what the answer says of this domain, as C xenstored does.
    fn take(&mut self, domid: u16, answer: &[u8; DOMCTL_SIZE]) {
        let (exists, caps) = (half(answer, 16) & STATE_EXISTS != 0, half(answer, 18));
        if exists && caps & CAP_CONTROL != 0 {
            self.control.get_or_insert(domid);
        }
        if exists && caps & CAP_XENSTORE != 0 {
            self.store = Some(domid);
        }
    }
}

/// The control domain and the store domain, by the capabilities that Xen 4.21 and later report.
///
/// # Errors
///
/// There is no hypervisor, or it is an earlier one.
pub fn roles() -> io::Result<Roles> {
    let mut hypervisor = Hypervisor { calls: Hypercalls::open()?, way: Way::State };
    let mut roles = Roles::default();
    for domid in 0..FIRST_RESERVED {
        match hypervisor.domctl(GET_DOMAIN_STATE, 0, domid) {
            Ok(answer) => roles.take(domid, &answer),
            Err(error) if is(&error, Errno::SRCH) => {}
            Err(error) => return Err(error),
        }
        // Nearly always domain 0 is both.
        if roles.control.is_some() && roles.store.is_some() {
            break;
        }
    }
    Ok(roles)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Domid and flags of `struct xen_domctl_getdomaininfo`, whose first eight bytes have been the
/// same in all versions.
fn info(answer: &[u8; DOMCTL_SIZE]) -> Option<(u16, u32)> {
    let domid = half(answer, 16);
    let flags = u32::from_le_bytes([answer[20], answer[21], answer[22], answer[23]]);
    (domid < FIRST_RESERVED).then_some((domid, flags))
}

/// State and unique id of `struct xen_domctl_get_domain_state`.
fn state(answer: &[u8; DOMCTL_SIZE]) -> Option<DomainStatus> {
    let state = half(answer, 16);
    let id = answer[24..32].try_into().map(u64::from_le_bytes).unwrap_or_default();
    let alive = state & STATE_EXISTS != 0 && state & STATE_DEAD == 0;
    alive.then_some(DomainStatus { unique_id: Some(id), shutdown: state & STATE_SHUTDOWN != 0 })
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

impl Domains for Hypervisor {
    fn domain(&mut self, domid: u16) -> io::Result<Option<DomainStatus>> {
        match self.way {
            Way::State => match self.domctl(GET_DOMAIN_STATE, 0, domid) {
                Ok(answer) => Ok(state(&answer)),
                Err(error) if is(&error, Errno::SRCH) => Ok(None),
                Err(error) => Err(error),
            },
            Way::Info { version } => {
                let found = self.next_info(version, domid)?;
                // It tells of the next domain if there is none with this domid.
                let flags = found.filter(|(found, _)| *found == domid).map(|(_, flags)| flags);
                let alive = flags.filter(|flags| flags & INFO_DYING == 0);
                let shutdown = |flags: u32| flags & INFO_SHUTDOWN != 0;
                Ok(alive.map(|flags| DomainStatus { unique_id: None, shutdown: shutdown(flags) }))
            }
        }
    }

    fn all(&mut self) -> io::Result<Vec<u16>> {
        let mut found = Vec::new();
        match self.way {
            // To the handler of VIRQ_DOM_EXC, all domains have changed once it is bound.
            Way::State => loop {
                match self.domctl(GET_DOMAIN_STATE, 0, INVALID) {
                    Ok(answer) => found.push(half(&answer, 8)),
                    Err(error) if is(&error, Errno::NOENT) => break,
                    Err(error) => return Err(error),
                }
                if found.len() > usize::from(FIRST_RESERVED) {
                    return Err(io::Error::other("the hypervisor tells of domains without end"));
                }
            },
            Way::Info { version } => {
                let mut next = 0;
                while let Some((domid, _)) = self.next_info(version, next)? {
                    // An answer that does not lead on would have no end.
                    if domid < next || domid >= FIRST_RESERVED {
                        return Err(io::Error::other(format!("domain {domid} after {next}")));
                    }
                    found.push(domid);
                    next = domid + 1;
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

    // Fails if a field of the stable call is read from the wrong place (domctl.h: state u16, caps
    // u16, pad u32, unique_id u64, from byte 16 of the argument on), or a dead domain is alive.
    #[test]
    fn domain_state_is_read_from_its_place() {
        let living = DomainStatus { unique_id: Some(0x0102), shutdown: false };
        assert_eq!(state(&answer(&[(16, 1), (24, 2), (25, 1)])), Some(living));
        let shut = DomainStatus { unique_id: Some(7), shutdown: true };
        assert_eq!(state(&answer(&[(16, 1 | 2), (18, 0xff), (24, 7)])), Some(shut));
        assert!(state(&answer(&[(16, 1 | 2 | 4), (24, 7)])).is_some(), "dying is not dead");
        assert_eq!(state(&answer(&[(16, 1 | 2 | 4 | 8), (24, 7)])), None);
        assert_eq!(state(&answer(&[])), None, "no answer is no domain");
    }

    // Fails if capabilities are read from the wrong place, those of a domain that is gone count, or the
    // control domain is not the first that may be it (C xenstored: `stubdom_init`).
    #[test]
    fn roles_follow_from_capabilities() {
        let mut roles = Roles::default();
        roles.take(0, &answer(&[(18, 7)]));
        assert_eq!(roles, Roles::default(), "no such domain");
        for (domid, caps) in [(1, 2), (2, 1), (3, 1), (4, 4)] {
            roles.take(domid, &answer(&[(16, 1), (18, caps)]));
        }
        assert_eq!(roles, Roles { control: Some(2), store: Some(4) });
    }

    // Fails if the unstable call is read from the wrong place (domid u16 at 16, flags u32 at 20).
    #[test]
    fn domain_info_is_read_from_its_place() {
        assert_eq!(info(&answer(&[(16, 5), (20, 4)])), Some((5, INFO_SHUTDOWN)));
        assert_eq!(info(&answer(&[(16, 0xf4), (17, 0x7f)])), None, "not a domain");
    }
}
