//! WATCH, UNWATCH, RESET_WATCHES, and the way of an event from a change to its receiver.

use alloc::borrow::Cow;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::{Access, DomId, ErrorName, Path, PathKind, Quota, WatchEvent, feature};

use crate::access::{Acl, Rights};
use crate::change::{Change, merge};
use crate::charge::{event_cost, watch_cost};
use crate::connection::{ConnId, Queued};
use crate::engine::Engine;
use crate::execute::resolve;
use crate::tree::{Tree, parent};
use crate::watch::{PENDING_MAX, Watch, WatchId};

/// Places for events that a connection keeps when none wait.
const EVENTS_KEPT: usize = 16;

impl Engine {
    pub(crate) fn watch(
        &mut self,
        conn: ConnId,
        path: Path<'_>,
        token: &[u8],
        depth: Option<u32>,
    ) -> Result<(), ErrorName> {
        let rights = self.rights(conn);
        if depth.is_some() && self.features(conn) & feature::WATCH_DEPTH == 0 {
            return Err(ErrorName::Einval);
        }
        let resolved = self.resolve(&rights, path)?;
        let connection = self.conns.get(&conn).ok_or(ErrorName::Eio)?;
        if connection.watches.contains_key(&(resolved.as_ref().into(), token.into())) {
            return Err(ErrorName::Eexist);
        }
        let usage = self.domains.get(rights.domid).map(|d| d.usage).unwrap_or_default();
        let bytes = usage.bytes + watch_cost(&resolved, token);
        if !self.allow(&rights, Quota::Watches, usage.watches + 1)
            || !self.allow(&rights, Quota::Memory, bytes)
        {
            return Err(ErrorName::Enospc);
        }
        self.add_watch(conn, path, token, depth).map(drop)
    }

