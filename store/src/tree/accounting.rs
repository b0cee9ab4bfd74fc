//! What a domain makes the server keep.

use alloc::vec::Vec;
use core::ops::{AddAssign, Neg};

use xenstore_protocol::DomId;

use crate::tree::children::chunk_max;

/// Nodes and bytes that are charged to a domain, or a change of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charge {
    pub(crate) nodes: i64,
    pub(crate) bytes: i64,
}

/// Bytes that each of these costs besides its texts, with everything that leads to it: at least what
/// the allocator gives for it. `tests/tests/accounting.rs` holds them against the allocator.
const NODE: i64 = 256;
/// A permission entry, with its place in the index of the domains that are mentioned.
const PERMISSION: i64 = 56;
const WATCH: i64 = 768;
const EVENT: i64 = 320;
const REQUEST: i64 = 320;
/// An open transaction.
pub(crate) const TRANSACTION: i64 = 2048;

/// What a watch costs its domain. Path and token are kept twice.
pub(crate) fn watch_cost(path: &str, token: &[u8]) -> i64 {
    WATCH + 2 * bytes(path.len() + token.len())
}

/// What an event that waits costs the domain that watches.
pub(crate) fn event_cost(path: &str) -> i64 {
    EVENT + bytes(path.len())
}

/// What a request of a transaction costs, besides what it has changed.
pub(crate) fn request_cost(payload: usize) -> i64 {
    REQUEST + bytes(payload)
}

/// What one version of a node takes, with so many bytes of text and so many children.
pub(crate) fn version_cost(text: usize, children: usize) -> i64 {
    // A chunk, which may be one of a list that was longer, and a list of chunks that are half full at
    // least, 16 bytes for each of both.
    NODE + bytes(text) + 16 * bytes(children.min(chunk_max(children).max(128))) + bytes(children)
}

/// A length as a charge; lengths are far below 2^63.
pub(crate) fn bytes(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

impl Charge {
    /// One node. Its name may be in the index as well.
    pub(crate) fn node(name: usize, perms: usize, value: usize) -> Charge {
        Charge { nodes: 1, bytes: NODE + PERMISSION * bytes(perms) + bytes(2 * name + value) }
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

/// Charges by domain: mostly of one, so that a map would be too much.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charges {
    of: Vec<(DomId, Charge)>,
    /// The sum of all bytes that were ever charged, for all domains, without those released.
    pub(crate) added: i64,
}

impl Charges {
    pub(crate) fn add(&mut self, domid: DomId, charge: Charge) {
        let place = self.place(domid).unwrap_or_else(|place| {
            self.of.insert(place, (domid, Charge::default()));
            place
        });
        self.of[place].1 += charge;
        self.added += charge.bytes.max(0);
    }

    fn place(&self, domid: DomId) -> Result<usize, usize> {
        self.of.binary_search_by_key(&domid, |(domid, _)| *domid)
    }

    pub(crate) fn of(&self, domid: DomId) -> Charge {
        self.place(domid).map_or(Charge::default(), |place| self.of[place].1)
    }

    /// The domains with a charge, also if all of it was released.
    pub(crate) fn domids(&self) -> impl ExactSizeIterator<Item = DomId> {
        self.of.iter().map(|(domid, _)| *domid)
    }

    /// Forgets the domains to which nothing is charged.
    pub(crate) fn forget_zeroes(&mut self) {
        self.of.retain(|(_, charge)| *charge != Charge::default());
    }

    /// Removes and returns all charges, by domain.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = (DomId, Charge)> {
        self.added = 0;
        self.of.drain(..)
    }
}
