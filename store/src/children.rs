//! The children of a node: found by name, listed in order of creation, cheap to snapshot.

use alloc::vec::Vec;
use core::cmp::Ordering;

use triomphe::Arc;

use crate::node::Node;

/// Most nodes that one chunk holds: what fills a block of 512 bytes of the usual allocators. A
/// change copies one chunk and the list of chunks at the most, so that writing below a node with
/// many children stays cheap while a snapshot is open.
const CHUNK_MAX: usize = 63;

/// Nodes sorted by name, with room for few more than there are.
type Chunk = Vec<Arc<Node>>;

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
    /// Sorted, none of them empty, shared between snapshots until one changes.
    Many(Vec<Arc<Chunk>>),
}

/// Place of a name in a chunk, or where it would be inserted.
fn place(chunk: &Chunk, name: &[u8]) -> Result<usize, usize> {
    chunk.binary_search_by(|node| node.name_bytes().cmp(name))
}

/// The chunk in which `name` is or would be.
fn chunk_of(chunks: &[Arc<Chunk>], name: &[u8]) -> usize {
    chunks.partition_point(|chunk| chunk[0].name_bytes() <= name).saturating_sub(1)
}

/// The capacity for so many nodes: with the allocator's own word it fills whole blocks.
fn capacity(len: usize) -> usize {
    len | 3
}

/// The first bytes of a name, in the order of names: none has a NUL in it.
fn beginning(name: &[u8]) -> u64 {
    let mut beginning = [0; 8];
    let len = name.len().min(8);
    beginning[..len].copy_from_slice(&name[..len]);
    u64::from_be_bytes(beginning)
}

/// Inserts into a chunk that is not full.
fn put(chunk: &mut Chunk, place: usize, node: Arc<Node>) {
    let len = chunk.len();
    chunk.reserve_exact(capacity(len + 1) - len);
    chunk.insert(place, node);
}

/// Inserts into a chunk; if it is full, gives back its upper part, which becomes one of its own.
fn insert(chunk: &mut Chunk, place: usize, node: Arc<Node>) -> Option<Chunk> {
    if chunk.len() < CHUNK_MAX {
        put(chunk, place, node);
        return None;
    }
    // Names often arrive in order: then full chunks stay full.
    let cut = if place == CHUNK_MAX { CHUNK_MAX } else { CHUNK_MAX / 2 };
    let mut upper = Chunk::with_capacity(capacity(CHUNK_MAX - cut));
    upper.extend(chunk.drain(cut..));
    shrink(chunk);
    match place.checked_sub(cut) {
        None | Some(0) if cut < CHUNK_MAX => put(chunk, place, node),
        above => put(&mut upper, above.unwrap_or_default(), node),
    }
    Some(upper)
}

