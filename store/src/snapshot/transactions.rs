//! An open transaction in a stream: its snapshot, its log and its replies. Nothing is executed again, so
//! a change of quotas or features in between has no effect on it.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::stream::{Cursor, StreamError, Writer};
use xenstore_protocol::{DomId, Errno, Facet, Operation, Request};

use crate::snapshot::difference::{
    put_difference, put_path, put_subtree, take_difference, take_path, take_subtree,
};
use crate::snapshot::nodes::{put_perms, take_perms};
use crate::transaction::execute::Staged;
use crate::transaction::read_set::looks_at;
use crate::transaction::response::Response;
use crate::transaction::{Logged, Transaction};
use crate::tree::Tree;
use crate::tree::accounting::Charge;
use crate::tree::acl::Acl;
use crate::tree::change::{Change, Readers};
use crate::tree::cow_cost::Copies;
use crate::tree::node::Node;

/// What an answer was, as a letter.
mod answer {
    pub(super) const DONE: u8 = b'd';
    pub(super) const ERROR: u8 = b'e';
    /// The node as it is in the snapshot.
    pub(super) const AS_BEFORE: u8 = b's';
    /// The node as it is in the transaction's tree.
    pub(super) const AS_NOW: u8 = b'w';
    /// What was seen of a node that is in neither.
    pub(super) const SEEN: u8 = b'n';
}

/// Stands beside the first flag: the format of the record, which has no other number yet.
const FORMAT: u32 = 2 << 8;

/// Most bytes that a transaction may be charged.
const BYTES_MAX: i64 = 1 << 40;

/// Writes a transaction; its snapshot as what differs from `base`.
pub(super) fn put_transaction(
    writer: &mut Writer,
    transaction: &Transaction,
    base: &Tree,
    domid: Option<DomId>,
) {
    let Transaction { snapshot, staged, .. } = transaction;
    writer.u32(FORMAT | u32::from(transaction.lost));
    writer.u64(transaction.steps as u64);
    writer.u64(transaction.stamp);
    writer.u64(transaction.epoch);
    writer.u64(transaction.since);
    let made = [transaction.bytes, staged.charges.added, staged.copied, staged.removed];
    made.iter().for_each(|bytes| writer.u64(bytes.cast_unsigned()));
    writer.u8(transaction.doomed.is_some().into());
    if let Some(error) = transaction.doomed {
        // It keeps nothing any more.
        return writer.c_string(error.as_str().as_bytes());
    }
    for numbers in [&transaction.copies.copied, &transaction.copies.seen] {
        writer.len32(numbers.len());
        for (created, at) in numbers {
            writer.u64(*created);
            writer.u32(*at);
        }
    }
    put_difference(writer, base, snapshot);
    put_difference(writer, snapshot, &staged.tree);
    writer.len32(staged.charges.domids().len());
    for domid in staged.charges.domids() {
        writer.u16(domid.0);
    }
    writer.len32(staged.changes.len());
    for change in &staged.changes {
        put_change(writer, change, snapshot);
    }
    writer.len32(transaction.log.len());
    for logged in &transaction.log {
        writer.u32(logged.op.as_wire());
        writer.len16(logged.payload.len());
        writer.bytes(&logged.payload);
        put_answer(writer, transaction, logged, domid);
    }
}

fn put_change(writer: &mut Writer, change: &Change, snapshot: &Tree) {
    writer.u8(change.owned.into());
    put_path(writer, &change.path);
    writer.len16(change.top);
    let readers: Vec<&Acl> = change.readers.iter().collect();
    writer.len32(readers.len());
    for acl in readers {
        writer.len16(acl.entries().len());
        put_perms(writer, acl);
    }
    writer.len32(change.removed.len());
    for node in &change.removed {
        let was_there = snapshot.get(&change.path).is_some_and(|before| Arc::ptr_eq(before, node));
        writer.u8(was_there.into());
        if !was_there {
            put_subtree(writer, node);
        }
    }
}

