//! The invariants of an engine, checked from scratch.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use xenstore_protocol::{DomId, Path};

use crate::domain::registry::Usage;
use crate::engine::Engine;
use crate::engine::connection::Connection;
use crate::ids::{Caller, ConnId};
use crate::tree::accounting::{Charges, event_cost, watch_cost};
use crate::tree::components;
use crate::tree::owner_index::OwnerIndex;
use crate::watch::index::WatchId;

/// An invariant that does not hold; always a bug of this crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Violation {}

/// Says what is wrong unless `holds`.
fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation(text())) }
}

impl Engine {
    /// Checks everything that must hold between requests. Costs as much as the store is large.
    pub fn check(&self) -> Result<(), Violation> {
        self.check_tree()?;
        self.check_watches()?;
        self.check_usage()?;
        ensure(
            self.committed.charges.domids().len() == 0 && self.committed.changes.is_empty(),
            || "charges or changes of a request are not settled".into(),
        )?;
        for (domid, domain) in self.domains.known.iter() {
            let target = domain.target.filter(|target| self.domains.get(*target).is_none());
            ensure(target.is_none(), || format!("domain {domid} has a target that is gone"))?;
        }
        self.check_indices()
    }

    fn check_tree(&self) -> Result<(), Violation> {
        for node in self.committed.tree.all() {
            let names: Vec<&str> = node.children().iter().map(|child| child.name()).collect();
            let name = node.name();
            ensure(names.windows(2).all(|pair| pair[0] < pair[1]), || {
                format!("children of {name:?} are not in order: {names:?}")
            })?;
            let len: usize = names.iter().map(|name| name.len() + 1).sum();
            ensure(
                len == node.children().names_len() && names.len() == node.children().len(),
                || format!("children of {name:?} are miscounted"),
            )?;
            ensure(names.iter().all(|name| is_name(name)), || {
                format!("a child of {name:?} has a name that is none: {names:?}")
            })?;
            let created = node.children().by_creation();
            ensure(created.windows(2).all(|pair| pair[0].created() < pair[1].created()), || {
                format!("children of {name:?} have no order of creation")
            })?;
            ensure(node.created() <= self.stamp && node.listed() <= self.stamp, || {
                format!("{name:?} is from the future")
            })?;
            let owner = node.acl().owner();
            let known =
                self.domains.get(owner).is_some() || self.domains.dying.contains_key(&owner);
            ensure(known, || format!("{name:?} belongs to domain {owner}, which is gone"))?;
        }
        Ok(())
    }

    /// What is charged must be what is there.
    fn check_usage(&self) -> Result<(), Violation> {
        let mut nodes = Charges::default();
        for node in self.committed.tree.all() {
            nodes.add(node.acl().owner(), node.charge());
        }
        let mut others: BTreeMap<DomId, Usage> = BTreeMap::new();
        for watch in self.watches.all.values() {
            let usage = others.entry(self.rights(watch.conn).domid).or_default();
            usage.watches += 1;
            usage.bytes += watch_cost(&watch.path, &watch.token);
            usage.bytes += watch.pending.iter().map(|path| event_cost(path)).sum::<i64>();
        }
        for (conn, connection) in self.conns.iter() {
            let usage = others.entry(self.rights(*conn).domid).or_default();
            usage.transactions += crate::tree::accounting::bytes(connection.transactions.len());
            usage.bytes += connection.transactions.values().map(|tx| tx.bytes).sum::<i64>();
        }
        for (domid, domain) in self.domains.known.iter() {
            let node = nodes.of(*domid);
            let mut usage = others.remove(domid).unwrap_or_default();
            usage.nodes += node.nodes;
            usage.bytes += node.bytes;
            let counted = domain.usage;
            // Charges of removed nodes are released in pieces.
            ensure(counted == usage || self.has_work(), || {
                format!("domain {domid} is charged for {counted:?} and has {usage:?}")
            })?;
        }
        Ok(())
    }

    /// What is found by domain must be what is there.
    fn check_indices(&self) -> Result<(), Violation> {
        let expected =
            OwnerIndex::of(&self.committed.tree, [self.config.privileged, self.config.store]);
        ensure(self.has_work() || self.owner_index == expected, || {
            format!("the index of owners is {:?} and not {expected:?}", self.owner_index)
        })?;
        let known = self.domains.known.iter();
        let targets = known.filter_map(|(domid, domain)| Some((domain.target?, *domid))).collect();
        ensure(*self.domains.targets() == targets, || "the index of targets is wrong".into())?;
        let of_domain = |(conn, connection): (&ConnId, &Connection)| match connection.caller {
            Caller::Domain(domid) => Some((domid, *conn)),
            Caller::Socket => None,
        };
        let conns = self.conns.iter().filter_map(of_domain).collect();
        ensure(self.conns_of == conns, || "the index of connections is wrong".into())
    }

