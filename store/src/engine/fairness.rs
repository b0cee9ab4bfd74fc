//! Fair progress: a transaction of the control domain that keeps failing is protected for a while
//! from those who make it fail.
//!
//! Of a connection of the control domain, [`FAILURES`] of whose last 16 commits failed with EAGAIN,
//! the transactions are protected for [`PROTECTED_FOR`] from their start. What an unprivileged
//! connection does, be it a single request or the commit of a transaction, then waits if the
//! protected transaction could be committed before it and not any more after it. It is tried on the
//! tree and taken back; the connection is not served any further until the transaction has ended or
//! the time is up.
//!
//! A request waits for [`HELD_FOR`] at the most, however many transactions are protected one after
//! the other. What a protected transaction has not read yet may change until it does: it then goes on
//! from the tree as it is ([`Transaction::follow`](crate::transaction::Transaction::follow)). Only those wait who cannot be protected, so that nobody waits for somebody who waits.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Bound;

use crate::domain::registry::Host;
use crate::engine::Engine;
use crate::engine::connection::Connection;
use crate::ids::{ConnId, Millis};
use crate::mru_map::Recent;
use crate::transaction::execute::Work;
use crate::transaction::read_set::looks_at;
use crate::tree::change::Change;
use crate::tree::{Tree, parent};
use xenstore_protocol::{Request, TxId};

/// Failures after which the transactions of a connection are protected. A retry loop on a
/// connection of its own so commits at the third try, if it takes less than [`PROTECTED_FOR`] and
/// nobody with privileges is in its way.
pub const FAILURES: u32 = 2;
/// How long a transaction is protected from its start, in milliseconds.
pub const PROTECTED_FOR: Millis = 500;
/// How long a request waits at the most, in milliseconds from when it was first put off.
pub const HELD_FOR: Millis = 500;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that was put off has not been answered"]
pub enum Outcome {
    /// It has been answered.
    Answered,
    /// Nothing has been done and nothing written: the very same request is to be offered again, and
    /// no other of its connection before. That is when [`Engine::pop_ready`] names the connection,
    /// or at this time, when it does not wait any longer.
    Later(Millis),
}

/// Who is protected, and who waits.
#[derive(Debug, Default)]
pub(crate) struct Protection {
    /// Protected transactions, and when that ends.
    pub(crate) open: Vec<(ConnId, TxId, Millis)>,
    /// Paths of the requests of protected transactions.
    pub(crate) footprints: BTreeMap<(ConnId, TxId), BTreeSet<Box<str>>>,
    /// Connections whose request has been put off, and for how long at the most.
    pub(crate) held: BTreeMap<ConnId, Millis>,
    /// How many transactions were protected, and requests put off.
    pub(crate) protected_count: u64,
    pub(crate) held_count: u64,
    /// When the log was told last.
    told: Option<Millis>,
}

impl Protection {
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
            self.protection.open.push((conn, tx_id, now + PROTECTED_FOR));
            self.protection.protected_count += 1;
            let line = format!(
                "transactions of {} keep failing: guests that are in their way have to wait",
                self.who(conn)
            );
            self.domains.notices.tell_sometimes(&mut self.protection.told, || line);
        }
    }

    /// Transactions have ended: who waited for a protected one is tried again.
    pub(crate) fn unprotect(&mut self) {
        let protection = &mut self.protection;
        let before = protection.open.len();
        protection.open.retain(|(conn, id, _)| {
            self.conns.get(conn).is_some_and(|conn| conn.transactions.contains_key(id))
        });
        if protection.open.len() < before {
            self.ready.extend(protection.held.keys());
        }
        if !protection.footprints.is_empty() {
            let open: BTreeSet<_> =
                protection.open.iter().map(|(conn, id, _)| (*conn, *id)).collect();
            protection.footprints.retain(|transaction, _| open.contains(transaction));
        }
    }

    /// Records that a protected transaction has a request about this path.
    pub(crate) fn add_footprint(&mut self, conn: ConnId, id: TxId, request: &Request<'_>) {
        let Some((path, ..)) = looks_at(request) else { return };
        if let Some(path) = path.resolve(self.rights(conn).domid) {
            let footprint = self.protection.footprints.entry((conn, id)).or_default();
            footprint.insert(path.as_str().into());
        }
    }

    /// The tree as it is, if what `conn` is about to do to it may have to be taken back.
    pub(crate) fn guard(&self, conn: ConnId, now: Millis) -> Option<(Tree, u64)> {
        let guarded = self.protection.is_active(now) && !self.rights(conn).privileged;
        guarded.then(|| (self.work.tree.clone(), self.stamp))
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
        let until = self.protection.held.get(&conn).copied().unwrap_or(now + HELD_FOR);
        if until <= now || self.work.changes.is_empty() {
            return None;
        }
        let after = self.work.tree.clone();
        // Most changes are elsewhere, and replaying a long transaction for each would be expensive.
        let footprints = &self.protection.footprints;
        let near = |conn, id| {
            let footprint = footprints.get(&(conn, id));
            footprint
                .is_some_and(|footprint| self.work.changes.iter().any(|c| concerns(c, footprint)))
        };
        let in_force = |(conn, id, end): &&(ConnId, TxId, Millis)| *end > now && near(*conn, *id);
        let open: Vec<_> = self.protection.open.iter().filter(in_force).copied().collect();
        let broken = open.into_iter().find(|(conn, id, _)| {
            !self.could_commit(*conn, *id, &after, host)
                && self.could_commit(*conn, *id, before, host)
        });
        let (.., end) = broken?;
        self.work = Work::new(before.clone());
        self.stamp = *stamp;
        if self.protection.held.insert(conn, until).is_none() {
            self.protection.held_count += 1;
        }
        Some(end.min(until))
    }

    /// Would the answers that a transaction has given still be given on `tree`?
    fn could_commit(&mut self, conn: ConnId, id: TxId, tree: &Tree, host: &mut dyn Host) -> bool {
        let take =
            |conns: &mut Recent<ConnId, Connection>| conns.get_mut(&conn)?.transactions.remove(&id);
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
fn concerns(change: &Change, footprint: &BTreeSet<Box<str>>) -> bool {
    if change.path.starts_with('@') {
        return true;
    }
    let top = &change.path[..change.top];
    let mut above = core::iter::successors(Some(&*change.path), |path| parent(path));
    let start = format!("{}/", top.trim_end_matches('/'));
    above.any(|path| footprint.contains(path))
        || footprint
            .range::<str, _>((Bound::Included(&*start), Bound::Unbounded))
            .next()
            .is_some_and(|path| path.starts_with(&start))
}
