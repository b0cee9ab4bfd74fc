//! Replies, and their payloads.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::errno::Errno;
use crate::features::Features;
use crate::header::Header;
use crate::ids::{DomId, TxId};
use crate::limits::{HEADER_LEN, PAYLOAD_MAX};
use crate::operation::Operation;
use crate::perm::Perms;
use crate::quota::Quota;
use crate::strings::{Strings, decimal};

/// The reply to one request.
///
/// ```
/// use xenstore_protocol::{Errno, Header, Operation, Reply};
///
/// let request = Header { ty: Operation::Read.as_wire(), ..Header::default() };
/// let mut out = Vec::new();
/// Reply::Error(Errno::Enoent).emit(&request, &mut out);
/// assert_eq!(&out[16..], b"ENOENT\0");
/// assert_eq!(Reply::parse(Operation::Read, true, b"ENOENT\0"), Ok(Reply::Error(Errno::Enoent)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply<'a> {
    /// The request succeeded.
    Ok,
    /// The request failed.
    Error(Errno),
    /// The value of a node (READ) or the output of a command (CONTROL).
    Bytes(Cow<'a, [u8]>),
    /// The names of the children, each NUL-terminated (DIRECTORY).
    Names(Cow<'a, [u8]>),
    /// A part of the names (DIRECTORY_PART).
    Part {
        /// The generation of the list. Parts with equal generations are of the same list.
        generation: u64,
        /// Bytes of the list from the requested offset on.
        names: Cow<'a, [u8]>,
        /// True at the end of the list.
        last: bool,
    },
    /// The permission list of a node (GET_PERMS).
    Perms(Perms),
    /// The id of the new transaction (TRANSACTION_START).
    Transaction(TxId),
    /// The path of a domain's nodes (GET_DOMAIN_PATH).
    DomainPath(String),
    /// True if the domain is introduced (IS_DOMAIN_INTRODUCED).
    Introduced(bool),
    /// The features that a domain is offered (GET_FEATURE).
    Features(Features),
    /// The value of a quota (GET_QUOTA).
    Number(u32),
    /// The names of the quotas of the server, separated by blanks (GET_QUOTA).
    QuotaNames(Cow<'a, str>),
}

/// The payload of a reply is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MalformedReply(
    /// The type of the request.
    pub Operation,
);

impl fmt::Display for MalformedReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed reply to {}", self.0)
    }
}

impl core::error::Error for MalformedReply {}

