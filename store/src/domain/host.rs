//! The machine that the store runs on.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};

/// What the hypervisor reports about a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Distinguishes domains that had the same domid at different times; 0 if unknown.
    pub unique_id: u64,
    /// True if the domain has shut down, for any reason, and still exists.
    pub shutdown: bool,
}

/// The machine that the store runs on: the hypervisor, and the server's own CONTROL commands.
///
/// No method has a default implementation, so a wrapper cannot forget to forward one.
pub trait Host {
    /// Queries a domain. Returns `None` if it does not exist.
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo>;

    /// Connects the ring of a domain and offers it `features`. A repeated call for the same domain
    /// resets its ring.
    ///
    /// # Errors
    ///
    /// The error becomes the reply to INTRODUCE.
    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno>;

    /// Disconnects the ring of a domain.
    fn release(&mut self, domid: DomId);

    /// Runs a CONTROL command of the server, such as `log`. Returns `None` if there is no such command.
    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>>;

    /// The commands of [`Host::control`] with their arguments, for CONTROL `help`.
    fn control_commands(&self) -> &'static [(&'static str, &'static str)];
}

impl<T: Host + ?Sized> Host for Box<T> {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        (**self).domain(domid)
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        (**self).introduce(domid, gfn, port, features)
    }

    fn release(&mut self, domid: DomId) {
        (**self).release(domid);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        (**self).control(command, args)
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        (**self).control_commands()
    }
}

/// A machine without domains and without CONTROL commands, for a store that is used on its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHost;

impl Host for NoHost {
    fn domain(&mut self, _: DomId) -> Option<DomainInfo> {
        None
    }

    fn introduce(&mut self, _: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        Err(Errno::Enoent)
    }

    fn release(&mut self, _: DomId) {}

    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

/// A machine on which every domain exists, from the first query until it is released or destroyed. It has
/// no rings and no CONTROL commands.
#[derive(Debug, Default)]
pub struct AllDomains {
    domains: BTreeMap<DomId, DomainInfo>,
    last_id: u64,
}

impl AllDomains {
    /// Restores the identity of a domain.
    pub fn restore(&mut self, domid: DomId, info: DomainInfo) {
        self.last_id = self.last_id.max(info.unique_id);
        self.domains.insert(domid, info);
    }

    /// Shuts down a domain, which still exists.
    pub fn shut_down(&mut self, domid: DomId) {
        self.info(domid).shutdown = true;
    }

    /// Destroys a domain. A later domain with its domid has another unique id.
    pub fn destroy(&mut self, domid: DomId) {
        self.domains.remove(&domid);
    }

    fn info(&mut self, domid: DomId) -> &mut DomainInfo {
        self.domains.entry(domid).or_insert_with(|| {
            self.last_id += 1;
            DomainInfo { unique_id: self.last_id, shutdown: false }
        })
    }
}

impl Host for AllDomains {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        Some(*self.info(domid))
    }

    fn introduce(&mut self, domid: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        self.info(domid);
        Ok(())
    }

    fn release(&mut self, domid: DomId) {
        self.destroy(domid);
    }

    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}
