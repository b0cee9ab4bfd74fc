//! Watches: found by the path of a change, and what waits for each.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Bound;

use xenstore_protocol::DomId;

use crate::connection::ConnId;
use crate::node::Node;
use crate::recent::Recent;
use crate::tree::{components, parent};

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

/// The watches on one path, and the depth of each.
type Found = BTreeMap<WatchId, Option<u32>>;

/// All watches. They are found by path in one ordered map, so that a watch costs the same however
/// deep its path is (XSA-326), and those below a path are next to each other.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    pub(crate) all: Recent<WatchId, Watch>,
    by_path: BTreeMap<Arc<str>, Found>,
    pub(crate) last: u64,
}

/// Watches exactly on a node that was there and is there no more.
pub(crate) struct Removed<'a> {
    pub(crate) path: &'a Arc<str>,
    pub(crate) ids: &'a Found,
    /// The node, and the one above it, as they were.
    pub(crate) nodes: [&'a triomphe::Arc<Node>; 2],
}

impl Watches {
    pub(crate) fn add(&mut self, watch: Watch) -> WatchId {
        self.last += 1;
        let id = WatchId(self.last);
        self.by_path.entry(watch.path.clone()).or_default().insert(id, watch.depth);
        self.all.insert(id, watch);
        id
    }

    pub(crate) fn remove(&mut self, id: WatchId) -> Option<Watch> {
        let watch = self.all.remove(&id)?;
        if let Some(ids) = self.by_path.get_mut(&watch.path) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_path.remove(&watch.path);
            }
        }
        Some(watch)
    }

    fn at(&self, path: &str) -> impl Iterator<Item = (&WatchId, &Option<u32>)> {
        self.by_path.get(path).into_iter().flatten()
    }

    /// Watches that a change of the node at `path` fires, in order of registration.
    pub(crate) fn matching(&self, path: &str) -> Vec<WatchId> {
        if path.starts_with('@') {
            return self.at(path).map(|(id, _)| *id).collect();
        }
        let mut found = Vec::new();
        let mut distance = 0;
        let mut above = Some(path);
        while let Some(path) = above {
            let near = |depth: Option<u32>| depth.is_none_or(|depth| depth as usize >= distance);
            found.extend(self.at(path).filter(|(_, depth)| near(**depth)).map(|(id, _)| *id));
            distance += 1;
            above = parent(path);
        }
        found.sort_unstable();
        found
    }

    /// Watches on a special path fired by a domain: with the bare name, and with the domid behind
    /// it, which depth 1 or a watch on that very path asks for.
    pub(crate) fn matching_special(&self, name: &str, domid: DomId) -> Vec<(WatchId, Arc<str>)> {
        let with_domid: Arc<str> = alloc::format!("{name}/{domid}").into();
        let mut found = Vec::new();
        for (id, depth) in self.at(name) {
            let bare = depth.is_none_or(|depth| depth == 0);
            let path = || self.all[id].path.clone();
            found.push((*id, if bare { path() } else { with_domid.clone() }));
        }
        for (id, _) in self.at(&with_domid) {
            found.push((*id, with_domid.clone()));
        }
        found.sort_unstable_by_key(|(id, _)| *id);
        found
    }

    /// Watches exactly on nodes below `path` that were there (`before`) and are there no more:
    /// deepest first, siblings in order of creation.
    pub(crate) fn removed_below<'a>(
        &'a self,
        path: &str,
        before: &'a triomphe::Arc<Node>,
        now: Option<&triomphe::Arc<Node>>,
    ) -> Vec<Removed<'a>> {
        let start = alloc::format!("{path}/");
        let from = (Bound::Included(start.as_str()), Bound::Unbounded);
        let below = self.by_path.range::<str, _>(from);
        let mut found: Vec<(Vec<u64>, Removed<'a>)> = Vec::new();
        for (path, ids) in below.take_while(|(path, _)| path.starts_with(&start)) {
            let (mut node, mut above, mut now) = (before, before, now);
            // Sorts a node behind all that is below it.
            let mut place = Vec::new();
            let gone = components(&path[start.len()..]).all(|name| {
                let Some(child) = node.children().get(name) else { return false };
                (above, node) = (node, child);
                now = now.and_then(|now| now.children().get(name));
                place.push(child.created());
                true
            }) && now.is_none();
            if gone {
                place.push(u64::MAX);
                found.push((place, Removed { path, ids, nodes: [node, above] }));
            }
        }
        found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        found.into_iter().map(|(_, removed)| removed).collect()
    }

    /// Watches by path, for the invariant checker.
    pub(crate) fn indexed(&self) -> Vec<WatchId> {
        let of = |(path, found): (&Arc<str>, &Found)| {
            let agree = |(id, depth): &(&WatchId, &Option<u32>)| {
                let watch = self.all.get(id);
                watch.is_none_or(|watch| watch.path == *path && watch.depth == **depth)
            };
            found.iter().filter(agree).map(|(id, _)| *id).collect::<Vec<_>>()
        };
        let mut found: Vec<WatchId> = self.by_path.iter().flat_map(of).collect();
        found.sort_unstable();
        found
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
        assert!(watches.by_path.is_empty() && watches.all.is_empty());
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
