//! Watches: found by the path of a change, and what waits for each.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::DomId;

use crate::connection::ConnId;
use crate::node::Node;
use crate::tree::components;

/// A watch, by number, in order of registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WatchId(pub(crate) u64);

/// Most different events that wait for one watch. Beyond, they become a single one with the path
/// of the watch itself: "look again at everything". So nothing is lost, and a client that does not
/// read costs a bounded amount of memory.
pub(crate) const PENDING_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) conn: ConnId,
    /// Resolved.
    pub(crate) path: Arc<str>,
    /// Bytes of a path that the client did not write and does not want to read.
    pub(crate) prefix: usize,
    pub(crate) token: Box<[u8]>,
    pub(crate) depth: Option<u32>,
    /// Paths of the events that wait to be fetched.
    pub(crate) pending: BTreeSet<Arc<str>>,
    /// One event with the path of the watch waits instead of all that happened.
    pub(crate) collapsed: bool,
}

/// Gets a path, the nodes that were at and above it, and the watches exactly on it.
type Visit<'v> = dyn FnMut(&str, [&Arc<Node>; 2], &[WatchId]) + 'v;

/// Watches below one path, by the names that follow.
#[derive(Debug, Default)]
struct Branch {
    here: Vec<WatchId>,
    below: BTreeMap<Box<str>, Branch>,
}

/// All watches.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    pub(crate) all: BTreeMap<WatchId, Watch>,
    root: Branch,
    special: BTreeMap<Box<str>, Vec<WatchId>>,
    last: u64,
}

impl Watches {
    pub(crate) fn add(&mut self, watch: Watch) -> WatchId {
        self.last += 1;
        let id = WatchId(self.last);
        if watch.path.starts_with('@') {
            self.special.entry((*watch.path).into()).or_default().push(id);
        } else {
            let mut branch = &mut self.root;
            for name in components(&watch.path) {
                branch = branch.below.entry(name.into()).or_default();
            }
            branch.here.push(id);
        }
        self.all.insert(id, watch);
        id
    }

    pub(crate) fn remove(&mut self, id: WatchId) -> Option<Watch> {
        let watch = self.all.remove(&id)?;
        if watch.path.starts_with('@') {
            if let Some(ids) = self.special.get_mut(&*watch.path) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.special.remove(&*watch.path);
                }
            }
        } else {
            let names: Vec<&str> = components(&watch.path).collect();
            self.root.remove(&names, id);
        }
        Some(watch)
    }

    /// Watches that a change of the node at `path` fires, in order of registration.
    pub(crate) fn matching(&self, path: &str) -> Vec<WatchId> {
        let mut found = Vec::new();
        if path.starts_with('@') {
            found.extend(self.special.get(path).into_iter().flatten());
            return found;
        }
        let mut distance = components(path).count();
        let mut branch = Some(&self.root);
        let mut names = components(path);
        while let Some(at) = branch {
            let near =
                |id: &&WatchId| self.all[*id].depth.is_none_or(|depth| depth as usize >= distance);
            found.extend(at.here.iter().filter(near));
            distance = distance.wrapping_sub(1);
            branch = names.next().and_then(|name| at.below.get(name));
        }
        found.sort_unstable();
        found
    }

    /// Watches on a special path fired by a domain: with the bare name, and with the domid behind
    /// it, which depth 1 or a watch on that very path asks for.
    pub(crate) fn matching_special(&self, name: &str, domid: DomId) -> Vec<(WatchId, Arc<str>)> {
        let with_domid: Arc<str> = alloc::format!("{name}/{domid}").into();
        let mut found = Vec::new();
        for id in self.special.get(name).into_iter().flatten() {
            let watch = &self.all[id];
            let bare = watch.depth.is_none_or(|depth| depth == 0);
            found.push((*id, if bare { watch.path.clone() } else { with_domid.clone() }));
        }
        for id in self.special.get(&*with_domid).into_iter().flatten() {
            found.push((*id, with_domid.clone()));
        }
        found.sort_unstable_by_key(|(id, _)| *id);
        found
    }

    /// Watches exactly on nodes below `path` that were there and are there no more: deepest first,
    /// siblings in order of creation. `visit` gets the path and the nodes at and above it as they
    /// were.
    pub(crate) fn removed_below(
        &self,
        path: &str,
        before: &Arc<Node>,
        now: Option<&Arc<Node>>,
        visit: &mut Visit<'_>,
    ) {
        let mut branch = &self.root;
        for name in components(path) {
            match branch.below.get(name) {
                Some(below) => branch = below,
                None => return,
            }
        }
        branch.removed_below(path, before, now, visit);
    }

    /// Watches at or below every path, for the invariant checker.
    pub(crate) fn indexed(&self) -> Vec<WatchId> {
        let mut found: Vec<WatchId> = self.special.values().flatten().copied().collect();
        let mut stack = alloc::vec![&self.root];
        while let Some(branch) = stack.pop() {
            found.extend(&branch.here);
            stack.extend(branch.below.values());
        }
        found.sort_unstable();
        found
    }
}

