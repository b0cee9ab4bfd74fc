//! What snapshots cost: nodes that have to be copied because they are shared, and old versions that
//! only a snapshot keeps.

use alloc::collections::BTreeMap;

use triomphe::Arc;

use crate::tree::accounting::{bytes, version_cost};
use crate::tree::node::Node;
use crate::tree::{Tree, components};

/// What one version of a node takes by itself: its record, its own texts, and its part of the list
/// of its children, of which a change copies one chunk and the list of chunks.
fn version(node: &Node) -> i64 {
    version_cost(node.name().len() + node.value().len(), node.children().len())
}

/// The existing nodes on the way to `path`, from the root on. A change there copies those that a snapshot
/// shares.
pub(crate) fn on_way<'t>(tree: &'t Tree, path: &str) -> impl Iterator<Item = &'t Node> {
    let special = path.starts_with('@');
    let mut names = components(if special { "" } else { path });
    let mut next = Some(tree.root());
    let way = core::iter::from_fn(move || {
        let node = next?;
        next = names.next().and_then(|name| node.children().get(name));
        Some(node)
    });
    let special = special.then(|| tree.special()).into_iter().flatten();
    special.chain(way).map(|node| &**node)
}

/// Bytes of old versions that a change at `path` may leave behind. This is an upper bound: the bytes
/// really copied depend on what else holds the nodes, such as a thread that writes a state, and a replay
/// would differ.
pub(crate) fn replaced_by_change(tree: &Tree, path: &str) -> i64 {
    on_way(tree, path).map(version).sum()
}

/// The nodes of its tree that a transaction has copied, by creation stamp. Its snapshot and its recorded
/// replies keep every version that they have seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Copies {
    /// For each node the number of the last request that copied it; requests are numbered from 1.
    pub(crate) copied: BTreeMap<u64, u32>,
    /// For each node the number of the last request whose reply keeps it and its subtree.
    pub(crate) seen: BTreeMap<u64, u32>,
}

impl Copies {
    /// Bytes that request number `at` copies for a change at `path`. Nodes from after `start` are the
    /// transaction's own.
    pub(crate) fn change(&mut self, tree: &Tree, path: &str, start: u64, at: u32) -> i64 {
        let (mut bytes, mut seen) = (0, 0);
        for node in on_way(tree, path) {
            let created = node.created();
            if !self.seen.is_empty() {
                seen = seen.max(self.seen.get(&created).copied().unwrap_or(0));
            }
            let own = u32::from(created > start);
            if own > seen {
                continue;
            }
            let copied = self.copied.entry(created).or_insert(own);
            if *copied <= seen {
                bytes += version(node);
                *copied = at;
            }
        }
        bytes
    }
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
