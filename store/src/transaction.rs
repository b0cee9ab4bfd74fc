//! Transactions.
//!
//! A transaction works on a snapshot of the tree and keeps its requests with the answers that it
//! has given. It may be committed if running those requests again, alone and now, gives the same
//! answers: then it is as if all of it had happened at the moment of the commit. One that has
//! changed nothing always commits, as if it had happened at its start.

use alloc::boxed::Box;
use alloc::vec::Vec;

use xenstore_protocol::{ErrorName, Operation, Quota, Reply, Request};

use crate::charge::{OVERHEAD, bytes};
use crate::engine::Millis;
use crate::execute::{Context, Work, execute};
use crate::tree::Tree;

/// A request of a transaction and the answer to it.
#[derive(Clone, Debug)]
struct Logged {
    op: Operation,
    payload: Box<[u8]>,
    answer: Result<Reply<'static>, ErrorName>,
}

/// An open transaction.
#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    /// The committed tree when it was opened.
    snapshot: Tree,
    /// What decides over requests besides the tree, when it was opened; see `Engine::epoch`.
    epoch: u64,
    work: Work,
    log: Vec<Logged>,
    /// A limit was reached: nothing but END is answered any more, and END T fails as well.
    doomed: bool,
    pub(crate) since: Millis,
    /// Bytes charged to the domain that opened it.
    pub(crate) bytes: i64,
}

impl Transaction {
    pub(crate) fn new(tree: &Tree, epoch: u64, since: Millis) -> Transaction {
        Transaction {
            snapshot: tree.clone(),
            epoch,
            work: Work::new(tree.clone()),
            log: Vec::new(),
            doomed: false,
            since,
            bytes: OVERHEAD,
        }
    }

    /// Number of requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.log.len()
    }

    /// Has it changed anything?
    pub(crate) fn has_changes(&self) -> bool {
        !self.work.changes.is_empty()
    }

    /// Runs a request inside the transaction.
    pub(crate) fn request(
        &mut self,
        cx: &mut Context<'_>,
        request: &Request<'_>,
        payload: &[u8],
    ) -> Result<Reply<'static>, ErrorName> {
        let cost = OVERHEAD + bytes(payload.len());
        let room = cx
            .check(Quota::TransactionNodes, bytes(self.log.len() + 1))
            .and_then(|()| cx.check(Quota::Memory, cx.usage.bytes + cost));
        if self.doomed || room.is_err() {
            self.doomed = true;
            return Err(ErrorName::Enospc);
        }
        let before = self.work.charges.growth();
        // Nodes that it has made are looked at by themselves.
        cx.usage.bytes -= before;
        let answer = execute(&mut self.work, cx, request);
        // What it has made is only its own until it is committed.
        self.bytes += self.work.charges.growth() - before;
        self.bytes += cost + answer.as_ref().map_or(0, size_of_answer);
        let op = request.operation();
        self.log.push(Logged { op, payload: payload.into(), answer: answer.clone() });
        answer
    }

    /// What the tree becomes if the transaction is committed now; `None` if it stays as it is.
    pub(crate) fn commit(
        self,
        cx: &mut Context<'_>,
        tree: &Tree,
        epoch: u64,
    ) -> Result<Option<Work>, ErrorName> {
        if self.doomed {
            return Err(ErrorName::Enospc);
        }
        if !self.has_changes() {
            return Ok(None);
        }
        if self.epoch == epoch && self.snapshot.is_same(tree) {
            return Ok(Some(self.work));
        }
        let mut work = Work::new(tree.clone());
        for logged in &self.log {
            let request = Request::parse(logged.op, &logged.payload)?;
            let answer = execute(&mut work, cx, &request);
            if !same_answer(&answer, &logged.answer) {
                // A quota that others have used up in the meantime will not be free at once.
                let full = answer == Err(ErrorName::Enospc);
                return Err(if full { ErrorName::Enospc } else { ErrorName::Eagain });
            }
        }
        Ok(Some(work))
    }
}

/// Would the client notice the difference? Generations are only compared with each other.
fn same_answer(
    a: &Result<Reply<'static>, ErrorName>,
    b: &Result<Reply<'static>, ErrorName>,
) -> bool {
    match (a, b) {
        (
            Ok(Reply::Part { names, last, .. }),
            Ok(Reply::Part { names: names_b, last: last_b, .. }),
        ) => names == names_b && last == last_b,
        _ => a == b,
    }
}

fn size_of_answer(reply: &Reply<'_>) -> i64 {
    match reply {
        Reply::Bytes(text) | Reply::Names(text) | Reply::Part { names: text, .. } => {
            bytes(text.len())
        }
        Reply::Perms(perms) => bytes(8 * perms.0.len()),
        _ => 0,
    }
}