impl<'a> Reply<'a> {
    /// The reply to GET_QUOTA of a server that has every [`Quota`].
    pub fn all_quota_names() -> Reply<'static> {
        let names: Vec<&str> = Quota::ALL.iter().map(|q| q.name()).collect();
        Reply::QuotaNames(Cow::Owned(names.join(" ")))
    }

    /// Appends header and payload of the reply to a request with header `request`. The error E2BIG
    /// replaces a payload over [`PAYLOAD_MAX`].
    pub fn emit(&self, request: &Header, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + HEADER_LEN, 0);
        self.emit_payload(out);
        let len = out.len() - start - HEADER_LEN;
        if len > PAYLOAD_MAX {
            out.truncate(start);
            return Reply::Error(Errno::E2big).emit(request, out);
        }
        let ty = match self {
            Reply::Error(_) => Operation::Error.as_wire(),
            _ => request.ty,
        };
        #[allow(clippy::cast_possible_truncation)] // at most PAYLOAD_MAX
        let header = Header { ty, len: len as u32, ..*request };
        out[start..start + HEADER_LEN].copy_from_slice(&header.emit());
    }

    fn emit_payload(&self, out: &mut Vec<u8>) {
        let mut string = |text: &str| {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        };
        match self {
            Reply::Ok => string("OK"),
            Reply::Error(error) => string(error.as_str()),
            Reply::Bytes(bytes) | Reply::Names(bytes) => out.extend_from_slice(bytes),
            Reply::Part { generation, names, last } => {
                string(&format!("{generation}"));
                out.extend_from_slice(names);
                if *last {
                    out.push(0);
                }
            }
            Reply::Perms(perms) => perms.emit(out),
            Reply::Transaction(id) => string(&format!("{id}")),
            Reply::Features(features) => string(&format!("{features}")),
            Reply::Number(number) => string(&format!("{number}")),
            Reply::DomainPath(path) => string(path),
            Reply::Introduced(yes) => string(if *yes { "T" } else { "F" }),
            Reply::QuotaNames(names) => string(names),
        }
    }

    /// The reply to GET_DOMAIN_PATH for `domid`.
    pub fn domain_path(domid: DomId) -> Reply<'static> {
        Reply::DomainPath(format!("/local/domain/{domid}"))
    }

    /// Reads the payload of a reply to a request of type `op`. `is_error` states whether the type of
    /// the reply is ERROR. An unknown error name is read as `EINVAL`, as in libxenstore.
    ///
    /// # Errors
    ///
    /// Fails if the payload is malformed.
    pub fn parse(
        op: Operation,
        is_error: bool,
        payload: &'a [u8],
    ) -> Result<Reply<'a>, MalformedReply> {
        Self::parse_payload(op, is_error, payload).ok_or(MalformedReply(op))
    }

    fn parse_payload(op: Operation, is_error: bool, payload: &'a [u8]) -> Option<Reply<'a>> {
        let text = || payload.strip_suffix(b"\0").filter(|t| !t.contains(&0));
        if is_error {
            return Some(Reply::Error(Errno::parse(text()?).unwrap_or(Errno::Einval)));
        }
        Some(match op {
            Operation::Control | Operation::Read => Reply::Bytes(Cow::Borrowed(payload)),
            Operation::Directory => {
                let whole = payload.is_empty() || payload.ends_with(b"\0");
                whole.then_some(Reply::Names(Cow::Borrowed(payload)))?
            }
            Operation::DirectoryPart => parse_part(payload)?,
            Operation::GetPerms => {
                payload.ends_with(b"\0").then_some(Reply::Perms(Perms::parse(payload)?))?
            }
            Operation::TransactionStart => Reply::Transaction(TxId(decimal(text()?)?)),
            Operation::GetDomainPath => {
                Reply::DomainPath(core::str::from_utf8(text()?).ok()?.into())
            }
            Operation::IsDomainIntroduced => Reply::Introduced(match text()? {
                b"T" => true,
                b"F" => false,
                _ => return None,
            }),
            Operation::GetFeature => Reply::Features(Features::from(decimal::<u32>(text()?)?)),
            Operation::GetQuota => match decimal(text()?) {
                Some(number) => Reply::Number(number),
                None => Reply::QuotaNames(Cow::Borrowed(core::str::from_utf8(text()?).ok()?)),
            },
            Operation::WatchEvent | Operation::Error => return None,
            _ => (payload == b"OK\0").then_some(Reply::Ok)?,
        })
    }
}

