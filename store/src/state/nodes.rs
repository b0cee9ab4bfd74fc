//! The tree in a stream: a record for each node, parents first, siblings in order of creation.

use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::stream::{Cursor, StreamError, Writer, kind};
use xenstore_protocol::{ABS_PATH_MAX, Access, DomId, PAYLOAD_MAX, Path, Perm};

use crate::access::{Acl, AclEntry};
use crate::node::Node;
use crate::tree::{Tree, components};

/// Most entries of a permission list: as many as a message has room for.
const PERMS_MAX: usize = PAYLOAD_MAX / 3;

/// Bytes of a permission entry.
const PERM_LEN: usize = 4;

/// Permission entries as NODE_DATA has them.
pub(super) fn put_perms(writer: &mut Writer, acl: &Acl) {
    for entry in acl.entries() {
        let [low, high] = entry.perm.domid.0.to_le_bytes();
        writer.bytes(&[entry.perm.access.letter(), entry.ignored.into(), low, high]);
    }
}

/// Reads `count` permission entries. Lists that nodes inherit are shared: it gives back the one of
/// `candidates` that is the same.
pub(super) fn take_perms(
    body: &mut Cursor<'_>,
    count: u16,
    candidates: [Option<&Acl>; 2],
) -> Result<Acl, StreamError> {
    if count == 0 {
        return Err(body.error("a node without permissions"));
    }
    if usize::from(count) > PERMS_MAX {
        return Err(body.error("more permissions than a message can have"));
    }
    let mut few = [None; 4];
    let mut many = Vec::new();
    for at in 0..usize::from(count) {
        let access = Access::parse(body.u8()?).ok_or(body.error("no permission letter"))?;
        let ignored = body.u8()? & 1 != 0;
        let entry = AclEntry { perm: Perm { access, domid: DomId(body.u16()?) }, ignored };
        match few.get_mut(at) {
            Some(place) if usize::from(count) <= 4 => *place = Some(entry),
            _ => many.push(entry),
        }
    }
    let is = |acl: &Acl| {
        let entries = acl.entries();
        entries.len() == usize::from(count)
            && if many.is_empty() {
                entries.iter().zip(&few).all(|(a, b)| Some(*a) == *b)
            } else {
                *entries == *many
            }
    };
    if let Some(acl) = candidates.into_iter().flatten().find(|acl| is(acl)) {
        return Ok(acl.clone());
    }
    many.extend(few.into_iter().flatten());
    Acl::from_entries(many).ok_or(body.error("a node without permissions"))
}

/// Calls `visit` with every node of the tree and its path: parents first, siblings in order of
/// creation, then the special nodes.
pub(super) fn walk<'t>(tree: &'t Tree, mut visit: impl FnMut(&[u8], &'t Node)) {
    visit(b"/", tree.root());
    let mut path = Vec::new();
    let mut stack: Vec<(usize, Vec<&'t Arc<Node>>)> = Vec::new();
    let children = |node: &'t Node| {
        let mut children = node.children().by_creation();
        children.reverse();
        children
    };
    stack.push((0, children(tree.root())));
    while let Some((len, nodes)) = stack.last_mut() {
        path.truncate(*len);
        let Some(node) = nodes.pop() else {
            stack.pop();
            continue;
        };
        path.push(b'/');
        path.extend_from_slice(node.name_bytes());
        visit(&path, node);
        if node.children().len() > 0 {
            stack.push((path.len(), children(node)));
        }
    }
    for node in tree.special() {
        visit(node.name_bytes(), node);
    }
}

/// Writes a record for each node. Unless it is for somebody else, the stamps of the node come behind
/// its value, where others see padding.
pub(super) fn put_nodes(writer: &mut Writer, tree: &Tree, stamps: bool) {
    let mut before = 0;
    walk(tree, |path, node| {
        writer.begin(kind::NODE_DATA);
        writer.u64(0); // committed: no connection, no transaction
        writer.len16(path.len() + 1);
        writer.len16(node.value().len());
        writer.u16(0);
        writer.len16(node.acl().entries().len());
        put_perms(writer, node.acl());
        writer.c_string(path);
        writer.bytes(node.value());
        if stamps {
            writer.varint(zigzag(node.created().wrapping_sub(before)));
            writer.varint(node.listed().wrapping_sub(node.created()));
            before = node.created();
        }
    });
}

