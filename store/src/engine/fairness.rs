//! Fairness: a transaction of the control domain that guests keep failing is protected for a while.
//!
//! If [`FAILURES`] of the last 16 commits of a connection of the control domain failed with EAGAIN, its
//! transactions are protected for [`PROTECTED_FOR`] from their start. A request of an unprivileged
//! connection, including a commit, is deferred if the protected transaction could be committed before
//! it and not after it. The request is tried on the tree and undone. Its connection is not served
//! until the transaction has ended or the time is over.
//!
//! A request is deferred for at most [`HELD_FOR`], also if several transactions are protected in
//! sequence. A node that a protected transaction has not read yet may change: the transaction then
//! continues from the current tree ([`Transaction::follow`](crate::transaction::Transaction::follow)).
//! Only unprivileged connections are deferred, so no connection waits for one that waits.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Bound;

use crate::domain::host::Host;
use crate::engine::Engine;
use crate::engine::connection::Connection;
use crate::ids::{ConnId, Millis};
use crate::mru_map::MruMap;
use crate::transaction::execute::Staged;
use crate::transaction::read_set::looks_at;
use crate::tree::change::Change;
use crate::tree::{Tree, parent};
use xenstore_protocol::{Request, TxId};

/// Failures after which the transactions of a connection are protected. A retry loop on a
/// separate connection thus commits at the third try, if a try takes less than [`PROTECTED_FOR`] and
/// no privileged connection conflicts with it.
pub const FAILURES: u32 = 2;
/// How long a transaction is protected from its start, in milliseconds.
pub const PROTECTED_FOR: Millis = 500;
/// Limit of the deferral of a request, in milliseconds from its first deferral.
pub const HELD_FOR: Millis = 500;

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a deferred request has no reply"]
pub enum Outcome {
    /// The request was executed, and its reply written.
    Executed,
    /// The request had no effect and nothing was written. Retry the same request, before any other of
    /// its connection, when [`Engine::pop_ready`] returns the connection, or at this time, when it is
    /// no longer deferred.
    Deferred(Millis),
}

/// Protected transactions and deferred requests.
#[derive(Debug, Default)]
pub(crate) struct Fairness {
    /// Protected transactions, and when that ends.
    pub(crate) open: Vec<(ConnId, TxId, Millis)>,
    /// Paths of the requests of protected transactions.
    pub(crate) read_sets: BTreeMap<(ConnId, TxId), BTreeSet<Box<str>>>,
    /// Connections with a deferred request, and the end of the deferral.
    pub(crate) held: BTreeMap<ConnId, Millis>,
    /// Numbers of protected transactions and deferred requests.
    pub(crate) protected_count: u64,
    pub(crate) held_count: u64,
    /// The time of the last warning.
    told: Option<Millis>,
}

impl Fairness {
    fn is_active(&self, now: Millis) -> bool {
        self.open.iter().any(|(.., end)| *end > now)
    }

    /// The protected transactions of a connection.
    pub(crate) fn of(&self, conn: ConnId) -> impl Iterator<Item = (TxId, Millis)> {
        self.open.iter().filter(move |(of, ..)| *of == conn).map(|(_, id, end)| (*id, *end))
    }

    /// Until when a transaction is protected.
    pub(crate) fn end_of(&self, conn: ConnId, tx_id: TxId) -> Option<Millis> {
        let entry = self.open.iter().find(|(c, id, _)| (*c, *id) == (conn, tx_id));
        entry.map(|(.., end)| *end)
    }

    pub(crate) fn is_held(&self, conn: ConnId) -> bool {
        self.held.contains_key(&conn)
    }

    /// Its request has been answered, or the connection is gone.
    pub(crate) fn answered(&mut self, conn: ConnId) {
        if !self.held.is_empty() {
            self.held.remove(&conn);
        }
    }
}

impl Engine {
    /// A transaction has been opened on a connection that has had these failures.
    pub(crate) fn protect(&mut self, conn: ConnId, tx_id: TxId, failures: u32, now: Millis) {
        if failures >= FAILURES && self.rights(conn).privileged {
            self.fairness.open.push((conn, tx_id, now + PROTECTED_FOR));
            self.fairness.protected_count += 1;
            let line = format!(
                "transactions of {} keep failing: guests that are in their way have to wait",
                self.who(conn)
            );
            self.domains.warnings.push_throttled(&mut self.fairness.told, || line);
        }
    }

