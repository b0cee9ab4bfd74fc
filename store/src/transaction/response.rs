//! What requests on the tree answer: the node that was looked at, of which the reply is written
//! only when its place is known.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::{Errno, Facet, PAYLOAD_MAX, Reply, Request};

use crate::ids::Millis;
use crate::tree::accounting::bytes;
use crate::tree::node::Node;

/// The answer to a request that has succeeded.
#[derive(Clone, Debug)]
pub(crate) enum Response {
    /// Nothing but that.
    Done,
    /// What the request asks for of this node.
    Seen(Arc<Node>),
    /// All other requests: the reply itself.
    Reply(Reply<'static>),
    /// None yet: nothing has been done, and the request is to be offered again, at this time at the
    /// latest.
    Deferred(Millis),
}

impl Response {
    /// The reply to `request`.
    pub(crate) fn reply<'a>(&'a self, request: &Request<'_>, lists: &'a mut Lists) -> Reply<'a> {
        match (self, request) {
            (Response::Reply(reply), _) => reply.clone(),
            (Response::Seen(node), Request::Read(_)) => Reply::Bytes(Cow::Borrowed(node.value())),
            (Response::Seen(node), Request::Directory(_)) => Reply::Names(Cow::Owned(names(node))),
            (Response::Seen(node), Request::GetPerms(_)) => Reply::Perms(node.acl().perms()),
            (Response::Seen(node), Request::DirectoryPart { offset, .. }) => {
                let list = lists.of(node);
                let part = part(list, node.listed(), *offset);
                let last = part.end == list.len();
                let names = Cow::Borrowed(&list[part]);
                Reply::Part { generation: node.listed(), names, last }
            }
            _ => Reply::Ok,
        }
    }

    /// Bytes of the reply that are kept with it.
    pub(crate) fn size(&self, request: &Request<'_>) -> i64 {
        match (self, request.operation().facet()) {
            (Response::Seen(node), Some(Facet::Value)) => bytes(node.value().len()),
            (Response::Seen(node), Some(Facet::Permissions)) => {
                bytes(8 * node.acl().entries().len())
            }
            (Response::Seen(node), _) => bytes(node.children().names_len()),
            _ => 0,
        }
    }
}

/// Would the client notice the difference between two answers to `request`? Generations are only
/// compared with each other, so that it does not notice theirs.
pub(crate) fn same(
    request: &Request<'_>,
    a: &Result<Response, Errno>,
    b: &Result<Response, Errno>,
) -> bool {
    let (a, b) = match (a, b) {
        (Ok(Response::Seen(a)), Ok(Response::Seen(b))) => (a, b),
        (Ok(Response::Done), Ok(Response::Done)) => return true,
        (Err(a), Err(b)) => return a == b,
        _ => return false,
    };
    let facet = request.operation().facet();
    Arc::ptr_eq(a, b)
        || facet == Some(Facet::Children) && a.listed() == b.listed()
        || match request {
            Request::Read(_) => a.value() == b.value(),
            Request::GetPerms(_) => a.acl().perms() == b.acl().perms(),
            Request::DirectoryPart { offset, .. } => {
                let (x, y) = (names(a), names(b));
                let (p, q) = (part(&x, a.listed(), *offset), part(&y, a.listed(), *offset));
                (p.end == x.len()) == (q.end == y.len()) && x[p] == y[q]
            }
            _ => names(a) == names(b),
        }
}

/// The children's names in order of creation, each with its NUL.
fn names(node: &Node) -> Vec<u8> {
    let mut names = Vec::with_capacity(node.children().names_len());
    for child in node.children().by_creation() {
        names.extend_from_slice(child.name_bytes());
        names.push(0);
    }
    names
}

/// As many whole names from byte `offset` of the list on as fit a reply. An offset inside a name
/// starts there.
fn part(list: &[u8], generation: u64, offset: u64) -> core::ops::Range<usize> {
    let room = PAYLOAD_MAX - alloc::format!("{generation}").len() - 2;
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(list.len());
    let rest = &list[start..];
    let len = match rest.get(room..) {
        None | Some([]) => rest.len(),
        Some(_) => rest[..room].iter().rposition(|b| *b == 0).map_or(0, |at| at + 1),
    };
    start..start + len
}

/// Cached lists of children that are being fetched in parts. Without them each part would cost as much
/// as the whole. The key is the generation; a list that is no longer cached is created again.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    /// Generations and lists, the last used at the end.
    recent: Vec<(u64, Vec<u8>)>,
}

/// Lists that are kept.
const LISTS_MAX: usize = 8;

impl Lists {
    fn of(&mut self, node: &Node) -> &[u8] {
        let known = self.recent.iter().position(|(generation, _)| *generation == node.listed());
        let list = match known {
            Some(at) => self.recent.remove(at),
            None => (node.listed(), names(node)),
        };
        if self.recent.len() == LISTS_MAX {
            self.recent.remove(0);
        }
        self.recent.push(list);
        &self.recent.last().expect("just pushed").1
    }

    /// The last part of a list has been fetched.
    pub(crate) fn finished(&mut self, generation: u64) {
        self.recent.retain(|(known, _)| *known != generation);
    }
}
