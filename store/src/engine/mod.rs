//! The engine: state, and the way of a request through it.

pub(crate) mod apply;
pub(crate) mod conflicts;
pub(crate) mod connection;
pub(crate) mod control;
pub(crate) mod deferred;
pub(crate) mod fairness;
pub(crate) mod fanout;
pub(crate) mod input;
pub(crate) mod invariants;
pub(crate) mod lifecycle;
pub(crate) mod restore;
pub(crate) mod retention;
pub(crate) mod serial_replay;
pub(crate) mod settings;
pub(crate) mod transactions;
pub(crate) mod watches;

use alloc::collections::{BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use xenstore_protocol::{
    DomId, Errno, Features, Frame, Quota, Reply, Request, TxId, WatchEvent, admit,
};

use crate::domain::host::Host;
use crate::domain::quotas::{Config, Quotas};
use crate::domain::registry::{Domain, Domains};
use crate::engine::conflicts::{ConflictLog, RecentChange};
use crate::engine::connection::Connection;
use crate::engine::deferred::Deferred;
use crate::engine::fairness::{Fairness, Outcome};
use crate::ids::{Caller, ConnId, Millis};
use crate::mru_map::MruMap;
use crate::transaction::execute::{COUNTED_MAX, Context, Staged, execute};
use crate::transaction::response::{Lists, Response};
use crate::transaction::retention::Retention;
use crate::tree::Tree;
use crate::tree::acl::{Era, Rights};
use crate::tree::change::{Change, merge};
use crate::tree::owner_index::OwnerIndex;
use crate::tree::removal::Removal;
use crate::watch::index::Watches;

/// Bytes of events that go out before a reply; more wait until they are fetched.
const EVENTS_BEFORE_REPLY: usize = 64 * 1024;

/// Room for changes that is kept from one request to the next.
const CHANGES_KEPT: usize = 16;

/// A XenStore; see the crate's documentation for how to use it.
///
/// Exactly one reply is written for each request. Events that the request caused for its own sender
/// come before it, except that the first event of a watch comes after the reply to WATCH.
#[derive(Debug)]
pub struct Engine {
    pub(crate) config: Config,
    /// The committed tree. Its charges are settled and its changes told after each request.
    pub(crate) committed: Staged,
    /// Follows the committed tree whenever that is settled.
    pub(crate) owner_index: OwnerIndex,
    pub(crate) domains: Domains,
    pub(crate) conns: MruMap<ConnId, Connection>,
    /// The connections of each domain that are no sockets.
    pub(crate) conns_of: BTreeSet<(DomId, ConnId)>,
    pub(crate) watches: Watches,
    /// Grows with every change of the tree.
    pub(crate) stamp: u64,
    /// Grows with every change of what decides over requests besides the tree: targets, quotas,
    /// domains.
    pub(crate) epoch: u64,
    pub(crate) ready: BTreeSet<ConnId>,
    pub(crate) closed: VecDeque<ConnId>,
    pub(crate) conflicts: ConflictLog,
    pub(crate) fairness: Fairness,
    pub(crate) retention: Retention,
    pub(crate) deferred: Deferred,
    lists: Lists,
    pub(crate) last_conn: u64,
    pub(crate) injected_eagain: u32,
}

impl Engine {
    /// A store with the initial tree, in which only the privileged and the store's own domain are
    /// introduced.
    pub fn new(config: &Config) -> Engine {
        let mut domains = Domains::new(config.quotas);
        for domid in [config.privileged, config.store] {
            let domain = domains.add(domid, 0);
            domain.introduced = true;
            domain.quotas = Quotas::unlimited();
        }
        let tree = Tree::initial(config.privileged);
        for node in tree.all() {
            domains.charge(node.acl().owner(), node.charge());
        }
        let stamp =
            tree.all().map(|node| node.created().max(node.listed())).max().unwrap_or_default();
        Engine {
            config: *config,
            owner_index: OwnerIndex::of(&tree, [config.privileged, config.store]),
            committed: Staged::new(tree),
            domains,
            conns: MruMap::new(),
            conns_of: BTreeSet::new(),
            watches: Watches::default(),
            stamp,
            epoch: 0,
            ready: BTreeSet::new(),
            closed: VecDeque::new(),
            conflicts: ConflictLog::default(),
            fairness: Fairness::default(),
            retention: Retention::default(),
            deferred: Deferred::default(),
            lists: Lists::default(),
            last_conn: 0,
            injected_eagain: 0,
        }
    }

    fn open(&mut self, caller: Caller) -> ConnId {
        self.last_conn += 1;
        let conn = ConnId(self.last_conn);
        let exists = match caller {
            Caller::Socket => true,
            Caller::Domain(domid) => self.domains.introduced(domid).is_some(),
        };
        if exists {
            self.conns.insert(conn, Connection::new(caller));
            if let Caller::Domain(domid) = caller {
                self.conns_of.insert((domid, conn));
            }
        }
        conn
    }

    fn close(&mut self, conn: ConnId) {
        self.reset_watches(conn);
        let connection = self.conns.remove(&conn);
        if let Some(Connection { caller: Caller::Domain(domid), .. }) = connection {
            self.conns_of.remove(&(domid, conn));
        }
        self.ready.remove(&conn);
    }

    /// All open connections.
    pub fn connections(&self) -> Vec<ConnId> {
        self.conns.keys().copied().collect()
    }

    /// Has this connection transactions that are open?
    pub fn in_transaction(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|connection| !connection.transactions.is_empty())
    }

    /// Is the connection open?
    pub fn is_connected(&self, conn: ConnId) -> bool {
        self.conns.contains_key(&conn)
    }

    /// Who is at the other end of a connection, unless it has ended.
    pub fn caller(&self, conn: ConnId) -> Option<Caller> {
        self.conns.get(&conn).map(|connection| connection.caller)
    }

    /// Do events wait for this connection?
    pub fn has_events(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|connection| connection.waiting() > 0)
    }

    /// Returns a connection that has queued events since the last call, or whose deferred request must
    /// be retried.
    pub fn pop_ready(&mut self) -> Option<ConnId> {
        self.ready.pop_first()
    }

    /// A connection that the engine has ended because its domain is gone.
    pub fn pop_closed(&mut self) -> Option<ConnId> {
        self.closed.pop_front()
    }

    /// How many nodes there are, with the special ones.
    pub fn node_count(&self) -> i64 {
        self.domains.known.values().map(|domain| domain.usage.nodes).sum()
    }

    /// Returns true if so much has been freed since it last returned true that it is time to give memory
    /// back to the system, which allocators do not do by themselves. Little enough that this takes
    /// about a millisecond.
    pub fn has_shrunk(&mut self) -> bool {
        self.deferred.has_freed() | self.domains.has_shrunk()
    }

    /// The next `count` commits fail with EAGAIN, to test clients.
    pub fn inject_eagain(&mut self, count: u32) {
        self.injected_eagain = count;
    }

    /// Executes one request, unless it is deferred.
    fn handle(
        &mut self,
        conn: ConnId,
        frame: &Frame<'_>,
        now: Millis,
        host: &mut dyn Host,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let Frame { header, payload } = frame;
        let Some(caller) = self.caller(conn) else {
            Reply::Error(Errno::Eio).emit(header, out);
            return Outcome::Executed;
        };
        self.domains.warnings.now = now;
        // Long paths cost their levels, several times over.
        self.deferred.spend(1 + payload.len() / 16);
        if let Some(until) = self.deferred.delay(conn, now) {
            return Outcome::Deferred(until);
        }
        let privileged = self.domid_of(Some(caller)) == self.config.privileged;
        let has_transaction =
            |id| self.conns.get(&conn).is_some_and(|c| c.transactions.contains_key(&id));
        let answer = admit(frame, privileged, has_transaction).and_then(|request| {
            let answer = self.dispatch(conn, frame, &request, now, host)?;
            Ok((request, answer))
        });
        if let Ok((_, Response::Deferred(until))) = answer {
            return Outcome::Deferred(until);
        }
        self.fairness.answered(conn);
        let limit = out.len() + EVENTS_BEFORE_REPLY;
        self.take_events(conn, limit, out);
        match answer {
            Err(error) => Reply::Error(error).emit(header, out),
            Ok((request, answer)) => {
                let reply = answer.reply(&request, &mut self.lists);
                reply.emit(header, out);
                if let Reply::Part { generation, last: true, .. } = reply {
                    self.lists.finished(generation);
                }
                if let Request::Watch { path, token, .. } = request {
                    // Never too long: the request has the same strings.
                    let _ = WatchEvent { path: path.as_str().as_bytes(), token }.emit(out);
                }
            }
        }
        Outcome::Executed
    }

    fn dispatch(
        &mut self,
        conn: ConnId,
        frame: &Frame<'_>,
        request: &Request<'_>,
        now: Millis,
        host: &mut dyn Host,
    ) -> Result<Response, Errno> {
        let tx_id = frame.header.tx_id;
        if request.operation().is_transactional() {
            if let Request::SetPerms { .. } = request
                && let Some(until) = self.delay_for_dying(conn, request, now, host)
            {
                return Ok(Response::Deferred(until));
            }
            return match tx_id {
                TxId::NONE => self.run(conn, request, now, host),
                _ => self.run_in_transaction(conn, tx_id, request, frame.payload, host),
            };
        }
        if let Some(until) = self.delay_for_dying(conn, request, now, host) {
            return Ok(Response::Deferred(until));
        }
        match request {
            Request::Watch { path, token, depth } => self.watch(conn, *path, token, *depth)?,
            Request::Unwatch { path, token } => self.unwatch(conn, *path, token)?,
            Request::ResetWatches => self.reset_watches(conn),
            Request::TransactionEnd { commit } => return self.end(conn, tx_id, *commit, now, host),
            Request::Introduce { domid, gfn, port } => self.introduce(*domid, *gfn, *port, host)?,
            Request::Release(domid) => self.release(*domid, host)?,
            Request::Resume(domid) => self.resume(*domid)?,
            Request::SetTarget { domid, target } => self.set_target(*domid, *target)?,
            Request::SetFeature { domid, features } => self.set_feature(*domid, *features, host)?,
            Request::SetQuota { domid, quota, value } => {
                self.set_quota(*domid, *quota, *value, host)?;
            }
            _ => return self.ask(conn, tx_id, request, now, host).map(Response::Reply),
        }
        Ok(Response::Done)
    }

    /// Requests that answer more than that it is done.
    fn ask(
        &mut self,
        conn: ConnId,
        tx_id: TxId,
        request: &Request<'_>,
        now: Millis,
        host: &mut dyn Host,
    ) -> Result<Reply<'static>, Errno> {
        match request {
            Request::TransactionStart if tx_id != TxId::NONE => Err(Errno::Ebusy),
            Request::TransactionStart => self.start(conn, now),
            Request::GetDomainPath(domid) => Ok(Reply::domain_path(*domid)),
            Request::IsDomainIntroduced(domid) => {
                let yes = *domid == DomId::SELF || self.domains.introduced(*domid).is_some();
                Ok(Reply::Introduced(yes))
            }
            Request::GetFeature(domid) => self.get_feature(conn, *domid, host),
            Request::GetQuota { domid, quota } => self.get_quota(*domid, *quota, host),
            Request::Control(control) => self.control(control, now, host),
            _ => Err(Errno::Enosys),
        }
    }

    fn domid_of(&self, caller: Option<Caller>) -> DomId {
        match caller {
            Some(Caller::Domain(domid)) => domid,
            Some(Caller::Socket) => self.config.store,
            None => DomId::INVALID,
        }
    }

    /// Returns the rights of a connection; those of one that has ended are empty.
    pub(crate) fn rights(&self, conn: ConnId) -> Rights {
        let domid = self.domid_of(self.caller(conn));
        self.rights_of(domid, self.domains.get(domid))
    }

    fn rights_of(&self, domid: DomId, domain: Option<&Domain>) -> Rights {
        let target = domain.and_then(|domain| domain.target);
        let target = target.map(|target| (target, self.domains.era(target)));
        let era = domain.map_or(0, |domain| domain.era);
        Rights { privileged: domid == self.config.privileged, domid, era, target }
    }

    /// How many replies a connection may leave unread before its requests should wait: what its
    /// domain's quota `outstanding` says.
    pub fn outstanding(&self, conn: ConnId) -> u32 {
        let rights = self.rights(conn);
        let limit = self.quotas(rights.domid).get(Quota::Outstanding);
        if rights.privileged || limit == 0 { u32::MAX } else { limit }
    }

    /// What the quotas of a domain are.
    pub(crate) fn quotas(&self, domid: DomId) -> Quotas {
        self.domains.get(domid).map_or(self.domains.defaults, |domain| domain.quotas)
    }

    /// What a connection may use.
    pub(crate) fn features(&self, conn: ConnId) -> Features {
        let caller = self.caller(conn);
        features_of(caller, self.domains.get(self.domid_of(caller)))
    }

    /// Calls `run` with the committed tree, or another, on behalf of `conn`.
    pub(crate) fn with_context<T>(
        &mut self,
        conn: ConnId,
        host: &mut dyn Host,
        run: impl FnOnce(&mut Staged, &mut Context<'_>) -> T,
    ) -> T {
        // Every request comes here: connection and domain are looked up once.
        let caller = self.caller(conn);
        let domid = self.domid_of(caller);
        let domain = self.domains.get(domid);
        let rights = self.rights_of(domid, domain);
        let any_domid = features_of(caller, domain).contains(Features::DOMID_ANY);
        let usage = domain.map(|domain| domain.usage).unwrap_or_default();
        let quotas = domain.map_or(self.domains.defaults, |domain| domain.quotas);
        let domains = RefCell::new(&mut self.domains);
        let refused = Cell::default();
        let mut exists = |domid| -> Option<Era> {
            domains.borrow_mut().find(domid, host).map(|domain| domain.era)
        };
        let era_of = |domid| domains.borrow().era(domid);
        let mut cx = Context {
            rights,
            quotas,
            usage,
            any_domid,
            stamp: &mut self.stamp,
            exists: &mut exists,
            era_of: &era_of,
            captures: true,
            counts_copies: self.retention.is_active(),
            refused,
            refused_at: None,
            largest: Cell::default(),
        };
        let result = run(&mut self.committed, &mut cx);
        let largest = cx.largest.get();
        if let Some((quota, wanted)) = cx.refused.take() {
            let path = cx.refused_at.take();
            self.domains.refuse(rights.domid, quota, wanted, path.as_deref());
        }
        if let Some(domain) = self.domains.known.get_mut(&domid) {
            domain.largest = domain.largest.max(largest);
        }
        result
    }

    /// May a connection's domain have as much of something? A refusal is counted.
    pub(crate) fn allow(&mut self, rights: &Rights, quota: Quota, wanted: i64) -> bool {
        rights.privileged || self.domains.allow(rights.domid, quota, wanted)
    }

    /// Bytes that are charged to a domain: what its quota `memory` limits. The store keeps at most as
    /// much again and a quarter for its open transactions ([`Config`]), and 4 KiB for the domain and
    /// its connection.
    pub fn charged(&self, domid: DomId) -> i64 {
        self.domains.get(domid).map_or(0, |domain| domain.usage.bytes)
    }

    /// A line for the log: something that an operator should know.
    pub fn pop_warning(&mut self) -> Option<String> {
        self.domains.warnings.pop()
    }

    /// Runs a request on the committed tree.
    fn run(
        &mut self,
        conn: ConnId,
        request: &Request<'_>,
        now: Millis,
        host: &mut dyn Host,
    ) -> Result<Response, Errno> {
        let guard = self.guard(conn, now);
        let captures = !self.watches.all.is_empty();
        let answer = self.with_context(conn, host, |staged, cx| {
            cx.captures = captures;
            execute(staged, cx, request)
        });
        if let Some(guard) = &guard
            && let Some(until) = self.hold(conn, guard, now, host)
        {
            return Ok(Response::Deferred(until));
        }
        if !self.committed.changes.is_empty() {
            self.settle(Some(conn), None);
        }
        if let Some((tree, _)) = guard {
            self.free_tree(tree);
        }
        answer
    }

    /// Charges what has been done to the committed tree, by a connection or else by the store itself,
    /// and queues its events. If it is a commit, `old` is the tree before.
    pub(crate) fn settle(&mut self, conn: Option<ConnId>, old: Option<&Tree>) {
        for (domid, charge) in self.committed.charges.drain() {
            self.domains.charge(domid, charge);
        }
        let mut changes = merge(core::mem::take(&mut self.committed.changes));
        let counted = core::mem::take(&mut self.committed.counted);
        let mut removal = None;
        // Most requests remove nothing.
        if counted > 0 || !self.committed.uncounted.is_empty() {
            removal = Some(self.removal(&changes, counted));
        }
        for change in changes.iter().filter(|change| change.owned) {
            self.owner_index.follow(change, &self.committed.tree);
        }
        self.fire(conn, &changes, old);
        for change in changes.drain(..) {
            self.conflicts.changed(RecentChange { path: change.path, conn, stamp: self.stamp });
            if let Some(removal) = &mut removal
                && (counted > COUNTED_MAX || !removal.charged.is_empty())
            {
                removal.unused.extend(change.removed);
            }
        }
        // For the next request, which mostly changes one node.
        if changes.capacity() <= CHANGES_KEPT {
            self.committed.changes = changes;
        }
        let replaced = core::mem::take(&mut self.committed.copied)
            + core::mem::take(&mut self.committed.removed);
        if replaced > 0 {
            self.retire(replaced);
        }
        if let Some(removal) = removal {
            self.forget_nodes(conn, removal);
        }
    }

    /// Returns what the removals in `changes`, of `counted` nodes so far, leave to be done.
    fn removal(&mut self, changes: &[Change], counted: usize) -> Removal {
        // Freeing a node takes a fifth of a unit.
        self.deferred.spend(counted / 4);
        let charged = core::mem::take(&mut self.committed.uncounted);
        let mut removal = Removal { charged, ..Removal::default() };
        for change in changes {
            let tops = change.removed.iter().filter(|top| self.owner_index.cut(top)).cloned();
            removal.indexed.extend(tops);
        }
        removal
    }
}

/// A socket has no ring page, but may use what a ring may.
fn features_of(caller: Option<Caller>, domain: Option<&Domain>) -> Features {
    match (caller, domain) {
        (Some(Caller::Domain(_)), Some(domain)) => domain.features,
        _ => Features::ALL,
    }
}