    /// Transactions have ended: who waited for a protected one is tried again.
    pub(crate) fn unprotect(&mut self) {
        let fairness = &mut self.fairness;
        let before = fairness.open.len();
        fairness.open.retain(|(conn, id, _)| {
            self.conns.get(conn).is_some_and(|conn| conn.transactions.contains_key(id))
        });
        if fairness.open.len() < before {
            self.ready.extend(fairness.held.keys());
        }
        if !fairness.read_sets.is_empty() {
            let open: BTreeSet<_> =
                fairness.open.iter().map(|(conn, id, _)| (*conn, *id)).collect();
            fairness.read_sets.retain(|transaction, _| open.contains(transaction));
        }
    }

    /// Records that a protected transaction has a request about this path.
    pub(crate) fn add_to_read_set(&mut self, conn: ConnId, id: TxId, request: &Request<'_>) {
        let Some((path, ..)) = looks_at(request) else { return };
        if let Some(path) = path.resolve(self.rights(conn).domid) {
            let read_set = self.fairness.read_sets.entry((conn, id)).or_default();
            read_set.insert(path.as_str().into());
        }
    }

    /// The tree as it is, if what `conn` is about to do to it may have to be taken back.
    pub(crate) fn guard(&self, conn: ConnId, now: Millis) -> Option<(Tree, u64)> {
        let guarded = self.fairness.is_active(now) && !self.rights(conn).privileged;
        guarded.then(|| (self.committed.tree.clone(), self.stamp))
    }

    /// Must what `conn` has done since `guard` wait? Then it is taken back, and this is until when.
    pub(crate) fn hold(
        &mut self,
        conn: ConnId,
        guard: &(Tree, u64),
        now: Millis,
        host: &mut dyn Host,
    ) -> Option<Millis> {
        let (before, stamp) = guard;
        let until = self.fairness.held.get(&conn).copied().unwrap_or(now + HELD_FOR);
        if until <= now || self.committed.changes.is_empty() {
            return None;
        }
        let after = self.committed.tree.clone();
        // Most changes are elsewhere, and replaying a long transaction for each would be expensive.
        let read_sets = &self.fairness.read_sets;
        let near = |conn, id| {
            let read_set = read_sets.get(&(conn, id));
            read_set.is_some_and(|read_set| {
                self.committed.changes.iter().any(|c| concerns(c, read_set))
            })
        };
        let in_force = |(conn, id, end): &&(ConnId, TxId, Millis)| *end > now && near(*conn, *id);
        let open: Vec<_> = self.fairness.open.iter().filter(in_force).copied().collect();
        let broken = open.into_iter().find(|(conn, id, _)| {
            !self.could_commit(*conn, *id, &after, host)
                && self.could_commit(*conn, *id, before, host)
        });
        let (.., end) = broken?;
        self.committed = Staged::new(before.clone());
        self.stamp = *stamp;
        if self.fairness.held.insert(conn, until).is_none() {
            self.fairness.held_count += 1;
        }
        Some(end.min(until))
    }

    /// Would the answers that a transaction has given still be given on `tree`?
    fn could_commit(&mut self, conn: ConnId, id: TxId, tree: &Tree, host: &mut dyn Host) -> bool {
        let take =
            |conns: &mut MruMap<ConnId, Connection>| conns.get_mut(&conn)?.transactions.remove(&id);
        let Some(transaction) = take(&mut self.conns) else { return false };
        self.deferred.spend(transaction.steps);
        let (stamp, epoch) = (self.stamp, self.epoch);
        let could =
            self.with_context(conn, host, |_, cx| transaction.could_commit(cx, tree, epoch));
        self.stamp = stamp;
        if let Some(connection) = self.conns.get_mut(&conn) {
            connection.transactions.insert(id, transaction);
        }
        could
    }
}

/// Returns true if a change can alter the reply to a request about one of these paths. It cannot if neither
/// path is at or above the other: a request depends on its node and on those above it, and a change
/// affects its node, the nodes below, and those above that were created or got another list of children.
fn concerns(change: &Change, read_set: &BTreeSet<Box<str>>) -> bool {
    if change.path.starts_with('@') {
        return true;
    }
    let top = &change.path[..change.top];
    let mut above = core::iter::successors(Some(&*change.path), |path| parent(path));
    let start = format!("{}/", top.trim_end_matches('/'));
    above.any(|path| read_set.contains(path))
        || read_set
            .range::<str, _>((Bound::Included(&*start), Bound::Unbounded))
            .next()
            .is_some_and(|path| path.starts_with(&start))
}
