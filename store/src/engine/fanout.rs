//! Queuing of events whose number exceeds the budget of one input.
//!
//! The first phase gathers the changes by watched path. The second queues the events of the watches of
//! each path. Where a path would cause more than [`MANY`] events, a watch with more than [`FEW`] changes
//! gets one event with its own path, which means "look again at everything". Permissions are evaluated
//! once for each connection and path. Each phase resumes where the budget has ended.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::Access;

use crate::engine::Engine;
use crate::ids::ConnId;
use crate::tree::acl::Acl;
use crate::tree::change::{Change, Readers};
use crate::tree::{Tree, components};
use crate::watch::index::{Gone, PENDING_MAX, WatchId};

/// Changes for which a watch gets an event each, however many watches there are.
const FEW: usize = 64;
/// Events that a path may cause before a watch with many changes gets a single event.
const MANY: usize = 65_536;

/// Events that are still to be queued.
#[derive(Debug)]
pub(crate) struct Fanout {
    changes: Vec<Change>,
    /// The tree after these changes.
    tree: Tree,
    /// The tree before, if the changes are a commit.
    old: Option<Tree>,
    /// Watches newer than this were not set when the changes were made.
    newest: WatchId,
    /// Changes that have been gathered, counted once for each path.
    gathered: usize,
    /// The change to be gathered next, and the last watched path below it that has been gathered.
    next: usize,
    below: Option<Arc<str>>,
    /// The changes that fire the watches of each path.
    found: BTreeMap<Arc<str>, Found>,
    /// The last watch of the first of these paths whose events have been queued.
    last: WatchId,
    /// Which connections may read the changes of that path.
    may_read: BTreeMap<ConnId, bool>,
}

/// The changes that fire the watches of a path.
#[derive(Debug, Default)]
struct Found {
    /// Changes at or below the path: the first one, their number, and the least distance in levels.
    few: Vec<(usize, usize)>,
    count: usize,
    nearest: usize,
    /// The permission lists for all of these changes together.
    readers: Readers,
    /// The permission lists for the event that the node itself was removed with a node above it.
    gone: Option<Readers>,
    /// The path in the events of watches that do not ask for the bare name of a special node.
    with_domid: Option<Arc<str>>,
}

impl Fanout {
    /// The events of `changes`, which led to `tree`.
    pub(crate) fn new(
        changes: Vec<Change>,
        tree: Tree,
        old: Option<Tree>,
        newest: WatchId,
    ) -> Fanout {
        Fanout {
            changes,
            tree,
            old,
            newest,
            gathered: 0,
            next: 0,
            below: None,
            found: BTreeMap::new(),
            last: WatchId(0),
            may_read: BTreeMap::new(),
        }
    }

    /// The events of a special node about a domain. Watches that ask for the domid get the path
    /// `with_domid`.
    pub(crate) fn special(
        name: &str,
        with_domid: Arc<str>,
        readers: Readers,
        tree: Tree,
        newest: WatchId,
    ) -> Fanout {
        let found =
            |with_domid| Found { gone: Some(readers.clone()), with_domid, ..Found::default() };
        let mut fanout = Fanout::new(Vec::new(), tree, None, newest);
        fanout.found.insert(name.into(), found(Some(with_domid.clone())));
        fanout.found.insert(with_domid, found(None));
        fanout
    }
}

impl Engine {
    /// Queues events as far as the budget allows. Returns the rest, if any.
    pub(crate) fn advance_fanout(&mut self, mut fanout: Fanout) -> Option<Fanout> {
        while fanout.next < fanout.changes.len() {
            if self.deferred.budget() == 0 {
                return Some(fanout);
            }
            self.gather(&mut fanout);
        }
        while let Some((path, found)) = fanout.found.pop_first() {
            if !self.queue_found(&mut fanout, &path, &found) {
                fanout.found.insert(path, found);
                return Some(fanout);
            }
            fanout.last = WatchId(0);
            fanout.may_read.clear();
        }
        None
    }