    /// The path that the caller means, if it may use one of that length.
    fn resolve<'p>(&mut self, rights: &Rights, path: Path<'p>) -> Result<Cow<'p, str>, ErrorName> {
        let (path, relative) = resolve(rights, path)?;
        let allowed = self.allow(rights, Quota::PathMax, relative);
        allowed.then_some(path).ok_or(ErrorName::Einval)
    }

    /// Adds a watch, whatever the quotas.
    pub(crate) fn add_watch(
        &mut self,
        conn: ConnId,
        path: Path<'_>,
        token: &[u8],
        depth: Option<u32>,
    ) -> Result<WatchId, ErrorName> {
        let domid = self.rights(conn).domid;
        let resolved = path.resolve(domid).ok_or(ErrorName::Einval)?.into_inner();
        let connection = self.conns.get_mut(&conn).ok_or(ErrorName::Eio)?;
        let key = (resolved.as_ref().into(), token.into());
        if connection.watches.contains_key(&key) {
            return Err(ErrorName::Eexist);
        }
        let relative = path.kind() == PathKind::Relative;
        let id = self.watches.add(Watch {
            conn,
            prefix: if relative { resolved.len() - path.as_str().len() } else { 0 },
            path: resolved.as_ref().into(),
            token: token.into(),
            depth,
            pending: BTreeSet::new(),
            collapsed: false,
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
    ) -> Result<(), ErrorName> {
        let rights = self.rights(conn);
        let resolved = self.resolve(&rights, path)?;
        let connection = self.conns.get_mut(&conn).ok_or(ErrorName::Eio)?;
        let key = (resolved.as_ref().into(), token.into());
        let id = connection.watches.remove(&key).ok_or(ErrorName::Enoent)?;
        self.forget_watch(conn, id);
        Ok(())
    }

    /// Drops the watches and transactions of a connection, and the events that wait for it.
    pub(crate) fn reset_watches(&mut self, conn: ConnId) {
        let Some(connection) = self.conns.get_mut(&conn) else { return };
        let watches = core::mem::take(&mut connection.watches);
        // All of them belong to these watches.
        connection.events.clear();
        let transactions = core::mem::take(&mut connection.transactions);
        for id in watches.into_values() {
            self.forget_watch(conn, id);
        }
        let domid = self.rights(conn).domid;
        for transaction in transactions.into_values() {
            self.forget_transaction(domid, &transaction);
        }
        self.protection.answered(conn);
        self.unprotect();
    }

    /// Ends a watch whose connection has no entry for it any more. Events that wait for it go too:
    /// after the reply to UNWATCH none follows.
    fn forget_watch(&mut self, conn: ConnId, id: WatchId) {
        let Some(watch) = self.watches.remove(id) else { return };
        let domid = self.rights(conn).domid;
        if !watch.pending.is_empty()
            && let Some(connection) = self.conns.get_mut(&conn)
        {
            connection.events.retain(|event| event.watch != id);
        }
        let events: i64 = watch.pending.iter().map(|path| event_cost(path)).sum();
        self.domains.count(domid, |usage| {
            usage.watches -= 1;
            usage.bytes -= watch_cost(&watch.path, &watch.token) + events;
        });
    }

    /// Tells the watchers of changes. `before` is needed where rights or nodes can have gone.
    /// Gives back each path once.
    pub(crate) fn fire(&mut self, changes: Vec<Change>, before: Option<&Tree>) -> Vec<Change> {
        let changes = merge(changes);
        if self.watches.all.is_empty() {
            return changes;
        }
        let tree = self.work.tree.clone();
        for change in &changes {
            let old = || before.and_then(|before| before.get(&change.path));
            let new = || tree.get(&change.path);
            if change.removed
                && let Some(old) = old()
            {
                let removed = self.watches.removed_below(&change.path, old, new());
                let events: Vec<_> = removed
                    .into_iter()
                    .map(|gone| {
                        (
                            gone.path.clone(),
                            gone.nodes.map(|n| n.acl().clone()),
                            gone.ids.keys().copied().collect::<Vec<_>>(),
                        )
                    })
                    .collect();
                for (path, acls, ids) in events {
                    // Rights on the parent as it is now count as well.
                    let above = parent(&path).and_then(|above| tree.get(above));
                    let acls: Vec<&Acl> = acls.iter().chain(above.map(|node| node.acl())).collect();
                    self.tell(&path, &ids, &acls);
                }
            }
            let ids = self.watches.matching(&change.path);
            if ids.is_empty() || old().is_none() && new().is_none() {
                continue;
            }
            let trees = [before, Some(&tree)];
            let nodes = trees.into_iter().flatten().flat_map(|tree| {
                [Some(&*change.path), parent(&change.path)]
                    .map(|path| path.and_then(|p| tree.get(p)))
            });
            let acls: Vec<&Acl> = nodes.flatten().map(|node| node.acl()).collect();
            self.tell(&change.path.as_str().into(), &ids, &acls);
        }
        changes
    }

    /// Tells the watchers of a special node about a domain.
    pub(crate) fn fire_special(&mut self, name: &str, domid: DomId) {
        let tree = self.work.tree.clone();
        let acls: Vec<&Acl> = [tree.get(name), Some(tree.root())]
            .into_iter()
            .flatten()
            .map(|node| node.acl())
            .collect();
        for (id, path) in self.watches.matching_special(name, domid) {
            self.tell(&path, &[id], &acls);
        }
    }

    /// Queues an event for those watches whose connection may read by one of the lists: that of the
    /// node or of its parent, before or after the change (XSA-115).
    fn tell(&mut self, path: &Arc<str>, ids: &[WatchId], acls: &[&Acl]) {
        for id in ids {
            let Some(conn) = self.watches.all.get(id).map(|watch| watch.conn) else { continue };
            let rights = self.rights(conn);
            if acls.iter().any(|acl| acl.access(&rights).grants(Access::Read)) {
                self.queue(*id, path.clone(), &rights);
            }
        }
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
        let Some(connection) = self.conns.get_mut(&conn) else { return };
        let too_long =
            path.len() - watch.prefix + watch.token.len() + 2 > xenstore_protocol::PAYLOAD_MAX;
        let collapse = too_long || no_memory || watch.pending.len() >= PENDING_MAX;
        let mut cost = 0;
        let path = if collapse {
            cost -= watch.pending.iter().map(|path| event_cost(path)).sum::<i64>();
            if !watch.pending.is_empty() {
                connection.events.retain(|event| event.watch != id);
                watch.pending.clear();
            }
            watch.collapsed = true;
            watch.path.clone()
        } else {
            path
        };
        cost += event_cost(&path);
        watch.pending.insert(path.clone());
        connection.events.push_back(Queued { watch: id, path });
        self.domains.count(rights.domid, |usage| usage.bytes += cost);
        self.ready.insert(conn);
    }

    /// Appends events that wait for `conn` until `out` is `limit` bytes long. Are there more?
    pub fn emit_events(&mut self, conn: ConnId, limit: usize, out: &mut Vec<u8>) -> bool {
        // Nearly always, after each request.
        if self.conns.get(&conn).is_none_or(|connection| connection.events.is_empty()) {
            return false;
        }
        let domid = self.rights(conn).domid;
        while out.len() < limit {
            let Some(connection) = self.conns.get_mut(&conn) else { return false };
            let Some(event) = connection.events.pop_front() else { break };
            let Some(watch) = self.watches.all.get_mut(&event.watch) else { continue };
            watch.pending.remove(&event.path);
            watch.collapsed = false;
            let path = event.path[watch.prefix..].as_bytes();
            WatchEvent { path, token: &watch.token }.emit(out);
            self.domains.count(domid, |usage| usage.bytes -= event_cost(&event.path));
        }
        let Some(connection) = self.conns.get_mut(&conn) else { return false };
        if connection.events.is_empty() {
            // A burst does not keep its memory.
            connection.events.shrink_to(EVENTS_KEPT);
        }
        !connection.events.is_empty()
    }
}
