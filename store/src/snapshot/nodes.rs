//! The tree in a stream of other daemons: a record for each node, parents first, siblings in order of
//! creation.

use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::stream::{Cursor, StreamError, Writer, kind};
use xenstore_protocol::{ABS_PATH_MAX, Access, DomId, PAYLOAD_MAX, Path, Perm};

use crate::tree::acl::{Acl, AclEntry, Era};
use crate::tree::children::Gathered;
use crate::tree::node::Node;
use crate::tree::{Tree, components};

/// Most entries of a permission list: as many as a message has room for.
const PERMS_MAX: usize = PAYLOAD_MAX / 3;

/// Bits of the second byte of an entry.
const IGNORED: u8 = 1;
/// Our own: the era of the domain follows.
const HAS_ERA: u8 = 2;

/// Permission entries as NODE_DATA has them, with eras.
pub(super) fn put_perms(writer: &mut Writer, acl: &Acl) {
    for entry in acl.entries() {
        put_perm(writer, entry, entry.era);
    }
}

fn put_perm(writer: &mut Writer, entry: &AclEntry, era: Era) {
    let [low, high] = entry.perm.domid.0.to_le_bytes();
    let ignored = if entry.ignored { IGNORED } else { 0 };
    let has_era = if era > 0 { HAS_ERA } else { 0 };
    writer.bytes(&[entry.perm.access.letter(), ignored | has_era, low, high]);
    if era > 0 {
        writer.u32(era);
    }
}

/// Reads `count` permission entries. Nodes share the lists that they inherit: returns the equal one of
/// `candidates`, if there is one.
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
        let flags = body.u8()?;
        let perm = Perm { access, domid: DomId(body.u16()?) };
        let era = if flags & HAS_ERA != 0 { body.u32()? } else { 0 };
        let entry = AclEntry { perm, ignored: flags & IGNORED != 0, era };
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

/// The children of a node, the youngest first.
pub(super) fn youngest_first(node: &Node) -> Vec<&Arc<Node>> {
    let mut children = node.children().by_creation();
    children.reverse();
    children
}

/// Calls `visit` with every node of the tree and its path: parents first, siblings in order of
/// creation, then the special nodes.
pub(super) fn walk<'t>(tree: &'t Tree, mut visit: impl FnMut(&[u8], &'t Node)) {
    visit(b"/", tree.root());
    let mut path = Vec::new();
    let mut stack: Vec<(usize, Vec<&'t Arc<Node>>)> = Vec::new();
    stack.push((0, youngest_first(tree.root())));
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
            stack.push((path.len(), youngest_first(node)));
        }
    }
    for node in tree.special() {
        visit(node.name_bytes(), node);
    }
}

/// Writes a record for each node, without entries that are stale.
pub(super) fn put_nodes(writer: &mut Writer, tree: &Tree, era_of: impl Fn(DomId) -> Era) {
    walk(tree, |path, node| {
        let acl = node.acl().without_stale(&era_of).unwrap_or_else(|| node.acl().clone());
        writer.begin(kind::NODE_DATA);
        writer.u64(0); // committed: no connection, no transaction
        writer.len16(path.len() + 1);
        writer.len16(node.value().len());
        writer.u16(0);
        writer.len16(acl.entries().len());
        acl.entries().iter().for_each(|entry| put_perm(writer, entry, 0));
        writer.c_string(path);
        writer.bytes(node.value());
    });
}

/// A node that may still get children, and is not shared yet.
pub(super) struct Open {
    pub(super) node: Arc<Node>,
    /// Bytes of its path, none for the root.
    pub(super) len: usize,
    /// Where those that it has got begin.
    from: usize,
}

/// A tree that grows from its nodes, parents first.
#[derive(Default)]
pub(super) struct Grower {
    /// The last node and those above it, which may still get children.
    pub(super) open: Vec<Open>,
    /// Children of those that get no more themselves.
    gathered: Gathered,
    /// Stamps of all nodes but the special ones.
    pub(super) created: Vec<u64>,
    special: Vec<Node>,
    /// The stamp that was given last.
    pub(super) before: u64,
    /// Path of the last node, if nodes come with their paths.
    path: Vec<u8>,
}

