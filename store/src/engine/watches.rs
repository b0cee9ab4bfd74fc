//! WATCH, UNWATCH, RESET_WATCHES, and the way of an event from a change to its receiver.

use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::{Access, DomId, Errno, Features, Path, PathKind, Quota, WatchEvent};

use crate::engine::Engine;
use crate::engine::fanout::Fanout;
use crate::ids::ConnId;
use crate::transaction::execute::resolve;
use crate::tree::Tree;
use crate::tree::accounting::{event_cost, watch_cost};
use crate::tree::acl::{Acl, Rights};
use crate::tree::change::{Change, Readers};
use crate::watch::index::{Gone, PENDING_MAX, Pending, Queued, Watch, WatchId};

/// Places for events that a connection keeps when none wait.
const EVENTS_KEPT: usize = 16;

impl Engine {
    pub(crate) fn watch(
        &mut self,
        conn: ConnId,
        path: Path<'_>,
        token: &[u8],
        depth: Option<u32>,
    ) -> Result<(), Errno> {
        let rights = self.rights(conn);
        if depth.is_some() && !self.features(conn).contains(Features::WATCH_DEPTH) {
            return Err(Errno::Einval);
        }
        let resolved = self.resolve(&rights, path)?;
        let connection = self.conns.get(&conn).ok_or(Errno::Eio)?;
        if connection.watches.contains_key(&(resolved.as_ref().into(), token.into())) {
            return Err(Errno::Eexist);
        }
        let usage = self.domains.get(rights.domid).map(|d| d.usage).unwrap_or_default();
        let bytes = usage.bytes + watch_cost(&resolved, token);
        if !self.allow(&rights, Quota::Watches, usage.watches + 1)
            || !self.allow(&rights, Quota::Memory, bytes)
        {
            return Err(Errno::Enospc);
        }
        self.add_watch(conn, path, token, depth).map(drop)
    }

