//! Watches: found by the path of a change, and what waits for each.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Bound;

use xenstore_protocol::DomId;

use crate::ids::ConnId;
use crate::mru_map::MruMap;
use crate::tree::node::Node;
use crate::tree::{Tree, components, parent};

/// A watch, by number, in order of registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WatchId(pub(crate) u64);

/// Most different events that wait for one watch. Beyond, they become a single one with the path
/// of the watch itself: "look again at everything". So nothing is lost, and a client that does not
/// read costs a bounded amount of memory.
pub(crate) const PENDING_MAX: usize = 1024;

/// Paths of the queued events of a watch. Usually there is at most one, which needs no allocation.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    first: Option<Arc<str>>,
    rest: BTreeSet<Arc<str>>,
}

impl Pending {
    pub(crate) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }

    pub(crate) fn contains(&self, path: &Arc<str>) -> bool {
        self.first.as_ref() == Some(path) || self.rest.contains(path)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<str>> {
        self.first.iter().chain(&self.rest)
    }

    /// Returns false if the path is pending already.
    pub(crate) fn insert(&mut self, path: Arc<str>) -> bool {
        if self.first.is_none() && !self.rest.contains(&path) {
            self.first = Some(path);
            return true;
        }
        self.first.as_ref() != Some(&path) && self.rest.insert(path)
    }

    pub(crate) fn remove(&mut self, path: &Arc<str>) {
        if self.first.as_ref() == Some(path) {
            self.first = None;
        } else if self.rest.remove(path) && self.rest.is_empty() {
            // An empty set still holds the memory of its last node.
            self.rest.clear();
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Pending::default();
    }
}

#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) conn: ConnId,
    /// Resolved.
    pub(crate) path: Arc<str>,
    /// Bytes of a path that the client did not write and does not want to read.
    pub(crate) prefix: usize,
    pub(crate) token: Arc<[u8]>,
    pub(crate) depth: Option<u32>,
    /// Paths of the events that wait to be fetched.
    pub(crate) pending: Pending,
    /// One event with the path of the watch waits instead of all that happened.
    pub(crate) collapsed: bool,
    /// Grows when the events that wait are dropped; see [`Queued`](Queued).
    pub(crate) round: u32,
}

/// An event that waits to be fetched.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    pub(crate) watch: WatchId,
    /// That of the watch when the event was queued: it is stale if the watch has another one now.
    pub(crate) round: u32,
    pub(crate) path: Arc<str>,
}

/// The watches on one path, and the depth of each.
pub(crate) type Found = BTreeMap<WatchId, Option<u32>>;

/// All watches. They are found by path in one ordered map, so that a watch costs the same however
/// deep its path is (XSA-326), and those below a path are next to each other.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    pub(crate) all: MruMap<WatchId, Watch>,
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

