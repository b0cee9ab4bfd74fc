//! The server's side of one connection, without I/O.

use alloc::vec::Vec;

use crate::{Deframer, Frame, FrameTooLong, Header};

/// Bytes on their way in and out of one connection.
///
/// Feed what was read to [`Connection::receive`] until it gives no more frames; append answers to
/// [`Connection::out`]; write [`Connection::unsent`] and say how much went with
/// [`Connection::sent`]. Stop reading while [`Connection::is_full`]: then a client that does not
/// read its answers costs a bounded amount of memory and slows nobody but itself.
#[derive(Debug, Default)]
pub struct Connection {
    deframer: Deframer,
    out: Vec<u8>,
    sent: usize,
    /// Bytes at the start of `out` that are the rest of a message.
    rest: usize,
}

impl Connection {
    /// Unsent bytes above which no more requests should be taken.
    pub const HIGH_WATER: usize = 64 * 1024;

    /// The next frame; see [`Deframer::next`]. The second part is where its answer goes.
    #[allow(clippy::type_complexity)]
    pub fn receive<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<(Frame<'s>, &'s mut Vec<u8>)>, FrameTooLong> {
        Ok(self.deframer.next(input)?.map(|frame| (frame, &mut self.out)))
    }

    /// Where answers and events are appended, as whole frames.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// What is still to be written.
    pub fn unsent(&self) -> &[u8] {
        &self.out[self.sent..]
    }

    /// `count` more bytes of [`Connection::unsent`] have been written.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.out.len() {
            (self.sent, self.rest) = (0, 0);
            self.out.clear();
            // A burst does not keep its memory: idle connections are many.
            self.out.shrink_to(4096);
        } else if self.sent >= Self::HIGH_WATER {
            // One who always leaves something does not keep what it has read.
            self.rest = self.partly_sent();
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// How many bytes of [`Connection::unsent`] are the rest of a message that has been sent in part.
    pub fn partly_sent(&self) -> usize {
        let mut at = self.rest;
        while at < self.sent {
            let header = self.out.get(at..).and_then(|message| message.first_chunk());
            let len = header.map_or(0, |header| Header::parse(header).len);
            at += crate::HEADER_LEN + usize::try_from(len).unwrap_or(0);
        }
        at.min(self.out.len()) - self.sent
    }

    /// Goes on where another was: with bytes that it has not sent, of which so many are the rest of
    /// a message.
    pub fn resume(unsent: Vec<u8>, rest: usize) -> Self {
        let rest = rest.min(unsent.len());
        Connection { deframer: Deframer::default(), out: unsent, sent: 0, rest }
    }

    /// Is the reader so far behind that its requests should wait?
    pub fn is_full(&self) -> bool {
        self.unsent().len() >= Self::HIGH_WATER
    }

    /// The incomplete frame at the end of what has been received.
    pub fn partial(&self) -> &[u8] {
        self.deframer.partial()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the rest of a message that went in part is counted wrongly, also when what has been
    // sent was forgotten in between, or for another who goes on.
    #[test]
    fn the_rest_of_a_message_is_known() {
        let mut connection = Connection::default();
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
                connection = Connection::resume(unsent, rest);
                assert_eq!(connection.partly_sent(), rest);
            }
            let count = connection.unsent().len().min(7919);
            connection.sent(count);
            total += count;
        }
    }

    // Fails if partial writes lose or repeat bytes.
    #[test]
    fn bytes_leave_in_order_whatever_the_writes() {
        let mut connection = Connection::default();
        connection.out().extend_from_slice(b"abcdef");
        connection.sent(2);
        connection.out().extend_from_slice(b"gh");
        assert_eq!(connection.unsent(), b"cdefgh");
        connection.sent(6);
        assert_eq!(connection.unsent(), b"");
        connection.out().extend_from_slice(b"i");
        assert_eq!(connection.unsent(), b"i");
    }

    // Fails if a reader who always leaves something makes what it has read stay (XSA-326).
    #[test]
    fn what_has_been_sent_is_not_kept() {
        let mut connection = Connection::default();
        for _ in 0..10_000 {
            connection.out().extend_from_slice(&[7; 1000]);
            connection.sent(if connection.unsent().len() > 1000 { 1000 } else { 999 });
        }
        assert!(!connection.unsent().is_empty());
        assert!(connection.out().len() < 2 * Connection::HIGH_WATER);
    }
}
