//! From an engine to its state and back.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use triomphe::Arc;
use xenstore_protocol::{ABS_PATH_MAX, DomId, PAYLOAD_MAX, Path, Request, TxId};

use crate::domain::quotas::{Config, Quotas};
use crate::domain::registry::{Domain, UNKNOWN_ID};
use crate::engine::Engine;
use crate::engine::connection::Connection;
use crate::ids::{Caller, ConnId};
use crate::snapshot::{
    ConnectionIo, ConnectionState, Counters, DomainState, EventState, ServerIo, State, WatchState,
};
use crate::transaction::Transaction;
use crate::tree::Tree;
use crate::tree::accounting::{Charge, event_cost};
use crate::tree::node::Node;
use crate::tree::owner_index::OwnerIndex;
use crate::watch::index::{PENDING_MAX, Queued, WatchId};

/// A state that cannot be; nothing was made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreError(pub String);

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for RestoreError {}

type Result<T> = core::result::Result<T, RestoreError>;

/// Fails with what is wrong unless `holds`.
fn ensure(holds: bool, wrong: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(RestoreError(wrong())) }
}

fn dump_domain(domid: DomId, domain: &Domain) -> DomainState {
    DomainState {
        domid,
        unique_id: domain.unique_id,
        introduced: domain.introduced,
        shutdown: domain.shutdown,
        target: domain.target,
        features: domain.features,
        quotas: Some(domain.quotas),
        peak: domain.peak,
        largest: domain.largest,
    }
}

impl Engine {
    /// Everything that outlives the engine; see [`State`] for what does not. Between requests, when
    /// [`Engine::pop_closed`] has nothing to say and [`Engine::has_work`] is false.
    ///
    /// Costs as much as there are domains, connections, watches and open transactions. The nodes are
    /// shared until they change.
    pub fn dump(&self) -> State {
        let counters = Counters {
            stamp: self.stamp,
            epoch: self.epoch,
            last_conn: self.last_conn,
            last_watch: self.watches.last,
            injected_eagain: self.injected_eagain,
            protected: self.fairness.protected_count,
            held: self.fairness.held_count,
        };
        State {
            quotas: Some(self.domains.defaults),
            domains: self.domains.known.iter().map(|(id, d)| dump_domain(*id, d)).collect(),
            connections: self.conns.iter().map(|(id, c)| self.dump_connection(*id, c)).collect(),
            io: ServerIo::default(),
            lost: Vec::new(),
            counters,
            retention: self.retention.clone(),
            eras: self.domains.eras.clone(),
            tree: self.committed.tree.clone(),
        }
    }

    fn dump_connection(&self, id: ConnId, connection: &Connection) -> ConnectionState {
        let mut ids: Vec<&WatchId> = connection.watches.values().collect();
        ids.sort_unstable();
        let watch = |id: &WatchId| {
            let watch = self.watches.all.get(id)?;
            Some(WatchState {
                id: *id,
                path: watch.path.clone(),
                prefix: watch.prefix,
                token: watch.token.clone(),
                depth: watch.depth,
                collapsed: watch.collapsed,
            })
        };
        let is_live = |event: &&Queued| self.watches.is_live(event);
        let event = |event: &Queued| EventState { watch: event.watch, path: event.path.clone() };
        ConnectionState {
            id,
            caller: connection.caller,
            io: ConnectionIo::default(),
            watches: ids.into_iter().filter_map(watch).collect(),
            domid: Some(self.rights(id).domid),
            last_transaction: connection.last_transaction,
            failures: connection.failures,
            held: self.fairness.held.get(&id).copied(),
            protected: self.fairness.of(id).collect(),
            events: connection.events.iter().filter(is_live).map(event).collect(),
            transactions: connection
                .transactions
                .iter()
                .map(|(id, tx)| (*id, tx.clone()))
                .collect(),
        }
    }

