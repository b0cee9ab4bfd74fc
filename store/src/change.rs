//! What requests did to the tree, as watches see it.

use alloc::string::String;
use alloc::vec::Vec;

/// A node that a client changed. Parents that were created on the way are not among them; watchers
/// of their ancestors hear of the node itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) path: String,
    /// It was removed, with all below it, at some point; it may be there again.
    pub(crate) removed: bool,
    /// It was created with other permissions than the node above it has, or its permissions were set.
    pub(crate) permitted: bool,
}

impl Change {
    pub(crate) fn written(path: &str) -> Change {
        Change { path: path.into(), removed: false, permitted: false }
    }

    pub(crate) fn permitted(path: &str) -> Change {
        Change { path: path.into(), removed: false, permitted: true }
    }

    pub(crate) fn removed(path: &str) -> Change {
        Change { path: path.into(), removed: true, permitted: false }
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
            changes[first].removed |= changes[place].removed;
            changes[first].permitted |= changes[place].permitted;
            // No path is empty.
            changes[place].path.clear();
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

    // Fails if a path is told twice, out of the order of first changes, or forgets its removal.
    #[test]
    fn paths_stand_once_at_their_first_change() {
        let changes = [
            Change::written("/b"),
            Change::removed("/a"),
            Change::removed("/b"),
            Change::written("/b"),
        ];
        assert_eq!(merge(changes.to_vec()), [Change::removed("/b"), Change::removed("/a")]);
    }
}