    /// Gathers the watched paths of the next change, or a part of them.
    fn gather(&mut self, fanout: &mut Fanout) {
        let Fanout { changes, tree, old, gathered, next, below, found, .. } = fanout;
        let change = &changes[*next];
        let now = tree.get(&change.path);
        let after = below.take();
        let watched = change.removed.first().map(|_| &self.watches);
        let watched = watched
            .into_iter()
            .flat_map(|watches| watches.watched_below(&change.path, after.as_deref()));
        for (path, _) in watched {
            for before in &change.removed {
                let mut place = Vec::new();
                let gone = Gone { path: &change.path, before, now, old: old.as_ref() };
                let nodes = gone.find(path, &mut place);
                self.deferred.spend(1 + place.len() / 4);
                if let Some([node, above]) = nodes {
                    let entry = found.entry(path.clone()).or_default();
                    let readers = entry.gone.get_or_insert_default();
                    readers.add(node.acl());
                    readers.add(above.acl());
                }
            }
            if self.deferred.budget() == 0 {
                *below = Some(path.clone());
                return;
            }
        }
        if old.as_ref().is_none_or(|old| old.get(&change.path).is_some()) || now.is_some() {
            for (path, distance) in self.watches.watched_above(&change.path) {
                self.deferred.spend(1);
                let entry = found.entry(path.clone()).or_default();
                let events = (entry.few.len() + 1) * self.watches.count_on(path);
                let is_few = *gathered < MANY && events <= MANY && entry.few.len() < PENDING_MAX;
                if is_few || entry.few.len() < FEW {
                    entry.few.push((*next, distance));
                    *gathered += 1;
                }
                entry.nearest =
                    if entry.count == 0 { distance } else { entry.nearest.min(distance) };
                entry.count += 1;
                change.readers.iter().for_each(|acl| entry.readers.add(acl));
            }
        }
        self.deferred.spend(1 + components(&change.path).count() / 4);
        *next += 1;
    }

    /// Queues the events of the watches of a path. Returns false if the budget ends before the last.
    fn queue_found(&mut self, fanout: &mut Fanout, path: &Arc<str>, found: &Found) -> bool {
        loop {
            let ids: Vec<_> =
                self.watches.on_path(path, fanout.last, fanout.newest).take(256).collect();
            if ids.is_empty() {
                return true;
            }
            for (id, depth) in ids {
                if self.deferred.budget() == 0 {
                    return false;
                }
                fanout.last = id;
                self.queue_for(fanout, id, depth, path, found);
            }
        }
    }

    /// Queues the events of one watch.
    fn queue_for(
        &mut self,
        fanout: &mut Fanout,
        id: WatchId,
        depth: Option<u32>,
        path: &Arc<str>,
        found: &Found,
    ) {
        self.deferred.spend(1);
        let Some(conn) = self.watches.all.get(&id).map(|watch| watch.conn) else { return };
        let rights = self.rights(conn);
        let mut units = 0;
        let mut reads = |readers: &Readers| {
            let grants = |acl: &Acl| {
                units += 1;
                acl.access(&rights).grants(Access::Read)
            };
            readers.iter().any(grants)
        };
        let near = |distance: usize| depth.is_none_or(|depth| depth as usize >= distance);
        let mut paths = Vec::new();
        if found.gone.as_ref().is_some_and(&mut reads) {
            let bare = depth.is_none_or(|depth| depth == 0);
            paths.push(match &found.with_domid {
                Some(with_domid) if !bare => with_domid.clone(),
                _ => path.clone(),
            });
        }
        if found.count > found.few.len() {
            let may_read = *fanout.may_read.entry(conn).or_insert_with(|| reads(&found.readers));
            if may_read && near(found.nearest) {
                paths.push(path.clone());
            }
        } else {
            for (at, distance) in &found.few {
                let change = &fanout.changes[*at];
                if near(*distance) && reads(&change.readers) {
                    paths.push(change.path.as_str().into());
                }
            }
        }
        self.deferred.spend(units / 8 + paths.len());
        for path in paths {
            self.queue(id, path, &rights);
        }
    }
}