/// Gives back room that is no longer needed.
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
            List::Many(chunks) => &*chunks[chunk_of(chunks, name)],
        };
        place(chunk, name).ok().map(|place| &chunk[place])
    }

    /// Does a change at this name copy a chunk, because a snapshot has it as well?
    pub(crate) fn is_shared_at(&self, name: &str) -> bool {
        match &self.list {
            List::Few(_) => false,
            List::Many(chunks) => !chunks[chunk_of(chunks, name.as_bytes())].is_unique(),
        }
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
            List::Many(chunks) => {
                let at = chunk_of(chunks, name);
                let place = place(&chunks[at], name).ok()?;
                (Arc::make_mut(&mut chunks[at]), place)
            }
        };
        Some(Arc::make_mut(&mut chunk[place]))
    }

    /// Adds a child that is not there yet.
    pub(crate) fn insert(&mut self, node: Arc<Node>) {
        self.count += 1;
        self.names_len += node.name_bytes().len() + 1;
        let free =
            |chunk: &Chunk| place(chunk, node.name_bytes()).expect_err("a child is inserted once");
        match &mut self.list {
            List::Few(chunk) => {
                let place = free(chunk);
                if let Some(upper) = insert(chunk, place, node) {
                    let lower = core::mem::take(chunk);
                    self.list = List::Many(alloc::vec![Arc::new(lower), Arc::new(upper)]);
                }
            }
            List::Many(chunks) => {
                let at = chunk_of(chunks, node.name_bytes());
                let place = free(&chunks[at]);
                if let Some(upper) = insert(Arc::make_mut(&mut chunks[at]), place, node) {
                    chunks.insert(at + 1, Arc::new(upper));
                }
            }
        }
    }

    /// Adds many children, in any order; false if two of them have the same name, or one that is
    /// there already. Then some are missing.
    pub(crate) fn extend(&mut self, nodes: Vec<Arc<Node>>) -> bool {
        if self.count > 0 {
            return nodes.into_iter().all(|node| {
                let is_new = self.get(node.name()).is_none();
                is_new.then(|| self.insert(node)).is_some()
            });
        }
        // Most names differ in what is at hand without a look at the node.
        let mut sorted: Vec<(u64, Arc<Node>)> =
            nodes.into_iter().map(|node| (beginning(node.name_bytes()), node)).collect();
        sorted.sort_unstable_by(|(a, x), (b, y)| {
            a.cmp(b).then_with(|| x.name_bytes().cmp(y.name_bytes()))
        });
        let same = |pair: &[(u64, Arc<Node>)]| {
            pair[0].0 == pair[1].0 && pair[0].1.name_bytes() == pair[1].1.name_bytes()
        };
        if sorted.windows(2).any(same) {
            return false;
        }
        self.count = sorted.len();
        self.names_len = sorted.iter().map(|(_, node)| node.name_bytes().len() + 1).sum();
        let mut sorted = sorted.into_iter().map(|(_, node)| node);
        let mut chunk = |len: usize| {
            let mut chunk = Chunk::with_capacity(capacity(len));
            chunk.extend(sorted.by_ref().take(len));
            chunk
        };
        self.list = match self.count {
            ..=CHUNK_MAX => List::Few(chunk(self.count)),
            _ => {
                let starts = (0..self.count).step_by(CHUNK_MAX);
                let len = |start| CHUNK_MAX.min(self.count - start);
                List::Many(starts.map(|start| Arc::new(chunk(len(start)))).collect())
            }
        };
        true
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<Node>> {
        let name = name.as_bytes();
        let node = match &mut self.list {
            List::Few(chunk) => {
                let place = place(chunk, name).ok()?;
                let node = chunk.remove(place);
                shrink(chunk);
                node
            }
            List::Many(chunks) => {
                let at = chunk_of(chunks, name);
                let place = place(&chunks[at], name).ok()?;
                let chunk = Arc::make_mut(&mut chunks[at]);
                let node = chunk.remove(place);
                shrink(chunk);
                join(chunks, at);
                if let [_] = chunks[..] {
                    let last = chunks.remove(0);
                    self.list = List::Few(Arc::unwrap_or_clone(last));
                }
                node
            }
        };
        self.count -= 1;
        self.names_len -= node.name_bytes().len() + 1;
        Some(node)
    }

    /// By name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Node>> {
        let (few, many) = match &self.list {
            List::Few(chunk) => (chunk.as_slice(), &[][..]),
            List::Many(chunks) => (&[][..], chunks.as_slice()),
        };
        few.iter().chain(many.iter().flat_map(|chunk| chunk.iter()))
    }

    /// Nodes by name, in the chunks in which they are kept.
    fn chunks(&self) -> impl Iterator<Item = &[Arc<Node>]> {
        let (few, many) = match &self.list {
            List::Few(chunk) => (chunk.as_slice(), &[][..]),
            List::Many(chunks) => (&[][..], chunks.as_slice()),
        };
        let few = (!few.is_empty()).then_some(few);
        few.into_iter().chain(many.iter().map(|chunk| chunk.as_slice()))
    }

    /// Children that are not one and the same node here and there, by name; those that are only on
    /// one side have nothing on the other. Chunks that are shared are passed over.
    pub(crate) fn differing<'a>(&'a self, other: &'a Children) -> Vec<Pair<'a>> {
        let mut found = Vec::new();
        let (mut rest, mut others) = (self.chunks(), other.chunks());
        let (mut a, mut b): (&[_], &[_]) = (&[], &[]);
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
                (Some(x), Some(y)) => x.name_bytes().cmp(y.name_bytes()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
            };
            let x = if order.is_le() { a.split_off_first() } else { None };
            let y = if order.is_ge() { b.split_off_first() } else { None };
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
fn join(chunks: &mut Vec<Arc<Chunk>>, changed: usize) {
    let first = changed.saturating_sub(1);
    let small = |at: &usize| {
        let (lower, upper) = (chunks[*at].len(), chunks[at + 1].len());
        lower == 0 || upper == 0 || lower + upper <= CHUNK_MAX / 2
    };
    let Some(at) = (first..=changed).filter(|at| at + 1 < chunks.len()).find(small) else { return };
    let upper = Arc::unwrap_or_clone(chunks.remove(at + 1));
    let lower = Arc::make_mut(&mut chunks[at]);
    lower.reserve_exact(capacity(lower.len() + upper.len()) - lower.len());
    lower.extend(upper);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Acl;
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
            List::Many(chunks) => chunks.iter().map(|chunk| &**chunk).collect(),
        };
        for chunk in &chunks {
            assert!(chunk.len() <= CHUNK_MAX && chunk.capacity() <= capacity(chunk.len()) + 4);
            assert!(chunks.len() == 1 || !chunk.is_empty());
        }
        let nodes: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        assert!(chunks.len() <= 1 + nodes * 4 / CHUNK_MAX, "{} for {nodes}", chunks.len());
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
            let name = format!("n{}", (random >> 16) % 700);
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
