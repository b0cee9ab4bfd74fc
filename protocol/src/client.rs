//! The client's side of one connection, without I/O.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use crate::{
    Deframer, Frame, FrameTooLong, HEADER_LEN, Header, Operation, PAYLOAD_MAX, Request, RequestId,
    TxId, WatchEvent,
};

/// What a server sent, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// The answer to a request; read it with [`crate::Reply::parse`].
    Reply {
        /// Which request.
        req_id: RequestId,
        /// What it asked.
        op: Operation,
        /// Is it an ERROR?
        is_error: bool,
        /// The rest of it.
        payload: &'a [u8],
    },
    /// A watch fired.
    Event(WatchEvent<'a>),
}

/// The server broke the protocol; the connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A payload over the limit.
    TooLong(FrameTooLong),
    /// A reply to nothing that is being waited for.
    UnknownRequest(RequestId),
    /// A reply of another type than its request.
    WrongType {
        /// What was asked.
        expected: Operation,
        /// What was answered.
        got: u32,
    },
    /// An event that is not two strings.
    MalformedEvent,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::TooLong(error) => error.fmt(f),
            ProtocolError::UnknownRequest(id) => write!(f, "reply to unknown request id {id}"),
            ProtocolError::WrongType { expected, got } => {
                write!(f, "reply of type {got} to {}", expected.name())
            }
            ProtocolError::MalformedEvent => f.write_str("malformed watch event"),
        }
    }
}

impl core::error::Error for ProtocolError {}

/// A request whose payload is over [`PAYLOAD_MAX`]; nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestTooLong;

/// Requests under way, and bytes in both directions.
#[derive(Debug, Default)]
pub struct Connection {
    deframer: Deframer,
    waiting: BTreeMap<RequestId, Operation>,
    last_id: RequestId,
    out: Vec<u8>,
}

impl Connection {
    /// Appends a request to the bytes to be written and gives it an id. Any number may be under
    /// way; a server answers them in order, but nobody should rely on it.
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
            return Err(RequestTooLong);
        }
        // 0 is left to events; an id that is still waited for is not used twice.
        loop {
            self.last_id.0 = self.last_id.0.wrapping_add(1);
            if self.last_id != RequestId::EVENT && !self.waiting.contains_key(&self.last_id) {
                break;
            }
        }
        let op = request.operation();
        self.waiting.insert(self.last_id, op);
        #[allow(clippy::cast_possible_truncation)] // at most PAYLOAD_MAX
        let header = Header { ty: op.as_wire(), req_id: self.last_id, tx_id, len: len as u32 };
        self.out[start..start + HEADER_LEN].copy_from_slice(&header.emit());
        Ok(self.last_id)
    }

    /// What is to be written.
    pub fn unsent(&self) -> &[u8] {
        &self.out
    }

    /// `count` bytes of [`Connection::unsent`] have been written.
    pub fn sent(&mut self, count: usize) {
        self.out.drain(..count);
    }

    /// Requests whose answer has not come yet.
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Takes what was read; see [`Deframer::next`] for how to call it.
    pub fn receive<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Incoming<'s>>, ProtocolError> {
        match self.deframer.next(input) {
            Err(too_long) => Err(ProtocolError::TooLong(too_long)),
            Ok(None) => Ok(None),
            Ok(Some(frame)) => incoming(&mut self.waiting, frame).map(Some),
        }
    }
}

fn incoming<'a>(
    waiting: &mut BTreeMap<RequestId, Operation>,
    frame: Frame<'a>,
) -> Result<Incoming<'a>, ProtocolError> {
    let Header { ty, req_id, .. } = frame.header;
    let got = frame.header.operation();
    if got == Some(Operation::WatchEvent) {
        let event = WatchEvent::parse(frame.payload).ok_or(ProtocolError::MalformedEvent)?;
        return Ok(Incoming::Event(event));
    }
    let op = waiting.remove(&req_id).ok_or(ProtocolError::UnknownRequest(req_id))?;
    let is_error = got == Some(Operation::Error);
    if !is_error && got != Some(op) {
        return Err(ProtocolError::WrongType { expected: op, got: ty });
    }
    Ok(Incoming::Reply { req_id, op, is_error, payload: frame.payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Errno, Path, Reply};

    fn read(path: &'static [u8]) -> Request<'static> {
        Request::Read(Path::parse(path).unwrap())
    }

    // Fails if replies are matched by order instead of by id, or an event is taken for a reply.
    #[test]
    fn replies_are_matched_by_id_with_events_in_between() {
        let mut client = Connection::default();
        let first = client.request(TxId::NONE, &read(b"/a")).unwrap();
        let second = client.request(TxId::NONE, &read(b"/b")).unwrap();
        assert_ne!(first, second);
        let mut stream = Vec::new();
        let header = |req_id| Header { ty: 2, req_id, ..Header::default() };
        WatchEvent { path: b"/w", token: b"t" }.emit(&mut stream);
        Reply::Error(Errno::Enoent).emit(&header(second), &mut stream);
        Reply::Bytes(b"1"[..].into()).emit(&header(first), &mut stream);
        let mut input = &stream[..];
        assert!(matches!(client.receive(&mut input), Ok(Some(Incoming::Event(_)))));
        match client.receive(&mut input) {
            Ok(Some(Incoming::Reply { req_id, is_error: true, .. })) => assert_eq!(req_id, second),
            other => panic!("{other:?}"),
        }
        match client.receive(&mut input) {
            Ok(Some(Incoming::Reply { req_id, payload: b"1", .. })) => assert_eq!(req_id, first),
            other => panic!("{other:?}"),
        }
        assert_eq!(client.in_flight(), 0);
    }

    // Fails if a reply that nobody asked for, or of the wrong type, goes unnoticed.
    #[test]
    fn foreign_replies_are_protocol_errors() {
        let mut client = Connection::default();
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

    // Fails if the limit of 4096 bytes is off by one, or a refused request leaves bytes behind.
    #[test]
    fn requests_over_the_limit_are_not_sent() {
        let mut client = Connection::default();
        let value = [0; PAYLOAD_MAX - 2];
        let path = Path::parse(b"/a").unwrap();
        assert_eq!(
            client.request(TxId::NONE, &Request::Write { path, value: &value }),
            Err(RequestTooLong)
        );
        assert!(client.unsent().is_empty());
        assert!(client.request(TxId::NONE, &Request::Write { path, value: &value[1..] }).is_ok());
        assert_eq!(client.unsent().len(), HEADER_LEN + PAYLOAD_MAX);
    }
}
