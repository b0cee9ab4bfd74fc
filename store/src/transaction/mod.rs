//! Transactions.
//!
//! A transaction works on a snapshot of the tree and keeps its requests with the answers that it
//! has given. It may be committed if running those requests again, alone and now, gives the same
//! answers: then it is as if all of it had happened at the moment of the commit. One that has
//! changed nothing always commits, as if it had happened at its start.
//!
//! Requests that only read are not run again where the facets that they have seen are still the
//! same (`read_set.rs`), so that a commit costs what the transaction has changed and what others
//! have changed under it.

pub(crate) mod execute;
pub(crate) mod read_set;
pub(crate) mod response;
pub(crate) mod retention;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use xenstore_protocol::{Errno, Operation, Path, Quota, Request};

use crate::ids::Millis;
use crate::transaction::execute::{Context, Staged, execute};
use crate::transaction::read_set::{looks_at, unchanged};
use crate::transaction::response::{Response, same};
use crate::tree::accounting::{TRANSACTION, bytes, request_cost};
use crate::tree::cow_cost::Copies;
use crate::tree::removal::Removal;
use crate::tree::{Tree, components};

/// A request of a transaction and the answer to it.
#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub(crate) op: Operation,
    pub(crate) payload: Box<[u8]>,
    pub(crate) answer: Result<Response, Errno>,
}

/// Levels of paths and nodes that are removed, in all requests of a transaction of a domain with quotas:
/// so much work may have to be done at once when it is committed, some five milliseconds.
const STEPS_MAX: usize = 1 << 17;

/// A transaction with at most so many steps is freed at once, which takes some 50 microseconds at most.
const SMALL: usize = 1024;

/// Why a transaction cannot be committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) error: Errno,
    /// Where a request would now be answered differently.
    pub(crate) path: Option<String>,
}

/// An open transaction.
#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    /// The committed tree when it was opened.
    pub(crate) snapshot: Tree,
    /// What decides over requests besides the tree, when it was opened; see `Engine::epoch`.
    pub(crate) epoch: u64,
    /// `Engine::stamp` when it was opened.
    pub(crate) stamp: u64,
    pub(crate) staged: Staged,
    pub(crate) log: Vec<Logged>,
    /// A limit was reached: nothing but END is answered any more, and END T fails with this error.
    pub(crate) doomed: Option<Errno>,
    /// Not all of it has come over from another daemon: its requests are answered, but END T is not
    /// granted.
    pub(crate) lost: bool,
    pub(crate) since: Millis,
    /// Bytes charged to the domain that opened it.
    pub(crate) bytes: i64,
    /// What running its requests again costs; see [`STEPS_MAX`].
    pub(crate) steps: usize,
    pub(crate) copies: Copies,
    /// What it has kept before it was given up.
    unused: Removal,
}

impl Transaction {
    pub(crate) fn new(tree: &Tree, epoch: u64, stamp: u64, since: Millis) -> Transaction {
        Transaction {
            snapshot: tree.clone(),
            epoch,
            stamp,
            staged: Staged::new(tree.clone()),
            log: Vec::new(),
            doomed: None,
            lost: false,
            since,
            bytes: TRANSACTION,
            steps: 0,
            copies: Copies::default(),
            unused: Removal::default(),
        }
    }

    /// Returns true if dropping this transaction and `old`, the committed tree just before its commit, frees
    /// few nodes: at most those that its own requests have copied.
    pub(crate) fn is_small(&self, old: &Tree) -> bool {
        self.steps <= SMALL && self.unused.is_empty() && self.snapshot.is_same(old)
    }

    /// Everything that it alone keeps, to be freed in pieces.
    pub(crate) fn into_nodes(self) -> Removal {
        let mut unused = self.unused;
        discard(self.snapshot, self.staged, self.log, &mut unused);
        unused
    }

