//! Old versions of nodes that the open transactions of a domain keep.
//!
//! A snapshot costs nothing by itself; what others change afterwards stays because of it. For each
//! domain with quotas that has transactions open, that is limited by its quota `memory`, besides
//! what is charged to it. Measuring goes through all that has changed, so that it is done only when
//! as much has been replaced in the whole tree as would bring the domain over its limit, or a quarter
//! of it: a domain keeps at most that quarter more than its limit.
//!
//! Where it is over the limit, its oldest transactions are given up, one after the other: their
//! snapshot goes, their requests answer ENOSPC, END T answers EAGAIN.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, Errno, Quota, TxId};

use crate::engine::Engine;
use crate::ids::ConnId;
use crate::tree::cow_cost::kept_by;

impl Engine {
    /// A domain has opened a transaction.
    pub(crate) fn track_retention(&mut self, domid: DomId) {
        let limit = i64::from(self.quotas(domid).get(Quota::Memory));
        if limit > 0 && domid != self.config.privileged && !self.retention.due.contains_key(&domid)
        {
            self.retention.set(domid, self.retention.retired + limit);
        }
    }

    /// So many bytes of the tree have been replaced.
    pub(crate) fn retire(&mut self, bytes: i64) {
        self.retention.retired += bytes;
        if bytes == 0 || self.retention.retired < self.retention.next {
            return;
        }
        let now = self.retention.retired;
        let due: Vec<DomId> = self
            .retention
            .due
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(domid, _)| *domid)
            .collect();
        for domid in due {
            let limit = i64::from(self.quotas(domid).get(Quota::Memory));
            let kept = self.keep_within(domid, limit);
            self.retention.set(domid, now + (limit - kept).max(limit / 4).max(1));
        }
        self.retention.next = self.retention.due.values().copied().min().unwrap_or(i64::MAX);
    }

    /// Gives up transactions of a domain, the oldest first, until what they keep is within the limit
    /// (0: none). How much that is then.
    fn keep_within(&mut self, domid: DomId, limit: i64) -> i64 {
        let mut open = self.snapshots_of(domid);
        // From the newest on, each keeps what the next newer one does not. Those that are older than the
        // one with which the limit is exceeded are given up whatever they keep.
        let mut newer = self.committed.tree.clone();
        let mut kept: Vec<i64> = Vec::new();
        let mut sum = 0;
        for (_, conn, id) in open.iter().rev() {
            let mut bytes = 0;
            if limit == 0 || sum <= limit {
                let snapshot = self.conns[conn].transactions[id].snapshot().clone();
                let most = if limit == 0 { i64::MAX } else { limit - sum };
                bytes = kept_by(&snapshot, &newer, most);
                newer = snapshot;
            }
            sum += bytes;
            kept.push(bytes);
        }
        open.reverse();
        while limit > 0
            && sum > limit
            && let (Some(bytes), Some((_, conn, id))) = (kept.pop(), open.pop())
        {
            self.domains.allow(domid, Quota::Memory, sum);
            sum -= bytes;
            let connection = self.conns.get_mut(&conn);
            let Some(transaction) = connection.and_then(|c| c.transactions.get_mut(&id)) else {
                continue;
            };
            let transaction = triomphe::Arc::make_mut(transaction);
            let back = transaction.give_up(Errno::Eagain);
            if let Some(unused) = transaction.take_unused() {
                self.forget_nodes(None, unused);
            }
            self.domains.count(domid, |usage| usage.bytes -= back);
        }
        sum
    }

    /// Transactions of a domain that have a snapshot, the oldest first.
    fn snapshots_of(&self, domid: DomId) -> Vec<(u64, ConnId, TxId)> {
        let mut found = Vec::new();
        for (conn, connection) in self.conns.iter() {
            if connection.transactions.is_empty() || self.rights(*conn).domid != domid {
                continue;
            }
            let open = connection.transactions.iter().filter(|(_, tx)| !tx.is_given_up());
            found.extend(open.map(|(id, tx)| (tx.stamp, *conn, *id)));
        }
        found.sort_unstable();
        found
    }
}
