//! Where in the committed tree each domain is mentioned, so that its death costs what it owned.
//!
//! A node mentions the domains that its permission list names. Most nodes inherit their list, so
//! that only beginnings are kept: the nodes that mention a domain which the node above them does
//! not. All others that mention it are below one of those, without a gap. Nothing is kept for the
//! domains that never die, to which most nodes of a host belong.
//!
//! Nodes are known by their stamps of creation, which no two of them share. What is kept here is
//! determined by the tree alone, and the invariant checker compares the two.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::DomId;

use crate::access::Acl;
use crate::change::Change;
use crate::node::Node;
use crate::tree::{Tree, components};

/// A beginning, or a node on the way to one; not the root.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    parent: u64,
    name: Box<str>,
    /// Mentions that begin here, and places right below.
    uses: usize,
}

/// An index of the tree by mentioned domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mentions {
    /// Domains that never die.
    immortal: [DomId; 2],
    /// Domains, each with the nodes at which mentions of it begin.
    begins: BTreeSet<(DomId, u64)>,
    places: BTreeMap<u64, Place>,
}

/// Nodes from the root down to one.
type Way<'t> = Vec<&'t Arc<Node>>;

impl Mentions {
    /// The index of a tree; nothing is kept for those who are `immortal`.
    pub(crate) fn of(tree: &Tree, immortal: [DomId; 2]) -> Mentions {
        Mentions::with(tree, immortal, |_| ())
    }

    /// The same, calling `visit` with every node but the special ones: walking a large tree costs
    /// more than what is done at its nodes.
    pub(crate) fn with(
        tree: &Tree,
        immortal: [DomId; 2],
        mut visit: impl FnMut(&Node),
    ) -> Mentions {
        let mut mentions = Mentions { immortal, begins: BTreeSet::new(), places: BTreeMap::new() };
        let mut stack = alloc::vec![(0, tree.root())];
        let mut way = Way::new();
        while let Some((depth, node)) = stack.pop() {
            way.truncate(depth);
            way.push(node);
            visit(node);
            mentions.look(&way);
            if node.children().len() > 0 {
                stack.extend(node.children().iter().map(|child| (depth + 1, child)));
            }
        }
        mentions
    }

    /// Follows changes of the tree since it was `before`; or else, if nodes have been created at the
    /// most, since that stamp. Nodes that inherit their list begin nothing.
    pub(crate) fn follow(
        &mut self,
        changes: &[Change],
        before: Option<&Tree>,
        after: &Tree,
        since: u64,
    ) {
        let matters = |change: &&Change| change.removed || change.permitted;
        for change in changes.iter().filter(matters) {
            if !change.path.starts_with('@') {
                self.follow_one(&change.path, before, after, since);
            }
        }
    }

    fn follow_one(&mut self, path: &str, before: Option<&Tree>, after: &Tree, since: u64) {
        let mut names = components(path);
        let mut old = before.map(Tree::root);
        // With room for a child of the last. A vector that grows leaves pieces of the heap behind
        // in which a node does not fit well.
        let mut way = Way::with_capacity(components(path).count() + 2);
        way.push(after.root());
        loop {
            let node = way[way.len() - 1];
            match old {
                Some(old) if Arc::ptr_eq(old, node) => return,
                Some(old) => self.permitted(&mut way, old.acl()),
                None if before.is_some() || node.created() > since => self.look(&way),
                None => {}
            }
            let Some(name) = names.next() else {
                // What is below a new node may have inherited what is no longer its list.
                if old.is_none() {
                    self.look_below(&mut way);
                }
                return;
            };
            old = old.and_then(|old| old.children().get(name));
            let child = node.children().get(name);
            if let Some(gone) = old
                && child.is_none_or(|child| child.created() != gone.created())
            {
                self.removed(gone);
                old = None;
            }
            match child {
                Some(child) => way.push(child),
                None => return,
            }
        }
    }

    /// The node at the end of the way may have had another list.
    fn permitted(&mut self, way: &mut Way<'_>, old: &Acl) {
        let node = way[way.len() - 1];
        if old.is_same(node.acl()) {
            return;
        }
        for domid in self.mortals(old) {
            self.remove(domid, node.created());
        }
        self.look(way);
        self.look_below(way);
    }

