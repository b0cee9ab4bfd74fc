//! The requests that read and change the tree, inside and outside of transactions.
//!
//! Each checks everything before it changes anything, so that a request that fails has done
//! nothing and there is nothing to undo (XSA-414, XSA-415, XSA-421).

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::Cell;

use triomphe::Arc;
use xenstore_protocol::{
    Access, DomId, Errno, PAYLOAD_MAX, Path, Perms, Quota, Request, domain_prefix_len,
};

use crate::domain::quotas::Quotas;
use crate::domain::registry::{Largest, Usage};
use crate::transaction::read_set::looks_at;
use crate::transaction::response::Response;
use crate::tree::accounting::{Charge, Charges, bytes};
use crate::tree::acl::{Acl, AclEntry, Era, Rights};
use crate::tree::change::{Change, Readers};
use crate::tree::cow_cost::replaced_by_change;
use crate::tree::node::{Node, node_size};
use crate::tree::{Nearest, Tree, components, parent};

/// Nodes that a removal counts at once. The rest is counted later; see `engine/deferred.rs`.
pub(crate) const COUNTED_MAX: usize = 16_384;

/// A tree that requests work on, and what they did to it: the committed one, or that of a
/// transaction.
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    pub(crate) tree: Tree,
    /// What has been charged since the charges were last settled.
    pub(crate) charges: Charges,
    pub(crate) changes: Vec<Change>,
    /// Bytes of nodes that were copied because others see them, if that is counted.
    pub(crate) copied: i64,
    /// Bytes of nodes that were taken away, and how many.
    pub(crate) removed: i64,
    pub(crate) counted: usize,
    /// Nodes that were taken away with all below them, and are still charged to their owners.
    pub(crate) uncounted: Vec<Arc<Node>>,
}

impl Staged {
    pub(crate) fn new(tree: Tree) -> Staged {
        Staged {
            tree,
            charges: Charges::default(),
            changes: Vec::new(),
            copied: 0,
            removed: 0,
            counted: 0,
            uncounted: Vec::new(),
        }
    }
}

/// On whose behalf, and within which limits, a request runs.
pub(crate) struct Context<'a> {
    pub(crate) rights: Rights,
    pub(crate) quotas: Quotas,
    /// What is charged to the caller in the committed tree.
    pub(crate) usage: Usage,
    /// May the caller grant rights to every domain at once?
    pub(crate) any_domid: bool,
    /// Grows with every change.
    pub(crate) stamp: &'a mut u64,
    /// The era of a domain, if it exists.
    pub(crate) exists: &'a mut dyn FnMut(DomId) -> Option<Era>,
    /// The era of a domain that is known; 0 for any other.
    pub(crate) era_of: &'a dyn Fn(DomId) -> Era,
    /// True if the readers of a change must be recorded, which is not so without watches.
    pub(crate) captures: bool,
    /// Is it to be counted what is copied?
    pub(crate) counts_copies: bool,
    /// The last amount that was refused, and by which quota.
    pub(crate) refused: Cell<Option<(Quota, i64)>>,
    /// The path of the request to which it was refused.
    pub(crate) refused_at: Option<String>,
    /// The largest amounts that were allowed.
    pub(crate) largest: Cell<Largest>,
}

type Result<T> = core::result::Result<T, Errno>;

