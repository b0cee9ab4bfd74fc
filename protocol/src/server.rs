//! The server's side of one connection, without I/O.

use alloc::vec::Vec;

use crate::frame::{Deframer, Frame, FrameTooLong};
use crate::header::Header;
use crate::limits::HEADER_LEN;

/// The unread and unsent bytes of one connection, on the server.
///
/// Pass received bytes to [`ServerConnection::receive`] until it returns no frame. Append replies and
/// events to [`ServerConnection::out`]. Write [`ServerConnection::unsent`], and report the written
/// length to [`ServerConnection::sent`]. Stop reading while [`ServerConnection::is_full`]: a client
/// that does not read its replies then costs a bounded amount of memory, and delays only itself.
#[derive(Debug, Default)]
pub struct ServerConnection {
    deframer: Deframer,
    out: Vec<u8>,
    sent: usize,
    /// Bytes at the start of `out` that are the rest of a partly sent message.
    rest: usize,
}

impl ServerConnection {
    /// Unsent bytes from which on the connection is full.
    pub const HIGH_WATER: usize = 64 * 1024;

    /// Takes the next frame; see [`Deframer::next`]. Also returns the queue for its reply.
    ///
    /// # Errors
    ///
    /// Fails if the frame is too long. The connection must be closed.
    #[allow(clippy::type_complexity)]
    pub fn receive<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<(Frame<'s>, &'s mut Vec<u8>)>, FrameTooLong> {
        Ok(self.deframer.next(input)?.map(|frame| (frame, &mut self.out)))
    }

    /// The queue of unsent bytes. Append complete frames only.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// The bytes to write.
    pub fn unsent(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// Records that the first `count` bytes of [`ServerConnection::unsent`] have been written.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.out.len() {
            (self.sent, self.rest) = (0, 0);
            self.out.clear();
            // Idle connections are many: they keep little capacity.
            self.out.shrink_to(4096);
        } else if self.sent >= Self::HIGH_WATER {
            // A client that never reads everything must not keep sent bytes in memory.
            self.rest = self.partly_sent();
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// The number of bytes at the start of [`ServerConnection::unsent`] that are the rest of a partly
    /// sent message.
    pub fn partly_sent(&self) -> usize {
        let mut at = self.rest;
        while at < self.sent {
            let header = self.out.get(at..).and_then(|message| message.first_chunk());
            let len = header.map_or(0, |header| Header::parse(header).len);
            at += HEADER_LEN + usize::try_from(len).unwrap_or(0);
        }
        at.min(self.out.len()) - self.sent
    }

    /// Continues a connection that has these unsent bytes, of which the first `rest` are the rest of
    /// a partly sent message.
    pub fn resume(unsent: Vec<u8>, rest: usize) -> Self {
        let rest = rest.min(unsent.len());
        ServerConnection { deframer: Deframer::default(), out: unsent, sent: 0, rest }
    }

    /// Returns true if [`ServerConnection::HIGH_WATER`] bytes or more are unsent.
    pub fn is_full(&self) -> bool {
        self.unsent().len() >= Self::HIGH_WATER
    }

    /// The received bytes of an incomplete frame.
    pub fn partial(&self) -> &[u8] {
        self.deframer.partial()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the rest of a partly sent message is measured wrongly, also after sent bytes were
    // dropped or the connection was resumed.
    #[test]
    fn rest_of_a_partly_sent_message_is_measured() {
        let mut connection = ServerConnection::default();
        for len in [3, 0, 4096, 100].into_iter().cycle().take(200) {
            connection.out().extend_from_slice(&Header { len, ..Header::default() }.emit());
            connection.out().extend(core::iter::repeat_n(0xff, len as usize));
        }
        let ends = [19, 35, 4147, 4263];
        let mut total = 0;
        while !connection.unsent().is_empty() {
            let at = total % 4263;
            let end = ends.iter().find(|end| **end > at).unwrap();
            let starts = [0, 19, 35, 4147].contains(&at);
            let rest = if starts { 0 } else { end - at };
            assert_eq!(connection.partly_sent(), rest, "after {total}");
            if total % 10 == 0 {
                let unsent = connection.unsent().to_vec();
                connection = ServerConnection::resume(unsent, rest);
                assert_eq!(connection.partly_sent(), rest);
            }
            let count = connection.unsent().len().min(7919);
            connection.sent(count);
            total += count;
        }
    }

    // Fails if a partial write loses or repeats bytes.
    #[test]
    fn partial_writes_keep_the_order_of_bytes() {
        let mut connection = ServerConnection::default();
        connection.out().extend_from_slice(b"abcdef");
        connection.sent(2);
        connection.out().extend_from_slice(b"gh");
        assert_eq!(connection.unsent(), b"cdefgh");
        connection.sent(6);
        assert_eq!(connection.unsent(), b"");
        connection.out().extend_from_slice(b"i");
        assert_eq!(connection.unsent(), b"i");
    }

    // Fails if sent bytes stay in memory for a client that never reads everything (XSA-326).
    #[test]
    fn sent_bytes_are_dropped() {
        let mut connection = ServerConnection::default();
        for _ in 0..10_000 {
            connection.out().extend_from_slice(&[7; 1000]);
            connection.sent(if connection.unsent().len() > 1000 { 1000 } else { 999 });
        }
        assert!(!connection.unsent().is_empty());
        assert!(connection.out().len() < 2 * ServerConnection::HIGH_WATER);
    }
}
