//! The requests that read and change the tree, inside and outside of transactions.
//!
//! Each checks everything before it changes anything, so that a request that fails has done
//! nothing and there is nothing to undo (XSA-414, XSA-415, XSA-421).

use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::{
    Access, DomId, ErrorName, PAYLOAD_MAX, Path, Perms, Quota, Request, domain_prefix_len,
};

use crate::access::{Acl, AclEntry, Rights};
use crate::answer::Answer;
use crate::change::Change;
use crate::charge::{Charge, Charges, bytes};
use crate::config::Quotas;
use crate::domain::Usage;
use crate::node::{Node, node_size};
use crate::tree::{Tree, components, parent};

/// A tree that requests work on, and what they did to it: the committed one, or that of a
/// transaction.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) tree: Tree,
    /// What has been charged since the charges were last settled.
    pub(crate) charges: Charges,
    pub(crate) changes: Vec<Change>,
}

impl Work {
    pub(crate) fn new(tree: Tree) -> Work {
        Work { tree, charges: Charges::default(), changes: Vec::new() }
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
    /// Is there such a domain?
    pub(crate) exists: &'a mut dyn FnMut(DomId) -> bool,
}

type Result<T> = core::result::Result<T, ErrorName>;

impl Context<'_> {
    pub(crate) fn check(&self, quota: Quota, amount: i64) -> Result<()> {
        if self.rights.privileged || self.quotas.allows(quota, amount) {
            Ok(())
        } else {
            Err(ErrorName::Enospc)
        }
    }

    /// The path that the caller means, if it may use one of that length.
    pub(crate) fn resolve<'p>(&self, path: Path<'p>) -> Result<Cow<'p, str>> {
        resolve(&self.rights, &self.quotas, path)
    }

    /// The same, for requests that know no special nodes.
    fn resolve_ordinary<'p>(&self, path: Path<'p>) -> Result<Cow<'p, str>> {
        self.resolve(path)
            .and_then(|path| if path.starts_with('@') { Err(ErrorName::Einval) } else { Ok(path) })
    }

    /// The node at `path`, if the caller has the access it wants. Whether a node exists is told
    /// only to those who have that access to the nearest one that does.
    fn reach<'t>(&self, tree: &'t Tree, path: &str, wanted: Access) -> Result<&'t Arc<Node>> {
        let (node, missing) = tree.nearest(path);
        if !node.acl().access(&self.rights).grants(wanted) {
            return Err(ErrorName::Eacces);
        }
        if missing == 0 { Ok(node) } else { Err(ErrorName::Enoent) }
    }

    /// Would the caller stay within its memory with this much more?
    fn check_memory(&self, work: &Work, owner: DomId, more: i64) -> Result<()> {
        if owner != self.rights.domid || more <= 0 {
            return Ok(());
        }
        self.check(Quota::Memory, self.usage.bytes + work.charges.of(owner).bytes + more)
    }
}

/// Resolves a path. The limits are on the whole path for everybody, and on the part below the
/// domain's own for those who have quotas (XSA-323).
pub(crate) fn resolve<'p>(
    rights: &Rights,
    quotas: &Quotas,
    path: Path<'p>,
) -> Result<Cow<'p, str>> {
    let path = path.resolve(rights.domid).ok_or(ErrorName::Einval)?.into_inner();
    let relative = path.len() - domain_prefix_len(&path);
    if !rights.privileged && !quotas.allows(Quota::PathMax, bytes(relative)) {
        return Err(ErrorName::Einval);
    }
    Ok(path)
}

/// Runs a request on `work`. On an error nothing has changed.
pub(crate) fn execute(
    work: &mut Work,
    cx: &mut Context<'_>,
    request: &Request<'_>,
) -> Result<Answer> {
    match request {
        Request::Read(path) | Request::DirectoryPart { path, .. } => {
            let path = cx.resolve_ordinary(*path)?;
            Ok(Answer::Seen(cx.reach(&work.tree, &path, Access::Read)?.clone()))
        }
        Request::Directory(path) => {
            let path = cx.resolve_ordinary(*path)?;
            let node = cx.reach(&work.tree, &path, Access::Read)?;
            if node.children().names_len() > PAYLOAD_MAX {
                return Err(ErrorName::E2big);
            }
            Ok(Answer::Seen(node.clone()))
        }
        Request::GetPerms(path) => {
            let path = cx.resolve(*path)?;
            Ok(Answer::Seen(cx.reach(&work.tree, &path, Access::Read)?.clone()))
        }
        Request::Write { path, value } => {
            let path = cx.resolve_ordinary(*path)?;
            write(work, cx, &path, value)
        }
        Request::Mkdir(path) => {
            let path = cx.resolve_ordinary(*path)?;
            mkdir(work, cx, &path)
        }
        Request::Rm(path) => {
            let path = cx.resolve_ordinary(*path)?;
            rm(work, cx, &path)
        }
        Request::SetPerms { path, perms } => {
            let path = cx.resolve(*path)?;
            set_perms(work, cx, &path, perms)
        }
        _ => Err(ErrorName::Enosys),
    }
}