fn take_change(body: &mut Cursor<'_>, snapshot: &Tree, limit: u64) -> Result<Change, StreamError> {
    let owned = body.u8()? != 0;
    let path = take_path(body)?;
    let top = usize::from(body.u16()?).min(path.len());
    let mut readers = Readers::default();
    for _ in 0..body.u32()? {
        let count = body.u16()?;
        readers.add(&take_perms(body, count, [None, None])?);
    }
    let mut removed = Vec::new();
    for _ in 0..body.u32()? {
        removed.push(match body.u8()? {
            0 => take_subtree(body, limit)?,
            _ => snapshot.get(&path).cloned().ok_or(body.error("no such node"))?,
        });
    }
    Ok(Change { path, top, removed, owned, readers })
}

fn put_answer(
    writer: &mut Writer,
    transaction: &Transaction,
    logged: &Logged,
    domid: Option<DomId>,
) {
    let node = match &logged.answer {
        Ok(Response::Seen(node)) => node,
        Ok(_) => return writer.u8(answer::DONE),
        Err(error) => {
            writer.u8(answer::ERROR);
            return writer.c_string(error.as_str().as_bytes());
        }
    };
    let is_in = |tree: &Tree| place(logged, tree, domid).is_some_and(|at| Arc::ptr_eq(at, node));
    if is_in(&transaction.snapshot) {
        writer.u8(answer::AS_BEFORE);
    } else if is_in(&transaction.staged.tree) {
        writer.u8(answer::AS_NOW);
    } else {
        writer.u8(answer::SEEN);
        writer.u64(node.created());
        writer.u64(node.listed());
        writer.len16(node.acl().entries().len());
        put_perms(writer, node.acl());
        writer.len16(node.value().len());
        writer.bytes(node.value());
        let lists = logged.op.facet() == Some(Facet::Children);
        let children = if lists { node.children().by_creation() } else { Vec::new() };
        writer.len32(children.len());
        for child in children {
            put_path(writer, child.name());
        }
    }
}

/// The node that a request looks at, in a tree.
fn place<'t>(logged: &Logged, tree: &'t Tree, domid: Option<DomId>) -> Option<&'t Arc<Node>> {
    let request = Request::parse(logged.op, &logged.payload).ok()?;
    let (path, ..) = looks_at(&request)?;
    tree.get(path.resolve(domid?)?.as_str())
}

/// Reads a transaction. `base` is what its snapshot is written as a difference from.
pub(super) fn take_transaction(
    body: &mut Cursor<'_>,
    base: &Tree,
    limit: u64,
    domid: Option<DomId>,
) -> Result<Transaction, StreamError> {
    let flags = body.u32()?;
    if flags & !1 != FORMAT {
        return Err(body.error("an open transaction as an earlier version wrote it"));
    }
    let lost = flags & 1 != 0;
    let steps = usize::try_from(body.u64()?).unwrap_or(usize::MAX / 2);
    let (stamp, epoch, since) = (body.u64()?, body.u64()?, body.u64()?);
    let mut made = [0; 4];
    for bytes in &mut made {
        *bytes = body.u64()?.cast_signed();
    }
    if stamp > limit || made.iter().any(|bytes| !(0..=BYTES_MAX).contains(bytes)) {
        return Err(body.error("a transaction that cannot be"));
    }
    let [bytes, added, copied, removed] = made;
    if body.u8()? != 0 {
        let error = Errno::parse(body.c_string()?).ok_or(body.error("no name of an error"))?;
        let mut transaction = Transaction::new(base, epoch, stamp, since);
        transaction.give_up(error);
        (transaction.bytes, transaction.steps) = (bytes, steps.min(usize::MAX / 2));
        return Ok(transaction);
    }
    let mut copies = Copies::default();
    for numbers in [&mut copies.copied, &mut copies.seen] {
        for _ in 0..body.u32()? {
            numbers.insert(body.u64()?, body.u32()?);
        }
    }
    let (snapshot, _) = take_difference(body, base, limit)?;
    let mut staged = Staged::new(snapshot.clone());
    let effect;
    (staged.tree, effect) = take_difference(body, &snapshot, limit)?;
    staged.charges = effect.charges;
    staged.charges.forget_zeroes();
    // A charge that was released leaves a zero.
    for _ in 0..body.u32()? {
        staged.charges.add(DomId(body.u16()?), Charge::default());
    }
    for _ in 0..body.u32()? {
        staged.changes.push(take_change(body, &snapshot, limit)?);
    }
    if !are_told(&effect.places, &staged.changes) || !are_new(effect.created, stamp) {
        return Err(body.error("a transaction that has done what it has not"));
    }
    (staged.charges.added, staged.copied, staged.removed) = (added, copied, removed);
    let mut transaction = Transaction::new(&snapshot, epoch, stamp, since);
    (transaction.staged, transaction.lost) = (staged, lost);
    (transaction.bytes, transaction.steps) = (bytes, steps.min(usize::MAX / 2));
    transaction.copies = copies;
    for _ in 0..body.u32()? {
        let op = Operation::from_wire(body.u32()?).filter(|op| op.is_transactional());
        let op = op.ok_or(body.error("no request of a transaction"))?;
        let len = body.u16()?;
        let payload = body.take(len.into())?.into();
        let mut logged = Logged { op, payload, answer: Ok(Response::Done) };
        if Request::parse(op, &logged.payload).is_err() {
            return Err(body.error("a malformed request"));
        }
        logged.answer = take_answer(body, &transaction, &logged, limit, domid)?;
        transaction.log.push(logged);
    }
    Ok(transaction)
}

