//! The tree of nodes: a persistent value whose clone is a snapshot.

pub(crate) mod accounting;
pub(crate) mod acl;
pub(crate) mod change;
pub(crate) mod children;
pub(crate) mod cow_cost;
pub(crate) mod inline_str;
pub(crate) mod node;
pub(crate) mod owner_index;
pub(crate) mod removal;

use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::{Access, DomId, Perm};

use crate::tree::acl::Acl;
use crate::tree::children::Children;
use crate::tree::node::{Node, descend};

/// Events about domains that appear.
pub(crate) const INTRODUCE: &str = "@introduceDomain";
/// Events about domains that shut down or disappear.
pub(crate) const RELEASE: &str = "@releaseDomain";

/// All nodes. Cloning shares everything; changing copies what is shared, from the root to the
/// place of the change. Paths are absolute and legal.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: Arc<Node>,
    /// The special nodes, which have permissions and nothing else and are not below the root.
    special: Arc<Children>,
}

/// Where the way to a path ends; see [`Tree::nearest`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nearest<'t> {
    pub(crate) node: &'t Arc<Node>,
    /// The node above that; the root itself if there is none.
    pub(crate) above: &'t Arc<Node>,
    /// Names of the path that are missing below the node.
    pub(crate) missing: usize,
}

/// Names on the way to a node. By hand: `str::split` costs more than finding the node does.
pub(crate) fn components(path: &str) -> impl Iterator<Item = &str> {
    let mut rest = path.strip_prefix('/').unwrap_or(path);
    core::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.bytes().position(|byte| byte == b'/').unwrap_or(rest.len());
        let name = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        Some(name)
    })
}

/// Path of the parent; that of a special node is the root. None for the root.
pub(crate) fn parent(path: &str) -> Option<&str> {
    match path.rfind('/') {
        _ if path == "/" => None,
        None | Some(0) => Some("/"),
        Some(at) => Some(&path[..at]),
    }
}

impl Tree {
    /// The tree that a server starts with: `/`, `/tool`, `/tool/xenstored` and the special nodes,
    /// owned by `owner`. Every domain may watch `@releaseDomain`.
    pub(crate) fn initial(owner: DomId) -> Tree {
        let acl = Acl::private(owner);
        let mut special = Children::new(0);
        special.insert(Arc::new(Node::new(INTRODUCE, 0, acl.clone(), b"")));
        let any_domain = [(Access::None, owner), (Access::Read, DomId::ANY)];
        let readable = Acl::new(any_domain.map(|(access, domid)| Perm { access, domid }));
        special.insert(Arc::new(Node::new(RELEASE, 0, readable.expect("two entries"), b"")));
        let root = Arc::new(Node::new("", 0, acl.clone(), b""));
        let mut tree = Tree { root, special: Arc::new(special) };
        let mut stamp = 0;
        tree.create("/tool/xenstored", 2, &acl, b"", &mut stamp);
        tree
    }

    /// A tree with this root and these special nodes.
    pub(crate) fn from_parts(root: Arc<Node>, special: Vec<Node>) -> Tree {
        let mut nodes = Children::new(0);
        special.into_iter().for_each(|node| nodes.insert(Arc::new(node)));
        Tree { root, special: Arc::new(nodes) }
    }

    /// Is it the name of a special node?
    pub(crate) fn is_special(name: &str) -> bool {
        [INTRODUCE, RELEASE].contains(&name)
    }

    /// Takes those special nodes from `other` that are missing here.
    pub(crate) fn complete(&mut self, other: &Tree) {
        for node in other.special() {
            if self.special.get(node.name()).is_none() {
                Arc::make_mut(&mut self.special).insert(node.clone());
            }
        }
    }

    /// Puts a node, which may have children, below one that is there and has none with its name.
    pub(crate) fn put(&mut self, parent: &str, node: Arc<Node>) -> Option<()> {
        let children = self.get_mut(parent).filter(|_| !parent.starts_with('@'))?.children_mut();
        children.get(node.name()).is_none().then(|| children.insert(node))
    }

    /// Takes a node away that is below the root, with all below it.
    pub(crate) fn take(&mut self, path: &str) -> Option<Arc<Node>> {
        self.part(path).map(|(_, node)| node)
    }

    /// Takes a node away; the one that it was below, to be changed, and the node.
    fn part(&mut self, path: &str) -> Option<(&mut Node, Arc<Node>)> {
        let name = components(path).last()?;
        // Nothing is to be copied in vain.
        self.get(path)?;
        let parent = self.get_mut(parent(path)?)?;
        let node = parent.children_mut().remove(name)?;
        Some((parent, node))
    }

    /// One without special nodes, of a transaction that does not need any more.
    pub(crate) fn empty() -> Tree {
        let root = Node::new("", 0, Acl::private(DomId::INVALID), b"");
        Tree { root: Arc::new(root), special: Arc::new(Children::new(0)) }
    }

    pub(crate) fn into_root(self) -> Arc<Node> {
        self.root
    }

    pub(crate) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// Is it the same snapshot?
    pub(crate) fn is_same(&self, other: &Tree) -> bool {
        let same_special =
            || self.special.iter().zip(other.special.iter()).all(|(a, b)| Arc::ptr_eq(a, b));
        Arc::ptr_eq(&self.root, &other.root) && same_special()
    }