    /// What it does not keep any more.
    pub(crate) fn take_unused(&mut self) -> Option<Removal> {
        (!self.unused.is_empty()).then(|| core::mem::take(&mut self.unused))
    }

    /// Number of requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.log.len()
    }

    /// Has it changed anything?
    pub(crate) fn has_changes(&self) -> bool {
        !self.staged.changes.is_empty()
    }

    /// Does its commit depend on the requests? Not if it is doomed or has changed nothing.
    pub(crate) fn can_matter(&self) -> bool {
        self.doomed.is_none() && !self.lost && self.has_changes()
    }

    /// What it sees besides what it has done.
    pub(crate) fn snapshot(&self) -> &Tree {
        &self.snapshot
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.doomed.is_some()
    }

    /// Lets everything go that it keeps: END T fails with this error. How many bytes it costs less.
    pub(crate) fn give_up(&mut self, error: Errno) -> i64 {
        self.doomed = Some(error);
        self.copies = Copies::default();
        let none = Tree::empty();
        let staged = core::mem::replace(&mut self.staged, Staged::new(none.clone()));
        let snapshot = core::mem::replace(&mut self.snapshot, none);
        discard(snapshot, staged, core::mem::take(&mut self.log), &mut self.unused);
        core::mem::replace(&mut self.bytes, TRANSACTION) - TRANSACTION
    }

    /// Runs a request inside the transaction.
    pub(crate) fn request(
        &mut self,
        cx: &mut Context<'_>,
        request: &Request<'_>,
        payload: &[u8],
    ) -> Result<Response, Errno> {
        let copied = self.copied_by(cx, request);
        let cost = request_cost(payload.len()) + copied;
        let room = cx
            .check(Quota::TransactionNodes, bytes(self.log.len() + 1))
            .and_then(|()| cx.check(Quota::Memory, cx.usage.bytes + cost))
            .and_then(|()| self.count_steps(cx, request));
        if self.doomed.is_some() || room.is_err() {
            if self.doomed.is_none() {
                self.give_up(Errno::Enospc);
            }
            return Err(Errno::Enospc);
        }
        // What it has made is in what is charged for the transaction already.
        cx.usage.bytes -= self.staged.charges.of(cx.rights.domid).bytes;
        cx.counts_copies = false;
        self.staged.copied += copied;
        let before = self.staged.charges.added + self.staged.copied;
        let counted = self.staged.counted;
        let answer = execute(&mut self.staged, cx, request);
        self.steps += self.staged.counted - counted;
        // No charge is released before its end: its replies retain the nodes that they show.
        self.bytes += self.staged.charges.added + self.staged.copied - before;
        self.bytes += cost + answer.as_ref().map_or(0, |answer| answer.size(request));
        if let Ok(Response::Seen(node)) = &answer {
            self.copies.seen.insert(node.created(), self.number_of_next());
        }
        let op = request.operation();
        self.log.push(Logged { op, payload: payload.into(), answer: answer.clone() });
        answer
    }

    /// Counts the steps of a request, as far as they are known before.
    fn count_steps(&mut self, cx: &Context<'_>, request: &Request<'_>) -> Result<(), Errno> {
        let levels = |(path, ..): (Path<'_>, _, _)| components(path.as_str()).count();
        self.steps += 1 + looks_at(request).map_or(0, levels);
        match cx.rights.privileged || self.steps <= STEPS_MAX {
            true => Ok(()),
            false => Err(Errno::Enospc),
        }
    }

    /// Bytes that it will take to change what `request` may change: the nodes on the way that the
    /// snapshot or earlier answers have as well, and its path once more.
    fn copied_by(&mut self, cx: &Context<'_>, request: &Request<'_>) -> i64 {
        let Some((path, _, true)) = looks_at(request) else { return 0 };
        let Ok(path) = cx.resolve(path) else { return 0 };
        let at = self.number_of_next();
        self.copies.change(&self.staged.tree, &path, self.stamp, at) + bytes(path.len())
    }

    fn number_of_next(&self) -> u32 {
        u32::try_from(self.log.len() + 1).unwrap_or(u32::MAX)
    }

    /// What the tree becomes if the transaction is committed now; `None` if it stays as it is.
    pub(crate) fn commit(
        &mut self,
        cx: &mut Context<'_>,
        tree: &Tree,
        epoch: u64,
    ) -> Result<Option<Staged>, Refusal> {
        if let Some(error) = self.doomed {
            return Err(Refusal { error, path: None });
        }
        if self.lost {
            return Err(Refusal { error: Errno::Eagain, path: None });
        }
        if !self.has_changes() {
            return Ok(None);
        }
        if self.epoch == epoch && self.snapshot.is_same(tree) {
            return Ok(Some(core::mem::replace(&mut self.staged, Staged::new(tree.clone()))));
        }
        self.replay(cx, tree, self.epoch == epoch).map(Some)
    }

    /// Continues from `tree` instead of its snapshot if `request` would read a later change there, and no
    /// earlier request would. So a change of a node that a protected transaction has not read yet causes
    /// no conflict.
    pub(crate) fn follow(
        &mut self,
        cx: &mut Context<'_>,
        tree: &Tree,
        epoch: u64,
        request: &Request<'_>,
    ) {
        let Some((path, facet, _)) = looks_at(request) else { return };
        let same = |path: &str| unchanged(&self.snapshot, tree, path, facet);
        if self.doomed.is_some() || cx.resolve(path).is_ok_and(|path| same(&path)) {
            return;
        }
        // As at its start: nodes that it creates get later stamps than its snapshot, nodes that it has read
        // have earlier ones.
        *cx.stamp += 1;
        let stamp = *cx.stamp;
        if let Ok(staged) = self.replay(cx, tree, self.epoch == epoch) {
            (self.snapshot, self.epoch, self.stamp) = (tree.clone(), epoch, stamp);
            self.staged = staged;
        }
    }

    /// Would all its requests be answered as they have been, were they run on `tree`? Also asked of
    /// one that has changed nothing yet.
    pub(crate) fn could_commit(&self, cx: &mut Context<'_>, tree: &Tree, epoch: u64) -> bool {
        self.doomed.is_none() && self.replay(cx, tree, self.epoch == epoch).is_ok()
    }

    /// Runs the requests again on `tree`. With `skip`, those that only read are left out where they
    /// would see the same; nothing but the tree may then have changed.
    pub(crate) fn replay(
        &self,
        cx: &mut Context<'_>,
        tree: &Tree,
        skip: bool,
    ) -> Result<Staged, Refusal> {
        let mut staged = Staged::new(tree.clone());
        for logged in &self.log {
            let malformed = |error| Refusal { error, path: None };
            let request = Request::parse(logged.op, &logged.payload).map_err(malformed)?;
            if skip && self.sees_the_same(cx, tree, &request) {
                continue;
            }
            let answer = execute(&mut staged, cx, &request);
            if !same(&request, &answer, &logged.answer) {
                let path = looks_at(&request).and_then(|(path, ..)| cx.resolve(path).ok());
                // A quota that others have used up in the meantime will not be free at once.
                let full = matches!(answer, Err(Errno::Enospc));
                let error = if full { Errno::Enospc } else { Errno::Eagain };
                return Err(Refusal { error, path: path.map(Into::into) });
            }
        }
        Ok(staged)
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

/// Appends the nodes of which this has the last use.
fn discard(snapshot: Tree, staged: Staged, log: Vec<Logged>, removal: &mut Removal) {
    let seen = log.into_iter().filter_map(|logged| match logged.answer {
        Ok(Response::Seen(node)) => Some(node),
        _ => None,
    });
    let removed = staged.changes.into_iter().flat_map(|change| change.removed);
    let roots = [staged.tree, snapshot].map(Tree::into_root);
    removal.free(seen.chain(removed).chain(staged.uncounted).chain(roots));
}