    /// Connections, watches, their index and the queues of events must agree.
    fn check_watches(&self) -> Result<(), Violation> {
        let known: Vec<WatchId> = self.watches.all.keys().copied().collect();
        ensure(self.watches.indexed() == known, || "the index of watches is wrong".into())?;
        let of_connections: BTreeSet<WatchId> = self
            .conns
            .values()
            .flat_map(|connection| connection.watches.values().copied())
            .collect();
        ensure(of_connections.iter().eq(&known), || "connections and watches do not agree".into())?;
        for (conn, connection) in self.conns.iter() {
            let conn: &ConnId = conn;
            for ((path, token), id) in &connection.watches {
                let agrees = self.watches.all.get(id).is_some_and(|watch| {
                    watch.conn == *conn && *watch.path == **path && *watch.token == **token
                });
                ensure(agrees, || format!("watch {path} of connection {conn} is confused"))?;
            }
            let pending: usize = connection
                .watches
                .values()
                .filter_map(|id| Some(self.watches.all.get(id)?.pending.len()))
                .sum();
            let live = || connection.events.iter().filter(|event| self.watches.is_live(event));
            let queued = live().all(|event| {
                let watch = self.watches.all.get(&event.watch);
                watch.is_some_and(|watch| watch.pending.contains(&event.path))
            });
            let counted = pending == live().count() && pending == connection.waiting();
            ensure(queued && counted, || {
                format!("events of connection {conn} do not belong to its watches")
            })?;
        }
        Ok(())
    }
}

/// Is it one component of a path, or the name of a special node?
fn is_name(name: &str) -> bool {
    Path::parse(name.as_bytes()).is_some() && components(name).count() == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::quotas::Config;
    use crate::tree::acl::Acl;
    use triomphe::Arc;
    use xenstore_protocol::DomId as Id;

    fn broken(break_it: impl FnOnce(&mut Engine)) -> String {
        let mut engine = Engine::new(&Config::default());
        let conn = engine.connect(Caller::Socket);
        let path = Path::parse(b"/a").unwrap();
        engine.watch(conn, path, b"t", None).unwrap();
        engine.check().unwrap();
        break_it(&mut engine);
        engine.check().unwrap_err().0
    }

    // Fails if one of these ways of being damaged goes unnoticed.
    #[test]
    fn damage_is_noticed() {
        let node = |name: &str, stamp| {
            Arc::new(crate::tree::node::Node::new(name, stamp, Acl::private(Id(0)), b""))
        };
        let cases = [
            ("charged", broken(|e| e.domains.charge(Id(0), node("x", 1).charge()))),
            ("charged", broken(|e| e.domains.count(Id(0), |usage| usage.watches += 1))),
            (
                "charged",
                broken(|e| {
                    e.committed.tree.get_mut("/").unwrap().children_mut().insert(node("x", 2));
                }),
            ),
            (
                "future",
                broken(|e| {
                    e.committed.tree.get_mut("/").unwrap().children_mut().insert(node("x", 99));
                }),
            ),
            (
                "name",
                broken(|e| {
                    e.committed.tree.get_mut("/").unwrap().children_mut().insert(node("x y", 2));
                }),
            ),
            (
                "gone",
                broken(|e| {
                    let acl = Acl::private(Id(7));
                    e.committed.tree.get_mut("/tool").unwrap().set_acl(acl);
                }),
            ),
            (
                "target",
                broken(|e| {
                    e.domains.known.get_mut(&Id(0)).unwrap().target = Some(Id(7));
                }),
            ),
            ("index", broken(|e| e.watches.all.clear())),
            (
                "agree",
                broken(|e| {
                    e.conns.values_mut().for_each(|connection| connection.watches.clear());
                }),
            ),
            (
                "events",
                broken(|e| {
                    let watch = WatchId(1);
                    let event = crate::watch::index::Queued { watch, round: 0, path: "/a".into() };
                    e.conns.values_mut().for_each(|c| c.events.push_back(event.clone()));
                }),
            ),
            (
                "owners",
                broken(|e| {
                    let charge = e.committed.tree.get("/tool").unwrap().charge();
                    e.domains.add(Id(5), 1);
                    e.domains.charge(Id(0), -charge);
                    e.domains.charge(Id(5), charge);
                    e.committed.tree.get_mut("/tool").unwrap().set_acl(Acl::private(Id(5)));
                }),
            ),
            (
                "index of targets",
                broken(|e| e.domains.known.get_mut(&Id(0)).unwrap().target = Some(Id(0))),
            ),
            ("index of connections", broken(|e| e.conns_of.extend([(Id(0), ConnId(1))]))),
            (
                "settled",
                broken(|e| {
                    e.committed
                        .changes
                        .push(crate::tree::change::Change::written("/a", Default::default()))
                }),
            ),
        ];
        for (expected, violation) in cases {
            assert!(violation.contains(expected), "{expected}: {violation}");
        }
    }
}
