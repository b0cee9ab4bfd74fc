//! An index of the committed tree by owner: the cost of a domain's death is bounded by what it owned.
//!
//! Most nodes have the owner of their parent. The index has only the beginnings: nodes whose owner
//! differs from that of their parent. Every other node of a domain is below one of its beginnings, with
//! only nodes of that domain between them. The index has no entries for domains that never die, which
//! own most nodes of a host.
//!
//! Nodes are identified by their creation stamps, which are unique. The index is a function of the tree
//! alone, and the invariant checker compares the two.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::DomId;

use crate::tree::change::Change;
use crate::tree::node::Node;
use crate::tree::{Tree, components};

/// A beginning, or a node on the way to one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Creation stamp of the parent; [`CUT`] for the root and for a node that was cut off.
    parent: u64,
    name: Box<str>,
    /// The domain whose nodes begin here.
    owner: Option<DomId>,
    /// Number of places among the children, plus one if nodes begin here.
    uses: usize,
}

/// The parent stamp of a place without a parent.
const CUT: u64 = u64::MAX;

/// An index of the tree by owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnerIndex {
    /// Domains that never die.
    immortal: [DomId; 2],
    /// For each domain the nodes at which its nodes begin.
    begins: BTreeSet<(DomId, u64)>,
    places: BTreeMap<u64, Place>,
}

/// Nodes from the root down to one.
type Way<'t> = Vec<&'t Arc<Node>>;

impl OwnerIndex {
    /// The index of a tree, without entries for the `immortal` domains.
    pub(crate) fn of(tree: &Tree, immortal: [DomId; 2]) -> OwnerIndex {
        OwnerIndex::with(tree, immortal, |_| ())
    }

    /// Like [`OwnerIndex::of`], and calls `visit` with every node except the special ones: one walk of a
    /// large tree is cheaper than two.
    pub(crate) fn with(
        tree: &Tree,
        immortal: [DomId; 2],
        mut visit: impl FnMut(&Node),
    ) -> OwnerIndex {
        let mut owners = OwnerIndex { immortal, begins: BTreeSet::new(), places: BTreeMap::new() };
        let mut stack = alloc::vec![(0, tree.root())];
        let mut way = Way::new();
        while let Some((depth, node)) = stack.pop() {
            way.truncate(depth);
            way.push(node);
            visit(node);
            owners.look(&way);
            if node.children().len() > 0 {
                stack.extend(node.children().iter().map(|child| (depth + 1, child)));
            }
        }
        owners
    }

    /// Updates the index after a change that created a node with another owner than its parent, or gave a
    /// node another owner. `tree` is the tree after this and other changes. The cost is the depth of
    /// the path, plus the children of a node that has another owner.
    pub(crate) fn follow(&mut self, change: &Change, tree: &Tree) {
        if !change.owned || change.path.starts_with('@') {
            return;
        }
        // With capacity for a child of the last node: a growing vector fragments the heap.
        let mut way = Way::with_capacity(components(&change.path).count() + 2);
        way.push(tree.root());
        for name in components(&change.path) {
            let Some(child) = way[way.len() - 1].children().get(name) else { return };
            way.push(child);
            if way[way.len() - 2].acl().owner() != child.acl().owner() {
                self.look(&way);
            }
        }
        self.look(&way);
        for child in way[way.len() - 1].children().iter() {
            way.push(child);
            self.look(&way);
            way.pop();
        }
    }

    /// Updates whether nodes of a domain begin at the last node of the way.
    fn look(&mut self, way: &Way<'_>) {
        let node = way[way.len() - 1];
        let owner = node.acl().owner();
        let above = way.len().checked_sub(2).map(|at| way[at].acl().owner());
        let begins = above != Some(owner) && !self.immortal.contains(&owner);
        let known = self.places.get(&node.created()).and_then(|place| place.owner);
        if known == begins.then_some(owner) {
            return;
        }
        self.forget(node.created());
        if begins {
            self.add(owner, way);
        }
    }

    fn add(&mut self, owner: DomId, way: &Way<'_>) {
        let created = way[way.len() - 1].created();
        self.begins.insert((owner, created));
        for at in (0..way.len()).rev() {
            if let Some(place) = self.places.get_mut(&way[at].created()) {
                place.uses += 1;
                break;
            }
            let parent = at.checked_sub(1).map_or(CUT, |above| way[above].created());
            let place = Place { parent, name: way[at].name().into(), owner: None, uses: 1 };
            self.places.insert(way[at].created(), place);
        }
        if let Some(place) = self.places.get_mut(&created) {
            place.owner = Some(owner);
        }
    }

    /// Removes the beginning at this node.
    pub(crate) fn forget(&mut self, created: u64) {
        let Some(place) = self.places.get_mut(&created) else { return };
        if let Some(owner) = place.owner.take() {
            self.begins.remove(&(owner, created));
            self.release(created);
        }
    }

    /// Drops one use of a place, and the place at its last one.
    fn release(&mut self, mut created: u64) {
        while let Some(place) = self.places.get_mut(&created) {
            place.uses -= 1;
            if place.uses > 0 {
                return;
            }
            let parent = place.parent;
            self.places.remove(&created);
            created = parent;
        }
    }

    /// Separates a removed node from its parent. Returns true if the index has entries for it or below
    /// it, which [`OwnerIndex::unindex`] removes.
    pub(crate) fn cut(&mut self, top: &Node) -> bool {
        let Some(place) = self.places.get_mut(&top.created()) else { return false };
        let parent = core::mem::replace(&mut place.parent, CUT);
        self.release(parent);
        true
    }

