//! Requests: what a client may ask, read from and written to payloads.

use alloc::vec::Vec;

use crate::{
    DomId, Errno, EvtchnPort, Features, Gfn, Operation, Path, Perms, Quota, Strings, decimal,
};

/// A request without its header. The text of paths, tokens and values is borrowed from the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// A command to the server itself.
    Control(Control<'a>),
    /// Names of the children of a node.
    Directory(Path<'a>),
    /// Value of a node.
    Read(Path<'a>),
    /// Permission list of a node.
    GetPerms(Path<'a>),
    /// Tell about changes at or below a path.
    Watch {
        /// Where.
        path: Path<'a>,
        /// Comes back with each event; any bytes but NUL.
        token: &'a [u8],
        /// Levels below `path` to tell about; all if absent. For a special path 1 asks for events
        /// that carry the domid.
        depth: Option<u32>,
    },
    /// Undo a WATCH.
    Unwatch {
        /// As given to WATCH.
        path: Path<'a>,
        /// As given to WATCH.
        token: &'a [u8],
    },
    /// Open a transaction.
    TransactionStart,
    /// Close the transaction that the header names.
    TransactionEnd {
        /// Apply its changes, or drop them.
        commit: bool,
    },
    /// Connect a domain.
    Introduce {
        /// Which.
        domid: DomId,
        /// Frame of its ring page; only a fallback for the grant table.
        gfn: Gfn,
        /// Its event channel port, never 0.
        port: EvtchnPort,
    },
    /// Disconnect a domain.
    Release(DomId),
    /// Where a domain's nodes are.
    GetDomainPath(DomId),
    /// Set the value of a node, creating it and its parents where needed.
    Write {
        /// Which node.
        path: Path<'a>,
        /// Any bytes.
        value: &'a [u8],
    },
    /// Create a node and its parents where needed.
    Mkdir(Path<'a>),
    /// Remove a node and all below it.
    Rm(Path<'a>),
    /// Replace the permission list of a node.
    SetPerms {
        /// Which node.
        path: Path<'a>,
        /// At least one entry; the first names the owner.
        perms: Perms,
    },
    /// Is a domain connected?
    IsDomainIntroduced(DomId),
    /// A domain runs again after a shutdown (suspend).
    Resume(DomId),
    /// Give a domain the rights of another (a device model and its guest).
    SetTarget {
        /// Who gets the rights.
        domid: DomId,
        /// Whose rights.
        target: DomId,
    },
    /// Drop all watches and transactions of this connection.
    ResetWatches,
    /// A part of the names of the children of a node.
    DirectoryPart {
        /// Which node.
        path: Path<'a>,
        /// Byte of the list of names to start at.
        offset: u64,
    },
    /// Feature bits that a domain (absent: the caller) is offered.
    GetFeature(Option<DomId>),
    /// Choose the feature bits of a domain before it is introduced.
    SetFeature {
        /// Which domain.
        domid: DomId,
        /// The features to offer.
        features: Features,
    },
    /// Names of all quotas, or the value of one, global or of a domain.
    GetQuota {
        /// Whose; absent: the value that new domains start with.
        domid: Option<DomId>,
        /// Which; absent: list their names.
        quota: Option<Quota>,
    },
    /// Set a quota, global or of a domain.
    SetQuota {
        /// Whose; absent: the value that new domains start with.
        domid: Option<DomId>,
        /// Which.
        quota: Quota,
        /// The limit; 0 for none.
        value: u32,
    },
}

/// A CONTROL request: a command and its arguments, all NUL-terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control<'a> {
    strings: &'a [u8],
}

impl<'a> Control<'a> {
    /// Takes NUL-terminated strings, at least one.
    pub fn new(strings: &'a [u8]) -> Option<Control<'a>> {
        strings.ends_with(b"\0").then_some(Control { strings })
    }

    /// The command.
    pub fn command(&self) -> &'a [u8] {
        Strings::new(self.strings).next().unwrap_or_default()
    }

    /// Its arguments.
    pub fn args(&self) -> Strings<'a> {
        let mut strings = Strings::new(self.strings);
        strings.next();
        strings
    }
}

/// The string, if the payload is exactly one.
fn one(payload: &[u8]) -> Option<&[u8]> {
    let mut strings = Strings::new(payload);
    strings.next().filter(|_| strings.rest().is_empty())
}

/// The strings, if the payload is exactly `N`.
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

/// The largest word is not a limit: C xenstored uses it for "not set".
fn quota_value(text: &[u8]) -> Option<u32> {
    decimal(text).filter(|value| *value != u32::MAX)
}

impl<'a> Request<'a> {
    /// Reads a payload. Every way of being malformed is EINVAL; a type that is not a request is
    /// ENOSYS.
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

    /// Writes the payload.
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

/// `path token [depth]`; bytes behind the last NUL are ignored, as C xenstored does.
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

    // Fails if a payload that existing clients send is refused, or is not written back as it was.
    #[test]
    fn what_clients_send_round_trips() {
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

    // Fails if a malformed payload is half-accepted. Rows follow the parsing rules that the
    // existing daemons share, and plain decimals where they disagree.
    #[test]
    fn malformed_payloads_are_einval() {
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

    // Fails if bytes behind the last NUL stop being ignored where C xenstored ignores them.
    #[test]
    fn trailing_bytes_are_ignored_where_the_grammar_allows() {
        for (op, payload) in
            [(4, "/a\0t\0junk"), (5, "/a\0t\0junk"), (14, "/a\0n0\0junk"), (8, "5\x001\x002\0\0x")]
        {
            assert!(parse(op, payload).is_ok(), "{op} {payload:?}");
        }
    }
}