fn write(work: &mut Work, cx: &mut Context<'_>, path: &str, value: &[u8]) -> Result<Answer> {
    match cx.reach(&work.tree, path, Access::Write) {
        Ok(node) => {
            let more = bytes(value.len()) - bytes(node.value().len());
            let owner = node.acl().owner();
            cx.check(Quota::NodeSize, bytes(node.size()) + more)?;
            cx.check_memory(work, owner, more)?;
            let node = work.tree.get_mut(path).ok_or(ErrorName::Eio)?;
            node.set_value(value);
            work.charges.add(owner, Charge { nodes: 0, bytes: more });
        }
        Err(ErrorName::Enoent) => create(work, cx, path, value)?,
        Err(error) => return Err(error),
    }
    work.changes.push(Change::written(path));
    Ok(Answer::Done)
}

fn mkdir(work: &mut Work, cx: &mut Context<'_>, path: &str) -> Result<Answer> {
    match cx.reach(&work.tree, path, Access::Write) {
        Ok(_) => return Ok(Answer::Done),
        Err(ErrorName::Enoent) => create(work, cx, path, b"")?,
        Err(error) => return Err(error),
    }
    work.changes.push(Change::written(path));
    Ok(Answer::Done)
}

/// Creates a node that is missing, and its missing parents. They get the permissions of the nearest
/// existing ancestor; an unprivileged creator owns them.
fn create(work: &mut Work, cx: &mut Context<'_>, path: &str, value: &[u8]) -> Result<()> {
    let (ancestor, missing) = work.tree.nearest(path);
    let acl = match cx.rights.privileged {
        true => ancestor.acl().clone(),
        false => ancestor.acl().with_owner(cx.rights.domid),
    };
    let perms = acl.entries().len();
    let names: Vec<&str> = components(path).collect();
    let new_names = &names[names.len() - missing..];
    cx.check(Quota::NodeSize, bytes(ancestor.size() + new_names[0].len() + 1))?;
    let mut more = Charge::default();
    for (i, name) in new_names.iter().enumerate() {
        let child_name = new_names.get(i + 1).map(|child| child.len() + 1);
        let value = if child_name.is_some() { &b""[..] } else { value };
        let size = node_size(perms, value.len() + child_name.unwrap_or(0));
        cx.check(Quota::NodeSize, bytes(size))?;
        more += Charge::node(name.len(), perms, value.len());
    }
    let domid = cx.rights.domid;
    let nodes = cx.usage.nodes + work.charges.of(domid).nodes + more.nodes;
    cx.check(Quota::Nodes, nodes)?;
    cx.check_memory(work, acl.owner(), more.bytes)?;
    work.tree.create(path, &acl, value, cx.stamp, |_| ());
    work.charges.add(acl.owner(), more);
    Ok(())
}

fn rm(work: &mut Work, cx: &mut Context<'_>, path: &str) -> Result<Answer> {
    match cx.reach(&work.tree, path, Access::Write) {
        Ok(_) if path == "/" => Err(ErrorName::Einval),
        Ok(_) => {
            remove(work, cx.stamp, path);
            Ok(Answer::Done)
        }
        // Not there already is fine, if its parent is.
        Err(ErrorName::Enoent) if parent(path).is_some_and(|p| work.tree.get(p).is_some()) => {
            Ok(Answer::Done)
        }
        Err(error) => Err(error),
    }
}

/// Removes a node and all below it, whoever owns them.
pub(crate) fn remove(work: &mut Work, stamp: &mut u64, path: &str) {
    if let Some(removed) = work.tree.remove(path, stamp) {
        for node in removed.descend() {
            work.charges.add(node.acl().owner(), -node.charge());
        }
        work.changes.push(Change::removed(path));
    }
}

/// In the order of C xenstored: number of entries, existence of the owner, access, change of owner.
fn set_perms(work: &mut Work, cx: &mut Context<'_>, path: &str, perms: &Perms) -> Result<Answer> {
    cx.check(Quota::NodePermissions, bytes(perms.0.len()))?;
    let owner = perms.0[0].domid;
    if !(cx.exists)(owner) {
        return Err(ErrorName::Enoent);
    }
    let mut entry = |perm: &xenstore_protocol::Perm| {
        let everybody = perm.domid == DomId::ANY && cx.any_domid;
        AclEntry { perm: *perm, ignored: !everybody && !(cx.exists)(perm.domid) }
    };
    let entries: Vec<AclEntry> = perms.0.iter().map(&mut entry).collect();
    let acl = Acl::from_entries(entries).ok_or(ErrorName::Einval)?;
    let node = cx.reach(&work.tree, path, Access::Write)?;
    if !node.acl().is_owner(&cx.rights) {
        return Err(ErrorName::Eacces);
    }
    if !cx.rights.privileged && owner != node.acl().owner() {
        return Err(ErrorName::Eperm);
    }
    cx.check(
        Quota::NodeSize,
        bytes(node.size() + 8 * acl.entries().len()) - bytes(8 * node.acl().entries().len()),
    )?;
    let before = (node.acl().owner(), node.charge());
    let node = work.tree.get_mut(path).ok_or(ErrorName::Eio)?;
    node.set_acl(acl);
    let after = (node.acl().owner(), node.charge());
    work.charges.add(before.0, -before.1);
    work.charges.add(after.0, after.1);
    work.changes.push(Change::written(path));
    Ok(Answer::Done)
}
