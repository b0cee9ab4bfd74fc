//! A tree as what makes it differ from another one: a snapshot from the committed tree, or what a
//! transaction works on from its snapshot.
//!
//! Trees that come from each other share nodes, and whether they do is looked at when a transaction
//! is committed. So it is nodes that are compared here and not what is in them, and the restored
//! trees share what the trees shared.

use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::AbsPath;
use xenstore_protocol::stream::{Cursor, StreamError, Writer};

use crate::snapshot::nodes::{put_perms, take_perms};
use crate::tree::accounting::Charges;
use crate::tree::acl::Acl;
use crate::tree::node::{Node, descend};
use crate::tree::{Tree, components, parent};

/// What is written of a difference, as a letter before each.
mod mark {
    pub(super) const END: u8 = b'.';
    /// A node is another one, perhaps with the same content.
    pub(super) const CHANGED: u8 = b'*';
    pub(super) const ADDED: u8 = b'+';
    pub(super) const REMOVED: u8 = b'-';
}

/// Writes how `new` differs from `base`. Goes down both at once, and stops where they are one.
pub(super) fn put_difference(writer: &mut Writer, base: &Tree, new: &Tree) {
    for (a, b) in base.special().zip(new.special()) {
        if !Arc::ptr_eq(a, b) {
            put_node(writer, mark::CHANGED, b.name(), b);
        }
    }
    let mut stack = Vec::new();
    if !Arc::ptr_eq(base.root(), new.root()) {
        stack.push((String::from("/"), base.root(), new.root()));
    }
    while let Some((path, a, b)) = stack.pop() {
        put_node(writer, mark::CHANGED, &path, b);
        let below = if path == "/" { "" } else { &path };
        let path_of = |node: &Node| alloc::format!("{below}/{}", node.name());
        for (a, b) in a.children().differing(b.children()) {
            match (a, b) {
                (Some(a), Some(b)) if a.created() == b.created() => {
                    stack.push((path_of(b), a, b));
                }
                _ => {
                    if let Some(a) = a {
                        writer.u8(mark::REMOVED);
                        put_path(writer, &path_of(a));
                    }
                    if let Some(b) = b {
                        put_all(writer, path_of(b), b);
                    }
                }
            }
        }
    }
    writer.u8(mark::END);
}

/// Writes a node with all below it by itself.
pub(super) fn put_subtree(writer: &mut Writer, node: &Arc<Node>) {
    put_all(writer, alloc::format!("/{}", node.name()), node);
    writer.u8(mark::END);
}

/// Reads what [`put_subtree`] has written. No stamp may be above `limit`.
pub(super) fn take_subtree(body: &mut Cursor<'_>, limit: u64) -> Result<Arc<Node>, StreamError> {
    let (tree, _) = take_difference(body, &Tree::empty(), limit)?;
    let mut nodes = tree.root().children().iter();
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node.clone()),
        _ => Err(body.error("not one node")),
    }
}

/// A node that is not in the base, with all below it, parents first.
fn put_all(writer: &mut Writer, path: String, node: &Arc<Node>) {
    let mut stack = alloc::vec![(path, node)];
    while let Some((path, node)) = stack.pop() {
        put_node(writer, mark::ADDED, &path, node);
        let children = node.children().iter();
        stack.extend(children.map(|child| (alloc::format!("{path}/{}", child.name()), child)));
    }
}

pub(super) fn put_path(writer: &mut Writer, path: &str) {
    writer.len16(path.len() + 1);
    writer.c_string(path.as_bytes());
}

fn put_node(writer: &mut Writer, mark: u8, path: &str, node: &Node) {
    writer.u8(mark);
    put_path(writer, path);
    writer.u64(node.created());
    writer.u64(node.listed());
    writer.len16(node.acl().entries().len());
    put_perms(writer, node.acl());
    writer.len16(node.value().len());
    writer.bytes(node.value());
}

