//! From an engine to its state and back.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use xenstore_protocol::{ErrorName, Path};

use crate::access::{Acl, AclEntry};
use crate::config::Config;
use crate::connection::{Caller, ConnId};
use crate::domain::UNKNOWN_ID;
use crate::engine::Engine;
use crate::node::Node;
use crate::state::{ConnectionState, DomainState, NodeState, State, WatchState};
use crate::tree::{parent, paths};

/// A state that cannot be; nothing was made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreError(pub String);

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for RestoreError {}

fn node_state(path: String, node: &Node) -> NodeState {
    let perms = node.acl().entries().iter().map(|entry| (entry.perm, entry.ignored)).collect();
    NodeState { path, value: node.value().into(), perms }
}

impl Engine {
    /// Everything that outlives the engine; see [`State`] for what does not.
    pub fn dump(&self) -> State {
        let tree = &self.work.tree;
        let (special, mut nodes): (Vec<NodeState>, Vec<NodeState>) = paths(tree, |_| true)
            .into_iter()
            .filter_map(|path| tree.get(&path).map(|node| node_state(path, node)))
            .partition(|node| node.path.starts_with('@'));
        nodes.extend(special);
        let domain = |(domid, domain): (&_, &crate::domain::Domain)| DomainState {
            domid: *domid,
            unique_id: domain.unique_id,
            introduced: domain.introduced,
            shutdown: domain.shutdown,
            target: domain.target,
            features: domain.features,
            quotas: domain.quotas,
        };
        let connection = |connection: &crate::connection::Connection| {
            let mut ids: Vec<_> = connection.watches.values().collect();
            ids.sort_unstable();
            let watches = ids.into_iter().filter_map(|id| {
                let watch = self.watches.all.get(id)?;
                let depth = watch.depth.map(|depth| u16::try_from(depth).unwrap_or(u16::MAX - 1));
                let depth = depth.map(|depth| depth.min(u16::MAX - 1));
                let path = watch.path[watch.prefix..].into();
                Some(WatchState { path, token: watch.token.clone(), depth })
            });
            ConnectionState { caller: connection.caller, watches: watches.collect() }
        };
        State {
            quotas: self.domains.defaults,
            domains: self.domains.known.iter().map(domain).collect(),
            connections: self.conns.values().map(connection).collect(),
            nodes,
        }
    }

    /// Makes an engine from a state. The connections come back in the order of the state; each gets
    /// an event for every watch, since what it has missed is not known.
    pub fn restore(config: &Config, state: &State) -> Result<(Engine, Vec<ConnId>), RestoreError> {
        let mut engine = Engine::new(config);
        engine.domains.defaults = state.quotas;
        for domain in &state.domains {
            engine.restore_domain(domain);
        }
        engine.restore_nodes(&state.nodes)?;
        let conns: Result<Vec<ConnId>, RestoreError> =
            state.connections.iter().map(|state| engine.restore_connection(state)).collect();
        let conns = conns?;
        // A target that is not there would be that of a later domain with its domid.
        let known: Vec<_> = engine.domains.known.keys().copied().collect();
        for domain in engine.domains.known.values_mut() {
            domain.target = domain.target.filter(|target| known.contains(target));
        }
        Ok((engine, conns))
    }

    fn restore_domain(&mut self, state: &DomainState) {
        let own = [self.config.privileged, self.config.store].contains(&state.domid);
        let domain = self.domains.add(state.domid, state.unique_id);
        domain.unique_id = state.unique_id;
        domain.introduced = own || state.introduced;
        domain.shutdown = state.shutdown;
        domain.target = state.target;
        domain.features = state.features;
        domain.quotas = state.quotas;
    }

    fn restore_nodes(&mut self, nodes: &[NodeState]) -> Result<(), RestoreError> {
        let wrong = |path: &str, what: &str| RestoreError(alloc::format!("node {path}: {what}"));
        // The initial nodes are replaced by those of the state.
        let old: Vec<_> =
            self.work.tree.all().map(|node| (node.acl().owner(), -node.charge())).collect();
        old.into_iter().for_each(|(owner, charge)| self.domains.charge(owner, charge));
        self.work.tree.remove("/tool", &mut self.stamp);
        let mut seen = alloc::collections::BTreeSet::new();
        for node in nodes {
            let entries = node.perms.iter();
            let entries =
                entries.map(|(perm, ignored)| AclEntry { perm: *perm, ignored: *ignored });
            let acl = Acl::from_entries(entries.collect());
            let acl = acl.ok_or_else(|| wrong(&node.path, "no permissions"))?;
            // A domain may be known by what it owns alone.
            self.domains.add(acl.owner(), UNKNOWN_ID);
            if !seen.insert(&node.path) {
                return Err(wrong(&node.path, "is there twice"));
            }
            let permanent = node.path == "/" || self.work.tree.get(&node.path).is_some();
            if !permanent {
                let has_parent =
                    parent(&node.path).is_some_and(|above| seen.contains(&String::from(above)));
                if !has_parent || node.path.starts_with('@') {
                    return Err(wrong(&node.path, "no parent"));
                }
                self.work.tree.create(&node.path, &acl, b"", &mut self.stamp, |_| ());
            }
            let place = self.work.tree.get_mut(&node.path);
            let place = place.ok_or_else(|| wrong(&node.path, "cannot be made"))?;
            place.set_acl(acl);
            place.set_value(&node.value);
        }
        let new: Vec<_> =
            self.work.tree.all().map(|node| (node.acl().owner(), node.charge())).collect();
        new.into_iter().for_each(|(owner, charge)| self.domains.charge(owner, charge));
        Ok(())
    }

    fn restore_connection(&mut self, state: &ConnectionState) -> Result<ConnId, RestoreError> {
        if let Caller::Domain(domid) = state.caller
            && self.domains.introduced(domid).is_none()
        {
            return Err(RestoreError(alloc::format!("a connection of domain {domid}, unknown")));
        }
        let conn = self.connect(state.caller);
        for watch in &state.watches {
            let wrong = |error: ErrorName| {
                RestoreError(alloc::format!("watch {} of connection {conn}: {error}", watch.path))
            };
            let path = Path::parse(watch.path.as_bytes()).ok_or(wrong(ErrorName::Einval))?;
            let depth = watch.depth.map(u32::from);
            let id = self.add_watch(conn, path, &watch.token, depth).map_err(wrong)?;
            let path = self.watches.all[&id].path.clone();
            let rights = self.rights(conn);
            self.queue(id, path, &rights);
        }
        Ok(conn)
    }
}
