//! The children of a node: found by name, listed in order of creation, cheap to snapshot.

use alloc::vec::Vec;
use core::cmp::Ordering;

use triomphe::Arc;

use crate::tree::node::Node;

/// Most nodes that a chunk should hold in a list of so many: about as many as there are chunks, and
/// not very few. A change copies one chunk and the list of chunks at the most, so that writing below
/// a node with many children stays cheap while a snapshot is open.
pub(crate) fn chunk_max(count: usize) -> usize {
    count.isqrt() | 31
}

/// A child, with the first bytes of its name: looking for a name need not go to each node on the way.
#[derive(Clone, Debug)]
struct Entry {
    key: Key,
    node: Arc<Node>,
}

/// Sorted by name, with room for few more than there are.
type Chunk = Vec<Entry>;

/// A child here, and the one with its name there.
pub(crate) type Pair<'a> = (Option<&'a Arc<Node>>, Option<&'a Arc<Node>>);

/// The children of a node that has or has had some.
#[derive(Clone, Debug)]
pub(crate) struct Children {
    /// See [`Node::listed`].
    pub(crate) listed: u64,
    count: usize,
    /// Bytes of all names, each with its NUL.
    names_len: usize,
    list: List,
}

#[derive(Clone, Debug)]
enum List {
    Few(Chunk),
    /// Sorted, none of them empty.
    Many(Vec<Part>),
}

/// A chunk, shared between snapshots until one changes, and the key of its first entry.
#[derive(Clone, Debug)]
struct Part {
    first: Key,
    chunk: Arc<Chunk>,
}

/// The first eight bytes of a name, zeroes if it is shorter: keys are in the order of names, which
/// have no zeroes, and equal keys of which one has a zero are those of equal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    fn of(name: &[u8]) -> Key {
        let bytes = match name.first_chunk() {
            Some(bytes) => *bytes,
            None => {
                let mut bytes = [0; 8];
                bytes[..name.len()].copy_from_slice(name);
                bytes
            }
        };
        Key(u64::from_be_bytes(bytes))
    }

    /// How the name of a node, which has the key `of`, compares with the one that has this key.
    fn order(self, name: &[u8], of: Key, node: &Node) -> Ordering {
        match of.cmp(&self) {
            Ordering::Equal if name.len() >= 8 => node.name_bytes().cmp(name),
            order => order,
        }
    }
}

impl Entry {
    fn new(node: Arc<Node>) -> Entry {
        Entry { key: Key::of(node.name_bytes()), node }
    }

    /// By name.
    fn order(&self, other: &Entry) -> Ordering {
        let names = || self.node.name_bytes().cmp(other.node.name_bytes());
        self.key.cmp(&other.key).then_with(names)
    }
}

/// Nodes that wait for the list that they will be in: those of the list that is next to be made are
/// the last.
#[derive(Debug, Default)]
pub(crate) struct Gathered(Vec<Entry>);

impl Gathered {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn push(&mut self, node: Arc<Node>) {
        self.0.push(Entry::new(node));
    }
}

impl Part {
    fn new(chunk: Chunk) -> Part {
        Part { first: chunk[0].key, chunk: Arc::new(chunk) }
    }

    /// Changes the chunk, which may become empty.
    fn change<T>(&mut self, change: impl FnOnce(&mut Chunk) -> T) -> T {
        let chunk = Arc::make_mut(&mut self.chunk);
        let result = change(chunk);
        self.first = chunk.first().map_or(self.first, |entry| entry.key);
        result
    }
}

/// Place of a name in a chunk, or where it would be inserted.
fn place(chunk: &Chunk, name: &[u8]) -> Result<usize, usize> {
    let key = Key::of(name);
    chunk.binary_search_by(|entry| key.order(name, entry.key, &entry.node))
}

/// The chunk in which `name` is or would be.
fn chunk_of(parts: &[Part], name: &[u8]) -> usize {
    let key = Key::of(name);
    let not_after =
        |part: &Part| key.order(name, part.first, &part.chunk[0].node) != Ordering::Greater;
    parts.partition_point(not_after).saturating_sub(1)
}

/// The capacity for so many nodes: with the allocator's own word it fills whole blocks.
fn capacity(len: usize) -> usize {
    len | 3
}

