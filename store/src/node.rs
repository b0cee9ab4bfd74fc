//! A node of the tree.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Acl;
use crate::charge::Charge;
use crate::children::Children;

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) name: Box<str>,
    /// Grows from node to node: children are listed in this order.
    pub(crate) created: u64,
    /// Changes whenever the list of children does; the generation of DIRECTORY_PART.
    pub(crate) listed: u64,
    pub(crate) acl: Acl,
    pub(crate) value: Box<[u8]>,
    pub(crate) children: Children,
}

impl Node {
    pub(crate) fn new(name: &str, created: u64, acl: Acl, value: &[u8]) -> Node {
        let children = Children::default();
        Node { name: name.into(), created, listed: created, acl, value: value.into(), children }
    }

    /// What the `node-size` quota counts, in bytes, as C xenstored does: a fixed part, permission
    /// entries, the value and the names of the children.
    pub(crate) fn size(&self) -> usize {
        node_size(self.acl.entries().len(), self.value.len() + self.children.names_len())
    }

    /// What its owner is charged for it.
    pub(crate) fn charge(&self) -> Charge {
        Charge::node(self.name.len(), self.acl.entries().len(), self.value.len())
    }

    /// The node and all below it, parents first. Not recursive: a tree is as deep as a path is
    /// long (XSA-418).
    pub(crate) fn descend<'a>(self: &'a Arc<Node>) -> impl Iterator<Item = &'a Arc<Node>> {
        let mut stack: Vec<&'a Arc<Node>> = alloc::vec![self];
        core::iter::from_fn(move || {
            let node = stack.pop()?;
            stack.extend(node.children.iter());
            Some(node)
        })
    }
}

/// See [`Node::size`].
pub(crate) fn node_size(perms: usize, value_and_names: usize) -> usize {
    16 + 8 * perms + value_and_names
}
