//! The children of a node: found by name, listed in order of creation, cheap to snapshot.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::node::Node;

/// Most children that one chunk holds. A change copies one chunk and the list of chunks at the
/// most, so that writing below a node with many children stays cheap while a snapshot is open.
const CHUNK_MAX: usize = 64;

/// Nodes sorted by name, in chunks that are shared between snapshots until one changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Children {
    chunks: Vec<Arc<Vec<Arc<Node>>>>,
    count: usize,
    /// Bytes of all names, each with its NUL.
    names_len: usize,
}

impl Children {
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Bytes of the list of names as DIRECTORY sends it.
    pub(crate) fn names_len(&self) -> usize {
        self.names_len
    }

    /// The chunk in which `name` is or would be.
    fn chunk_of(&self, name: &str) -> usize {
        self.chunks.partition_point(|chunk| chunk[0].name() <= name).saturating_sub(1)
    }

    /// Chunk, and place in it or where it would be inserted.
    fn find(&self, name: &str) -> (usize, Result<usize, usize>) {
        let at = self.chunk_of(name);
        let place = match self.chunks.get(at) {
            Some(chunk) => chunk.binary_search_by(|node| node.name().cmp(name)),
            None => Err(0),
        };
        (at, place)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Node>> {
        match self.find(name) {
            (at, Ok(place)) => Some(&self.chunks[at][place]),
            _ => None,
        }
    }

    /// The child, to be changed: what is shared with a snapshot is copied on the way. The name must
    /// stay as it is.
    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut Node> {
        match self.find(name) {
            (at, Ok(place)) => {
                let chunk = Arc::make_mut(&mut self.chunks[at]);
                Some(Arc::make_mut(&mut chunk[place]))
            }
            _ => None,
        }
    }

    /// Adds a child that is not there yet.
    pub(crate) fn insert(&mut self, node: Arc<Node>) {
        let (at, place) = self.find(node.name());
        let place = place.expect_err("a child is inserted once");
        self.count += 1;
        self.names_len += node.name().len() + 1;
        if self.chunks.is_empty() {
            self.chunks.push(Arc::new(alloc::vec![node]));
            return;
        }
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        chunk.insert(place, node);
        if chunk.len() > CHUNK_MAX {
            // Names often arrive in order: then full chunks stay full.
            let cut = if place == CHUNK_MAX { CHUNK_MAX } else { CHUNK_MAX / 2 };
            let upper = chunk.split_off(cut);
            self.chunks.insert(at + 1, Arc::new(upper));
        }
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<Arc<Node>> {
        let (at, Ok(place)) = self.find(name) else { return None };
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        let node = chunk.remove(place);
        if chunk.is_empty() {
            self.chunks.remove(at);
        }
        self.count -= 1;
        self.names_len -= node.name().len() + 1;
        Some(node)
    }

    /// By name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// In order of creation, which is what DIRECTORY shows.
    pub(crate) fn by_creation(&self) -> Vec<&Arc<Node>> {
        let mut nodes: Vec<&Arc<Node>> = self.iter().collect();
        nodes.sort_unstable_by_key(|node| node.created());
        nodes
    }
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

    // Fails if any sequence of insertions and removals differs from a plain map, or if a snapshot
    // taken in between sees later changes.
    #[test]
    fn behaves_like_a_map_and_snapshots_do_not_change() {
        let mut children = Children::default();
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