impl Branch {
    fn is_empty(&self) -> bool {
        self.here.is_empty() && self.below.is_empty()
    }

    /// Recursion is as deep as a path is long, which is bounded.
    fn remove(&mut self, names: &[&str], id: WatchId) {
        let Some((name, rest)) = names.split_first() else {
            return self.here.retain(|other| *other != id);
        };
        if let Some(below) = self.below.get_mut(*name) {
            below.remove(rest, id);
            if below.is_empty() {
                self.below.remove(*name);
            }
        }
    }

    /// Follows only names that are both watched and in the tree.
    fn removed_below(
        &self,
        path: &str,
        before: &Arc<Node>,
        now: Option<&Arc<Node>>,
        visit: &mut Visit<'_>,
    ) {
        let mut watched: Vec<(&Branch, &Arc<Node>)> = self
            .below
            .iter()
            .filter_map(|(name, branch)| Some((branch, before.children.get(name)?)))
            .collect();
        watched.sort_unstable_by_key(|(_, node)| node.created);
        for (branch, node) in watched {
            let path = alloc::format!("{}/{}", path.trim_end_matches('/'), node.name);
            let now = now.and_then(|now| now.children.get(&node.name));
            branch.removed_below(&path, node, now, visit);
            if now.is_none() && !branch.here.is_empty() {
                visit(&path, [node, before], &branch.here);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(path: &str, depth: Option<u32>) -> Watch {
        Watch {
            conn: ConnId(1),
            path: path.into(),
            prefix: 0,
            token: b"t"[..].into(),
            depth,
            pending: BTreeSet::new(),
            collapsed: false,
        }
    }

    // Fails if a watch fires beyond its depth, beside its path, or not at all
    // (docs/misc/xenstore.txt, WATCH).
    #[test]
    fn a_change_fires_watches_on_its_path_within_their_depth() {
        let mut watches = Watches::default();
        let rows = [
            ("/", None),
            ("/a", None),
            ("/a", Some(0)),
            ("/a", Some(1)),
            ("/ab", None),
            ("/a/b", Some(0)),
            ("/a/b/c", None),
        ];
        let ids: Vec<WatchId> = rows.iter().map(|(p, d)| watches.add(watch(p, *d))).collect();
        let fired = |path: &str| -> Vec<usize> {
            let found = watches.matching(path);
            found.iter().map(|id| ids.iter().position(|i| i == id).unwrap()).collect()
        };
        assert_eq!(fired("/a"), [0, 1, 2, 3]);
        assert_eq!(fired("/a/b"), [0, 1, 3, 5]);
        assert_eq!(fired("/a/b/c/d"), [0, 1, 6]);
        assert_eq!(fired("/"), [0]);
        for id in ids {
            watches.remove(id);
        }
        assert!(watches.root.is_empty() && watches.all.is_empty());
    }

    // Fails if the bare and the per-domain form of special watches are mixed up.
    #[test]
    fn special_watches_come_bare_or_with_the_domid() {
        let mut watches = Watches::default();
        for (path, depth) in [
            ("@releaseDomain", None),
            ("@releaseDomain", Some(1)),
            ("@releaseDomain/5", None),
            ("@releaseDomain/6", None),
            ("@introduceDomain", None),
        ] {
            watches.add(watch(path, depth));
        }
        let found = watches.matching_special("@releaseDomain", DomId(5));
        let found: Vec<(u64, &str)> = found.iter().map(|(id, path)| (id.0, &**path)).collect();
        assert_eq!(
            found,
            [(1, "@releaseDomain"), (2, "@releaseDomain/5"), (3, "@releaseDomain/5")]
        );
    }
}
