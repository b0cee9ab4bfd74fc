//! Domains appear, get targets, shut down, resume and disappear.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Gfn, Request};

use crate::domain::host::Host;
use crate::domain::registry::UNKNOWN_ID;
use crate::engine::Engine;
use crate::ids::{ConnId, Millis};
use crate::transaction::execute::{remove, replace_acl};
use crate::tree::change::{Change, Readers};
use crate::tree::{INTRODUCE, Nearest, RELEASE, components};

impl Engine {
    /// Introducing a domain again resets its connection: watches, transactions and events are dropped,
    /// and no watch fires.
    pub(crate) fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        host: &mut dyn Host,
    ) -> Result<(), Errno> {
        if !domid.is_ordinary() {
            return Err(Errno::Einval);
        }
        let domain = self.domains.find(domid, host).ok_or(Errno::Enoent)?;
        host.introduce(domid, gfn, port, domain.features)?;
        let again = core::mem::replace(&mut domain.introduced, true);
        self.epoch += 1;
        if again {
            for conn in self.connections_of(domid) {
                self.reset_watches(conn);
            }
        } else {
            self.fire_special(INTRODUCE, domid);
        }
        Ok(())
    }

    /// Forgets a domain that another has taken the place of before its death was told, so that the
    /// new one starts with nothing of it (XSA-322).
    fn forget_predecessor(&mut self, domid: DomId, host: &mut dyn Host) {
        let own = [self.config.privileged, self.config.store].contains(&domid);
        let is_candidate = domid.is_ordinary() && !own;
        let Some(domain) = self.domains.get(domid).filter(|_| is_candidate) else { return };
        let known = domain.unique_id;
        if !host.domain(domid).is_some_and(|info| self.is_same(domid, known, info.unique_id)) {
            self.destroy(domid, host);
        }
    }

    /// Is a domain the one that was known? One of a state that did not say which it was is taken for
    /// the one that is there.
    fn is_same(&mut self, domid: DomId, known: u64, found: u64) -> bool {
        if known == UNKNOWN_ID
            && let Some(domain) = self.domains.known.get_mut(&domid)
        {
            domain.unique_id = found;
            return true;
        }
        known == found
    }

    pub(crate) fn release(&mut self, domid: DomId, host: &mut dyn Host) -> Result<(), Errno> {
        if domid == self.config.privileged || domid == self.config.store {
            return Err(Errno::Einval);
        }
        self.domains.introduced(domid).ok_or(Errno::Enoent)?;
        self.destroy(domid, host);
        Ok(())
    }

    /// The domain runs again, so that its next shutdown fires again.
    pub(crate) fn resume(&mut self, domid: DomId) -> Result<(), Errno> {
        if domid == self.config.privileged || domid == self.config.store {
            return Err(Errno::Einval);
        }
        self.domains.introduced(domid).ok_or(Errno::Enoent)?.shutdown = false;
        Ok(())
    }

    pub(crate) fn set_target(&mut self, domid: DomId, target: DomId) -> Result<(), Errno> {
        self.domains.introduced(target).ok_or(Errno::Enoent)?;
        self.domains.introduced(domid).ok_or(Errno::Enoent)?;
        self.domains.set_target(domid, Some(target));
        self.epoch += 1;
        Ok(())
    }

    pub(crate) fn refresh_domains(&mut self, host: &mut dyn Host) {
        let domids: Vec<DomId> = self.domains.known.keys().copied().collect();
        let own = [self.config.privileged, self.config.store];
        for domid in domids.into_iter().filter(|domid| !own.contains(domid)) {
            let info = host.domain(domid);
            let Some(known) = self.domains.get(domid).map(|domain| domain.unique_id) else {
                continue;
            };
            let Some(info) = info.filter(|info| self.is_same(domid, known, info.unique_id)) else {
                self.destroy(domid, host);
                continue;
            };
            let Some(domain) = self.domains.introduced(domid) else { continue };
            if info.shutdown && !domain.shutdown {
                domain.shutdown = true;
                self.fire_special(RELEASE, domid);
            }
        }
    }

    fn connections_of(&self, domid: DomId) -> Vec<ConnId> {
        let conns = self.conns_of.range((domid, ConnId(0))..=(domid, ConnId(u64::MAX)));
        conns.map(|(_, conn)| *conn).collect()
    }

    /// Forgets a domain. Its rights end at once. Its nodes are removed as far as the budget of the input
    /// allows, the rest in pieces. `@releaseDomain` fires after the last one is removed.
    fn destroy(&mut self, domid: DomId, host: &mut dyn Host) {
        self.epoch += 1;
        for conn in self.connections_of(domid) {
            self.close(conn);
            self.closed.push_back(conn);
        }
        // A later domain with this domid must not inherit anything (XSA-322).
        self.domains.untarget(domid);
        self.domains.warnings.forget(Some(domid));
        let introduced = self.domains.forget(domid);
        if introduced {
            host.release(domid);
        }
        self.domains.dying.insert(domid, introduced);
        for path in [INTRODUCE, RELEASE] {
            self.disown(path, domid);
        }
        self.remove_nodes_of(domid);
    }

    /// Removes each topmost node of a dead domain with its subtree, or gives its nodes to the privileged
    /// domain. The root cannot be removed. Stops when the budget is used up.
    pub(crate) fn remove_nodes_of(&mut self, domid: DomId) {
        while self.deferred.budget() > 0 {
            let Some(created) = self.owner_index.first(domid) else {
                if self.domains.dying.remove(&domid) == Some(true) {
                    self.fire_special(RELEASE, domid);
                }
                return;
            };
            let path = self.owner_index.path_of(created);
            self.deferred.spend(1 + components(&path).count() / 4);
            let Nearest { node, above, missing } = self.committed.tree.nearest(&path);
            if missing > 0 || node.created() != created {
                // It has been removed, and the index still has it.
                self.owner_index.forget(created);
            } else if self.config.keep_orphans || path == "/" {
                self.deferred.spend(node.children().len() / 4);
                self.disown(&path, domid);
            } else {
                let readers = Readers::from_iter([node.acl(), above.acl()]);
                remove(&mut self.committed, &mut self.stamp, &path, readers);
                self.settle(None, None);
            }
        }
    }

    /// Gives a node that a dead domain owns to the privileged domain. No watch fires.
    fn disown(&mut self, path: &str, domid: DomId) {
        let acl = self.committed.tree.get(path).map(|node| node.acl().clone());
        let Some(acl) = acl.filter(|acl| acl.owner() == domid) else { return };
        replace_acl(&mut self.committed, path, acl.with_owner(self.config.privileged, 0));
        let change = Change { owned: true, ..Change::written(path, Readers::default()) };
        self.owner_index.follow(&change, &self.committed.tree);
        self.settle(None, None);
    }

    /// Until when a request about a domid whose last domain still has nodes is deferred, at most.
    pub(crate) fn delay_for_dying(
        &mut self,
        conn: ConnId,
        request: &Request<'_>,
        now: Millis,
        host: &mut dyn Host,
    ) -> Option<Millis> {
        if let Request::Introduce { domid, .. } = request {
            self.forget_predecessor(*domid, host);
        }
        if self.domains.dying.is_empty() {
            return None;
        }
        let dying = |domid: &DomId| self.domains.dying.contains_key(domid);
        let waits = match request {
            Request::SetPerms { perms, .. } => perms.0.iter().any(|perm| dying(&perm.domid)),
            Request::Introduce { domid, .. } => dying(domid),
            Request::SetTarget { domid, target } => [domid, target].into_iter().any(dying),
            Request::SetFeature { domid, .. } => dying(domid),
            Request::GetFeature(domid) => domid.as_ref().is_some_and(dying),
            Request::SetQuota { domid, .. } | Request::GetQuota { domid, .. } => {
                domid.as_ref().is_some_and(dying)
            }
            _ => false,
        };
        waits.then(|| self.deferred.wait(conn, now))
    }
}