    /// The path that the caller means, if it may use one of that length.
    fn resolve<'p>(&mut self, rights: &Rights, path: Path<'p>) -> Result<Cow<'p, str>, Errno> {
        let (path, relative) = resolve(rights, path)?;
        let allowed = self.allow(rights, Quota::PathMax, relative);
        allowed.then_some(path).ok_or(Errno::Einval)
    }

    /// Adds a watch, whatever the quotas.
    pub(crate) fn add_watch(
        &mut self,
        conn: ConnId,
        path: Path<'_>,
        token: &[u8],
        depth: Option<u32>,
    ) -> Result<WatchId, Errno> {
        let domid = self.rights(conn).domid;
        let resolved = path.resolve(domid).ok_or(Errno::Einval)?.into_inner();
        let connection = self.conns.get_mut(&conn).ok_or(Errno::Eio)?;
        let key = (resolved.as_ref().into(), token.into());
        if connection.watches.contains_key(&key) {
            return Err(Errno::Eexist);
        }
        let relative = path.kind() == PathKind::Relative;
        let id = self.watches.add(Watch {
            conn,
            prefix: if relative { resolved.len() - path.as_str().len() } else { 0 },
            path: resolved.as_ref().into(),
            token: token.into(),
            depth,
            pending: Pending::default(),
            collapsed: false,
            round: 0,
        });
        connection.watches.insert(key, id);
        self.domains.count(domid, |usage| {
            usage.watches += 1;
            usage.bytes += watch_cost(&resolved, token);
        });
        Ok(id)
    }

    pub(crate) fn unwatch(
        &mut self,
        conn: ConnId,
        path: Path<'_>,
        token: &[u8],
    ) -> Result<(), Errno> {
        let rights = self.rights(conn);
        let resolved = self.resolve(&rights, path)?;
        let connection = self.conns.get_mut(&conn).ok_or(Errno::Eio)?;
        let key = (resolved.as_ref().into(), token.into());
        let id = connection.watches.remove(&key).ok_or(Errno::Enoent)?;
        self.forget_watch(conn, id);
        Ok(())
    }

    /// Drops the watches and transactions of a connection, and the events that wait for it.
    pub(crate) fn reset_watches(&mut self, conn: ConnId) {
        let Some(connection) = self.conns.get_mut(&conn) else { return };
        let watches = core::mem::take(&mut connection.watches);
        // All of them belong to these watches.
        connection.events.clear();
        connection.stale = 0;
        let transactions = core::mem::take(&mut connection.transactions);
        for id in watches.into_values() {
            self.forget_watch(conn, id);
        }
        let domid = self.rights(conn).domid;
        for transaction in transactions.into_values() {
            self.forget_transaction(domid, triomphe::Arc::unwrap_or_clone(transaction));
        }
        self.fairness.answered(conn);
        self.unprotect();
    }

    /// Ends a watch whose connection has no entry for it any more. Events that wait for it go too:
    /// after the reply to UNWATCH none follows.
    fn forget_watch(&mut self, conn: ConnId, id: WatchId) {
        let Some(watch) = self.watches.remove(id) else { return };
        let domid = self.rights(conn).domid;
        self.drop_events(conn, watch.pending.len());
        let events: i64 = watch.pending.iter().map(|path| event_cost(path)).sum();
        self.domains.count(domid, |usage| {
            usage.watches -= 1;
            usage.bytes -= watch_cost(&watch.path, &watch.token) + events;
        });
    }

    /// Drops `count` queued events of a connection that are stale: their watch was removed, or has another
    /// round.
    fn drop_events(&mut self, conn: ConnId, count: usize) {
        let Some(connection) = self.conns.get_mut(&conn).filter(|conn| !conn.events.is_empty())
        else {
            return;
        };
        let (watches, before) = (&self.watches, connection.events.len());
        connection.make_stale(count, |event| watches.is_live(event));
        if connection.events.len() < before {
            self.deferred.spend(before / 4);
        }
    }

    /// Queues the events of changes by a connection, or by the store itself if `conn` is `None`. Each path
    /// occurs once. `old` is the tree before a commit. Work beyond the budget of the input is deferred.
    pub(crate) fn fire(&mut self, conn: Option<ConnId>, changes: &[Change], old: Option<&Tree>) {
        if self.watches.all.is_empty() {
            return;
        }
        for (at, change) in changes.iter().enumerate() {
            self.deferred.spend(change.path.len() / 16);
            if !self.fire_at_once(change, old) {
                let (tree, newest) = (self.committed.tree.clone(), WatchId(self.watches.last));
                let fanout = Fanout::new(changes[at..].to_vec(), tree, old.cloned(), newest);
                return self.deferred.defer_fanout(conn, fanout);
            }
        }
    }

    /// Queues the events of one change. Returns false if they exceed the budget, or if earlier events are
    /// still deferred.
    fn fire_at_once(&mut self, change: &Change, old: Option<&Tree>) -> bool {
        let mut room = usize::try_from(self.deferred.budget()).unwrap_or(usize::MAX);
        let mut events = Vec::new();
        let now = || self.committed.tree.get(&change.path);
        for before in &change.removed {
            let Some(below) = self.watches.count_below(&change.path, room) else { return false };
            room -= below;
            self.deferred.spend(below);
            if below > 0 {
                let gone = Gone { path: &change.path, before, now: now(), old };
                events.extend(self.watches.removed_below(gone).into_iter().map(|gone| {
                    let readers: Readers = gone.nodes.into_iter().map(|node| node.acl()).collect();
                    (gone.path.clone(), gone.ids.keys().copied().collect::<Vec<_>>(), readers)
                }));
            }
        }
        let mut ids = Vec::new();
        if old.is_none_or(|old| old.get(&change.path).is_some()) || now().is_some() {
            let Some(matching) = self.watches.matching(&change.path, room) else { return false };
            ids = matching;
        }
        if self.deferred.has_fanouts() && !(events.is_empty() && ids.is_empty()) {
            return false;
        }
        // Events queued before the budget ends are queued again later; equal events are merged.
        events.iter().all(|(path, ids, readers)| self.queue_for_readers(path, ids, readers))
            && (ids.is_empty()
                || self.queue_for_readers(&change.path.as_str().into(), &ids, &change.readers))
    }

    /// Queues the events of a special node about a domain.
    pub(crate) fn fire_special(&mut self, name: &str, domid: DomId) {
        let tree = self.committed.tree.clone();
        let nodes = [tree.get(name), Some(tree.root())].into_iter().flatten();
        let readers: Readers = nodes.map(|node| node.acl()).collect();
        let with_domid: Arc<str> = alloc::format!("{name}/{domid}").into();
        let count = [name, &with_domid].map(|path| self.watches.count_on(path));
        let room = usize::try_from(self.deferred.budget()).unwrap_or(usize::MAX);
        let at_once = !self.deferred.has_fanouts() && count[0] + count[1] < room && {
            let matching = self.watches.matching_special(name, domid);
            matching.into_iter().all(|(id, path)| self.queue_for_readers(&path, &[id], &readers))
        };
        if !at_once {
            let newest = WatchId(self.watches.last);
            let fanout = Fanout::special(name, with_domid, readers, tree, newest);
            self.deferred.defer_fanout(None, fanout);
        }
    }

    /// Queues an event for those watches whose connection may read by one of the lists. Returns false if
    /// the budget ends before the last.
    fn queue_for_readers(&mut self, path: &Arc<str>, ids: &[WatchId], readers: &Readers) -> bool {
        for id in ids {
            if self.deferred.budget() == 0 {
                return false;
            }
            self.deferred.spend(1);
            let Some(conn) = self.watches.all.get(id).map(|watch| watch.conn) else { continue };
            let rights = self.rights(conn);
            let grants = |acl: &Acl| acl.access(&rights).grants(Access::Read);
            if readers.iter().any(grants) {
                self.queue(*id, path.clone(), &rights);
            }
        }
        true
    }

    /// Queues an event for a watch whose connection has these rights.
    pub(crate) fn queue(&mut self, id: WatchId, path: Arc<str>, rights: &Rights) {
        let Some(watch) = self.watches.all.get(&id) else { return };
        if watch.collapsed || watch.pending.contains(&path) {
            return;
        }
        let conn = watch.conn;
        let no_memory = !rights.privileged && {
            let usage = self.domains.get(rights.domid).map(|d| d.usage).unwrap_or_default();
            !self.allow(rights, Quota::Memory, usage.bytes + event_cost(&path))
        };
        let Some(watch) = self.watches.all.get_mut(&id) else { return };
        let too_long =
            path.len() - watch.prefix + watch.token.len() + 2 > xenstore_protocol::PAYLOAD_MAX;
        let collapse = too_long || no_memory || watch.pending.len() >= PENDING_MAX;
        let (mut cost, mut dropped) = (0, 0);
        let path = if collapse {
            cost -= watch.pending.iter().map(|path| event_cost(path)).sum::<i64>();
            dropped = watch.pending.len();
            watch.pending.clear();
            watch.round = watch.round.wrapping_add(1);
            watch.collapsed = true;
            watch.path.clone()
        } else {
            path
        };
        cost += event_cost(&path);
        watch.pending.insert(path.clone());
        let event = Queued { watch: id, round: watch.round, path };
        if dropped > 0 {
            self.deferred.spend(dropped / 2);
            self.drop_events(conn, dropped);
        }
        let Some(connection) = self.conns.get_mut(&conn) else { return };
        connection.events.push_back(event);
        self.domains.count(rights.domid, |usage| usage.bytes += cost);
        self.ready.insert(conn);
    }

    /// Appends queued events of `conn` until `out` has `limit` bytes. Returns true if more are queued.
    pub(crate) fn take_events(&mut self, conn: ConnId, limit: usize, out: &mut Vec<u8>) -> bool {
        // Nearly always, after each request.
        if self.conns.get(&conn).is_none_or(|connection| connection.events.is_empty()) {
            return false;
        }
        let domid = self.rights(conn).domid;
        while out.len() < limit {
            let Some(connection) = self.conns.get_mut(&conn) else { return false };
            let Some(event) = connection.events.pop_front() else { break };
            if !self.watches.is_live(&event) {
                connection.stale -= 1;
                continue;
            }
            let Some(watch) = self.watches.all.get_mut(&event.watch) else { continue };
            watch.pending.remove(&event.path);
            watch.collapsed = false;
            let path = event.path[watch.prefix..].as_bytes();
            // An event that does not fit a message is dropped (XSA-324).
            let _ = WatchEvent { path, token: &watch.token }.emit(out);
            self.domains.count(domid, |usage| usage.bytes -= event_cost(&event.path));
        }
        let Some(connection) = self.conns.get_mut(&conn) else { return false };
        connection.make_stale(0, |event| self.watches.is_live(event));
        if connection.events.is_empty() {
            // A burst does not keep its memory.
            connection.events.shrink_to(EVENTS_KEPT);
        }
        connection.waiting() > 0
    }
}
