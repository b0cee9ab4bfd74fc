//! Requests, and their payloads.

use alloc::vec::Vec;

use crate::errno::Errno;
use crate::features::Features;
use crate::ids::{DomId, EvtchnPort, Gfn};
use crate::operation::Operation;
use crate::path::Path;
use crate::perm::Perms;
use crate::quota::Quota;
use crate::strings::{Strings, decimal};

/// A request without its header. Paths, tokens and values are borrowed from the frame.
///
/// ```
/// use xenstore_protocol::{Errno, Operation, Request};
///
/// let request = Request::parse(Operation::Write, b"/a\0value")?;
/// assert!(matches!(request, Request::Write { value: b"value", .. }));
/// let mut payload = Vec::new();
/// request.emit(&mut payload);
/// assert_eq!(payload, b"/a\0value");
/// assert_eq!(Request::parse(Operation::Write, b"/a"), Err(Errno::Einval));
/// # Ok::<(), Errno>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request<'a> {
    /// Runs a command of the server.
    Control(Control<'a>),
    /// Returns the names of the children of a node.
    Directory(Path<'a>),
    /// Returns the value of a node.
    Read(Path<'a>),
    /// Returns the permission list of a node.
    GetPerms(Path<'a>),
    /// Adds a watch: each change at or below a path fires an event.
    Watch {
        /// The path.
        path: Path<'a>,
        /// A part of each event: any bytes but NUL.
        token: &'a [u8],
        /// The number of levels below `path`; `None` for all. For a special path, 1 requests events
        /// that include the domid.
        depth: Option<u32>,
    },
    /// Removes a watch.
    Unwatch {
        /// The path of the watch, as in WATCH.
        path: Path<'a>,
        /// The token of the watch.
        token: &'a [u8],
    },
    /// Opens a transaction.
    TransactionStart,
    /// Ends the transaction that the header names.
    TransactionEnd {
        /// True to commit, false to abort.
        commit: bool,
    },
    /// Introduces a domain: the server connects to its ring.
    Introduce {
        /// The domain.
        domid: DomId,
        /// The frame of its ring page, which is used if the grant table has none.
        gfn: Gfn,
        /// Its event channel port; not 0.
        port: EvtchnPort,
    },
    /// Releases a domain: the server disconnects from its ring.
    Release(DomId),
    /// Returns the path of a domain's nodes.
    GetDomainPath(DomId),
    /// Sets the value of a node. Creates the node and its parents if they do not exist.
    Write {
        /// The node.
        path: Path<'a>,
        /// The value: any bytes.
        value: &'a [u8],
    },
    /// Creates a node and its parents if they do not exist.
    Mkdir(Path<'a>),
    /// Removes a node and all nodes below it.
    Rm(Path<'a>),
    /// Replaces the permission list of a node.
    SetPerms {
        /// The node.
        path: Path<'a>,
        /// The list; its first entry names the owner.
        perms: Perms,
    },
    /// Returns whether a domain is introduced.
    IsDomainIntroduced(DomId),
    /// Reports that a domain runs again after a suspend.
    Resume(DomId),
    /// Gives a domain the rights of another: a device model those of its guest.
    SetTarget {
        /// The domain that gets the rights.
        domid: DomId,
        /// The domain whose rights they are.
        target: DomId,
    },
    /// Removes all watches and aborts all transactions of this connection.
    ResetWatches,
    /// Returns a part of the names of the children of a node.
    DirectoryPart {
        /// The node.
        path: Path<'a>,
        /// The byte of the list from which on names are returned.
        offset: u64,
    },
    /// Returns the features that a domain is offered; `None` is the caller.
    GetFeature(Option<DomId>),
    /// Sets the features that a domain is offered, before it is introduced.
    SetFeature {
        /// The domain.
        domid: DomId,
        /// The features to offer.
        features: Features,
    },
    /// Returns the names of all quotas, or the value of one.
    GetQuota {
        /// The domain; `None` is the value for new domains.
        domid: Option<DomId>,
        /// The quota; `None` returns the names.
        quota: Option<Quota>,
    },
    /// Sets a quota.
    SetQuota {
        /// The domain; `None` is the value for new domains.
        domid: Option<DomId>,
        /// The quota.
        quota: Quota,
        /// The limit; 0 for none.
        value: u32,
    },
}

/// A CONTROL request: a command and its arguments, each NUL-terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control<'a> {
    strings: &'a [u8],
}

impl<'a> Control<'a> {
    /// A request of these NUL-terminated strings. Returns `None` unless there is at least one, and the
    /// last byte is NUL.
    pub fn new(strings: &'a [u8]) -> Option<Control<'a>> {
        strings.ends_with(b"\0").then_some(Control { strings })
    }

    /// The command.
    pub fn command(&self) -> &'a [u8] {
        Strings::new(self.strings).next().unwrap_or_default()
    }

    /// The arguments.
    pub fn args(&self) -> Strings<'a> {
        let mut strings = Strings::new(self.strings);
        strings.next();
        strings
    }
}

/// The string of a payload that is exactly one string.
fn one(payload: &[u8]) -> Option<&[u8]> {
    let mut strings = Strings::new(payload);
    strings.next().filter(|_| strings.rest().is_empty())
}

/// The strings of a payload that is exactly `N` strings.
fn exactly<const N: usize>(payload: &[u8]) -> Option<[&[u8]; N]> {
    let mut strings = Strings::new(payload);
    let mut found = [&b""[..]; N];
    for string in &mut found {
        *string = strings.next()?;
    }
    strings.rest().is_empty().then_some(found)
}

fn domid(text: &[u8]) -> Option<DomId> {
    decimal(text).map(DomId)
}

/// Reads the value of a quota. `u32::MAX` is refused: C xenstored uses it for "not set".
fn quota_value(text: &[u8]) -> Option<u32> {
    decimal(text).filter(|value| *value != u32::MAX)
}

impl<'a> Request<'a> {
    /// Reads a payload.
    ///
    /// # Errors
    ///
    /// Fails with `EINVAL` if the payload is malformed, and with `ENOSYS` if `op` is not a request.
    pub fn parse(op: Operation, payload: &'a [u8]) -> Result<Request<'a>, Errno> {
        if !op.is_request() {
            return Err(Errno::Enosys);
        }
        Self::parse_payload(op, payload).ok_or(Errno::Einval)
    }

    fn parse_payload(op: Operation, payload: &'a [u8]) -> Option<Request<'a>> {
        let path = || one(payload).and_then(Path::parse);
        let one_domid = || one(payload).and_then(domid);
        Some(match op {
            Operation::Control => Request::Control(Control::new(payload)?),
            Operation::Directory => Request::Directory(path()?),
            Operation::Read => Request::Read(path()?),
            Operation::GetPerms => Request::GetPerms(path()?),
            Operation::Watch => parse_watch(payload)?,
            Operation::Unwatch => {
                let mut strings = Strings::new(payload);
                let path = Path::parse(strings.next()?)?;
                let token = strings.next()?;
                strings.next().is_none().then_some(Request::Unwatch { path, token })?
            }
            Operation::TransactionStart => Request::TransactionStart,
            Operation::TransactionEnd => match payload {
                b"T\0" => Request::TransactionEnd { commit: true },
                b"F\0" => Request::TransactionEnd { commit: false },
                _ => return None,
            },
            Operation::Introduce => {
                let mut strings = Strings::new(payload);
                let domid = domid(strings.next()?)?;
                let gfn = Gfn(decimal(strings.next()?)?);
                let port = EvtchnPort(decimal(strings.next()?).filter(|port| *port != 0)?);
                Request::Introduce { domid, gfn, port }
            }
            Operation::Release => Request::Release(one_domid()?),
            Operation::GetDomainPath => Request::GetDomainPath(one_domid()?),
            Operation::Write => {
                let mut strings = Strings::new(payload);
                let path = Path::parse(strings.next()?)?;
                Request::Write { path, value: strings.rest() }
            }
            Operation::Mkdir => Request::Mkdir(path()?),
            Operation::Rm => Request::Rm(path()?),
            Operation::SetPerms => {
                let mut strings = Strings::new(payload);
                let path = Path::parse(strings.next()?)?;
                Request::SetPerms { path, perms: Perms::parse(strings.rest())? }
            }
            Operation::IsDomainIntroduced => Request::IsDomainIntroduced(one_domid()?),
            Operation::Resume => Request::Resume(one_domid()?),
            Operation::SetTarget => {
                let [who, target] = exactly(payload)?;
                Request::SetTarget { domid: domid(who)?, target: domid(target)? }
            }
            Operation::ResetWatches => Request::ResetWatches,
            Operation::DirectoryPart => {
                let [path, offset] = exactly(payload)?;
                Request::DirectoryPart { path: Path::parse(path)?, offset: decimal(offset)? }
            }
            Operation::GetFeature if payload.is_empty() => Request::GetFeature(None),
            Operation::GetFeature => Request::GetFeature(Some(one_domid()?)),
            Operation::SetFeature => {
                let [who, value] = exactly(payload)?;
                let features = Features::from(decimal::<u32>(value)?);
                Request::SetFeature { domid: domid(who)?, features }
            }
            Operation::GetQuota => parse_get_quota(payload)?,
            Operation::SetQuota => parse_set_quota(payload)?,
            Operation::WatchEvent | Operation::Error => return None,
        })
    }

    /// The path of the node that a request on the tree names; `None` for any other request.
    pub fn tree_path(&self) -> Option<Path<'a>> {
        match self {
            Request::Directory(path)
            | Request::DirectoryPart { path, .. }
            | Request::Read(path)
            | Request::GetPerms(path)
            | Request::Write { path, .. }
            | Request::Mkdir(path)
            | Request::Rm(path)
            | Request::SetPerms { path, .. } => Some(*path),
            _ => None,
        }
    }

    /// The message type in the header.
    pub fn operation(&self) -> Operation {
        match self {
            Request::Control(_) => Operation::Control,
            Request::Directory(_) => Operation::Directory,
            Request::Read(_) => Operation::Read,
            Request::GetPerms(_) => Operation::GetPerms,
            Request::Watch { .. } => Operation::Watch,
            Request::Unwatch { .. } => Operation::Unwatch,
            Request::TransactionStart => Operation::TransactionStart,
            Request::TransactionEnd { .. } => Operation::TransactionEnd,
            Request::Introduce { .. } => Operation::Introduce,
            Request::Release(_) => Operation::Release,
            Request::GetDomainPath(_) => Operation::GetDomainPath,
            Request::Write { .. } => Operation::Write,
            Request::Mkdir(_) => Operation::Mkdir,
            Request::Rm(_) => Operation::Rm,
            Request::SetPerms { .. } => Operation::SetPerms,
            Request::IsDomainIntroduced(_) => Operation::IsDomainIntroduced,
            Request::Resume(_) => Operation::Resume,
            Request::SetTarget { .. } => Operation::SetTarget,
            Request::ResetWatches => Operation::ResetWatches,
            Request::DirectoryPart { .. } => Operation::DirectoryPart,
            Request::GetFeature(_) => Operation::GetFeature,
            Request::SetFeature { .. } => Operation::SetFeature,
            Request::GetQuota { .. } => Operation::GetQuota,
            Request::SetQuota { .. } => Operation::SetQuota,
        }
    }

    /// Appends the payload.
    pub fn emit(&self, out: &mut Vec<u8>) {
        let mut strings = |parts: &[&[u8]]| {
            for part in parts {
                out.extend_from_slice(part);
                out.push(0);
            }
        };
        let text = |number: u64| alloc::format!("{number}").into_bytes();
        let dom = |domid: DomId| text(domid.0.into());
        match self {
            Request::Control(control) => out.extend_from_slice(control.strings),
            Request::Directory(path)
            | Request::Read(path)
            | Request::GetPerms(path)
            | Request::Mkdir(path)
            | Request::Rm(path) => strings(&[path.as_str().as_bytes()]),
            Request::Watch { path, token, depth } => {
                strings(&[path.as_str().as_bytes(), token]);
                if let Some(depth) = depth {
                    strings(&[&text((*depth).into())]);
                }
            }
            Request::Unwatch { path, token } => strings(&[path.as_str().as_bytes(), token]),
            Request::TransactionStart | Request::ResetWatches => strings(&[b""]),
            Request::TransactionEnd { commit } => strings(&[if *commit { b"T" } else { b"F" }]),
            Request::Introduce { domid, gfn, port } => {
                strings(&[&dom(*domid), &text(gfn.0), &text(port.0.into())]);
            }
            Request::Release(domid)
            | Request::GetDomainPath(domid)
            | Request::IsDomainIntroduced(domid)
            | Request::Resume(domid) => strings(&[&dom(*domid)]),
            Request::Write { path, value } => {
                strings(&[path.as_str().as_bytes()]);
                out.extend_from_slice(value);
            }
            Request::SetPerms { path, perms } => {
                strings(&[path.as_str().as_bytes()]);
                perms.emit(out);
            }
            Request::SetTarget { domid, target } => strings(&[&dom(*domid), &dom(*target)]),
            Request::DirectoryPart { path, offset } => {
                strings(&[path.as_str().as_bytes(), &text(*offset)]);
            }
            Request::GetFeature(domid) => domid.iter().for_each(|d| strings(&[&dom(*d)])),
            Request::SetFeature { domid, features } => {
                strings(&[&dom(*domid), &text(features.bits().into())]);
            }
            Request::GetQuota { domid, quota } => {
                domid.iter().for_each(|d| strings(&[&dom(*d)]));
                quota.iter().for_each(|q| strings(&[q.name().as_bytes()]));
            }
            Request::SetQuota { domid, quota, value } => {
                domid.iter().for_each(|d| strings(&[&dom(*d)]));
                strings(&[quota.name().as_bytes(), &text((*value).into())]);
            }
        }
    }
}

/// Reads `path token [depth]`. Ignores bytes after the last NUL, as C xenstored does.
fn parse_watch(payload: &[u8]) -> Option<Request<'_>> {
    let mut strings = Strings::new(payload);
    let path = Path::parse(strings.next()?)?;
    let token = strings.next()?;
    let depth = match strings.next() {
        Some(text) => Some(decimal(text)?),
        None => None,
    };
    strings.next().is_none().then_some(Request::Watch { path, token, depth })
}

fn parse_get_quota(payload: &[u8]) -> Option<Request<'_>> {
    if payload.is_empty() {
        return Some(Request::GetQuota { domid: None, quota: None });
    }
    let (who, name) = match (one(payload), exactly(payload)) {
        (Some(name), _) => (None, name),
        (None, Some([who, name])) => (Some(domid(who)?), name),
        (None, None) => return None,
    };
    Some(Request::GetQuota { domid: who, quota: Some(Quota::parse(name)?) })
}

fn parse_set_quota(payload: &[u8]) -> Option<Request<'_>> {
    let (who, [name, value]) = match (exactly(payload), exactly(payload)) {
        (Some(pair), _) => (None, pair),
        (None, Some([who, name, value])) => (Some(domid(who)?), [name, value]),
        (None, None) => return None,
    };
    Some(Request::SetQuota { domid: who, quota: Quota::parse(name)?, value: quota_value(value)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(op: u32, payload: &str) -> Result<Request<'_>, Errno> {
        Request::parse(Operation::from_wire(op).unwrap(), payload.as_bytes())
    }

    // Fails if a payload that existing clients send is refused, or does not round-trip.
    #[test]
    fn payloads_of_existing_clients_round_trip() {
        let sent = [
            (0, "print\0hello\0"),
            (1, "/a\0"),
            (2, "data/x\0"),
            (3, "@releaseDomain\0"),
            (4, "/a\0tok\0"),
            (4, "/a\0\0"),
            (4, "@releaseDomain\0t\x001\0"),
            (5, "/a\0tok\0"),
            (6, "\0"),
            (7, "T\0"),
            (7, "F\0"),
            (8, "5\x00123456\x009\0"),
            (9, "5\0"),
            (10, "32752\0"),
            (11, "/a\0value"),
            (11, "/a\0"),
            (11, "/a\0v\0w\0"),
            (12, "/a\0"),
            (13, "/a\0"),
            (14, "/a\0n0\0r5\0"),
            (17, "5\0"),
            (18, "5\0"),
            (19, "7\x005\0"),
            (21, "\0"),
            (22, "/a\x000\0"),
            (23, ""),
            (23, "5\0"),
            (24, "5\x0014\0"),
            (25, ""),
            (25, "nodes\0"),
            (25, "5\0nodes\0"),
            (26, "nodes\x007\0"),
            (26, "5\0soft-memory\x000\0"),
        ];
        for (op, payload) in sent {
            let request = parse(op, payload).unwrap_or_else(|e| panic!("{op} {payload:?}: {e}"));
            assert_eq!(request.operation().as_wire(), op);
            let is_on_tree = request.operation().facet().is_some();
            assert_eq!(request.tree_path().is_some(), is_on_tree, "{op} {payload:?}");
            let mut out = Vec::new();
            request.emit(&mut out);
            assert_eq!(out, payload.as_bytes(), "{op} {payload:?}");
        }
    }

    // Fails if a malformed payload is accepted. The rows follow the parsing rules that C xenstored and
    // oxenstored share, and plain decimals where they disagree.
    #[test]
    fn malformed_payload_is_einval() {
        let malformed = [
            (0, ""),
            (0, "print"),
            (1, ""),
            (1, "/a"),
            (1, "/a\0b"),
            (1, "/a\0\0"),
            (2, "\0"),
            (2, "/a/\0"),
            (3, "/a"),
            (4, "/a\0"),
            (4, "/a\0t\0x\0"),
            (4, "/a\0t\0-1\0"),
            (4, "/a\0t\x001\0x\0"),
            (4, "/a.b\0t\0"),
            (5, "/a\0t\x001\0"),
            (5, "/a\0"),
            (7, ""),
            (7, "T"),
            (7, "T\0\0"),
            (7, "X\0"),
            (8, "5\x001\x000\0"),
            (8, "5\x001\0"),
            (8, "x\x001\x001\0"),
            (9, ""),
            (9, "65536\0"),
            (9, "5"),
            (9, "5\x006\0"),
            (10, "\0"),
            (11, "/a"),
            (11, ""),
            (12, "/a"),
            (13, "/a\0x"),
            (14, "/a\0"),
            (14, "/a\0n0"),
            (14, "/a\0q0\0"),
            (17, "\0"),
            (18, "a\0"),
            (19, "5\0"),
            (19, "5\x006\x007\0"),
            (22, "/a\0"),
            (22, "/a\0x\0"),
            (22, "/a\0-1\0"),
            (22, "/a\x000\0x"),
            (23, "\0"),
            (23, "5\x006\0"),
            (24, "5\0"),
            (24, "5\0x\0"),
            (25, "bogus\0"),
            (25, "5\0nodes\0x\0"),
            (26, "nodes\0"),
            (26, "nodes\x004294967295\0"),
            (26, "nodes\0-1\0"),
            (26, "bogus\x001\0"),
        ];
        for (op, payload) in malformed {
            assert_eq!(parse(op, payload), Err(Errno::Einval), "{op} {payload:?}");
        }
        assert_eq!(parse(15, "/a\0t\0"), Err(Errno::Enosys));
        assert_eq!(parse(16, "EINVAL\0"), Err(Errno::Enosys));
    }

    // Fails if bytes after the last NUL are refused where C xenstored ignores them.
    #[test]
    fn bytes_after_the_last_nul_are_ignored() {
        for (op, payload) in
            [(4, "/a\0t\0junk"), (5, "/a\0t\0junk"), (14, "/a\0n0\0junk"), (8, "5\x001\x002\0\0x")]
        {
            assert!(parse(op, payload).is_ok(), "{op} {payload:?}");
        }
    }
}
