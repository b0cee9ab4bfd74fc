//! What a request sees of the tree, and whether it would see the same in another one.
//!
//! A request that only reads sees four things: which nodes on its path exist, their permissions,
//! and at the end of it a value, a list of permissions or a list of children. These are the facets
//! of a transaction's read_set: it does not care for anything else that others do.

use triomphe::Arc;
use xenstore_protocol::{Facet, Path, Request};

use crate::tree::{Tree, components};

/// The path that a request on the tree names, the facet that it reads there, and whether it can
/// change anything.
pub(crate) fn looks_at<'p>(request: &Request<'p>) -> Option<(Path<'p>, Facet, bool)> {
    let operation = request.operation();
    Some((request.tree_path()?, operation.facet()?, !operation.is_read_only()))
}

/// Returns true if a request reads the same at `path` in both trees. Descends both at once and stops
/// at a shared node, so an unchanged subtree costs nothing.
pub(crate) fn unchanged(a: &Tree, b: &Tree, path: &str, facet: Facet) -> bool {
    if path.starts_with('@') {
        return a.is_same(b);
    }
    let (mut x, mut y) = (a.root(), b.root());
    for name in components(path) {
        if Arc::ptr_eq(x, y) {
            return true;
        }
        // Those of the nearest node that is there decide over access, and new nodes inherit them.
        if x.acl() != y.acl() {
            return false;
        }
        (x, y) = match (x.children().get(name), y.children().get(name)) {
            (Some(x), Some(y)) => (x, y),
            (None, None) => return true,
            _ => return false,
        };
    }
    Arc::ptr_eq(x, y)
        || x.acl() == y.acl()
            && match facet {
                Facet::Value => x.value() == y.value(),
                Facet::Children => x.listed() == y.listed(),
                Facet::Existence | Facet::Permissions => true,
            }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::acl::Acl;
    use alloc::vec::Vec;
    use xenstore_protocol::DomId;

    fn tree() -> Tree {
        let mut tree = Tree::initial(DomId(0));
        for path in ["/p/a", "/p/b/c", "/q"] {
            tree.make(path, &Acl::private(DomId(0)), b"1", &mut 10);
        }
        tree
    }

    /// Of some paths those at which the facet is another after a change.
    fn changed(change: impl FnOnce(&mut Tree), facet: Facet) -> Vec<&'static str> {
        let paths = ["/", "/p", "/p/a", "/p/a/x", "/p/b", "/p/b/c", "/p/new", "/p/new/x", "/q"];
        let before = tree();
        let mut after = before.clone();
        change(&mut after);
        paths.into_iter().filter(|path| !unchanged(&before, &after, path, facet)).collect()
    }

    // Fails if a change that a request would see is overlooked, or one is seen that it would not
    // (the facets of a read_set: existence, value, permissions, list of children).
    #[test]
    fn each_change_is_seen_by_those_who_look_there() {
        use Facet::*;
        for facet in [Existence, Value, Permissions, Children] {
            let with_parent = |below: &[&'static str]| {
                let parent = (facet == Children).then_some("/p");
                parent.into_iter().chain(below.iter().copied()).collect::<Vec<_>>()
            };
            let write = |value: &'static [u8]| {
                changed(|tree| tree.get_mut("/p/a").unwrap().set_value(value), facet)
            };
            assert_eq!(write(b"2"), if facet == Value { &["/p/a"][..] } else { &[] });
            assert_eq!(write(b"1"), [""; 0], "the same value again");
            let acl = || Acl::private(DomId(0));
            let made = changed(|t| t.make("/p/new", &acl(), b"", &mut 99), facet);
            assert_eq!(made, with_parent(&["/p/new", "/p/new/x"]));
            let gone = changed(|t| drop(t.remove("/p/b", &mut 99)), facet);
            assert_eq!(gone, with_parent(&["/p/b", "/p/b/c"]));
            let granted =
                changed(|t| t.get_mut("/p/b").unwrap().set_acl(Acl::private(DomId(5))), facet);
            assert_eq!(granted, ["/p/b", "/p/b/c"]);
        }
    }
}
