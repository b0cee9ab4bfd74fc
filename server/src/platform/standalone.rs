//! The platform without Xen.

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};
use xenstore_store::{AllDomains, DomainInfo, Host};

use crate::log::Trace;

/// Every domain exists, from the first query until it is released; there are no rings.
#[derive(Debug, Default)]
pub struct Standalone {
    domains: AllDomains,
    trace: Trace,
}

impl Standalone {
    /// A platform whose CONTROL commands `log` and `logfile` control this trace.
    pub(crate) fn with_trace(trace: Trace) -> Standalone {
        Standalone { trace, ..Standalone::default() }
    }

    /// Restores the identity of a domain.
    pub(crate) fn knows(&mut self, domid: DomId, info: DomainInfo) {
        self.domains.restore(domid, info);
    }

    /// The domain shuts down but still exists.
    pub fn shut_down(&mut self, domid: u16) {
        self.domains.shut_down(DomId(domid));
    }

    /// Destroys a domain. A later domain with its domid is another one.
    pub fn destroy(&mut self, domid: u16) {
        self.domains.destroy(DomId(domid));
    }
}

impl Host for Standalone {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.domains.domain(domid)
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        self.domains.introduce(domid, gfn, port, features)
    }

    fn release(&mut self, domid: DomId) {
        self.domains.release(domid);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        self.trace.control(command, args)
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &Trace::COMMANDS
    }
}
