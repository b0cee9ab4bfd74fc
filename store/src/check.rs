//! The invariants of an engine, checked from scratch.

use alloc::string::String;
use core::fmt;

use crate::charge::Charges;
use crate::engine::Engine;

/// An invariant that does not hold; always a bug of this crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Violation {}

impl Engine {
    /// Checks everything that must hold between requests. Costs as much as the store is large.
    pub fn check(&self) -> Result<(), Violation> {
        let mut charges = Charges::default();
        for node in self.work.tree.all() {
            charges.add(node.acl.owner(), node.charge());
        }
        for (domid, domain) in &self.domains.known {
            let nodes = charges.of(*domid).nodes;
            if domain.usage.nodes != nodes {
                let counted = domain.usage.nodes;
                return Err(Violation(alloc::format!(
                    "domain {domid} is charged for {counted} nodes and owns {nodes}"
                )));
            }
        }
        Ok(())
    }
}