/// Inserts into a chunk that is not full.
fn put(chunk: &mut Chunk, place: usize, node: Arc<Node>) {
    let len = chunk.len();
    chunk.reserve_exact(capacity(len + 1) - len);
    chunk.insert(place, Entry::new(node));
}

/// Inserts into a chunk. If it has `max` nodes already, splits it and returns the upper part.
fn insert(chunk: &mut Chunk, max: usize, place: usize, node: Arc<Node>) -> Option<Chunk> {
    let len = chunk.len();
    if len < max {
        put(chunk, place, node);
        return None;
    }
    // Names often arrive in order: then full chunks stay full.
    let cut = if place == len { len } else { len / 2 };
    let mut upper = Chunk::with_capacity(capacity(len - cut));
    upper.extend(chunk.drain(cut..));
    shrink(chunk);
    match place.checked_sub(cut) {
        None | Some(0) if cut < len => put(chunk, place, node),
        above => put(&mut upper, above.unwrap_or_default(), node),
    }
    Some(upper)
}

/// Removes from a chunk.
fn take(chunk: &mut Chunk, place: usize) -> Arc<Node> {
    let node = chunk.remove(place).node;
    shrink(chunk);
    node
}

/// Frees unused capacity.
fn shrink(chunk: &mut Chunk) {
    if chunk.is_empty() {
        *chunk = Chunk::new();
    } else if chunk.capacity() > capacity(chunk.len()) + 4 {
        chunk.shrink_to(capacity(chunk.len()));
    }
}

