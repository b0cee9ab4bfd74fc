//! Nodes that have been removed from a tree and are still to be released.

use alloc::vec::Vec;

use triomphe::Arc;

use crate::tree::node::Node;

/// Nodes that have been removed from the tree, each with its subtree.
#[derive(Clone, Debug, Default)]
pub(crate) struct Removal {
    /// Nodes that may be in the index of owners.
    pub(crate) indexed: Vec<Arc<Node>>,
    /// Nodes that are still charged to their owners.
    pub(crate) charged: Vec<Arc<Node>>,
    /// Nodes that may have no other reference: their memory is freed.
    pub(crate) unused: Vec<Arc<Node>>,
    /// Charged bytes of the nodes freed so far.
    pub(crate) freed: i64,
}

impl Removal {
    pub(crate) fn is_empty(&self) -> bool {
        self.indexed.is_empty() && self.charged.is_empty() && self.unused.is_empty()
    }

    /// Adds nodes to be freed, in pieces if they have no other reference.
    pub(crate) fn free(&mut self, nodes: impl IntoIterator<Item = Arc<Node>>) {
        self.unused.extend(nodes.into_iter().filter(Arc::is_unique));
    }
}