pub(super) fn take_path(body: &mut Cursor<'_>) -> Result<String, StreamError> {
    let len = body.u16()?;
    let path = AbsPath::parse(body.string(len.into())?).ok_or(body.error("a path that is none"))?;
    Ok(path.as_str().into())
}

/// What a difference says about a node.
struct Content<'a> {
    created: u64,
    listed: u64,
    acl: Acl,
    value: &'a [u8],
}

fn take_content<'a>(
    body: &mut Cursor<'a>,
    near: Option<&Acl>,
    limit: u64,
) -> Result<Content<'a>, StreamError> {
    let (created, listed) = (body.u64()?, body.u64()?);
    if created > limit || listed > limit {
        return Err(body.error("a node from the future"));
    }
    let count = body.u16()?;
    let acl = take_perms(body, count, [near, None])?;
    let len = usize::from(body.u16()?);
    if len > xenstore_protocol::PAYLOAD_MAX {
        return Err(body.error("a value that no message has room for"));
    }
    Ok(Content { created, listed, acl, value: body.take(len)? })
}

/// What a difference does to the tree that it is applied to.
#[derive(Debug, Default)]
pub(super) struct Effect {
    /// What the new tree costs more.
    pub(super) charges: Charges,
    /// Where nodes appear, disappear, or get other permissions.
    pub(super) places: Vec<String>,
    /// Stamps of the nodes that appear.
    pub(super) created: Vec<u64>,
}

/// Reads a difference and makes the tree of it. No stamp may be above `limit`.
pub(super) fn take_difference(
    body: &mut Cursor<'_>,
    base: &Tree,
    limit: u64,
) -> Result<(Tree, Effect), StreamError> {
    let mut tree = base.clone();
    let mut parents = BTreeSet::new();
    let mut effect = Effect::default();
    let charges = &mut effect.charges;
    loop {
        let mark = body.u8()?;
        if mark == mark::END {
            break;
        }
        let path = take_path(body)?;
        match mark {
            mark::CHANGED => {
                let old = tree.get(&path).cloned().ok_or(body.error("no such node"))?;
                let new = take_content(body, Some(old.acl()), limit)?;
                if new.created != old.created() {
                    return Err(body.error("another node"));
                }
                let node = tree.get_mut(&path).ok_or(body.error("no such node"))?;
                node.set_listed(new.listed);
                node.set_acl(new.acl);
                node.set_value(new.value);
                charges.add(node.acl().owner(), node.charge());
                charges.add(old.acl().owner(), -old.charge());
                if node.acl() != old.acl() {
                    effect.places.push(path);
                }
            }
            mark::REMOVED => {
                let old = Some(&path).filter(|path| !path.starts_with('@'));
                let old = old.and_then(|path| tree.take(path)).ok_or(body.error("no such node"))?;
                descend(&old).for_each(|node| charges.add(node.acl().owner(), -node.charge()));
                effect.places.push(path);
            }
            mark::ADDED => {
                let above = parent(&path).ok_or(body.error("no parent"))?;
                let near = tree.get(above).map(|node| node.acl().clone());
                let new = take_content(body, near.as_ref(), limit)?;
                let name = components(&path).last().ok_or(body.error("no name"))?;
                let mut node = Node::new(name, new.created, new.acl, new.value);
                node.set_listed(new.listed);
                charges.add(node.acl().owner(), node.charge());
                let put = Some(()).filter(|()| !path.starts_with('@'));
                put.and_then(|()| tree.put(above, Arc::new(node)))
                    .ok_or(body.error("a node that cannot be added"))?;
                parents.insert(String::from(above));
                effect.created.push(new.created);
                effect.places.push(path);
            }
            _ => return Err(body.error("no such mark")),
        }
    }
    for path in parents {
        let Some(node) = tree.get(&path) else { continue };
        let order = node.children().by_creation();
        if order.windows(2).any(|pair| pair[0].created() == pair[1].created()) {
            return Err(body.error("siblings are not in order of creation"));
        }
    }
    Ok((tree, effect))
}