impl Context<'_> {
    /// The permission lists that decide who gets the events of a change: see [`Readers`].
    fn readers<'a>(&self, acls: impl IntoIterator<Item = &'a Acl>) -> Readers {
        if self.captures { acls.into_iter().collect() } else { Readers::default() }
    }

    pub(crate) fn check(&self, quota: Quota, amount: i64) -> Result<()> {
        if self.rights.privileged || self.quotas.allows(quota, amount) {
            self.largest.set(self.largest.get().with(quota, amount));
            Ok(())
        } else {
            self.refused.set(Some((quota, amount)));
            Err(Errno::Enospc)
        }
    }

    /// Resolves a path of the caller. The length of the whole path is limited for all callers, that below
    /// the domain's home for callers with quotas (XSA-323).
    pub(crate) fn resolve<'p>(&self, path: Path<'p>) -> Result<Cow<'p, str>> {
        let (path, relative) = resolve(&self.rights, path)?;
        self.check(Quota::PathMax, relative).map_err(|_| Errno::Einval)?;
        Ok(path)
    }

    /// The same, for requests that know no special nodes.
    fn resolve_ordinary<'p>(&self, path: Path<'p>) -> Result<Cow<'p, str>> {
        self.resolve(path)
            .and_then(|path| if path.starts_with('@') { Err(Errno::Einval) } else { Ok(path) })
    }

    /// The node at `path`, or else the nearest above it that exists, if the caller has the access to it
    /// that it wants. Without that access the caller does not learn whether the node exists.
    fn find<'t>(&self, tree: &'t Tree, path: &str, wanted: Access) -> Result<Nearest<'t>> {
        let nearest = tree.nearest(path);
        if nearest.node.acl().access(&self.rights).grants(wanted) {
            Ok(nearest)
        } else {
            Err(Errno::Eacces)
        }
    }

    /// The node at `path`, if it exists and the caller has the access it wants.
    fn reach<'t>(&self, tree: &'t Tree, path: &str, wanted: Access) -> Result<&'t Arc<Node>> {
        self.reach_with_parent(tree, path, wanted).map(|(node, _)| node)
    }

    /// The same, and the node above it.
    fn reach_with_parent<'t>(
        &self,
        tree: &'t Tree,
        path: &str,
        wanted: Access,
    ) -> Result<(&'t Arc<Node>, &'t Arc<Node>)> {
        match self.find(tree, path, wanted)? {
            Nearest { node, above, missing: 0 } => Ok((node, above)),
            _ => Err(Errno::Enoent),
        }
    }

    /// Counts what the change of `path` that follows copies.
    fn count_copies(&self, staged: &mut Staged, path: &str) {
        if self.counts_copies {
            staged.copied += replaced_by_change(&staged.tree, path);
        }
    }

    /// Would the caller stay within its memory with this much more?
    fn check_memory(&self, staged: &Staged, owner: DomId, more: i64) -> Result<()> {
        if owner != self.rights.domid || more <= 0 {
            return Ok(());
        }
        self.check(Quota::Memory, self.usage.bytes + staged.charges.of(owner).bytes + more)
    }
}

/// Resolves a path. The second part is its length as far as a quota limits it.
pub(crate) fn resolve<'p>(rights: &Rights, path: Path<'p>) -> Result<(Cow<'p, str>, i64)> {
    let path = path.resolve(rights.domid).ok_or(Errno::Einval)?.into_inner();
    let relative = path.len() - domain_prefix_len(&path);
    Ok((path, bytes(relative)))
}

/// Runs a request on `work`. On an error nothing has changed.
pub(crate) fn execute(
    staged: &mut Staged,
    cx: &mut Context<'_>,
    request: &Request<'_>,
) -> Result<Response> {
    let answer = execute_unreported(staged, cx, request);
    if answer.is_err() && cx.refused.get().is_some() {
        let path = looks_at(request).map(|(path, ..)| path);
        cx.refused_at =
            path.and_then(|path| resolve(&cx.rights, path).ok()).map(|(path, _)| path.into());
    }
    answer
}

fn execute_unreported(
    staged: &mut Staged,
    cx: &mut Context<'_>,
    request: &Request<'_>,
) -> Result<Response> {
    match request {
        Request::Read(path) | Request::DirectoryPart { path, .. } => {
            let path = cx.resolve_ordinary(*path)?;
            Ok(Response::Seen(cx.reach(&staged.tree, &path, Access::Read)?.clone()))
        }
        Request::Directory(path) => {
            let path = cx.resolve_ordinary(*path)?;
            let node = cx.reach(&staged.tree, &path, Access::Read)?;
            if node.children().names_len() > PAYLOAD_MAX {
                return Err(Errno::E2big);
            }
            Ok(Response::Seen(node.clone()))
        }
        Request::GetPerms(path) => {
            let path = cx.resolve(*path)?;
            let node = cx.reach(&staged.tree, &path, Access::Read)?;
            Ok(Response::Seen(match node.acl().without_stale(cx.era_of) {
                None => node.clone(),
                Some(acl) => Arc::new(Node::new("", node.created(), acl, b"")),
            }))
        }
        Request::Write { path, value } => {
            let path = cx.resolve_ordinary(*path)?;
            write(staged, cx, &path, value)
        }
        Request::Mkdir(path) => {
            let path = cx.resolve_ordinary(*path)?;
            mkdir(staged, cx, &path)
        }
        Request::Rm(path) => {
            let path = cx.resolve_ordinary(*path)?;
            rm(staged, cx, &path)
        }
        Request::SetPerms { path, perms } => {
            let path = cx.resolve(*path)?;
            set_perms(staged, cx, &path, perms)
        }
        _ => Err(Errno::Enosys),
    }
}

