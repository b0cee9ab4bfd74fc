//! The compact form of the tree: few bytes for each node, in the order of `nodes.rs`. A record is padded
//! with zeroes, and the next one continues the sequence. All numbers are varints.
//!
//! ```text
//! mark     0: nothing more in this record; 1: a special node; 2: a child of the node before, or the
//!          root; 3: of the one above that, and so on
//! name     its length and bytes; that of the root is empty
//! list     0: permissions of its parent; 1: of the node before; otherwise as many entries, less one
//! value    its length and bytes
//! created  how much more it is than that of the node before; odd if it is less
//! listed   how much more it is than `created`
//! ```

use xenstore_protocol::stream::{Cursor, StreamError, Writer, kind};
use xenstore_protocol::{ABS_PATH_MAX, PAYLOAD_MAX, Path};

use super::nodes::{Grower, put_perms, take_perms, youngest_first};
use crate::tree::Tree;
use crate::tree::acl::Acl;
use crate::tree::node::Node;

/// What comes before a node, less how many levels above the node before its parent is.
mod mark {
    pub(super) const END: u64 = 0;
    pub(super) const SPECIAL: u64 = 1;
    pub(super) const BELOW: u64 = 2;
}

/// Whose permissions a node has, less one of how many entries they have.
mod list {
    pub(super) const OF_PARENT: u64 = 0;
    pub(super) const OF_LAST: u64 = 1;
    pub(super) const NEW: u64 = 1;
}

/// Writes all nodes.
pub(super) fn put_nodes(writer: &mut Writer, tree: &Tree) {
    let mut before = 0;
    let mut put = |mark: u64, node: &Node, [parent, last]: [Option<&Node>; 2]| {
        if writer.is_long() {
            writer.begin(kind::NODES);
        }
        writer.varint(mark);
        put_bytes(writer, node.name_bytes());
        let has = |other: Option<&Node>| other.is_some_and(|other| other.acl() == node.acl());
        match () {
            () if has(parent) => writer.varint(list::OF_PARENT),
            () if has(last) => writer.varint(list::OF_LAST),
            () => {
                writer.varint(list::NEW + node.acl().entries().len() as u64);
                put_perms(writer, node.acl());
            }
        }
        put_bytes(writer, node.value());
        writer.varint(zigzag(node.created().wrapping_sub(before)));
        writer.varint(node.listed().wrapping_sub(node.created()));
        before = node.created();
    };
    put(mark::BELOW, tree.root(), [None, None]);
    let (mut last, mut depth) = (tree.root(), 0);
    let mut stack = alloc::vec![(tree.root(), youngest_first(tree.root()))];
    while let Some((parent, nodes)) = stack.last_mut() {
        let Some(node) = nodes.pop() else {
            stack.pop();
            continue;
        };
        let parent = *parent;
        let up = (depth + 1 - stack.len()) as u64;
        put(mark::BELOW + up, node, [Some(parent), Some(last)]);
        (last, depth) = (node, stack.len());
        if node.children().len() > 0 {
            stack.push((node, youngest_first(node)));
        }
    }
    for node in tree.special() {
        put(mark::SPECIAL, node, [None, None]);
    }
}

fn put_bytes(writer: &mut Writer, bytes: &[u8]) {
    writer.varint(bytes.len() as u64);
    writer.bytes(bytes);
}

fn take_bytes<'a>(body: &mut Cursor<'a>) -> Result<&'a [u8], StreamError> {
    let len = usize::try_from(body.varint()?);
    body.take(len.unwrap_or(usize::MAX))
}

/// Small differences in either direction become small numbers.
fn zigzag(difference: u64) -> u64 {
    (difference << 1) ^ (difference.cast_signed() >> 63).cast_unsigned()
}

fn unzigzag(number: u64) -> u64 {
    (number >> 1) ^ 0_u64.wrapping_sub(number & 1)
}

impl Grower {
    /// Takes a NODES record, in which no stamp may be above `limit`.
    pub(super) fn take_nodes(
        &mut self,
        body: &mut Cursor<'_>,
        limit: u64,
    ) -> Result<(), StreamError> {
        while !body.is_empty() {
            match body.varint()? {
                mark::END => break,
                mark::SPECIAL => {
                    let name = core::str::from_utf8(take_bytes(body)?).unwrap_or_default();
                    let node = take_rest(body, name, [None, None], &mut self.before, limit)?;
                    self.add_special(node, body)?;
                }
                mark => self.take_node(body, mark - mark::BELOW, limit)?,
            }
        }
        Ok(())
    }

    /// Takes a node whose parent is so many levels above the last one.
    fn take_node(&mut self, body: &mut Cursor<'_>, up: u64, limit: u64) -> Result<(), StreamError> {
        let name = take_bytes(body)?;
        let mut open = self.open.iter().rev();
        let last = open.clone().next().map(|open| open.node.acl());
        let parent = usize::try_from(up).ok().and_then(|up| open.nth(up));
        let Some(parent) = parent else {
            if !name.is_empty() {
                return Err(body.error("no parent"));
            }
            let node = take_rest(body, "", [None, None], &mut self.before, limit)?;
            self.created.push(node.created());
            return self.add_root(node, body);
        };
        let len = parent.len + 1 + name.len();
        let name = Path::parse(name).filter(|_| len <= ABS_PATH_MAX).map(Path::as_str);
        let name = name.filter(|name| !name.contains('/')).ok_or(body.error("no name"))?;
        let near = [Some(parent.node.acl()), last];
        let node = take_rest(body, name, near, &mut self.before, limit)?;
        for _ in 0..up {
            self.close(body)?;
        }
        self.created.push(node.created());
        self.push(node, len);
        Ok(())
    }
}

/// Takes what follows the name of a node. `before` is when the one before was created.
fn take_rest(
    body: &mut Cursor<'_>,
    name: &str,
    [parent, last]: [Option<&Acl>; 2],
    before: &mut u64,
    limit: u64,
) -> Result<Node, StreamError> {
    let none = body.error("permissions of no node");
    let acl = match body.varint()? {
        list::OF_PARENT => parent.ok_or(none)?.clone(),
        list::OF_LAST => last.ok_or(none)?.clone(),
        count => {
            let count = u16::try_from(count - list::NEW);
            take_perms(body, count.unwrap_or(u16::MAX), [parent, last])?
        }
    };
    let value = take_bytes(body)?;
    if value.len() > PAYLOAD_MAX {
        return Err(body.error("a value that no message has room for"));
    }
    let created = before.wrapping_add(unzigzag(body.varint()?));
    let listed = created.checked_add(body.varint()?).filter(|listed| *listed <= limit);
    let listed = listed.ok_or(body.error("a node from the future"))?;
    *before = created;
    let mut node = Node::new(name, created, acl, value);
    node.set_listed(listed);
    Ok(node)
}