    /// Forgets a node that has been [`cut`](OwnerIndex::cut) off, or whose parent has been forgotten. If this
    /// returns true, the caller must call it for the children too.
    pub(crate) fn unindex(&mut self, node: &Node) -> bool {
        let Some(place) = self.places.remove(&node.created()) else { return false };
        if let Some(owner) = place.owner {
            self.begins.remove(&(owner, node.created()));
        }
        true
    }

    /// One of the nodes at which the nodes of a domain begin, if there are any.
    pub(crate) fn first(&self, domid: DomId) -> Option<u64> {
        self.begins.range((domid, 0)..=(domid, u64::MAX)).next().map(|(_, created)| *created)
    }

    /// The path of a node that is in the index. If the node has been cut off, the path is not in the tree.
    pub(crate) fn path_of(&self, mut created: u64) -> String {
        let mut names = Vec::new();
        while let Some(place) = self.places.get(&created) {
            names.push(&*place.name);
            created = place.parent;
        }
        // The root has no name.
        names.pop_if(|name| name.is_empty());
        let path = names.iter().rev().fold(String::new(), |path, name| path + "/" + name);
        if path.is_empty() { "/".into() } else { path }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::acl::Acl;
    use crate::tree::change::{Readers, merge};
    use xenstore_protocol::{Access, Perm};

    const IMMORTAL: [DomId; 2] = [DomId(0); 2];

    fn acl(domids: &[u16]) -> Acl {
        let perm = |domid: &u16| Perm { access: Access::Read, domid: DomId(*domid) };
        Acl::new(domids.iter().map(perm)).unwrap()
    }

    fn owned_by(domid: u16) -> impl Fn(&Acl) -> bool {
        move |acl| acl.owner() == DomId(domid)
    }

    /// Makes one random change, as a request would.
    fn change(tree: &mut Tree, stamp: &mut u64, mut random: impl FnMut(usize) -> usize) -> Change {
        let names = ["a", "b", "c"];
        let path: String =
            (0..=random(4)).map(|_| alloc::format!("/{}", names[random(3)])).collect();
        let lists: [&[u16]; 7] = [&[0], &[0], &[0, 5], &[0, 6, 5], &[5], &[6, 5, 5], &[6]];
        let written = Change::written(&path, Readers::default());
        match (random(5), tree.get(&path).is_some()) {
            (0, _) => {
                let removed = tree.remove(&path, stamp).into_iter().collect();
                Change { removed, ..written }
            }
            (1 | 2, true) => {
                tree.get_mut(&path).unwrap().set_acl(acl(lists[random(7)]));
                Change { owned: true, ..written }
            }
            (_, true) => {
                tree.get_mut(&path).unwrap().set_value(b"x");
                written
            }
            (_, false) => {
                let above = tree.nearest(&path).node.acl().clone();
                let acl = above.with_owner([above.owner(), DomId(5), DomId(6)][random(3)], 0);
                let owned = acl.owner() != above.owner();
                tree.make(&path, &acl, b"", stamp);
                Change { owned, ..written }
            }
        }
    }

    /// Follows changes like the engine, all at once.
    fn follow(owners: &mut OwnerIndex, changes: &[Change], tree: &Tree) {
        for change in changes {
            let mut rest: Vec<_> = change.removed.iter().filter(|top| owners.cut(top)).collect();
            while let Some(node) = rest.pop() {
                if owners.unindex(node) {
                    rest.extend(node.children().iter());
                }
            }
        }
        changes.iter().for_each(|change| owners.follow(change, tree));
    }

    // Fails if the index differs from that of the tree after any changes, single or several in one
    // commit: a dead domain would leave nodes behind, or an entry would stay for ever.
    #[test]
    fn the_index_follows_the_tree() {
        let mut seed = 1_u32;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as usize % below
        };
        let mut tree = Tree::initial(DomId(0));
        let mut owners = OwnerIndex::of(&tree, IMMORTAL);
        let mut stamp = 10;
        let mut most = 0;
        for step in 0..4_000 {
            let count = if step % 2 == 0 { 1 } else { 1 + random(6) };
            let changes = (0..count).map(|_| change(&mut tree, &mut stamp, &mut random)).collect();
            follow(&mut owners, &merge(changes), &tree);
            assert_eq!(owners, OwnerIndex::of(&tree, IMMORTAL), "step {step}");
            most = most.max(owners.places.len());
            let mut left = owners.clone();
            while let Some(created) = left.first(DomId(5)) {
                let path = left.path_of(created);
                assert_eq!(tree.get(&path).unwrap().created(), created, "{path}");
                left.forget(created);
            }
            let others = crate::tree::paths(&tree, owned_by(6));
            assert_eq!(others.is_empty(), left.first(DomId(6)).is_none());
        }
        assert!(most > 20, "there was little to index");
    }

    // Fails if the index has entries for nodes that inherit their owner, or that belong to domains that
    // never die.
    #[test]
    fn only_beginnings_are_kept() {
        let mut tree = Tree::initial(DomId(0));
        tree.make("/home", &acl(&[5]), b"", &mut 10);
        for i in 0..100 {
            tree.make(&alloc::format!("/home/{i}"), &acl(&[5]), b"", &mut (20 + 2 * i));
            tree.make(&alloc::format!("/n{i}"), &acl(&[0]), b"", &mut (500 + 2 * i));
        }
        let mut owners = OwnerIndex::of(&tree, IMMORTAL);
        assert_eq!(owners.places.len(), 2, "the root, and /home");
        assert_eq!(owners.path_of(owners.first(DomId(5)).unwrap()), "/home");
        owners.forget(owners.first(DomId(5)).unwrap());
        assert!(owners.places.is_empty() && owners.begins.is_empty());
    }
}
