//! The domains of an embedded store.

use std::collections::BTreeMap;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};
use xenstore_store::{DomainInfo, Host};

/// A host on which every domain exists, from the first query until it is released or destroyed.
#[derive(Debug, Default)]
pub(crate) struct Domains {
    domains: BTreeMap<DomId, DomainInfo>,
    last_id: u64,
}

impl Domains {
    pub(crate) fn shut_down(&mut self, domid: DomId) {
        self.info(domid).shutdown = true;
    }

    /// A domain that has the same domid later is another one: it has another unique id.
    pub(crate) fn destroy(&mut self, domid: DomId) {
        self.domains.remove(&domid);
    }

    fn info(&mut self, domid: DomId) -> &mut DomainInfo {
        self.domains.entry(domid).or_insert_with(|| {
            self.last_id += 1;
            DomainInfo { unique_id: self.last_id, shutdown: false }
        })
    }
}

impl Host for Domains {
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

    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}
