//! What snapshots cost: nodes that have to be copied because they are shared, and old versions that
//! only a snapshot keeps.

use triomphe::Arc;

use crate::charge::{bytes, version_cost};
use crate::node::Node;
use crate::tree::{Tree, components};

/// What one version of a node takes by itself: its record, its own texts, and its part of the list
/// of its children, of which a change copies one chunk and the list of chunks.
fn version(node: &Node) -> i64 {
    version_cost(node.name().len() + node.value().len(), node.children().len())
}

/// Bytes that a change of the node at `path`, or of what is to be made there, copies: those nodes on
/// the way that somebody else sees as well.
pub(crate) fn copied_by_change(tree: &Tree, path: &str) -> i64 {
    if path.starts_with('@') {
        return tree.special().map(|node| version(node)).sum();
    }
    let mut node = tree.root();
    let mut shared = !node.is_unique();
    let mut copied = if shared { version(node) } else { 0 };
    for name in components(path) {
        let children = node.children();
        let in_shared_chunk = children.is_shared_at(name);
        if in_shared_chunk && !shared {
            copied += version(node);
        }
        let Some(child) = children.get(name) else { break };
        shared = shared || in_shared_chunk || !child.is_unique();
        if shared {
            copied += version(child);
        }
        node = child;
    }
    copied
}

/// Bytes of the nodes of `old` that are not in `new`. Goes down both at once and stops where they are
/// one, or when there are more than `most`.
pub(crate) fn kept_by(old: &Tree, new: &Tree, most: i64) -> i64 {
    let mut kept = 0;
    let mut pairs = alloc::vec![(old.root(), Some(new.root()))];
    while kept <= most
        && let Some((old, new)) = pairs.pop()
    {
        if new.is_some_and(|new| Arc::ptr_eq(old, new)) {
            continue;
        }
        kept += version(old);
        let now = |child: &Arc<Node>| new.and_then(|new| new.children().get(child.name()));
        pairs.extend(old.children().iter().map(|child| (child, now(child))));
    }
    let special = old.special().zip(new.special());
    kept + special.filter(|(a, b)| !Arc::ptr_eq(a, b)).map(|(a, _)| version(a)).sum::<i64>()
        + bytes(core::mem::size_of::<Tree>())
}