/// Small differences in either direction become small numbers.
fn zigzag(difference: u64) -> u64 {
    (difference << 1) ^ (difference.cast_signed() >> 63).cast_unsigned()
}

fn unzigzag(number: u64) -> u64 {
    (number >> 1) ^ 0_u64.wrapping_sub(number & 1)
}

/// A node that may still get children. Nobody else has it yet.
struct Open<'s> {
    node: Arc<Node>,
    /// Its permission entries as they were written, if they were.
    perms: &'s [u8],
    /// Bytes of its path.
    len: usize,
    /// Those that it has got.
    children: Vec<Arc<Node>>,
    /// The stamp of the last of them.
    youngest: u64,
}

impl<'s> Open<'s> {
    fn new(node: Node, perms: &'s [u8], len: usize) -> Open<'s> {
        Open { node: Arc::new(node), perms, len, children: Vec::new(), youngest: 0 }
    }

    /// Gives the node its children; false if two have the same name.
    fn settle(&mut self) -> bool {
        let children = core::mem::take(&mut self.children);
        children.is_empty() || Arc::make_mut(&mut self.node).children_mut().extend(children)
    }
}

/// A tree that grows from the records of a stream.
pub(super) struct Grower<'s> {
    /// Nodes come with their stamps, none of which may be larger than this; otherwise they are
    /// numbered.
    limit: Option<u64>,
    before: u64,
    /// Path of the last node.
    path: Vec<u8>,
    /// The nodes on it, which may still get children.
    open: Vec<Open<'s>>,
    /// Stamps of all nodes but the special ones.
    created: Vec<u64>,
    special: Vec<Node>,
}

