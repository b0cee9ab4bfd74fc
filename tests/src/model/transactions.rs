//! Transactions.

use super::requests::{NodeContext, count_owned};
use super::{Model, Outcome, Step, Transaction, Tree};

/// The changes of one request.
fn steps(changes: Vec<(String, bool)>, before: &Tree, after: &Tree) -> Vec<Step> {
    let step =
        |(path, removed)| Step { path, removed, before: before.clone(), after: after.clone() };
    changes.into_iter().map(step).collect()
}

impl Model {
    pub(super) fn outside_transaction(&mut self, conn: u32, ty: u32, payload: &[u8]) -> Outcome {
        let old = self.tree.clone();
        let mut tree = old.clone();
        let mut changes = Vec::new();
        let mut cx = NodeContext { tree: &mut tree, changes: &mut changes, nodes_elsewhere: 0 };
        let outcome = self.node_request(conn, &mut cx, ty, payload);
        self.tree = tree.clone();
        self.fire_changes(&steps(changes, &old, &tree), &old, &tree);
        outcome
    }

    pub(super) fn start(&mut self, conn: u32) -> Outcome {
        let domid = self.domid(conn);
        let conns = self.conns.keys().filter(|other| self.domid(**other) == domid);
        let open: usize = conns.map(|conn| self.conns[conn].transactions.len()).sum();
        if self.exceeds(conn, "transactions", open + 1) {
            return Err("ENOSPC");
        }
        let transaction = Transaction {
            snapshot: self.tree.clone(),
            tree: self.tree.clone(),
            changes: Vec::new(),
            log: Vec::new(),
            doomed: false,
        };
        let conn = self.conns.get_mut(&conn).expect("open");
        conn.last_transaction += 1;
        conn.transactions.insert(conn.last_transaction, transaction);
        Ok(format!("{}\0", conn.last_transaction).into_bytes())
    }

    pub(super) fn in_transaction(
        &mut self,
        conn: u32,
        tx: u32,
        ty: u32,
        payload: &[u8],
    ) -> Outcome {
        // The transaction does not record a malformed request.
        self.well_formed(conn, ty, payload)?;
        let open = &mut self.conns.get_mut(&conn).expect("open").transactions;
        let mut transaction = open.remove(&tx).expect("checked");
        let full = self.exceeds(conn, "transaction-nodes", transaction.log.len() + 1);
        let outcome = if transaction.doomed || full {
            transaction.doomed = true;
            Err("ENOSPC")
        } else {
            let domid = self.domid(conn);
            let elsewhere =
                count_owned(&self.tree, domid) - count_owned(&transaction.snapshot, domid);
            let mut cx = NodeContext {
                tree: &mut transaction.tree,
                changes: &mut transaction.changes,
                nodes_elsewhere: elsewhere,
            };
            let outcome = self.node_request(conn, &mut cx, ty, payload);
            transaction.log.push((ty, payload.to_vec(), outcome.clone()));
            outcome
        };
        self.conns.get_mut(&conn).expect("open").transactions.insert(tx, transaction);
        outcome
    }

    pub(super) fn end(&mut self, conn: u32, tx: u32, payload: &[u8]) -> Outcome {
        let commit = match payload {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err("EINVAL"),
        };
        let open = &mut self.conns.get_mut(&conn).expect("open").transactions;
        let transaction = open.remove(&tx).ok_or("ENOENT")?;
        let ok = || Ok(b"OK\0".to_vec());
        if !commit {
            return ok();
        }
        if transaction.doomed {
            return Err("ENOSPC");
        }
        if transaction.changes.is_empty() {
            return ok();
        }
        let old = self.tree.clone();
        let mut tree = old.clone();
        let mut all = Vec::new();
        for (ty, payload, before) in &transaction.log {
            let (last, mut changes) = (tree.clone(), Vec::new());
            let mut cx = NodeContext { tree: &mut tree, changes: &mut changes, nodes_elsewhere: 0 };
            let now = self.node_request(conn, &mut cx, *ty, payload);
            if now != *before {
                return Err(if now == Err("ENOSPC") { "ENOSPC" } else { "EAGAIN" });
            }
            all.extend(steps(changes, &last, &tree));
        }
        if self.has_bug && old.len() != transaction.snapshot.len() {
            return Err("EAGAIN");
        }
        self.tree = tree.clone();
        self.fire_changes(&all, &old, &tree);
        ok()
    }

    /// Succeeds if the payload is well-formed. A path that is too long is: its EINVAL is recorded.
    fn well_formed(&self, _conn: u32, ty: u32, payload: &[u8]) -> Result<(), &'static str> {
        use super::parse::{domid, exactly, number, path, strings};
        match ty {
            11 => path(strings(payload).0.first().ok_or("EINVAL")?).map(drop),
            14 => {
                let (texts, _) = strings(payload);
                path(texts.first().ok_or("EINVAL")?)?;
                if texts.len() < 2 {
                    return Err("EINVAL");
                }
                texts[1..].iter().try_for_each(|text| {
                    let (letter, id) = text.split_first().ok_or("EINVAL")?;
                    if !b"nrwb".contains(letter) {
                        return Err("EINVAL");
                    }
                    domid(id).map(drop)
                })
            }
            22 => {
                let texts = exactly(payload, 2)?;
                path(texts[0])?;
                number(texts[1], u64::MAX).map(drop)
            }
            _ => path(exactly(payload, 1)?[0]).map(drop),
        }
    }
}
