//! What a commit by read_set is held against: the same transaction run again request by request.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use xenstore_protocol::TxId;

use crate::domain::host::Host;
use crate::engine::Engine;
use crate::engine::invariants::Violation;
use crate::ids::ConnId;
use crate::transaction::Refusal;
use crate::transaction::execute::Staged;
use crate::tree::{Tree, paths};

/// Paths, values and permissions in order of creation; not the stamps, which differ.
fn content(tree: &Tree) -> Vec<String> {
    let line = |path: String| {
        let node = tree.get(&path).expect("it was just found");
        format!("{path} {:?} {:?}", node.value(), node.acl())
    };
    paths(tree, |_| true).into_iter().map(line).collect()
}

fn describe(outcome: &Result<Option<Staged>, Refusal>, unchanged: &Tree) -> String {
    match outcome {
        Err(refusal) => format!("{refusal:?}"),
        Ok(None) => format!("{:?}", content(unchanged)),
        Ok(Some(staged)) => {
            // What a change does to permissions is in the tree.
            let changes: Vec<_> =
                staged.changes.iter().map(|c| (&c.path, c.removed.len())).collect();
            format!("{:?} {:?} {changes:?}", content(&staged.tree), staged.charges)
        }
    }
}

impl Engine {
    /// Would END T of this transaction, as it is done, do what running all its requests again would
    /// do? For fuzzers and tests: it costs as much as the store is large. Changes nothing.
    pub fn check_commit(
        &mut self,
        conn: ConnId,
        tx_id: TxId,
        host: &mut dyn Host,
    ) -> Result<(), Violation> {
        let connection = self.conns.get_mut(&conn);
        let transaction = connection.and_then(|c| c.transactions.get(&tx_id).cloned());
        let Some(transaction) = transaction else { return Ok(()) };
        let mut transaction = triomphe::Arc::unwrap_or_clone(transaction);
        let before = (self.stamp, self.epoch);
        let usage = self.domains.get(self.rights(conn).domid).map(|domain| domain.usage);
        let domid = self.rights(conn).domid;
        self.discount_transaction(domid, &transaction);
        let replayed = self.with_context(conn, host, |staged, cx| {
            if !transaction.can_matter() {
                return None;
            }
            Some(transaction.replay(cx, &staged.tree, false).map(Some))
        });
        let (stamp, epoch) = before;
        self.stamp = stamp;
        let done =
            self.with_context(conn, host, |staged, cx| transaction.commit(cx, &staged.tree, epoch));
        self.stamp = stamp;
        if let (Some(usage), Some(domain)) = (usage, self.domains.known.get_mut(&domid)) {
            domain.usage = usage;
        }
        self.track_retention(domid);
        let Some(replayed) = replayed else { return Ok(()) };
        let tree = &self.committed.tree;
        let (done, replayed) = (describe(&done, tree), describe(&replayed, tree));
        if done == replayed {
            return Ok(());
        }
        Err(Violation(format!("a commit does not do what a replay does:\n{done}\n{replayed}")))
    }
}
