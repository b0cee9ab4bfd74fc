//! TRANSACTION_START and TRANSACTION_END, and requests in transactions.

use triomphe::Arc;
use xenstore_protocol::{DomId, Errno, Quota, Reply, Request, TxId};

use crate::domain::host::Host;
use crate::engine::Engine;
use crate::engine::conflicts::Conflict;
use crate::ids::{ConnId, Millis};
use crate::transaction::Transaction;
use crate::transaction::response::Response;

impl Engine {
    pub(crate) fn start(&mut self, conn: ConnId, now: Millis) -> Result<Reply<'static>, Errno> {
        let rights = self.rights(conn);
        let usage = self.domains.get(rights.domid).map(|d| d.usage).unwrap_or_default();
        if !self.allow(&rights, Quota::Transactions, usage.transactions + 1) {
            return Err(Errno::Enospc);
        }
        // Orders the snapshots of transactions by age.
        self.stamp += 1;
        let transaction = Transaction::new(&self.committed.tree, self.epoch, self.stamp, now);
        let connection = self.conns.get_mut(&conn).ok_or(Errno::Eio)?;
        let id = connection.next_transaction();
        let failures = connection.failures.count_ones();
        self.open_transaction(conn, id, Arc::new(transaction));
        self.protect(conn, id, failures, now);
        Ok(Reply::Transaction(id))
    }

    pub(crate) fn run_in_transaction(
        &mut self,
        conn: ConnId,
        tx_id: TxId,
        request: &Request<'_>,
        payload: &[u8],
        host: &mut dyn Host,
    ) -> Result<Response, Errno> {
        let connection = self.conns.get_mut(&conn).ok_or(Errno::Eio)?;
        let mut shared = connection.transactions.remove(&tx_id).ok_or(Errno::Enoent)?;
        // Copied if a state that is being written shares it.
        let transaction = Arc::make_mut(&mut shared);
        let before = transaction.bytes;
        let (protected, epoch) = (self.fairness.end_of(conn, tx_id).is_some(), self.epoch);
        if protected {
            self.add_to_read_set(conn, tx_id, request);
        }
        let answer = self.with_context(conn, host, |staged, cx| {
            if protected {
                transaction.follow(cx, &staged.tree, epoch, request);
            }
            transaction.request(cx, request, payload)
        });
        if let Some(unused) = transaction.take_unused() {
            self.forget_nodes(None, unused);
        }
        let more = transaction.bytes - before;
        let domid = self.rights(conn).domid;
        self.domains.count(domid, |usage| usage.bytes += more);
        if let Some(connection) = self.conns.get_mut(&conn) {
            connection.transactions.insert(tx_id, shared);
        }
        answer
    }

    /// Ends a transaction. The transaction no longer exists afterwards, whatever the reply: Linux relies on
    /// that.
    pub(crate) fn end(
        &mut self,
        conn: ConnId,
        tx_id: TxId,
        commit: bool,
        now: Millis,
        host: &mut dyn Host,
    ) -> Result<Response, Errno> {
        let connection = self.conns.get_mut(&conn).ok_or(Errno::Eio)?;
        let mut shared = connection.transactions.remove(&tx_id).ok_or(Errno::Enoent)?;
        // Copied if a state that is being written shares it.
        let transaction = Arc::make_mut(&mut shared);
        let domid = self.rights(conn).domid;
        self.discount_transaction(domid, transaction);
        if !commit {
            self.unprotect();
            self.forget_nodes(None, Arc::unwrap_or_clone(shared).into_nodes());
            return Ok(Response::Done);
        }
        if self.injected_eagain > 0 {
            self.injected_eagain -= 1;
            self.unprotect();
            return Err(Errno::Eagain);
        }
        let guard = self.guard(conn, now).map(|guard| (guard, Transaction::clone(transaction)));
        let epoch = self.epoch;
        let old = self.committed.tree.clone();
        let outcome =
            self.with_context(conn, host, |staged, cx| transaction.commit(cx, &staged.tree, epoch));
        let result = match outcome {
            Ok(Some(staged)) => {
                self.committed = staged;
                if let Some((guard, transaction)) = guard
                    && let Some(until) = self.hold(conn, &guard, now, host)
                {
                    self.open_transaction(conn, tx_id, Arc::new(transaction));
                    return Ok(Response::Deferred(until));
                }
                self.settle(Some(conn), Some(&old));
                Ok(Response::Done)
            }
            Ok(None) => Ok(Response::Done),
            Err(refusal) => {
                if let Some(path) = refusal.path {
                    let by = self.conflicts.who(&path, conn, transaction.stamp);
                    self.tell_conflict(conn, &path, by);
                    self.conflicts.conflict(Conflict { conn, path, by, at: now });
                }
                Err(refusal.error)
            }
        };
        if let Some(connection) = self.conns.get_mut(&conn) {
            let failed = u16::from(result.as_ref().is_err_and(|error| *error == Errno::Eagain));
            connection.failures = connection.failures << 1 | failed;
        }
        self.unprotect();
        if transaction.is_small(&old) {
            self.deferred.spend(transaction.steps / 4);
        } else {
            self.forget_nodes(None, Arc::unwrap_or_clone(shared).into_nodes());
            self.free_tree(old);
        }
        result
    }

    /// Charges a transaction and stores it.
    fn open_transaction(&mut self, conn: ConnId, id: TxId, transaction: Arc<Transaction>) {
        let domid = self.rights(conn).domid;
        self.domains.count(domid, |usage| {
            usage.transactions += 1;
            usage.bytes += transaction.bytes;
        });
        if let Some(connection) = self.conns.get_mut(&conn) {
            connection.transactions.insert(id, transaction);
        }
        self.track_retention(domid);
    }

    /// Releases the charges of a transaction that is no longer open.
    pub(crate) fn forget_transaction(&mut self, domid: DomId, transaction: Transaction) {
        self.discount_transaction(domid, &transaction);
        self.forget_nodes(None, transaction.into_nodes());
    }

    pub(crate) fn discount_transaction(&mut self, domid: DomId, transaction: &Transaction) {
        self.domains.count(domid, |usage| {
            usage.transactions -= 1;
            usage.bytes -= transaction.bytes;
        });
        if self.domains.get(domid).is_none_or(|domain| domain.usage.transactions == 0) {
            self.retention.forget(domid);
        }
    }
}
