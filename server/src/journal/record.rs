//! What stands in a journal.

use xenstore_store::{ConnId, Input};

/// A record. What belongs to an input comes right after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// Something that is done to the engine.
    Input(Input<'a>),
    /// What the machine answered meanwhile, to the last request if there are more than one.
    Answers(&'a [u8]),
    /// The input, at most one request, was refused: see [`Recovery::refuse`](super::recovery::Recovery::refuse).
    Refused,
    /// All that was taken from a ring and not executed.
    LeftOver {
        /// Whose.
        conn: ConnId,
        /// Whole requests, then a part of one.
        bytes: &'a [u8],
    },
    /// The last reply of a connection is not written, or another one is: that of a live update, which is
    /// known later.
    Instead {
        /// Whose.
        conn: ConnId,
        /// Bytes of the last reply, which is not written.
        withheld: u32,
        /// What is written.
        bytes: &'a [u8],
    },
    /// A guest has set the indices of its ring to 0.
    Zeroed {
        /// Whose.
        conn: ConnId,
        /// Number of bytes at the end of the replies that are still to be written.
        unsent: u32,
    },
}

// Inputs have small numbers.
const ANSWERS: u8 = 0x80;
const REFUSED: u8 = 0x81;
const LEFT_OVER: u8 = 0x82;
const ZEROED: u8 = 0x83;
const INSTEAD: u8 = 0x84;

impl<'a> Record<'a> {
    /// Appends it as bytes.
    pub(super) fn emit(&self, out: &mut Vec<u8>) {
        match self {
            Record::Input(input) => input.emit(out),
            Record::Answers(answers) => {
                out.push(ANSWERS);
                out.extend_from_slice(answers);
            }
            Record::Refused => out.push(REFUSED),
            Record::LeftOver { conn, bytes } => {
                out.push(LEFT_OVER);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Record::Instead { conn, withheld, bytes } => {
                out.push(INSTEAD);
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

    /// The reverse of [`Record::emit`]; `None` for anything else.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Record<'a>> {
        Some(match bytes.split_first()? {
            (&ANSWERS, answers) => Record::Answers(answers),
            (&REFUSED, []) => Record::Refused,
            (&LEFT_OVER, rest) => {
                let (conn, bytes) = rest.split_first_chunk()?;
                Record::LeftOver { conn: ConnId(u64::from_le_bytes(*conn)), bytes }
            }
            (&INSTEAD, rest) => {
                let (conn, rest) = rest.split_first_chunk()?;
                let (withheld, bytes) = rest.split_first_chunk()?;
                let (conn, withheld) = (u64::from_le_bytes(*conn), u32::from_le_bytes(*withheld));
                Record::Instead { conn: ConnId(conn), withheld, bytes }
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
