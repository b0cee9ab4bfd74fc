//! The platform without Xen.

use std::collections::BTreeMap;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};
use xenstore_store::{DomainInfo, Host};

use crate::log::Trace;

/// Every domain exists, from the first query until it is released; there are no rings.
#[derive(Debug, Default)]
pub struct Standalone {
    domains: BTreeMap<DomId, DomainInfo>,
    last_id: u64,
    trace: Trace,
}

impl Standalone {
    /// A platform whose CONTROL commands `log` and `logfile` control this trace.
    pub(crate) fn with_trace(trace: Trace) -> Standalone {
        Standalone { trace, ..Standalone::default() }
    }

    /// Restores the identity of a domain.
    pub(crate) fn knows(&mut self, domid: DomId, info: DomainInfo) {
        self.last_id = self.last_id.max(info.unique_id);
        self.domains.insert(domid, info);
    }

    /// The domain shuts down but still exists.
    pub fn shut_down(&mut self, domid: u16) {
        self.info(DomId(domid)).shutdown = true;
    }

    /// Destroys a domain. A later domain with its domid is another one.
    pub fn destroy(&mut self, domid: u16) {
        self.domains.remove(&DomId(domid));
    }

    fn info(&mut self, domid: DomId) -> &mut DomainInfo {
        self.domains.entry(domid).or_insert_with(|| {
            self.last_id += 1;
            DomainInfo { unique_id: self.last_id, shutdown: false }
        })
    }
}

impl Host for Standalone {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        Some(*self.info(domid))
    }

    fn introduce(&mut self, domid: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        self.info(domid);
        Ok(())
    }

    fn release(&mut self, domid: DomId) {
        self.domains.remove(&domid);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        self.trace.control(command, args)
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &Trace::COMMANDS
    }
}
