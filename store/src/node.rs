//! A node of the tree.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Acl;
use crate::charge::Charge;
use crate::children::Children;

#[derive(Clone, Debug)]
pub(crate) struct Node {
    name: Box<str>,
    created: u64,
    listed: u64,
    acl: Acl,
    value: Box<[u8]>,
    children: Children,
}

impl Node {
    pub(crate) fn new(name: &str, created: u64, acl: Acl, value: &[u8]) -> Node {
        let children = Children::default();
        Node { name: name.into(), created, listed: created, acl, value: value.into(), children }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Grows from node to node: children are listed in this order.
    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    /// Changes whenever the list of children does; the generation of DIRECTORY_PART.
    pub(crate) fn listed(&self) -> u64 {
        self.listed
    }

    pub(crate) fn acl(&self) -> &Acl {
        &self.acl
    }

    pub(crate) fn value(&self) -> &[u8] {
        &self.value
    }

    pub(crate) fn children(&self) -> &Children {
        &self.children
    }

    pub(crate) fn set_listed(&mut self, listed: u64) {
        self.listed = listed;
    }

    pub(crate) fn set_acl(&mut self, acl: Acl) {
        self.acl = acl;
    }

    pub(crate) fn set_value(&mut self, value: &[u8]) {
        self.value = value.into();
    }

    pub(crate) fn children_mut(&mut self) -> &mut Children {
        &mut self.children
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