impl<'s> Grower<'s> {
    pub(super) fn new(limit: Option<u64>) -> Grower<'s> {
        let (open, created, special) = (Vec::new(), Vec::new(), Vec::new());
        Grower { limit, before: 0, path: Vec::new(), open, created, special }
    }

    /// `created` and `listed` of a node, of which everything else has been read.
    fn stamps(&mut self, body: &mut Cursor<'_>) -> Result<(u64, u64), StreamError> {
        let Some(limit) = self.limit else {
            self.before += 1;
            return Ok((self.before, self.before));
        };
        let created = self.before.wrapping_add(unzigzag(body.varint()?));
        let listed = created.checked_add(body.varint()?);
        let listed = listed.filter(|listed| *listed <= limit && created <= *listed);
        self.before = created;
        Ok((created, listed.ok_or(body.error("a node from the future"))?))
    }

    /// Takes a NODE_DATA record; false if it belongs to a transaction and was left out.
    pub(super) fn take_record(&mut self, body: &mut Cursor<'s>) -> Result<bool, StreamError> {
        let committed = body.u32()? == 0;
        body.u32()?;
        let (path, value, _access) = (body.u16()?, body.u16()?, body.u16()?);
        if !committed {
            return Ok(false);
        }
        let count = body.u16()?;
        let perms = body.clone().take(usize::from(count) * PERM_LEN)?;
        let near = self.open.iter().rev().take(2);
        let acl = match near.clone().find(|open| open.perms == perms && count > 0) {
            Some(open) => {
                body.take(perms.len())?;
                open.node.acl().clone()
            }
            None => {
                let mut near = near.map(|open| open.node.acl());
                take_perms(body, count, [near.next(), near.next()])?
            }
        };
        let path = body.string(path.into())?;
        let value = body.take(value.into())?;
        self.add(path, (acl, perms), value, body)?;
        Ok(true)
    }

    /// Adds a node, with its permission entries as they were written, if they were. `rest` is what
    /// comes behind the value.
    pub(super) fn add(
        &mut self,
        path: &[u8],
        (acl, perms): (Acl, &'s [u8]),
        value: &[u8],
        rest: &mut Cursor<'_>,
    ) -> Result<(), StreamError> {
        let (created, listed) = self.stamps(rest)?;
        let place = &*rest;
        let wrong = |reason| Err(place.error(reason));
        if value.len() > PAYLOAD_MAX {
            return wrong("a value that no message has room for");
        }
        let new = |name: &str| {
            let mut node = Node::new(name, created, acl, value);
            node.set_listed(listed);
            node
        };
        if path.starts_with(b"@") {
            let name = core::str::from_utf8(path).ok().filter(|name| Tree::is_special(name));
            let Some(name) = name else { return wrong("a special node with a name that is none") };
            if self.special.iter().any(|node| node.name() == name) {
                return wrong("a node that is there twice");
            }
            self.special.push(new(name));
            return Ok(());
        }
        self.created.push(created);
        if path == b"/" {
            if !self.open.is_empty() {
                return wrong("a node that is there twice");
            }
            self.open.push(Open::new(new(""), perms, 0));
            self.path.clear();
            return Ok(());
        }
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let slash = slash.filter(|_| path.starts_with(b"/") && path.len() <= ABS_PATH_MAX);
        let Some(slash) = slash else { return wrong("a node whose path is none") };
        // That what is above is a path is known when it is found.
        let (above, name) = (&path[..slash], Path::parse(&path[slash + 1..]));
        let Some(name) = name.map(Path::as_str) else { return wrong("a node whose path is none") };
        let below = |open: &[u8]| {
            above.strip_prefix(open).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        while let Some(open) = self.open.last()
            && !below(&self.path[..open.len])
        {
            self.close(place)?;
        }
        let Some(open) = self.open.last_mut() else { return wrong("no parent") };
        if open.len != above.len() {
            // Not in the order in which trees are written: then its parent is complete, or missing.
            return self.add_to_complete(above, new(name), place);
        }
        if self.limit.is_some() && created <= open.youngest {
            return wrong("siblings are not in order of creation");
        }
        open.youngest = created;
        let len = open.len;
        self.path.truncate(len);
        self.path.extend_from_slice(&path[len..]);
        self.open.push(Open::new(new(name), perms, path.len()));
        Ok(())
    }

    /// The last open node gets no more children: hands it to the one above. The root stays.
    fn close(&mut self, place: &Cursor<'_>) -> Result<(), StreamError> {
        let Some(mut open) = self.open.pop() else { return Err(place.error("no root")) };
        let Some(above) = self.open.last_mut() else { return Err(place.error("no parent")) };
        if !open.settle() {
            return Err(place.error("a node that is there twice"));
        }
        above.children.push(open.node);
        self.path.truncate(above.len);
        Ok(())
    }

    fn add_to_complete(
        &mut self,
        above: &[u8],
        node: Node,
        place: &Cursor<'_>,
    ) -> Result<(), StreamError> {
        if self.limit.is_some() {
            return Err(place.error("no parent"));
        }
        while self.open.len() > 1 {
            self.close(place)?;
        }
        let root = self.open.first_mut().ok_or(place.error("no parent"))?;
        if !root.settle() {
            return Err(place.error("a node that is there twice"));
        }
        let mut parent = Arc::make_mut(&mut root.node);
        let above = core::str::from_utf8(above).map_err(|_| place.error("no parent"))?;
        for name in components(above) {
            parent = parent.child_mut(name).ok_or(place.error("no parent"))?;
        }
        if parent.children().get(node.name()).is_some() {
            return Err(place.error("a node that is there twice"));
        }
        parent.children_mut().insert(Arc::new(node));
        Ok(())
    }

    /// The tree, the stamps of its nodes, and the largest that was given.
    pub(super) fn finish(
        mut self,
        place: &Cursor<'_>,
    ) -> Result<(Tree, Vec<u64>, u64), StreamError> {
        while self.open.len() > 1 {
            self.close(place)?;
        }
        let mut root = self.open.pop().ok_or(place.error("no root"))?;
        if !root.settle() {
            return Err(place.error("a node that is there twice"));
        }
        Ok((Tree::from_parts(root.node, self.special), self.created, self.before))
    }
}
