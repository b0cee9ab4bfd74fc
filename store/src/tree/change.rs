//! What requests did to the tree, as watches see it.

use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;

use crate::tree::acl::Acl;
use crate::tree::node::Node;

/// The permission lists that decide who gets an event: a watcher must have read access by at least one of
/// them. They are those of the node and of its parent, before and after each request (XSA-115). They are
/// taken when the request is executed, also in a transaction: the lists at the time of the commit do not
/// count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readers {
    few: [Option<Acl>; 3],
    more: Vec<Acl>,
}

/// Lists with which another one is compared, the last first. Mostly it is the one before; comparing all
/// would cost the square of their number.
const COMPARED: usize = 8;

impl Readers {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Acl> {
        self.few.iter().flatten().chain(&self.more)
    }

    pub(crate) fn add(&mut self, acl: &Acl) {
        for place in &mut self.few {
            match place {
                Some(known) if known == acl => return,
                Some(_) => {}
                None => return *place = Some(acl.clone()),
            }
        }
        if !self.more.iter().rev().take(COMPARED).any(|known| known == acl) {
            self.more.push(acl.clone());
        }
    }
}

impl<'a> FromIterator<&'a Acl> for Readers {
    fn from_iter<I: IntoIterator<Item = &'a Acl>>(acls: I) -> Readers {
        let mut readers = Readers::default();
        acls.into_iter().for_each(|acl| readers.add(acl));
        readers
    }
}

/// A node that a client changed. Parents created on the way have no entry: watches on them match the
/// node itself.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) path: String,
    /// Length in bytes of the path of the topmost created node, a prefix of `path`.
    pub(crate) top: usize,
    /// The removed nodes, each with its subtree.
    pub(crate) removed: Vec<Arc<Node>>,
    /// True if the owner differs from the owner before, or from that of the parent.
    pub(crate) owned: bool,
    pub(crate) readers: Readers,
}

impl Change {
    /// An existing node gets another value or permission list.
    pub(crate) fn written(path: &str, readers: Readers) -> Change {
        let (path, top) = (path.into(), path.len());
        Change { path, top, removed: Vec::new(), owned: false, readers }
    }
}

/// Each path once, at the place of its first change.
pub(crate) fn merge(mut changes: Vec<Change>) -> Vec<Change> {
    if changes.len() < 2 {
        return changes;
    }
    let mut places: Vec<usize> = (0..changes.len()).collect();
    places.sort_by(|a, b| changes[*a].path.cmp(&changes[*b].path));
    let mut first = places[0];
    for &place in &places[1..] {
        if changes[place].path == changes[first].path {
            // No path is empty.
            changes[place].path.clear();
            let later = changes[place].clone();
            let merged = &mut changes[first];
            merged.top = merged.top.min(later.top);
            merged.owned |= later.owned;
            merged.removed.extend(later.removed);
            later.readers.iter().for_each(|acl| merged.readers.add(acl));
        } else {
            first = place;
        }
    }
    changes.retain(|change| !change.path.is_empty());
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenstore_protocol::DomId;

    // Fails if a path fires twice or out of the order of first changes, or loses its removal or its
    // readers.
    #[test]
    fn paths_stand_once_at_their_first_change() {
        let acls = [0, 1, 2, 3, 4].map(|domid| Acl::private(DomId(domid)));
        let change = |path: &str, acl: usize, removes: bool| Change {
            removed: (0..usize::from(removes))
                .map(|_| Arc::new(Node::new("x", 1, acls[0].clone(), b"")))
                .collect(),
            ..Change::written(path, [&acls[acl]].into_iter().collect())
        };
        let changes = [
            change("/b", 0, false),
            change("/a", 1, true),
            change("/b", 2, true),
            change("/b", 3, false),
            change("/b", 4, false),
        ];
        let merged = merge(changes.to_vec());
        let shown: Vec<_> = merged
            .iter()
            .map(|c| (&*c.path, c.removed.len(), c.readers.iter().map(Acl::owner).collect()))
            .collect();
        let owners = |domids: &[u16]| domids.iter().map(|domid| DomId(*domid)).collect::<Vec<_>>();
        assert_eq!(shown, [("/b", 1, owners(&[0, 2, 3, 4])), ("/a", 1, owners(&[1]))]);
    }
}
