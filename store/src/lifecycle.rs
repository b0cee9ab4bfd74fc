//! Domains appear, get targets, shut down, resume and disappear.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, ErrorName};

use crate::access::Acl;
use crate::connection::ConnId;
use crate::domain::{Host, UNKNOWN_ID};
use crate::engine::Engine;
use crate::execute::remove;
use crate::tree::{INTRODUCE, RELEASE};

impl Engine {
    /// Introducing a domain again gives it a fresh connection: watches, transactions and events are
    /// dropped, and nobody is told.
    pub(crate) fn introduce(
        &mut self,
        domid: DomId,
        gfn: u64,
        port: u32,
        host: &mut dyn Host,
    ) -> Result<(), ErrorName> {
        if !domid.is_ordinary() {
            return Err(ErrorName::Einval);
        }
        self.forget_predecessor(domid, host);
        let domain = self.domains.find(domid, host).ok_or(ErrorName::Enoent)?;
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
        let Some(domain) = self.domains.get(domid).filter(|_| !own) else { return };
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

    pub(crate) fn release(&mut self, domid: DomId, host: &mut dyn Host) -> Result<(), ErrorName> {
        if domid == self.config.privileged || domid == self.config.store {
            return Err(ErrorName::Einval);
        }
        self.domains.introduced(domid).ok_or(ErrorName::Enoent)?;
        self.destroy(domid, host);
        Ok(())
    }

    /// The domain runs again, so that its next shutdown is told again.
    pub(crate) fn resume(&mut self, domid: DomId) -> Result<(), ErrorName> {
        if domid == self.config.privileged || domid == self.config.store {
            return Err(ErrorName::Einval);
        }
        self.domains.introduced(domid).ok_or(ErrorName::Enoent)?.shutdown = false;
        Ok(())
    }

    pub(crate) fn set_target(&mut self, domid: DomId, target: DomId) -> Result<(), ErrorName> {
        self.domains.introduced(target).ok_or(ErrorName::Enoent)?;
        self.domains.introduced(domid).ok_or(ErrorName::Enoent)?;
        self.domains.set_target(domid, Some(target));
        self.epoch += 1;
        Ok(())
    }

    /// Asks the machine about every domain that the store knows, after it has said that something
    /// changed (VIRQ_DOM_EXC): tells shutdowns, and forgets domains that are gone or have been
    /// replaced by others with the same domid.
    pub fn domains_changed(&mut self, host: &mut dyn Host) {
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

    /// Forgets a domain. Who hears of its release finds nothing of it any more.
    fn destroy(&mut self, domid: DomId, host: &mut dyn Host) {
        self.epoch += 1;
        for conn in self.connections_of(domid) {
            self.disconnect(conn);
            self.closed.push_back(conn);
        }
        // A later domain with this domid must not inherit anything (XSA-322).
        self.domains.untarget(domid);
        let before = self.work.tree.clone();
        self.remove_mentions_of(domid);
        self.settle(Some(&before), None, self.stamp);
        self.mentions.forget(domid);
        self.domains.notices.forget(Some(domid));
        if self.domains.forget(domid) {
            host.release(domid);
            self.fire_special(RELEASE, domid);
        }
    }

    /// Removes each topmost node that the domain owns with all below it, or gives its nodes to the
    /// privileged domain. The root and the special nodes cannot be removed. Its entries in the lists
    /// of others go.
    fn remove_mentions_of(&mut self, domid: DomId) {
        let privileged = self.config.privileged;
        let keep = self.config.keep_orphans;
        let owns = |acl: &Acl| acl.owner() == domid;
        let names = |acl: &Acl| acl.without(domid).is_some();
        let goes = |acl: &Acl| !keep && owns(acl);
        // All are looked for before anything changes: a mention is found by the one above it.
        let owned = self.mentions.paths(&self.work.tree, domid, owns, goes);
        let named = self.mentions.paths(&self.work.tree, domid, names, goes);
        for path in owned {
            let permanent = keep || path == "/" || path.starts_with('@');
            if permanent {
                self.replace_acl(&path, |acl| Some(acl.with_owner(privileged)));
            } else {
                // Nothing happens if a node above it has gone with it already.
                remove(&mut self.work, &mut self.stamp, &path);
            }
        }
        for path in named {
            self.replace_acl(&path, |acl| acl.without(domid));
        }
    }

    /// Changes a permission list without telling watchers.
    fn replace_acl(&mut self, path: &str, change: impl FnOnce(&Acl) -> Option<Acl>) {
        let Some(node) = self.work.tree.get_mut(path) else { return };
        let Some(acl) = change(node.acl()) else { return };
        let before = (node.acl().owner(), node.charge());
        node.set_acl(acl);
        let after = (node.acl().owner(), node.charge());
        self.work.charges.add(before.0, -before.1);
        self.work.charges.add(after.0, after.1);
    }
}
