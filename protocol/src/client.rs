//! The client's side of one connection, without I/O.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use crate::event::WatchEvent;
use crate::frame::{Deframer, Frame, FrameTooLong};
use crate::header::Header;
use crate::ids::{RequestId, TxId};
use crate::limits::{HEADER_LEN, PAYLOAD_MAX};
use crate::operation::Operation;
use crate::request::Request;

/// A message from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerMessage<'a> {
    /// The reply to a request.
    Reply {
        /// The id of the request.
        req_id: RequestId,
        /// The type of the request.
        op: Operation,
        /// True if the reply is an ERROR.
        is_error: bool,
        /// The payload; read it with [`crate::Reply::parse`].
        payload: &'a [u8],
    },
    /// A watch event.
    Event(WatchEvent<'a>),
}

/// The server has violated the protocol. The connection is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A payload exceeds the limit.
    TooLong(FrameTooLong),
    /// A reply has an id that no request in flight has.
    UnknownRequest(RequestId),
    /// A reply has another type than its request.
    WrongType {
        /// The type of the request.
        expected: Operation,
        /// The number of the type of the reply.
        got: u32,
    },
    /// An event is not two strings.
    MalformedEvent,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::TooLong(error) => error.fmt(f),
            ProtocolError::UnknownRequest(id) => write!(f, "reply to unknown request id {id}"),
            ProtocolError::WrongType { expected, got } => {
                write!(f, "reply of type {got} to {expected}")
            }
            ProtocolError::MalformedEvent => f.write_str("malformed watch event"),
        }
    }
}

impl core::error::Error for ProtocolError {}

/// The payload of a request exceeds [`PAYLOAD_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestTooLong(
    /// The length of the payload, in bytes.
    pub usize,
);

impl fmt::Display for RequestTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request of {} bytes, the limit is {PAYLOAD_MAX}", self.0)
    }
}

impl core::error::Error for RequestTooLong {}

/// The requests in flight and the unsent bytes of one connection, on the client.
///
/// Queue requests with [`ClientConnection::request`]. Write [`ClientConnection::unsent`], and report
/// the written length to [`ClientConnection::sent`]. Pass received bytes to
/// [`ClientConnection::receive`] until it returns no message.
#[derive(Debug, Default)]
pub struct ClientConnection {
    deframer: Deframer,
    in_flight: BTreeMap<RequestId, Operation>,
    last_id: RequestId,
    out: Vec<u8>,
}

impl ClientConnection {
    /// Appends a request in transaction `tx_id` to the unsent bytes, and returns its new id. The
    /// number of requests in flight is not limited. Servers reply in order; clients should use the ids.
    ///
    /// # Errors
    ///
    /// Fails, and appends nothing, if the payload exceeds [`PAYLOAD_MAX`].
    pub fn request(
        &mut self,
        tx_id: TxId,
        request: &Request<'_>,
    ) -> Result<RequestId, RequestTooLong> {
        let start = self.out.len();
        self.out.resize(start + HEADER_LEN, 0);
        request.emit(&mut self.out);
        let len = self.out.len() - start - HEADER_LEN;
        if len > PAYLOAD_MAX {
            self.out.truncate(start);
            return Err(RequestTooLong(len));
        }
        // Events have id 0. An id in flight is not used for a second request.
        loop {
            self.last_id.0 = self.last_id.0.wrapping_add(1);
            if self.last_id != RequestId::EVENT && !self.in_flight.contains_key(&self.last_id) {
                break;
            }
        }
        let op = request.operation();
        self.in_flight.insert(self.last_id, op);
        #[allow(clippy::cast_possible_truncation)] // at most PAYLOAD_MAX
        let header = Header { ty: op.as_wire(), req_id: self.last_id, tx_id, len: len as u32 };
        self.out[start..start + HEADER_LEN].copy_from_slice(&header.emit());
        Ok(self.last_id)
    }

    /// The bytes to write.
    pub fn unsent(&self) -> &[u8] {
        &self.out
    }

    /// Records that the first `count` bytes of [`ClientConnection::unsent`] have been written.
    ///
    /// # Panics
    ///
    /// Panics if fewer bytes are unsent.
    pub fn sent(&mut self, count: usize) {
        self.out.drain(..count);
    }