    /// Restores an engine from a state. It continues like the engine from which the state was taken, with
    /// the same connection ids, which are returned in the order of the state. [`Engine::pop_ready`]
    /// returns the connections with queued events.
    ///
    /// The state decides over quotas and domains, the configuration over everything else.
    pub fn restore(config: &Config, state: &State) -> Result<(Engine, Vec<ConnId>)> {
        let mut engine = Engine::new(config);
        engine.domains.known.clear();
        engine.domains.eras = state.eras.clone();
        engine.domains.defaults = state.quotas.unwrap_or(config.quotas);
        for domid in [config.privileged, config.store] {
            let domain = engine.domains.add(domid, 0);
            domain.introduced = true;
            domain.quotas = Quotas::unlimited();
        }
        for domain in &state.domains {
            engine.restore_domain(domain);
        }
        for domain in &state.domains {
            // One that is not there would be that of a later domain with its domid.
            let target = domain.target.filter(|target| engine.domains.get(*target).is_some());
            engine.domains.set_target(domain.domid, target);
        }
        let counters = state.counters;
        engine.stamp = counters.stamp;
        engine.epoch = counters.epoch;
        engine.injected_eagain = counters.injected_eagain;
        engine.fairness.protected_count = counters.protected;
        engine.fairness.held_count = counters.held;
        engine.retention = state.retention.restored();
        engine.restore_tree(&state.tree);
        for connection in &state.connections {
            engine.restore_connection(connection, &counters)?;
        }
        // In the order in which they were opened, as far as it matters.
        engine.fairness.open.sort_by_key(|(.., end)| *end);
        engine.last_conn = counters.last_conn;
        engine.watches.last = counters.last_watch;
        for domain in &state.domains {
            if let Some(restored) = engine.domains.known.get_mut(&domain.domid) {
                restored.peak = domain.peak.max(restored.usage);
                restored.largest = domain.largest;
            }
        }
        let conns = state.connections.iter().map(|connection| connection.id).collect();
        Ok((engine, conns))
    }

    fn restore_domain(&mut self, state: &DomainState) {
        let own = [self.config.privileged, self.config.store].contains(&state.domid);
        let domain = self.domains.add(state.domid, state.unique_id);
        domain.unique_id = state.unique_id;
        domain.introduced = own || state.introduced;
        domain.shutdown = state.shutdown;
        domain.features = state.features;
        domain.quotas = state.quotas.unwrap_or(domain.quotas);
    }

    fn restore_tree(&mut self, tree: &Tree) {
        let mut tree = tree.clone();
        // Special nodes that another daemon does not know.
        tree.complete(&Tree::initial(self.config.privileged));
        let mut charge = |domid, charge| {
            // A domain may be known by what it owns alone.
            self.domains.add(domid, UNKNOWN_ID);
            self.domains.charge(domid, charge);
        };
        // Most nodes belong to the same domain as the one before.
        let mut run = (self.config.privileged, Charge::default());
        let mut visit = |node: &Node| {
            let owner = node.acl().owner();
            if owner != run.0 {
                charge(run.0, run.1);
                run = (owner, Charge::default());
            }
            run.1 += node.charge();
        };
        tree.special().for_each(|node| visit(node));
        let immortal = [self.config.privileged, self.config.store];
        self.owner_index = OwnerIndex::with(&tree, immortal, visit);
        charge(run.0, run.1);
        self.committed.tree = tree;
    }