    /// The special nodes, then every node of the tree, parents first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.special.iter().chain(descend(&self.root))
    }

    pub(crate) fn special(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.special.iter()
    }

    /// The node at `path`, or else the nearest above it that exists.
    pub(crate) fn nearest(&self, path: &str) -> Nearest<'_> {
        let mut above = &self.root;
        if path.starts_with('@') {
            let mut names = components(path);
            return match names.next().and_then(|name| self.special.get(name)) {
                Some(node) => Nearest { node, above, missing: names.count() },
                None => Nearest { node: above, above, missing: components(path).count() },
            };
        }
        let mut node = &self.root;
        let mut names = components(path);
        while let Some(name) = names.next() {
            match node.children().get(name) {
                Some(child) => (above, node) = (node, child),
                None => return Nearest { node, above, missing: 1 + names.count() },
            }
        }
        Nearest { node, above, missing: 0 }
    }

    pub(crate) fn get(&self, path: &str) -> Option<&Arc<Node>> {
        let nearest = self.nearest(path);
        (nearest.missing == 0).then_some(nearest.node)
    }

    /// The node at `path`, to be changed. If it is not there, what is shared of the way to it may
    /// have been copied in vain.
    pub(crate) fn get_mut(&mut self, path: &str) -> Option<&mut Node> {
        if path.starts_with('@') {
            self.special.get(path)?;
            return Arc::make_mut(&mut self.special).get_mut(path);
        }
        let mut node = Arc::make_mut(&mut self.root);
        for name in components(path) {
            node = node.child_mut(name)?;
        }
        Some(node)
    }

    /// Creates the node at `path` with this value, and those of its parents that are missing with
    /// none: so many as [`Tree::nearest`] says. All get the same permissions.
    pub(crate) fn create(
        &mut self,
        path: &str,
        missing: usize,
        acl: &Acl,
        value: &[u8],
        stamp: &mut u64,
    ) {
        let existing = components(path).count() - missing;
        let mut node = Arc::make_mut(&mut self.root);
        let mut names = components(path);
        for name in names.by_ref().take(existing) {
            node = node.child_mut(name).expect("nearest() has found it");
        }
        let mut left = missing;
        for name in names {
            left -= 1;
            *stamp += 1;
            let child = Node::new(name, *stamp, acl.clone(), if left == 0 { value } else { b"" });
            // Not that of the child: a list is known by this number alone.
            *stamp += 1;
            node.set_listed(*stamp);
            node.children_mut().insert(Arc::new(child));
            if left > 0 {
                node = node.child_mut(name).expect("just inserted");
            }
        }
    }

    /// Removes the node at `path`, not the root, and all below it.
    pub(crate) fn remove(&mut self, path: &str, stamp: &mut u64) -> Option<Arc<Node>> {
        let (parent, removed) = self.part(path)?;
        *stamp += 1;
        parent.set_listed(*stamp);
        Some(removed)
    }
}

#[cfg(test)]
impl Tree {
    /// Creates a node, and its parents that are missing.
    pub(crate) fn make(&mut self, path: &str, acl: &Acl, value: &[u8], stamp: &mut u64) {
        let missing = self.nearest(path).missing;
        self.create(path, missing, acl, value, stamp);
    }
}

/// Paths of the nodes whose permissions are looked for, in order of creation, parents first.
pub(crate) fn paths(tree: &Tree, mut wanted: impl FnMut(&Acl) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for node in tree.special().filter(|node| wanted(node.acl())) {
        found.push(String::from(node.name()));
    }
    let mut stack = alloc::vec![(String::from("/"), tree.root())];
    while let Some((path, node)) = stack.pop() {
        let prefix = if components(&path).next().is_none() { "" } else { &path };
        let children = node.children().by_creation();
        for child in children.into_iter().rev() {
            stack.push((alloc::format!("{prefix}/{}", child.name()), child));
        }
        if wanted(node.acl()) {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the tree a client finds on a new server differs from C xenstored's, or if special
    // nodes show up below the root.
    #[test]
    fn initial_tree_is_that_of_c_xenstored() {
        let tree = Tree::initial(DomId(0));
        let names: Vec<&str> = descend(tree.root()).map(|n| n.name()).collect();
        assert_eq!(names, ["", "tool", "xenstored"]);
        assert_eq!(tree.special().count(), 2);
        assert_eq!(tree.get(RELEASE).unwrap().acl().perms().0.len(), 2);
    }

    // Fails if parents are computed wrongly.
    #[test]
    fn parents() {
        assert_eq!(parent("/"), None);
        assert_eq!(parent("/a"), Some("/"));
        assert_eq!(parent("/a/b"), Some("/a"));
        assert_eq!(parent("@x"), Some("/"));
    }

    // Fails if a snapshot sees a later change.
    #[test]
    fn snapshots_are_independent() {
        let mut tree = Tree::initial(DomId(0));
        let acl = Acl::private(DomId(0));
        let mut stamp = 10;
        tree.make("/a/b", &acl, b"1", &mut stamp);
        let snapshot = tree.clone();
        tree.get_mut("/a/b").unwrap().set_value(b"2");
        tree.make("/a/c", &acl, b"", &mut stamp);
        tree.remove("/tool", &mut stamp);
        assert_eq!(snapshot.get("/a/b").unwrap().value(), b"1");
        assert!(snapshot.get("/a/c").is_none() && snapshot.get("/tool").is_some());
        assert_eq!(tree.nearest("/tool/xenstored/x").missing, 3);
    }
}