fn write(staged: &mut Staged, cx: &mut Context<'_>, path: &str, value: &[u8]) -> Result<Response> {
    let nearest = cx.find(&staged.tree, path, Access::Write)?;
    if nearest.missing > 0 {
        return plan(staged, cx, nearest, path, value)?.carry_out(staged, cx, path, value);
    }
    let Nearest { node, above, .. } = nearest;
    let readers = cx.readers([node.acl(), above.acl()]);
    let more = bytes(value.len()) - bytes(node.value().len());
    let owner = node.acl().owner();
    cx.check(Quota::NodeSize, bytes(node.size()) + more)?;
    cx.check_memory(staged, owner, more)?;
    cx.count_copies(staged, path);
    staged.copied += bytes(value.len());
    let node = staged.tree.get_mut(path).ok_or(Errno::Eio)?;
    node.set_value(value);
    staged.charges.add(owner, Charge { nodes: 0, bytes: more });
    staged.changes.push(Change::written(path, readers));
    Ok(Response::Done)
}

fn mkdir(staged: &mut Staged, cx: &mut Context<'_>, path: &str) -> Result<Response> {
    match cx.find(&staged.tree, path, Access::Write)? {
        Nearest { missing: 0, .. } => Ok(Response::Done),
        nearest => plan(staged, cx, nearest, path, b"")?.carry_out(staged, cx, path, b""),
    }
}

/// A node to be created, with its missing parents.
struct Plan {
    acl: Acl,
    /// The list of the node above.
    above: Acl,
    missing: usize,
    more: Charge,
}

/// May a node that is missing be created, with its missing parents? They get the permissions of the
/// nearest existing ancestor; an unprivileged creator owns them.
fn plan(
    staged: &Staged,
    cx: &Context<'_>,
    Nearest { node: ancestor, missing, .. }: Nearest<'_>,
    path: &str,
    value: &[u8],
) -> Result<Plan> {
    let acl = match cx.rights.privileged {
        true => ancestor.acl().clone(),
        false => ancestor.acl().with_owner(cx.rights.domid, cx.rights.era),
    };
    let perms = acl.entries().len();
    let existing = components(path).count() - missing;
    let mut new_names = components(path).skip(existing).peekable();
    let first = new_names.peek().map_or(0, |name| name.len() + 1);
    cx.check(Quota::NodeSize, bytes(ancestor.size() + first))?;
    let mut more = Charge::default();
    while let Some(name) = new_names.next() {
        let child_name = new_names.peek().map(|child| child.len() + 1);
        let value = if child_name.is_some() { &b""[..] } else { value };
        let size = node_size(perms, value.len() + child_name.unwrap_or(0));
        cx.check(Quota::NodeSize, bytes(size))?;
        more += Charge::node(name.len(), perms, value.len());
    }
    let domid = cx.rights.domid;
    let nodes = cx.usage.nodes + staged.charges.of(domid).nodes + more.nodes;
    cx.check(Quota::Nodes, nodes)?;
    cx.check_memory(staged, acl.owner(), more.bytes)?;
    Ok(Plan { acl, above: ancestor.acl().clone(), missing, more })
}

impl Plan {
    fn carry_out(
        self,
        staged: &mut Staged,
        cx: &mut Context<'_>,
        path: &str,
        value: &[u8],
    ) -> Result<Response> {
        cx.count_copies(staged, path);
        staged.tree.create(path, self.missing, &self.acl, value, cx.stamp);
        staged.charges.add(self.acl.owner(), self.more);
        let above = (self.missing == 1).then_some(&self.above);
        let readers = cx.readers([&self.acl].into_iter().chain(above));
        let created: usize = components_from_end(path).take(self.missing - 1).sum();
        staged.changes.push(Change {
            top: path.len() - created,
            owned: self.acl.owner() != self.above.owner(),
            ..Change::written(path, readers)
        });
        Ok(Response::Done)
    }
}

