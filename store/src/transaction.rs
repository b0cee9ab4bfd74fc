//! Transactions.
//!
//! A transaction works on a snapshot of the tree and keeps its requests with the answers that it
//! has given. It may be committed if running those requests again, alone and now, gives the same
//! answers: then it is as if all of it had happened at the moment of the commit. One that has
//! changed nothing always commits, as if it had happened at its start.
//!
//! Requests that only read are not run again where the facets that they have seen are still the
//! same (`footprint.rs`), so that a commit costs what the transaction has changed and what others
//! have changed under it.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use xenstore_protocol::{ErrorName, Operation, Quota, Request};

use crate::answer::{Answer, same};
use crate::charge::{OVERHEAD, bytes};
use crate::engine::Millis;
use crate::execute::{Context, Work, execute};
use crate::footprint::{looks_at, unchanged};
use crate::tree::Tree;

/// A request of a transaction and the answer to it.
#[derive(Clone, Debug)]
struct Logged {
    op: Operation,
    payload: Box<[u8]>,
    answer: Result<Answer, ErrorName>,
}

/// Why a transaction cannot be committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) error: ErrorName,
    /// Where a request would now be answered differently.
    pub(crate) path: Option<String>,
}

/// An open transaction.
#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    /// The committed tree when it was opened.
    snapshot: Tree,
    /// What decides over requests besides the tree, when it was opened; see `Engine::epoch`.
    epoch: u64,
    /// `Engine::stamp` when it was opened.
    pub(crate) stamp: u64,
    work: Work,
    log: Vec<Logged>,
    /// A limit was reached: nothing but END is answered any more, and END T fails as well.
    doomed: bool,
    pub(crate) since: Millis,
    /// Bytes charged to the domain that opened it.
    pub(crate) bytes: i64,
}

impl Transaction {
    pub(crate) fn new(tree: &Tree, epoch: u64, stamp: u64, since: Millis) -> Transaction {
        Transaction {
            snapshot: tree.clone(),
            epoch,
            stamp,
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

    /// Does its commit depend on the requests? Not if it is doomed or has changed nothing.
    pub(crate) fn can_matter(&self) -> bool {
        !self.doomed && self.has_changes()
    }

    /// Runs a request inside the transaction.
    pub(crate) fn request(
        &mut self,
        cx: &mut Context<'_>,
        request: &Request<'_>,
        payload: &[u8],
    ) -> Result<Answer, ErrorName> {
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
        self.bytes += cost + answer.as_ref().map_or(0, |answer| answer.size(request));
        let op = request.operation();
        self.log.push(Logged { op, payload: payload.into(), answer: answer.clone() });
        answer
    }

    /// What the tree becomes if the transaction is committed now; `None` if it stays as it is.
    pub(crate) fn commit(
        &mut self,
        cx: &mut Context<'_>,
        tree: &Tree,
        epoch: u64,
    ) -> Result<Option<Work>, Refusal> {
        if self.doomed {
            return Err(Refusal { error: ErrorName::Enospc, path: None });
        }
        if !self.has_changes() {
            return Ok(None);
        }
        if self.epoch == epoch && self.snapshot.is_same(tree) {
            return Ok(Some(core::mem::replace(&mut self.work, Work::new(tree.clone()))));
        }
        self.replay(cx, tree, self.epoch == epoch).map(Some)
    }

    /// Goes on from `tree` instead of its snapshot, if `request` would see something else there that
    /// others have done since, and all that came before would not. So a transaction that is
    /// protected cannot be overtaken by changes of what it is only about to read.
    pub(crate) fn follow(
        &mut self,
        cx: &mut Context<'_>,
        tree: &Tree,
        epoch: u64,
        request: &Request<'_>,
    ) {
        let Some((path, facet, _)) = looks_at(request) else { return };
        let same = |path: &str| unchanged(&self.snapshot, tree, path, facet);
        if self.doomed || cx.resolve(path).is_ok_and(|path| same(&path)) {
            return;
        }
        if let Ok(work) = self.replay(cx, tree, self.epoch == epoch) {
            (self.snapshot, self.epoch, self.stamp) = (tree.clone(), epoch, *cx.stamp);
            self.work = work;
        }
    }

    /// Would all its requests be answered as they have been, were they run on `tree`? Also asked of
    /// one that has changed nothing yet.
    pub(crate) fn could_commit(&self, cx: &mut Context<'_>, tree: &Tree, epoch: u64) -> bool {
        !self.doomed && self.replay(cx, tree, self.epoch == epoch).is_ok()
    }

    /// Runs the requests again on `tree`. With `skip`, those that only read are left out where they
    /// would see the same; nothing but the tree may then have changed.
    pub(crate) fn replay(
        &self,
        cx: &mut Context<'_>,
        tree: &Tree,
        skip: bool,
    ) -> Result<Work, Refusal> {
        let mut work = Work::new(tree.clone());
        for logged in &self.log {
            let malformed = |error| Refusal { error, path: None };
            let request = Request::parse(logged.op, &logged.payload).map_err(malformed)?;
            if skip && self.sees_the_same(cx, tree, &request) {
                continue;
            }
            let answer = execute(&mut work, cx, &request);
            if !same(&request, &answer, &logged.answer) {
                let path = looks_at(&request).and_then(|(path, ..)| cx.resolve(path).ok());
                // A quota that others have used up in the meantime will not be free at once.
                let full = matches!(answer, Err(ErrorName::Enospc));
                let error = if full { ErrorName::Enospc } else { ErrorName::Eagain };
                return Err(Refusal { error, path: path.map(Into::into) });
            }
        }
        Ok(work)
    }

    /// Does this request only read, and of what it has seen has nothing changed in `tree`?
    ///
    /// The transaction's own changes make no difference. Made on two trees that agree on a path,
    /// they leave trees that agree on it, as long as they are answered alike, which is asked.
    fn sees_the_same(&self, cx: &Context<'_>, tree: &Tree, request: &Request<'_>) -> bool {
        let Some((path, facet, false)) = looks_at(request) else { return false };
        // A path that is too long stays so.
        cx.resolve(path).is_ok_and(|path| unchanged(&self.snapshot, tree, &path, facet))
    }
}