impl Grower {
    /// Takes a NODE_DATA record; false if it belongs to a transaction and was left out.
    pub(super) fn take_record(&mut self, body: &mut Cursor<'_>) -> Result<bool, StreamError> {
        let committed = body.u32()? == 0;
        body.u32()?;
        let (path, value, _access) = (body.u16()?, body.u16()?, body.u16()?);
        if !committed {
            return Ok(false);
        }
        let count = body.u16()?;
        let mut near = self.open.iter().rev().map(|open| open.node.acl());
        let acl = take_perms(body, count, [near.next(), near.next()])?;
        let path = body.string(path.into())?;
        let value = body.take(value.into())?;
        self.add(path, acl, value, body)?;
        Ok(true)
    }

    /// Adds a node, which gets the next number for its stamps.
    pub(super) fn add(
        &mut self,
        path: &[u8],
        acl: Acl,
        value: &[u8],
        place: &Cursor<'_>,
    ) -> Result<(), StreamError> {
        let wrong = |reason| Err(place.error(reason));
        if value.len() > PAYLOAD_MAX {
            return wrong("a value that no message has room for");
        }
        self.before += 1;
        let created = self.before;
        let new = |name: &str| Node::new(name, created, acl, value);
        if path.starts_with(b"@") {
            let name = core::str::from_utf8(path).unwrap_or_default();
            return self.add_special(new(name), place);
        }
        self.created.push(created);
        if path == b"/" {
            self.path.clear();
            return self.add_root(new(""), place);
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
        let Some(open) = self.open.last() else { return wrong("no parent") };
        if open.len != above.len() {
            // Not in the order in which trees are written: then its parent is complete, or missing.
            return self.add_to_complete(above, new(name), place);
        }
        let len = open.len;
        self.path.truncate(len);
        self.path.extend_from_slice(&path[len..]);
        self.push(new(name), path.len());
        Ok(())
    }

    /// Adds a node to the last one that is open; its path is so long.
    pub(super) fn push(&mut self, node: Node, len: usize) {
        self.open.push(Open { node: Arc::new(node), len, from: self.gathered.len() });
    }

    pub(super) fn add_root(&mut self, node: Node, place: &Cursor<'_>) -> Result<(), StreamError> {
        match self.open.is_empty() {
            true => self.push(node, 0),
            false => return Err(place.error("a node that is there twice")),
        }
        Ok(())
    }

    pub(super) fn add_special(
        &mut self,
        node: Node,
        place: &Cursor<'_>,
    ) -> Result<(), StreamError> {
        if !Tree::is_special(node.name()) {
            return Err(place.error("a special node with a name that is none"));
        }
        if self.special.iter().any(|other| other.name() == node.name()) {
            return Err(place.error("a node that is there twice"));
        }
        self.special.push(node);
        Ok(())
    }

    /// The last open node gets no more children: hands it to the one above. The root stays.
    pub(super) fn close(&mut self, place: &Cursor<'_>) -> Result<(), StreamError> {
        self.settle(place)?;
        let open = self.open.pop().ok_or(place.error("no root"))?;
        if self.open.is_empty() {
            return Err(place.error("no parent"));
        }
        self.gathered.push(open.node);
        Ok(())
    }

    /// Gives the last open node its children.
    fn settle(&mut self, place: &Cursor<'_>) -> Result<(), StreamError> {
        let open = self.open.last_mut().ok_or(place.error("no root"))?;
        if open.from < self.gathered.len() {
            let children = Arc::make_mut(&mut open.node).children_mut();
            if !children.extend(&mut self.gathered, open.from) {
                return Err(place.error("a node that is there twice"));
            }
        }
        Ok(())
    }

    /// Closes all but the root, which gets its children.
    fn settle_all(&mut self, place: &Cursor<'_>) -> Result<(), StreamError> {
        while self.open.len() > 1 {
            self.close(place)?;
        }
        self.settle(place)
    }

    fn add_to_complete(
        &mut self,
        above: &[u8],
        node: Node,
        place: &Cursor<'_>,
    ) -> Result<(), StreamError> {
        self.settle_all(place)?;
        let root = self.open.first_mut().ok_or(place.error("no parent"))?;
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

    /// The tree, the stamps of its nodes, and the one that was given last.
    pub(super) fn finish(
        mut self,
        place: &Cursor<'_>,
    ) -> Result<(Tree, Vec<u64>, u64), StreamError> {
        self.settle_all(place)?;
        let root = self.open.pop().ok_or(place.error("no root"))?;
        Ok((Tree::from_parts(root.node, self.special), self.created, self.before))
    }
}