/// Is each place at or above one of the changes?
fn are_told(places: &[String], changes: &[Change]) -> bool {
    let told: BTreeSet<&str> = changes.iter().map(|change| change.path.as_str()).collect();
    places.iter().all(|place| {
        let start = format!("{place}/");
        told.contains(place.as_str())
            || told.range(start.as_str()..).next().is_some_and(|path| path.starts_with(&start))
    })
}

/// Are all of these nodes, and no two the same, from after the start of the transaction?
fn are_new(mut created: Vec<u64>, start: u64) -> bool {
    created.sort_unstable();
    created.windows(2).all(|pair| pair[0] < pair[1])
        && created.first().is_none_or(|first| *first > start)
}

fn take_answer(
    body: &mut Cursor<'_>,
    transaction: &Transaction,
    logged: &Logged,
    limit: u64,
    domid: Option<DomId>,
) -> Result<Result<Response, Errno>, StreamError> {
    let seen_in = |tree: &Tree, body: &Cursor<'_>| {
        let node = place(logged, tree, domid).ok_or(body.error("an answer about no node"))?;
        Ok(Ok(Response::Seen(node.clone())))
    };
    match body.u8()? {
        answer::DONE => Ok(Ok(Response::Done)),
        answer::ERROR => {
            let error = Errno::parse(body.c_string()?);
            Ok(Err(error.ok_or(body.error("no name of an error"))?))
        }
        answer::AS_BEFORE => seen_in(&transaction.snapshot, body),
        answer::AS_NOW => seen_in(&transaction.staged.tree, body),
        answer::SEEN => take_seen(body, limit).map(|node| Ok(Response::Seen(Arc::new(node)))),
        _ => Err(body.error("no such answer")),
    }
}

/// As much of a node as its answer shows: of its children only their names.
fn take_seen(body: &mut Cursor<'_>, limit: u64) -> Result<Node, StreamError> {
    let (created, listed) = (body.u64()?, body.u64()?);
    if created > limit || listed > limit {
        return Err(body.error("a node from the future"));
    }
    let count = body.u16()?;
    let acl = take_perms(body, count, [None, None])?;
    let len = body.u16()?;
    let mut node = Node::new("", created, acl, body.take(len.into())?);
    node.set_listed(listed);
    for order in 0..u64::from(body.u32()?) {
        let len = body.u16()?;
        let name = core::str::from_utf8(body.string(len.into())?);
        let name = name.map_err(|_| body.error("a name that is none"))?;
        if node.children().get(name).is_some() {
            return Err(body.error("a name that is there twice"));
        }
        let child = Node::new(name, order, Acl::private(DomId(0)), b"");
        node.children_mut().insert(Arc::new(child));
    }
    Ok(node)
}
