//! Inputs of an engine as data.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, Frame, HEADER_LEN};

use crate::domain::recorded::take;
use crate::ids::{Caller, ConnId, Millis};

/// One mutation of an engine; see [`Engine::apply`](crate::Engine::apply).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input<'a> {
    /// Opens a connection. The connection of a domain that is not introduced has ended already.
    Connect(Caller),
    /// Ends a connection: its watches, transactions and events are dropped. Has no effect if it has
    /// ended.
    Disconnect(ConnId),
    /// Resets a connection: its watches, transactions and events are dropped.
    Restart(ConnId),
    /// Executes requests. Only the last one may query the host, so that a record of the host's replies
    /// belongs to one request.
    Requests {
        /// The connection that sends the requests.
        conn: ConnId,
        /// The time of the requests.
        now: Millis,
        /// Whole frames as received.
        frames: &'a [u8],
    },
    /// Fetches queued events of a connection.
    Events {
        /// The connection.
        conn: ConnId,
        /// Bytes after which no further event is appended.
        limit: u32,
    },
    /// Queries the host for every known domain, after `VIRQ_DOM_EXC`. Shutdowns are announced; domains
    /// that are gone, or replaced by others with the same domid, are forgotten.
    DomainsChanged,
    /// Does deferred work, to be applied between other inputs while
    /// [`Engine::has_work`](crate::Engine::has_work) returns true.
    Work {
        /// Units of work, approximately.
        budget: u32,
    },
}

fn conn(bytes: &mut &[u8]) -> Option<ConnId> {
    take(bytes).map(u64::from_le_bytes).map(ConnId)
}

/// Returns the whole requests at the front of `frames`.
pub(crate) fn requests(mut frames: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    core::iter::from_fn(move || {
        let (frame, rest) = Frame::split_first(frames)?;
        frames = rest;
        Some(frame)
    })
}

impl<'a> Input<'a> {
    /// Appends the encoded input.
    #[inline]
    pub fn emit(&self, out: &mut Vec<u8>) {
        match self {
            Input::Connect(Caller::Socket) => out.push(0),
            Input::Connect(Caller::Domain(domid)) => {
                out.push(1);
                out.extend_from_slice(&domid.0.to_le_bytes());
            }
            Input::Disconnect(conn) => {
                out.push(2);
                out.extend_from_slice(&conn.0.to_le_bytes());
            }
            Input::Restart(conn) => {
                out.push(3);
                out.extend_from_slice(&conn.0.to_le_bytes());
            }
            Input::Requests { conn, now, frames } => {
                out.push(4);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&now.to_le_bytes());
                out.extend_from_slice(frames);
            }
            Input::Events { conn, limit } => {
                out.push(5);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&limit.to_le_bytes());
            }
            Input::DomainsChanged => out.push(6),
            Input::Work { budget } => {
                out.push(7);
                out.extend_from_slice(&budget.to_le_bytes());
            }
        }
    }

    /// Decodes what [`Input::emit`] has appended. Returns `None` for any other bytes.
    pub fn parse(mut bytes: &'a [u8]) -> Option<Input<'a>> {
        let bytes = &mut bytes;
        let input = match take::<1>(bytes)? {
            [0] => Input::Connect(Caller::Socket),
            [1] => Input::Connect(Caller::Domain(DomId(u16::from_le_bytes(take(bytes)?)))),
            [2] => Input::Disconnect(conn(bytes)?),
            [3] => Input::Restart(conn(bytes)?),
            [4] => {
                let (conn, now) = (conn(bytes)?, u64::from_le_bytes(take(bytes)?));
                let frames = core::mem::take(bytes);
                let whole = requests(frames).map(|frame| HEADER_LEN + frame.payload.len());
                if frames.is_empty() || whole.sum::<usize>() != frames.len() {
                    return None;
                }
                Input::Requests { conn, now, frames }
            }
            [5] => Input::Events { conn: conn(bytes)?, limit: u32::from_le_bytes(take(bytes)?) },
            [6] => Input::DomainsChanged,
            [7] => Input::Work { budget: u32::from_le_bytes(take(bytes)?) },
            _ => return None,
        };
        bytes.is_empty().then_some(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenstore_protocol::Header;

    // Fails if a decoded input differs from the encoded one, or if a truncated or extended one is
    // accepted.
    #[test]
    fn encoded_inputs_decode_to_the_same_input() {
        let one = [&Header { ty: 2, len: 3, ..Header::default() }.emit()[..], b"/a\0"].concat();
        let (conn, now) = (ConnId(0x1_0000_0005), 0x1234_5678_9abc);
        let inputs = [
            Input::Connect(Caller::Socket),
            Input::Connect(Caller::Domain(DomId(7))),
            Input::Disconnect(conn),
            Input::Restart(conn),
            Input::Requests { conn, now, frames: &one },
            Input::Events { conn, limit: 70_000 },
            Input::DomainsChanged,
            Input::Work { budget: 0x1234_5678 },
        ];
        for input in inputs {
            let mut bytes = Vec::new();
            input.emit(&mut bytes);
            assert_eq!(Input::parse(&bytes), Some(input));
            for len in 0..bytes.len() {
                assert_eq!(Input::parse(&bytes[..len]), None, "{len} bytes of {input:?}");
            }
            bytes.push(0);
            assert_eq!(Input::parse(&bytes), None, "{input:?} and a byte");
        }
        let two = [&one[..], &Header::default().emit()].concat();
        let (input, mut bytes) = (Input::Requests { conn, now, frames: &two }, Vec::new());
        input.emit(&mut bytes);
        assert_eq!(Input::parse(&bytes), Some(input));
        assert_eq!(Input::parse(&bytes[..bytes.len() - 1]), None);
    }
}