    /// Looks which mentions begin right below the end of the way.
    fn look_below(&mut self, way: &mut Way<'_>) {
        for child in way[way.len() - 1].children().iter() {
            way.push(child);
            self.look(way);
            way.pop();
        }
    }

    /// Looks which mentions begin at the end of the way.
    fn look(&mut self, way: &Way<'_>) {
        let node = way[way.len() - 1];
        let parent = way.len().checked_sub(2).map(|at| way[at].acl());
        if parent.is_some_and(|parent| parent.is_same(node.acl())) {
            return;
        }
        for domid in self.mortals(node.acl()) {
            match parent.is_some_and(|parent| parent.mentions(domid)) {
                true => self.remove(domid, node.created()),
                false => self.add(domid, way),
            }
        }
    }

    /// The domains that a list names, some of them more than once.
    fn mortals<'a>(&self, acl: &'a Acl) -> impl Iterator<Item = DomId> + use<'a> {
        let immortal = self.immortal;
        let named = acl.entries().iter().map(|entry| entry.perm.domid);
        named.filter(move |domid| !immortal.contains(domid))
    }

    fn add(&mut self, domid: DomId, way: &Way<'_>) {
        let node = way[way.len() - 1];
        if !self.begins.insert((domid, node.created())) {
            return;
        }
        for pair in way.windows(2).rev() {
            let (parent, node) = (pair[0].created(), pair[1]);
            if let Some(place) = self.places.get_mut(&node.created()) {
                place.uses += 1;
                return;
            }
            let place = Place { parent, name: node.name().into(), uses: 1 };
            self.places.insert(node.created(), place);
        }
    }

    fn remove(&mut self, domid: DomId, created: u64) {
        if self.begins.remove(&(domid, created)) {
            self.release(created);
        }
    }

    /// The nodes at which mentions of a domain begin.
    fn begins(&self, domid: DomId) -> impl Iterator<Item = u64> {
        self.begins.range((domid, 0)..=(domid, u64::MAX)).map(|(_, created)| *created)
    }

    /// A place has one use less.
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

    /// A node is gone, and all below it.
    fn removed(&mut self, top: &Arc<Node>) {
        let Some(place) = self.places.get(&top.created()) else { return };
        let parent = place.parent;
        let mut stack = alloc::vec![top];
        while let Some(node) = stack.pop() {
            if self.places.remove(&node.created()).is_none() {
                continue;
            }
            for domid in self.mortals(node.acl()) {
                self.begins.remove(&(domid, node.created()));
            }
            // What has inherited all and has nothing below it is no place.
            let may_be =
                |child: &&Arc<Node>| child.children().len() > 0 || !child.acl().is_same(node.acl());
            stack.extend(node.children().iter().filter(may_be));
        }
        self.release(parent);
    }

    /// A domain is not mentioned anywhere any more.
    pub(crate) fn forget(&mut self, domid: DomId) {
        let begins: Vec<u64> = self.begins(domid).collect();
        begins.into_iter().for_each(|created| self.remove(domid, created));
    }

    /// Paths of the nodes of `tree` that mention a domain and that are `wanted`, in order of
    /// creation, parents first; the special nodes before all others. What is below a node that is
    /// `enough` is left out.
    pub(crate) fn paths(
        &self,
        tree: &Tree,
        domid: DomId,
        wanted: impl Fn(&Acl) -> bool,
        enough: impl Fn(&Acl) -> bool,
    ) -> Vec<String> {
        let mentions = |node: &Node| node.acl().mentions(domid);
        let special = tree.special().filter(|node| mentions(node) && wanted(node.acl()));
        let special = special.map(|node| String::from(node.name()));
        let mut stack: Vec<(Vec<u64>, String)> =
            self.begins(domid).map(|created| self.way_to(created)).collect();
        let mut found = Vec::new();
        while let Some((order, path)) = stack.pop() {
            // Not there any more if its removal has not been followed yet.
            let Some(node) = tree.get(&path).filter(|node| mentions(node)) else { continue };
            if path == "/" || !enough(node.acl()) {
                let prefix = if path == "/" { "" } else { &path };
                for child in node.children().iter().filter(|child| mentions(child)) {
                    let order = [&order[..], &[child.created()]].concat();
                    stack.push((order, alloc::format!("{prefix}/{}", child.name())));
                }
            }
            if wanted(node.acl()) {
                found.push((order, path));
            }
        }
        found.sort_unstable();
        special.chain(found.into_iter().map(|(_, path)| path)).collect()
    }

    /// Stamps of the nodes on the way from below the root to one, and its path.
    fn way_to(&self, mut created: u64) -> (Vec<u64>, String) {
        let (mut order, mut names) = (Vec::new(), Vec::new());
        while let Some(place) = self.places.get(&created) {
            order.push(created);
            names.push(&*place.name);
            created = place.parent;
        }
        order.reverse();
        let path = names.iter().rev().fold(String::new(), |path, name| path + "/" + name);
        (order, if path.is_empty() { "/".into() } else { path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::merge;
    use xenstore_protocol::{Access, Perm};

    const IMMORTAL: [DomId; 2] = [DomId(0); 2];

    fn acl(domids: &[u16]) -> Acl {
        let perm = |domid: &u16| Perm { access: Access::Read, domid: DomId(*domid) };
        Acl::new(domids.iter().map(perm)).unwrap()
    }

    fn owned_by(domid: u16) -> impl Fn(&Acl) -> bool {
        move |acl| acl.owner() == DomId(domid)
    }

    /// Does one thing somewhere, as requests do it.
    fn change(tree: &mut Tree, stamp: &mut u64, mut random: impl FnMut(usize) -> usize) -> Change {
        let names = ["a", "b", "c"];
        let path: String =
            (0..=random(4)).map(|_| alloc::format!("/{}", names[random(3)])).collect();
        let lists: [&[u16]; 7] = [&[0], &[0], &[0, 5], &[0, 6, 5], &[5], &[6, 5, 5], &[6]];
        match (random(5), tree.get(&path).is_some()) {
            (0, _) => {
                tree.remove(&path, stamp);
                return Change::removed(&path);
            }
            (1 | 2, true) => tree.get_mut(&path).unwrap().set_acl(acl(lists[random(7)])),
            (_, true) => {
                tree.get_mut(&path).unwrap().set_value(b"x");
                return Change::written(&path);
            }
            (_, false) => {
                let above = tree.nearest(&path).0.acl();
                let acl = above.with_owner([above.owner(), DomId(5), DomId(6)][random(3)]);
                let inherited = acl.is_same(above);
                tree.make(&path, &acl, b"", stamp);
                if inherited {
                    return Change::written(&path);
                }
            }
        }
        Change::permitted(&path)
    }

    // Fails if after any changes, alone or several in one commit, the index is not that of the
    // tree: a domain that dies would leave something behind, or an entry would stay for ever.
    #[test]
    fn the_index_follows_the_tree() {
        let mut seed = 1_u32;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as usize % below
        };
        let mut tree = Tree::initial(DomId(0));
        let mut mentions = Mentions::of(&tree, IMMORTAL);
        let mut stamp = 10;
        let mut most = 0;
        for step in 0..4_000 {
            let (before, since) = (tree.clone(), stamp);
            let count = if step % 2 == 0 { 1 } else { 1 + random(6) };
            let changes = (0..count).map(|_| change(&mut tree, &mut stamp, &mut random)).collect();
            mentions.follow(&merge(changes), Some(&before), &tree, since);
            assert_eq!(mentions, Mentions::of(&tree, IMMORTAL), "step {step}");
            most = most.max(mentions.places.len());
            let found = mentions.paths(&tree, DomId(5), owned_by(5), |_| false);
            assert_eq!(found, crate::tree::paths(&tree, owned_by(5)));
        }
        assert!(most > 20, "there was little to index");
    }

    // Fails if the index keeps something for nodes that inherit a list, or that belong to those who
    // never die.
    #[test]
    fn only_beginnings_are_kept() {
        let mut tree = Tree::initial(DomId(0));
        tree.make("/home", &acl(&[5]), b"", &mut 10);
        for i in 0..100 {
            tree.make(&alloc::format!("/home/{i}"), &acl(&[5]), b"", &mut (20 + 2 * i));
            tree.make(&alloc::format!("/n{i}"), &acl(&[0]), b"", &mut (500 + 2 * i));
        }
        let mentions = Mentions::of(&tree, IMMORTAL);
        assert_eq!(mentions.places.len(), 1);
        assert_eq!(mentions.paths(&tree, DomId(5), owned_by(5), |_| false).len(), 101);
        assert_eq!(mentions.paths(&tree, DomId(5), owned_by(5), owned_by(5)), ["/home"]);
    }
}
