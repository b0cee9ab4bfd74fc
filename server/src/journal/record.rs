//! The records of a journal. `docs/formats.md` describes them byte by byte.

use xenstore_store::{ConnId, Input};

/// A record. The records that belong to an input follow it immediately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// An input of the engine.
    Input(Input<'a>),
    /// Replies of the hypervisor, to the last request of the input.
    HostReplies(&'a [u8]),
    /// The input, at most one request, was refused: see [`Recovery::refuse`](super::recovery::Recovery::refuse).
    Refused,
    /// All bytes that were read from a ring and not executed.
    Unread {
        conn: ConnId,
        /// Whole requests, then a part of one.
        bytes: &'a [u8],
    },
    /// Replaces the end of the replies of a connection. The reply to a live update is known later.
    ReplaceReply {
        conn: ConnId,
        /// Bytes at the end of the replies that are not sent.
        withheld: u32,
        /// Bytes that are sent.
        bytes: &'a [u8],
    },
    /// A guest has set the indices of its ring to 0.
    Zeroed {
        conn: ConnId,
        /// Bytes at the end of the replies that are not sent yet.
        unsent: u32,
    },
}

// Numbers below are kinds of inputs.
const HOST_REPLIES: u8 = 0x80;
const REFUSED: u8 = 0x81;
const UNREAD: u8 = 0x82;
const ZEROED: u8 = 0x83;
const REPLACE_REPLY: u8 = 0x84;

impl<'a> Record<'a> {
    /// Appends the body of the record.
    pub(super) fn emit(&self, out: &mut Vec<u8>) {
        match self {
            Record::Input(input) => input.emit(out),
            Record::HostReplies(replies) => {
                out.push(HOST_REPLIES);
                out.extend_from_slice(replies);
            }
            Record::Refused => out.push(REFUSED),
            Record::Unread { conn, bytes } => {
                out.push(UNREAD);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Record::ReplaceReply { conn, withheld, bytes } => {
                out.push(REPLACE_REPLY);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&withheld.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Record::Zeroed { conn, unsent } => {
                out.push(ZEROED);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&unsent.to_le_bytes());
            }
        }
    }

    /// Parses the body of a record. Returns `None` if it is not one of this version.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Record<'a>> {
        Some(match bytes.split_first()? {
            (&HOST_REPLIES, replies) => Record::HostReplies(replies),
            (&REFUSED, []) => Record::Refused,
            (&UNREAD, rest) => {
                let (conn, bytes) = rest.split_first_chunk()?;
                Record::Unread { conn: ConnId(u64::from_le_bytes(*conn)), bytes }
            }
            (&REPLACE_REPLY, rest) => {
                let (conn, rest) = rest.split_first_chunk()?;
                let (withheld, bytes) = rest.split_first_chunk()?;
                let (conn, withheld) = (u64::from_le_bytes(*conn), u32::from_le_bytes(*withheld));
                Record::ReplaceReply { conn: ConnId(conn), withheld, bytes }
            }
            (&ZEROED, rest) => {
                let (conn, unsent) = rest.split_first_chunk()?;
                let unsent = u32::from_le_bytes(unsent.try_into().ok()?);
                Record::Zeroed { conn: ConnId(u64::from_le_bytes(*conn)), unsent }
            }
            _ => Record::Input(Input::parse(bytes)?),
        })
    }
}