    fn restore_connection(&mut self, state: &ConnectionState, counters: &Counters) -> Result<()> {
        let ConnectionState { id: conn, caller, .. } = *state;
        if let Caller::Domain(domid) = caller {
            ensure(self.domains.introduced(domid).is_some(), || {
                format!("a connection of domain {domid}, unknown")
            })?;
        }
        ensure((1..=counters.last_conn).contains(&conn.0), || {
            format!("connection {conn} has a number that is not given yet")
        })?;
        let mut connection = Connection::new(caller);
        connection.last_transaction = state.last_transaction;
        connection.failures = state.failures;
        ensure(self.conns.insert(conn, connection).is_none(), || {
            format!("connection {conn} is there twice")
        })?;
        if let Caller::Domain(domid) = caller {
            self.conns_of.insert((domid, conn));
        }
        for watch in &state.watches {
            self.restore_watch(conn, watch, counters)?;
        }
        for event in &state.events {
            self.restore_event(conn, event)?;
        }
        for (id, transaction) in &state.transactions {
            self.restore_transaction(conn, *id, transaction)?;
        }
        for (id, end) in &state.protected {
            let known = state.transactions.iter().any(|(known, _)| known == id);
            ensure(known, || format!("fairness of no transaction of connection {conn}"))?;
            self.fairness.open.push((conn, *id, *end));
            let transaction = state.transactions.iter().find(|(known, _)| known == id);
            for logged in transaction.iter().flat_map(|(_, transaction)| &transaction.log) {
                if let Ok(request) = Request::parse(logged.op, &logged.payload) {
                    self.add_to_read_set(conn, *id, &request);
                }
            }
        }
        self.fairness.held.extend(state.held.map(|until| (conn, until)));
        Ok(())
    }

    fn restore_watch(
        &mut self,
        conn: ConnId,
        state: &WatchState,
        counters: &Counters,
    ) -> Result<()> {
        let wrong = || format!("watch {} of connection {conn} cannot be", state.path());
        let fits = state.path().len() + state.token.len() + 2 <= PAYLOAD_MAX;
        let id = state.id;
        let free = (1..=counters.last_watch).contains(&id.0) && !self.watches.all.contains_key(&id);
        ensure(fits && free && !state.token.contains(&0), wrong)?;
        let path = Path::parse(state.path().as_bytes()).ok_or_else(|| RestoreError(wrong()))?;
        self.watches.last = id.0 - 1;
        self.add_watch(conn, path, &state.token, state.depth)
            .map_err(|error| RestoreError(format!("{}: {error}", wrong())))?;
        if let Some(watch) = self.watches.all.get_mut(&id) {
            watch.collapsed = state.collapsed;
        }
        Ok(())
    }

    fn restore_event(&mut self, conn: ConnId, state: &EventState) -> Result<()> {
        let EventState { watch: id, path } = state;
        let wrong = || RestoreError(format!("an event of connection {conn} for {path} cannot be"));
        let watch = self.watches.all.get_mut(id).filter(|watch| watch.conn == conn);
        let watch = watch.ok_or_else(wrong)?;
        let told = path.strip_prefix(&watch.path[..watch.prefix]).ok_or_else(wrong)?;
        let fits = told.len() + watch.token.len() + 2 <= PAYLOAD_MAX && path.len() <= ABS_PATH_MAX;
        let few = watch.pending.len() < PENDING_MAX;
        if !fits || !few || !watch.pending.insert(path.clone()) {
            return Err(wrong());
        }
        let event = Queued { watch: *id, round: watch.round, path: path.clone() };
        self.conns.get_mut(&conn).ok_or_else(wrong)?.events.push_back(event);
        let domid = self.rights(conn).domid;
        self.domains.count(domid, |usage| usage.bytes += event_cost(path));
        self.ready.insert(conn);
        Ok(())
    }

    fn restore_transaction(
        &mut self,
        conn: ConnId,
        id: TxId,
        transaction: &Arc<Transaction>,
    ) -> Result<()> {
        let wrong = || RestoreError(format!("transaction {id} of connection {conn} cannot be"));
        // It may be taken over as it is, so that it must fit to what there is.
        let known = |domid: DomId| self.domains.get(domid).is_some();
        let fits = transaction.epoch < self.epoch || transaction.staged.charges.domids().all(known);
        let domid = self.rights(conn).domid;
        let connection = self.conns.get_mut(&conn).ok_or_else(wrong)?;
        let old = connection.transactions.insert(id, transaction.clone());
        if id == TxId::NONE || !fits || old.is_some() {
            return Err(wrong());
        }
        if transaction.lost {
            self.track_retention(domid);
        }
        self.domains.count(domid, |usage| {
            usage.transactions += 1;
            usage.bytes += transaction.bytes;
        });
        Ok(())
    }
}