/// Bytes of the names of a path, each with its slash, the last first.
fn components_from_end(path: &str) -> impl Iterator<Item = usize> {
    path.rsplit('/').map(|name| name.len() + 1)
}

fn rm(staged: &mut Staged, cx: &mut Context<'_>, path: &str) -> Result<Response> {
    match cx.reach_with_parent(&staged.tree, path, Access::Write) {
        Ok(_) if path == "/" => Err(Errno::Einval),
        Ok((node, above)) => {
            let readers = cx.readers([node.acl(), above.acl()]);
            cx.count_copies(staged, path);
            remove(staged, cx.stamp, path, readers);
            Ok(Response::Done)
        }
        // Not there already is fine, if its parent is.
        Err(Errno::Enoent) if parent(path).is_some_and(|p| staged.tree.get(p).is_some()) => {
            Ok(Response::Done)
        }
        Err(error) => Err(error),
    }
}

/// Removes a node and its subtree, also nodes of other owners. Releases the charges of at most
/// [`COUNTED_MAX`] of them now.
pub(crate) fn remove(staged: &mut Staged, stamp: &mut u64, path: &str, readers: Readers) {
    let Some(removed) = staged.tree.remove(path, stamp) else { return };
    let mut rest = alloc::vec![&removed];
    for _ in 0..COUNTED_MAX {
        let Some(node) = rest.pop() else { break };
        staged.charges.add(node.acl().owner(), -node.charge());
        staged.removed += node.charge().bytes;
        staged.counted += 1;
        rest.extend(node.children().iter());
    }
    staged.uncounted.extend(rest.into_iter().cloned());
    let removed = alloc::vec![removed];
    staged.changes.push(Change { removed, ..Change::written(path, readers) });
}

/// In the order of C xenstored: number of entries, existence of the owner, access, change of owner.
fn set_perms(
    staged: &mut Staged,
    cx: &mut Context<'_>,
    path: &str,
    perms: &Perms,
) -> Result<Response> {
    cx.check(Quota::NodePermissions, bytes(perms.0.len()))?;
    let owner = perms.0[0].domid;
    if (cx.exists)(owner).is_none() {
        return Err(Errno::Enoent);
    }
    let mut entry = |perm: &xenstore_protocol::Perm| {
        let any_domain = perm.domid == DomId::ANY && cx.any_domid;
        let era = if any_domain { Some(0) } else { (cx.exists)(perm.domid) };
        let (ignored, era) = (era.is_none(), era.unwrap_or_else(|| (cx.era_of)(perm.domid)));
        AclEntry { perm: *perm, ignored, era }
    };
    let entries: Vec<AclEntry> = perms.0.iter().map(&mut entry).collect();
    let acl = Acl::from_entries(entries).ok_or(Errno::Einval)?;
    let (node, above) = cx.reach_with_parent(&staged.tree, path, Access::Write)?;
    if !node.acl().is_owner(&cx.rights) {
        return Err(Errno::Eacces);
    }
    if !cx.rights.privileged && owner != node.acl().owner() {
        return Err(Errno::Eperm);
    }
    cx.check(
        Quota::NodeSize,
        bytes(node.size() + 8 * acl.entries().len()) - bytes(8 * node.acl().entries().len()),
    )?;
    let readers = cx.readers([node.acl(), &acl, above.acl()]);
    let owned = owner != node.acl().owner();
    cx.count_copies(staged, path);
    replace_acl(staged, path, acl);
    staged.changes.push(Change { owned, ..Change::written(path, readers) });
    Ok(Response::Done)
}

/// Gives the node at `path`, if there is one, another list, and charges its owners.
pub(crate) fn replace_acl(staged: &mut Staged, path: &str, acl: Acl) {
    let Some(node) = staged.tree.get_mut(path) else { return };
    let before = (node.acl().owner(), node.charge());
    node.set_acl(acl);
    let after = (node.acl().owner(), node.charge());
    staged.charges.add(before.0, -before.1);
    staged.charges.add(after.0, after.1);
}
