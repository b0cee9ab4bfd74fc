//! A node of the tree.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use triomphe::Arc;

use crate::tree::accounting::Charge;
use crate::tree::acl::Acl;
use crate::tree::children::Children;
use crate::tree::inline_str::InlineStr;

/// 48 bytes, which with the count in front of them fill a block of 64 of the usual allocators. A
/// node that has never had children has no list of them.
#[derive(Clone)]
pub(crate) struct Node {
    text: InlineStr,
    created: u64,
    acl: Acl,
    children: Option<Box<Children>>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name())
            .field("created", &self.created)
            .field("listed", &self.listed())
            .field("acl", &self.acl)
            .field("value", &self.value().escape_ascii())
            .field("children", self.children())
            .finish()
    }
}

/// Those of a node without any.
static NO_CHILDREN: Children = Children::new(0);

impl Node {
    pub(crate) fn new(name: &str, created: u64, acl: Acl, value: &[u8]) -> Node {
        Node { text: InlineStr::new(name.as_bytes(), value), created, acl, children: None }
    }

    pub(crate) fn name(&self) -> &str {
        core::str::from_utf8(self.text.name()).expect("it was made of one")
    }

    /// The name, where it is only compared or copied.
    pub(crate) fn name_bytes(&self) -> &[u8] {
        self.text.name()
    }

    /// Grows from node to node: children are listed in this order.
    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    /// Changes whenever the list of children does; the generation of DIRECTORY_PART. No other list
    /// has ever had this number.
    pub(crate) fn listed(&self) -> u64 {
        self.children.as_ref().map_or(self.created, |children| children.listed)
    }

    pub(crate) fn acl(&self) -> &Acl {
        &self.acl
    }

    pub(crate) fn value(&self) -> &[u8] {
        self.text.value()
    }

    pub(crate) fn children(&self) -> &Children {
        self.children.as_deref().unwrap_or(&NO_CHILDREN)
    }

    /// The child, to be changed: what is shared with a snapshot is copied on the way.
    pub(crate) fn child_mut(&mut self, name: &str) -> Option<&mut Node> {
        self.children.as_mut()?.get_mut(name)
    }

    pub(crate) fn set_acl(&mut self, acl: Acl) {
        self.acl = acl;
    }

    pub(crate) fn set_value(&mut self, value: &[u8]) {
        self.text.set_value(value);
    }

    /// Appends the children that are in no list but this one.
    pub(crate) fn dismantle(self, unused: &mut Vec<Arc<Node>>) {
        if let Some(children) = self.children {
            children.dismantle(unused);
        }
    }

    pub(crate) fn set_listed(&mut self, listed: u64) {
        if listed != self.listed() {
            self.children_mut().listed = listed;
        }
    }

    pub(crate) fn children_mut(&mut self) -> &mut Children {
        let created = self.created;
        self.children.get_or_insert_with(|| Box::new(Children::new(created)))
    }

    /// What the `node-size` quota counts, in bytes, as C xenstored does: a fixed part, permission
    /// entries, the value and the names of the children.
    pub(crate) fn size(&self) -> usize {
        node_size(self.acl.entries().len(), self.value().len() + self.children().names_len())
    }

    /// What its owner is charged for it.
    pub(crate) fn charge(&self) -> Charge {
        Charge::node(self.name_bytes().len(), self.acl.entries().len(), self.value().len())
    }
}

/// A node and all below it, parents first. Not recursive: a tree is as deep as a path is long
/// (XSA-418).
pub(crate) fn descend(node: &Arc<Node>) -> impl Iterator<Item = &Arc<Node>> {
    let mut stack: Vec<&Arc<Node>> = alloc::vec![node];
    core::iter::from_fn(move || {
        let node = stack.pop()?;
        if node.children().len() > 0 {
            stack.extend(node.children().iter());
        }
        Some(node)
    })
}

/// See [`Node::size`].
pub(crate) fn node_size(perms: usize, value_and_names: usize) -> usize {
    16 + 8 * perms + value_and_names
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a node, its count and the allocator's own word do not fit a block of 64 bytes, or a
    // list of children and that word.
    #[test]
    fn blocks_of_the_allocator_are_filled() {
        assert!(8 + size_of::<Node>() <= 64 - 8 && size_of::<Children>() <= 64 - 8);
    }
}
