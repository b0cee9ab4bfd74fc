//! What a domain makes the server keep.

use alloc::collections::BTreeMap;
use core::ops::{AddAssign, Neg};

use xenstore_protocol::DomId;

/// Nodes and bytes that are charged to a domain, or a change of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charge {
    pub(crate) nodes: i64,
    pub(crate) bytes: i64,
}

/// Bytes that every node, watch, event or request costs besides its text.
pub(crate) const OVERHEAD: i64 = 128;

/// A length as a charge; lengths are far below 2^63.
pub(crate) fn bytes(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

impl Charge {
    /// One node.
    pub(crate) fn node(name: usize, perms: usize, value: usize) -> Charge {
        Charge { nodes: 1, bytes: OVERHEAD + bytes(name + 8 * perms + value) }
    }
}

impl AddAssign for Charge {
    fn add_assign(&mut self, other: Charge) {
        self.nodes += other.nodes;
        self.bytes += other.bytes;
    }
}

impl Neg for Charge {
    type Output = Charge;

    fn neg(self) -> Charge {
        Charge { nodes: -self.nodes, bytes: -self.bytes }
    }
}

/// Charges by domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charges(pub(crate) BTreeMap<DomId, Charge>);

impl Charges {
    pub(crate) fn add(&mut self, domid: DomId, charge: Charge) {
        // A value of the same length, most often.
        if charge == Charge::default() {
            return;
        }
        *self.0.entry(domid).or_default() += charge;
    }

    /// Bytes that have been added, whoever they are charged to.
    pub(crate) fn growth(&self) -> i64 {
        self.0.values().map(|charge| charge.bytes.max(0)).sum()
    }

    pub(crate) fn of(&self, domid: DomId) -> Charge {
        self.0.get(&domid).copied().unwrap_or_default()
    }
}