/// A node that was removed, in which watches are looked for.
#[derive(Clone, Copy)]
pub(crate) struct Gone<'a> {
    pub(crate) path: &'a str,
    pub(crate) before: &'a triomphe::Arc<Node>,
    /// The node that exists there now.
    pub(crate) now: Option<&'a triomphe::Arc<Node>>,
    /// The tree before the commit that this is a part of: nodes that are not there never were, for any
    /// other connection.
    pub(crate) old: Option<&'a Tree>,
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

    /// Returns true if a queued event is not stale.
    pub(crate) fn is_live(&self, event: &Queued) -> bool {
        self.all.get(&event.watch).is_some_and(|watch| watch.round == event.round)
    }

    /// How many watches there are on a path.
    pub(crate) fn count_on(&self, path: &str) -> usize {
        self.by_path.get(path).map_or(0, BTreeMap::len)
    }

    fn at(&self, path: &str) -> impl Iterator<Item = (&WatchId, &Option<u32>)> {
        self.by_path.get(path).into_iter().flatten()
    }

    /// Watches that a change of the node at `path` fires, in order of registration; `None` if there are
    /// more than `most`.
    pub(crate) fn matching(&self, path: &str, most: usize) -> Option<Vec<WatchId>> {
        if path.starts_with('@') {
            let few = self.count_on(path) <= most;
            return few.then(|| self.at(path).map(|(id, _)| *id).collect());
        }
        let mut found = Vec::new();
        let mut distance = 0;
        let mut above = Some(path);
        while let Some(path) = above {
            if let Some(ids) = self.by_path.get(path) {
                if found.len() + ids.len() > most {
                    return None;
                }
                let near =
                    |depth: &Option<u32>| depth.is_none_or(|depth| depth as usize >= distance);
                found.extend(ids.iter().filter(|(_, depth)| near(depth)).map(|(id, _)| *id));
            }
            distance += 1;
            above = parent(path);
        }
        found.sort_unstable();
        Some(found)
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

    /// How many watches there are below a path, and paths that they watch; `None` if more than `most`.
    pub(crate) fn count_below(&self, path: &str, most: usize) -> Option<usize> {
        let mut sizes = self.watched_below(path, None).map(|(_, ids)| 1 + ids.len());
        sizes.try_fold(0, |sum, size| Some(sum + size).filter(|sum| *sum <= most))
    }

    /// The watched paths at and above a path, each with its distance.
    pub(crate) fn watched_above(&self, path: &str) -> impl Iterator<Item = (&Arc<str>, usize)> {
        let above = core::iter::successors(Some(path), |path| parent(path));
        above.enumerate().filter_map(|(distance, path)| {
            self.by_path.get_key_value(path).map(|(path, _)| (path, distance))
        })
    }

    /// Watches on a path, in order of registration, behind `after` and up to `newest`.
    pub(crate) fn on_path(
        &self,
        path: &str,
        after: WatchId,
        newest: WatchId,
    ) -> impl Iterator<Item = (WatchId, Option<u32>)> {
        let range = (Bound::Excluded(after), Bound::Included(newest.max(after)));
        let found = self.by_path.get(path).filter(|_| after < newest);
        found.into_iter().flat_map(move |found| found.range(range)).map(|(id, depth)| (*id, *depth))
    }

    /// Watched paths below one, behind `after`.
    pub(crate) fn watched_below<'a>(
        &'a self,
        path: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Found)> {
        let start = alloc::format!("{path}/");
        let from = after.map_or(Bound::Included(&*start), Bound::Excluded);
        let below = self.by_path.range::<str, _>((from, Bound::Unbounded));
        below.take_while(move |(path, _)| path.starts_with(&start))
    }

    /// Watches exactly on nodes below a removed one: deepest first, siblings in order of creation.
    pub(crate) fn removed_below<'a>(&'a self, gone: Gone<'a>) -> Vec<Removed<'a>> {
        let mut found: Vec<(Vec<u64>, Removed<'a>)> = Vec::new();
        for (path, ids) in self.watched_below(gone.path, None) {
            // Sorts a node behind all that is below it.
            let mut place = Vec::new();
            if let Some(nodes) = gone.find(path, &mut place) {
                place.push(u64::MAX);
                found.push((place, Removed { path, ids, nodes }));
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

impl<'a> Gone<'a> {
    /// The node at a path below the removed one, and its parent, if it was removed with it. Appends the
    /// stamps of the nodes on the way to `place`.
    pub(crate) fn find(
        &self,
        path: &str,
        place: &mut Vec<u64>,
    ) -> Option<[&'a triomphe::Arc<Node>; 2]> {
        let (mut node, mut above, mut now) = (self.before, self.before, self.now);
        for name in components(&path[self.path.len() + 1..]) {
            let child = node.children().get(name)?;
            (above, node) = (node, child);
            now = now.and_then(|now| now.children().get(name));
            place.push(child.created());
        }
        let was_there = || self.old.is_none_or(|old| old.get(path).is_some());
        (now.is_none() && was_there()).then_some([node, above])
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
            pending: Pending::default(),
            collapsed: false,
            round: 0,
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
            let found = watches.matching(path, 7).unwrap();
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