impl Children {
    /// None at all.
    pub(crate) const fn new(listed: u64) -> Children {
        Children { listed, count: 0, names_len: 0, list: List::Few(Vec::new()) }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Bytes of the list of names as DIRECTORY sends it.
    pub(crate) fn names_len(&self) -> usize {
        self.names_len
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Node>> {
        let name = name.as_bytes();
        let chunk = match &self.list {
            List::Few(chunk) => chunk,
            List::Many(parts) => &*parts[chunk_of(parts, name)].chunk,
        };
        place(chunk, name).ok().map(|place| &chunk[place].node)
    }

    /// The child, to be changed: what is shared with a snapshot is copied on the way. The name must
    /// stay as it is.
    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut Node> {
        let name = name.as_bytes();
        let (chunk, place) = match &mut self.list {
            List::Few(chunk) => {
                let place = place(chunk, name).ok()?;
                (chunk, place)
            }
            List::Many(parts) => {
                let at = chunk_of(parts, name);
                let place = place(&parts[at].chunk, name).ok()?;
                (Arc::make_mut(&mut parts[at].chunk), place)
            }
        };
        Some(Arc::make_mut(&mut chunk[place].node))
    }

    /// Adds a child that is not there yet.
    pub(crate) fn insert(&mut self, node: Arc<Node>) {
        self.count += 1;
        let max = chunk_max(self.count);
        self.names_len += node.name_bytes().len() + 1;
        let free =
            |chunk: &Chunk| place(chunk, node.name_bytes()).expect_err("a child is inserted once");
        match &mut self.list {
            List::Few(chunk) => {
                let place = free(chunk);
                if let Some(upper) = insert(chunk, max, place, node) {
                    let lower = core::mem::take(chunk);
                    self.list = List::Many(alloc::vec![Part::new(lower), Part::new(upper)]);
                }
            }
            List::Many(parts) => {
                let at = chunk_of(parts, node.name_bytes());
                let place = free(&parts[at].chunk);
                if let Some(upper) = parts[at].change(|chunk| insert(chunk, max, place, node)) {
                    parts.insert(at + 1, Part::new(upper));
                }
            }
        }
    }

    /// Adds those that have been gathered from `from` on, in any order; false if two of them have the
    /// same name, or one that is there already. Then some are missing.
    pub(crate) fn extend(&mut self, gathered: &mut Gathered, from: usize) -> bool {
        if self.count > 0 {
            return gathered.0.drain(from..).all(|Entry { node, .. }| {
                let is_new = self.get(node.name()).is_none();
                is_new.then(|| self.insert(node)).is_some()
            });
        }
        let entries = &mut gathered.0[from..];
        entries.sort_unstable_by(Entry::order);
        if entries.windows(2).any(|pair| pair[0].order(&pair[1]).is_eq()) {
            return false;
        }
        self.count = entries.len();
        self.names_len = entries.iter().map(|entry| entry.node.name_bytes().len() + 1).sum();
        let max = chunk_max(entries.len());
        let many = entries.len() > max;
        let mut entries = gathered.0.drain(from..);
        let mut chunks = core::iter::from_fn(|| {
            let mut chunk = Chunk::with_capacity(capacity(entries.len().min(max)));
            chunk.extend(entries.by_ref().take(max));
            (!chunk.is_empty()).then_some(chunk)
        });
        self.list = match many {
            false => List::Few(chunks.next().unwrap_or_default()),
            true => List::Many(chunks.map(Part::new).collect()),
        };
        true
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<Node>> {
        let name = name.as_bytes();
        let node = match &mut self.list {
            List::Few(chunk) => {
                let place = place(chunk, name).ok()?;
                take(chunk, place)
            }
            List::Many(parts) => {
                let at = chunk_of(parts, name);
                let place = place(&parts[at].chunk, name).ok()?;
                let node = parts[at].change(|chunk| take(chunk, place));
                join(parts, at, chunk_max(self.count));
                if let [_] = parts[..] {
                    let last = parts.remove(0);
                    self.list = List::Few(Arc::unwrap_or_clone(last.chunk));
                }
                node
            }
        };
        self.count -= 1;
        self.names_len -= node.name_bytes().len() + 1;
        Some(node)
    }

    /// Appends the nodes that only this list contains.
    pub(crate) fn dismantle(self, unused: &mut Vec<Arc<Node>>) {
        let nodes = |chunk: Chunk| chunk.into_iter().map(|entry| entry.node);
        match self.list {
            List::Few(chunk) => unused.extend(nodes(chunk)),
            List::Many(parts) => {
                for chunk in parts.into_iter().filter_map(|part| Arc::try_unwrap(part.chunk).ok()) {
                    unused.extend(nodes(chunk));
                }
            }
        }
    }

    /// By name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.chunks().flatten().map(|entry| &entry.node)
    }

    /// By name, in the chunks in which they are kept.
    fn chunks(&self) -> impl Iterator<Item = &[Entry]> {
        let (few, many) = match &self.list {
            List::Few(chunk) => (chunk.as_slice(), &[][..]),
            List::Many(parts) => (&[][..], parts.as_slice()),
        };
        let few = (!few.is_empty()).then_some(few);
        few.into_iter().chain(many.iter().map(|part| part.chunk.as_slice()))
    }

    /// Children that are not one and the same node here and there, by name; those that are only on
    /// one side have nothing on the other. Chunks that are shared are passed over.
    pub(crate) fn differing<'a>(&'a self, other: &'a Children) -> Vec<Pair<'a>> {
        let mut found = Vec::new();
        let (mut rest, mut others) = (self.chunks(), other.chunks());
        let (mut a, mut b): (&[Entry], &[Entry]) = (&[], &[]);
        loop {
            // Of a shared chunk both are at the same place, and what is left of it is the same.
            if core::ptr::eq(a, b) {
                (a, b) = (&[], &[]);
            }
            if a.is_empty() {
                a = rest.next().unwrap_or_default();
            }
            if b.is_empty() {
                b = others.next().unwrap_or_default();
            }
            let order = match (a.first(), b.first()) {
                (None, None) => return found,
                (Some(x), Some(y)) => x.order(y),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
            };
            let first = |rest: &mut &'a [Entry]| rest.split_off_first().map(|entry| &entry.node);
            let x = if order.is_le() { first(&mut a) } else { None };
            let y = if order.is_ge() { first(&mut b) } else { None };
            if !matches!((x, y), (Some(x), Some(y)) if Arc::ptr_eq(x, y)) {
                found.push((x, y));
            }
        }
    }

    /// In order of creation, which is what DIRECTORY shows.
    pub(crate) fn by_creation(&self) -> Vec<&Arc<Node>> {
        let mut nodes: Vec<(u64, &Arc<Node>)> =
            self.iter().map(|node| (node.created(), node)).collect();
        nodes.sort_unstable_by_key(|(created, _)| *created);
        nodes.into_iter().map(|(_, node)| node).collect()
    }
}

/// Joins a chunk that has lost a node with one beside it if they are small, so that any two side by
/// side are half full together, and with any other if it is empty.
fn join(parts: &mut Vec<Part>, changed: usize, max: usize) {
    let first = changed.saturating_sub(1);
    let small = |at: &usize| {
        let (lower, upper) = (parts[*at].chunk.len(), parts[at + 1].chunk.len());
        lower == 0 || upper == 0 || lower + upper <= max / 2
    };
    let Some(at) = (first..=changed).filter(|at| at + 1 < parts.len()).find(small) else { return };
    let upper = Arc::unwrap_or_clone(parts.remove(at + 1).chunk);
    parts[at].change(|lower| {
        lower.reserve_exact(capacity(lower.len() + upper.len()) - lower.len());
        lower.extend(upper);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::acl::Acl;
    use alloc::collections::BTreeMap;
    use alloc::format;
    use alloc::string::String;
    use xenstore_protocol::DomId;

    fn node(name: &str, created: u64) -> Arc<Node> {
        Arc::new(Node::new(name, created, Acl::private(DomId(0)), b""))
    }

    /// Chunks are neither empty nor too large, keep little room, and are not small side by side.
    fn check(children: &Children) {
        let chunks: Vec<&Chunk> = match &children.list {
            List::Few(chunk) => alloc::vec![chunk],
            List::Many(parts) => {
                assert!(parts.iter().all(|part| part.first == part.chunk[0].key));
                parts.iter().map(|part| &*part.chunk).collect()
            }
        };
        for chunk in &chunks {
            assert!(
                chunk.len() <= chunk_max(2000) && chunk.capacity() <= capacity(chunk.len()) + 4
            );
            assert!(chunks.len() == 1 || !chunk.is_empty());
        }
        let nodes: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        assert!(chunks.len() <= 1 + nodes * 4 / chunk_max(0), "{} for {nodes}", chunks.len());
    }

    // Fails if a list keeps chunks or room for children that have been removed.
    #[test]
    fn what_is_removed_leaves_no_room_behind() {
        let mut children = Children::new(0);
        (0..2000).for_each(|i| children.insert(node(&format!("n{i}"), i)));
        // All but each 20th, which are in all the chunks, and then those.
        for i in (0..2000).filter(|i| i % 20 > 0).chain((0..2000).step_by(20)) {
            children.remove(&format!("n{i}")).unwrap();
            check(&children);
        }
        assert_eq!((children.len(), children.names_len()), (0, 0));
        assert!(matches!(&children.list, List::Few(chunk) if chunk.capacity() == 0));
    }

    // Fails if any sequence of insertions and removals differs from a plain map, or if a snapshot
    // taken in between sees later changes.
    #[test]
    fn behaves_like_a_map_and_snapshots_do_not_change() {
        let mut children = Children::new(0);
        let mut model = BTreeMap::new();
        let mut random = 12345_u32;
        let mut snapshots = Vec::new();
        for step in 0..5000_u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let number = (random >> 16) % 700;
            // Of names of seven, eight and nine bytes a key has all, just all, and not all.
            let name = format!(
                "{}{number}",
                ["n", "name-", "with-a-long-beginning-"][number as usize % 3]
            );
            if model.remove(&name).is_some() {
                assert_eq!(*children.remove(&name).unwrap().name(), *name);
            } else {
                assert!(children.get(&name).is_none() && children.remove(&name).is_none());
                children.insert(node(&name, step.into()));
                model.insert(name, step);
            }
            if step % 50 == 0 {
                check(&children);
            }
            if step % 500 == 0 {
                snapshots.push((children.clone(), model.clone()));
            }
        }
        snapshots.push((children, model));
        for (children, model) in snapshots {
            let names: Vec<&str> = children.iter().map(|n| n.name()).collect();
            assert_eq!(names, model.keys().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(children.len(), model.len());
            assert_eq!(children.names_len(), names.iter().map(|n| n.len() + 1).sum::<usize>());
            let created: Vec<u64> = children.by_creation().iter().map(|n| n.created()).collect();
            let mut expected: Vec<u64> = model.values().map(|s| u64::from(*s)).collect();
            expected.sort_unstable();
            assert_eq!(created, expected);
        }
    }
}