    /// The number of requests without a reply.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Takes the next message from received bytes; see [`Deframer::next`].
    ///
    /// # Errors
    ///
    /// Fails if the server violates the protocol. The connection must be closed.
    pub fn receive<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<ServerMessage<'s>>, ProtocolError> {
        match self.deframer.next(input) {
            Err(too_long) => Err(ProtocolError::TooLong(too_long)),
            Ok(None) => Ok(None),
            Ok(Some(frame)) => message(&mut self.in_flight, frame).map(Some),
        }
    }
}

fn message<'a>(
    in_flight: &mut BTreeMap<RequestId, Operation>,
    frame: Frame<'a>,
) -> Result<ServerMessage<'a>, ProtocolError> {
    let Header { ty, req_id, .. } = frame.header;
    let got = frame.header.operation();
    if got == Some(Operation::WatchEvent) {
        let event = WatchEvent::parse(frame.payload).ok_or(ProtocolError::MalformedEvent)?;
        return Ok(ServerMessage::Event(event));
    }
    let op = in_flight.remove(&req_id).ok_or(ProtocolError::UnknownRequest(req_id))?;
    let is_error = got == Some(Operation::Error);
    if !is_error && got != Some(op) {
        return Err(ProtocolError::WrongType { expected: op, got: ty });
    }
    Ok(ServerMessage::Reply { req_id, op, is_error, payload: frame.payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;
    use crate::path::Path;
    use crate::reply::Reply;

    fn read(path: &'static [u8]) -> Request<'static> {
        Request::Read(Path::parse(path).unwrap())
    }

    // Fails if replies are matched by order instead of by id, or an event is read as a reply.
    #[test]
    fn replies_match_by_id_between_events() {
        let mut client = ClientConnection::default();
        let first = client.request(TxId::NONE, &read(b"/a")).unwrap();
        let second = client.request(TxId::NONE, &read(b"/b")).unwrap();
        assert_ne!(first, second);
        let mut stream = Vec::new();
        let header = |req_id| Header { ty: 2, req_id, ..Header::default() };
        WatchEvent { path: b"/w", token: b"t" }.emit(&mut stream).unwrap();
        Reply::Error(Errno::Enoent).emit(&header(second), &mut stream);
        Reply::Bytes(b"1"[..].into()).emit(&header(first), &mut stream);
        let mut input = &stream[..];
        assert!(matches!(client.receive(&mut input), Ok(Some(ServerMessage::Event(_)))));
        match client.receive(&mut input) {
            Ok(Some(ServerMessage::Reply { req_id, is_error: true, .. })) => {
                assert_eq!(req_id, second)
            }
            other => panic!("{other:?}"),
        }
        match client.receive(&mut input) {
            Ok(Some(ServerMessage::Reply { req_id, payload: b"1", .. })) => {
                assert_eq!(req_id, first)
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(client.in_flight(), 0);
    }

    // Fails if a reply without a request, or of the wrong type, is accepted.
    #[test]
    fn reply_of_another_type_or_id_is_a_protocol_error() {
        let mut client = ClientConnection::default();
        let id = client.request(TxId::NONE, &read(b"/a")).unwrap();
        let mut reply = Vec::new();
        Reply::Ok.emit(&Header { ty: 11, req_id: id, ..Header::default() }, &mut reply);
        let expected = Operation::Read;
        assert_eq!(
            client.receive(&mut &reply[..]),
            Err(ProtocolError::WrongType { expected, got: 11 })
        );
        assert_eq!(client.receive(&mut &reply[..]), Err(ProtocolError::UnknownRequest(id)));
    }

    // Fails if the limit of 4,096 bytes is off by one, or a refused request appends bytes.
    #[test]
    fn request_over_the_limit_appends_nothing() {
        let mut client = ClientConnection::default();
        let value = [0; PAYLOAD_MAX - 2];
        let path = Path::parse(b"/a").unwrap();
        assert_eq!(
            client.request(TxId::NONE, &Request::Write { path, value: &value }),
            Err(RequestTooLong(4097))
        );
        assert!(client.unsent().is_empty());
        assert!(client.request(TxId::NONE, &Request::Write { path, value: &value[1..] }).is_ok());
        assert_eq!(client.unsent().len(), HEADER_LEN + PAYLOAD_MAX);
    }
}
