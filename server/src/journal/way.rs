//! How far a ring has come, as far as the journal knows.

use xenstore_protocol::ring::filled;
use xenstore_store::IoState;
use xenstore_transport::ring::Indices;

/// Most bytes of answers that can wait to be written: more are not taken before some have gone.
const TAIL: usize = 512 * 1024;
/// Bytes of one direction of a ring.
const RING: u32 = xenstore_protocol::ring::SIZE;

/// What was taken from a ring and given to it since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Way {
    /// Bytes of requests that were taken.
    pub(super) consumed: u32,
    /// Bytes of answers that were made.
    pub(super) produced: u32,
    /// The last bytes that were taken and not executed.
    pub(super) unread: Vec<u8>,
    /// The last bytes that were made.
    pub(super) tail: Vec<u8>,
}

/// How to go on with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Where it was.
    Goes,
    /// The guest has started anew, and nothing has been done for it since.
    Anew,
    /// Its page says what cannot be.
    Broken,
}

/// Where to go on with a ring by what its page says. Requests were taken up to `before`; answers were
/// made from `before` on, this many bytes, and nobody has written down how many of them have gone.
/// The guest can have written anything into the page, of which `req_prod` is its own; what it says
/// decides over nothing but its own bytes.
pub(crate) fn settle(
    before: Indices,
    tail: usize,
    page: Indices,
    req_prod: u32,
) -> (Indices, Settled) {
    // Less was put down than has been taken if the rings have started anew.
    let is_same = filled(req_prod, before.req_cons).is_some();
    let gone = page.rsp_prod.wrapping_sub(before.rsp_prod) as usize;
    let untold = before.req_cons.wrapping_sub(page.req_cons);
    if is_same && gone <= tail && untold <= RING {
        (Indices { req_cons: before.req_cons, rsp_prod: page.rsp_prod }, Settled::Goes)
    } else if page == Indices::default() {
        (page, Settled::Anew)
    } else {
        (page, Settled::Broken)
    }
}

/// The same in the state of the connection, from which it goes on.
pub(crate) fn set_out(io: &mut IoState, (indices, settled): (Indices, Settled)) {
    let before = io.indices.unwrap_or_default().1;
    if settled == Settled::Goes {
        let gone = indices.rsp_prod.wrapping_sub(before) as usize;
        io.output.drain(..gone.min(io.output.len()));
    } else {
        (io.input, io.output) = (Vec::new(), Vec::new());
        io.broken = settled == Settled::Broken;
    }
    io.indices = Some((indices.req_cons, indices.rsp_prod));
}

impl Way {
    /// That of a connection as it is in a state. One that has failed begins at the start of its ring,
    /// when its guest lets it.
    pub(super) fn of(io: &IoState) -> Way {
        if io.broken {
            return Way::default();
        }
        let (consumed, written) = io.indices.unwrap_or_default();
        Way {
            consumed,
            produced: written.wrapping_add(word(io.output.len())),
            unread: io.input.clone(),
            tail: io.output.clone(),
        }
    }

    /// The reverse of [`Way::of`].
    pub(super) fn put(self, io: &mut IoState) {
        io.indices = Some((self.consumed, self.produced.wrapping_sub(word(self.tail.len()))));
        (io.input, io.output) = (self.unread, self.tail);
    }

    /// Requests of this many bytes were answered with these.
    pub(super) fn answered(&mut self, requests: usize, answers: &[u8]) {
        let known = self.unread.len().min(requests);
        self.unread.drain(..known);
        self.consumed = self.consumed.wrapping_add(word(requests - known));
        self.made(answers);
    }

    /// These bytes were made.
    pub(super) fn made(&mut self, bytes: &[u8]) {
        self.produced = self.produced.wrapping_add(word(bytes.len()));
        self.tail.extend_from_slice(bytes);
        if self.tail.len() > 2 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
    }

    /// Besides what was executed, these bytes were taken.
    pub(super) fn left_over(&mut self, bytes: &[u8]) {
        self.consumed = self.consumed.wrapping_sub(word(self.unread.len()));
        self.consumed = self.consumed.wrapping_add(word(bytes.len()));
        self.unread = bytes.to_vec();
    }
}

fn word(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if bytes are counted twice or not at all, however they were taken.
    #[test]
    fn bytes_are_counted_once() {
        let mut way = Way { consumed: u32::MAX - 10, ..Way::default() };
        way.answered(20, b"abc");
        assert_eq!((way.consumed, way.produced), (9, 3));
        way.left_over(&[1; 30]);
        assert_eq!(way.consumed, 39);
        way.answered(20, b"");
        assert_eq!((way.consumed, way.unread.len()), (39, 10));
        way.answered(25, b"d");
        assert_eq!((way.consumed, way.unread.len(), way.produced), (54, 0, 4));
        assert_eq!(way.tail, b"abcd");
        way.left_over(&[1; 7]);
        way.left_over(&[1; 9]);
        assert_eq!(way.consumed, 63);
    }

    // Fails if what a guest writes into its page makes us give it bytes that are not its own, or
    // give it up without need.
    #[test]
    fn the_page_is_believed_only_where_it_can_be_right() {
        let indices = |req_cons, rsp_prod| Indices { req_cons, rsp_prod };
        let settle = |page| settle(indices(5000, 800), 100, page, 5100);
        let goes = |page| settle(page) == (indices(5000, page.rsp_prod), Settled::Goes);
        assert!(goes(indices(5000, 900)) && goes(indices(4500, 800)));
        for page in [(3975, 900), (5001, 900), (5000, 799), (5000, 901)] {
            assert_eq!(settle(indices(page.0, page.1)).1, Settled::Broken, "{page:?}");
        }
        assert_eq!(settle(indices(0, 0)), (indices(0, 0), Settled::Anew));
        let young =
            |consumed, put_down| super::settle(indices(consumed, 0), 200, indices(0, 0), put_down);
        assert_eq!(young(0, 0), (indices(0, 0), Settled::Goes));
        assert_eq!(young(300, 300), (indices(300, 0), Settled::Goes), "not told of anything yet");
        assert_eq!(young(300, 0), (indices(0, 0), Settled::Anew));
    }
}
