//! When the old versions that the transactions of a domain retain must be measured.

use alloc::collections::BTreeMap;

use xenstore_protocol::DomId;

/// Bytes that were replaced in the tree, and the domains whose snapshots may retain them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Retention {
    /// Bytes of all versions of nodes that were replaced while a domain had a snapshot.
    pub(crate) retired: i64,
    /// The value of `retired` at which the next domain is due.
    pub(crate) next: i64,
    /// The value of `retired` at which each domain with open transactions is measured.
    pub(crate) due: BTreeMap<DomId, i64>,
}

impl Retention {
    /// The same, with the next measurement due at the first change.
    pub(crate) fn restored(&self) -> Retention {
        Retention { next: 0, ..self.clone() }
    }

    /// Returns true if a domain has a snapshot that is subject to a quota.
    pub(crate) fn is_active(&self) -> bool {
        !self.due.is_empty()
    }

    pub(crate) fn set(&mut self, domid: DomId, due: i64) {
        self.due.insert(domid, due);
        self.next = self.due.values().copied().min().unwrap_or(i64::MAX);
    }

    /// Removes a domain that has no open transactions.
    pub(crate) fn forget(&mut self, domid: DomId) {
        self.due.remove(&domid);
    }
}