/// Reads `generation NUL names`, followed by one more NUL at the end of the list.
fn parse_part(payload: &[u8]) -> Option<Reply<'_>> {
    let mut strings = Strings::new(payload);
    let generation = decimal(strings.next()?)?;
    let names = strings.rest();
    let (names, last) = match names.strip_suffix(b"\0") {
        Some(names) if names.is_empty() || names.ends_with(b"\0") => (names, true),
        _ => (names, false),
    };
    Some(Reply::Part { generation, names: Cow::Borrowed(names), last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RequestId;

    const REQUEST: Header = Header { ty: 0, req_id: RequestId(7), tx_id: TxId(3), len: 99 };

    fn emit(reply: &Reply<'_>, op: Operation) -> (Header, Vec<u8>) {
        let mut out = Vec::new();
        reply.emit(&Header { ty: op.as_wire(), ..REQUEST }, &mut out);
        let header = Header::parse(out[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, out.len() - HEADER_LEN);
        (header, out.split_off(HEADER_LEN))
    }

    // Fails if a payload differs from docs/misc/xenstore.txt, or does not round-trip.
    #[test]
    fn replies_have_the_documented_bytes_and_round_trip() {
        let bytes = |b: &'static [u8]| Cow::Borrowed(b);
        let part = |generation, names, last| Reply::Part { generation, names: bytes(names), last };
        let rows: &[(Operation, Reply<'_>, &[u8])] = &[
            (Operation::Write, Reply::Ok, b"OK\0"),
            (Operation::Read, Reply::Bytes(bytes(b"v\0w")), b"v\0w"),
            (Operation::Read, Reply::Bytes(bytes(b"")), b""),
            (Operation::Directory, Reply::Names(bytes(b"a\0b\0")), b"a\0b\0"),
            (Operation::Directory, Reply::Names(bytes(b"")), b""),
            (Operation::DirectoryPart, part(12, b"a\0b\0", true), b"12\0a\0b\0\0"),
            (Operation::DirectoryPart, part(12, b"a\0b\0", false), b"12\0a\0b\0"),
            (Operation::DirectoryPart, part(1, b"", true), b"1\0\0"),
            (Operation::GetPerms, Reply::Perms(Perms::parse(b"n0\0r5\0").unwrap()), b"n0\0r5\0"),
            (Operation::TransactionStart, Reply::Transaction(TxId(17)), b"17\0"),
            (Operation::GetDomainPath, Reply::domain_path(DomId(5)), b"/local/domain/5\0"),
            (Operation::IsDomainIntroduced, Reply::Introduced(true), b"T\0"),
            (Operation::IsDomainIntroduced, Reply::Introduced(false), b"F\0"),
            (Operation::GetFeature, Reply::Features(Features::ALL), b"15\0"),
            (
                Operation::GetQuota,
                Reply::QuotaNames(Cow::Borrowed("nodes watches")),
                b"nodes watches\0",
            ),
        ];
        for (op, reply, payload) in rows {
            let (header, out) = emit(reply, *op);
            assert_eq!(&out, payload, "{op:?}");
            assert_eq!(header, Header { ty: op.as_wire(), len: header.len, ..REQUEST });
            assert_eq!(Reply::parse(*op, false, payload).as_ref(), Ok(reply));
        }
    }

    // Fails if an error lacks its NUL, its type or the ids of its request.
    #[test]
    fn error_is_its_name_and_a_nul() {
        let (header, out) = emit(&Reply::Error(Errno::Enoent), Operation::Read);
        assert_eq!((header.ty, header.req_id, header.tx_id), (16, REQUEST.req_id, REQUEST.tx_id));
        assert_eq!(out, b"ENOENT\0");
        assert_eq!(
            Reply::parse(Operation::Read, true, b"EQUOTA\0"),
            Ok(Reply::Error(Errno::Einval)),
            "clients read unknown names as EINVAL"
        );
    }

    // Fails if the limit of 4,096 bytes is off by one (XSA-72).
    #[test]
    fn reply_over_the_limit_becomes_e2big() {
        let fits = Reply::Bytes(Cow::Owned(alloc::vec![b'x'; PAYLOAD_MAX]));
        assert_eq!(emit(&fits, Operation::Read).0.len, 4096);
        let over = Reply::Bytes(Cow::Owned(alloc::vec![b'x'; PAYLOAD_MAX + 1]));
        let (header, out) = emit(&over, Operation::Read);
        assert_eq!((header.ty, out), (16, b"E2BIG\0".to_vec()));
    }

    // Fails if a malformed reply is accepted.
    #[test]
    fn malformed_reply_is_refused() {
        for (op, payload) in [
            (Operation::Write, &b"OK"[..]),
            (Operation::Write, b"NO\0"),
            (Operation::TransactionStart, b"x\0"),
            (Operation::IsDomainIntroduced, b"Y\0"),
            (Operation::Directory, b"a\0b"),
            (Operation::GetPerms, b""),
            (Operation::DirectoryPart, b"12"),
            (Operation::WatchEvent, b"/a\0t\0"),
        ] {
            assert_eq!(Reply::parse(op, false, payload), Err(MalformedReply(op)));
        }
    }
}
