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
    /// All bytes of requests that were taken, if they are no more than a ring and began at index 0;
    /// otherwise it is not as long as `consumed` says.
    pub(super) taken: Vec<u8>,
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
    /// At 0: the guest has set both of our indices to that. Its connection stays.
    Zeroed,
    /// Its page says what cannot be.
    Broken,
}

/// Where to go on with a ring by what its page says. Requests were taken up to `before`; answers were
/// made from `before` on, this many bytes, and nobody has written down how many of them have gone.
/// The guest can have written anything into the page, of which `req_prod` is its own; what it says
/// decides over nothing but its own bytes.
///
/// Indices that are 0 in the page mean one of two things: nothing has been notified on these rings yet, or
/// the guest has set them to 0. A ring that is `untold` still contains all consumed requests.
pub(crate) fn settle(
    before: Indices,
    tail: usize,
    page: Indices,
    req_prod: u32,
    untold: bool,
) -> (Indices, Settled) {
    let zero = Indices::default();
    if page == zero && before.req_cons != 0 && !untold {
        return (zero, Settled::Zeroed);
    }
    // Less was put down than has been taken if the guest has set its indices to 0.
    let is_same = filled(req_prod, before.req_cons).is_some();
    let gone = page.rsp_prod.wrapping_sub(before.rsp_prod) as usize;
    let behind = before.req_cons.wrapping_sub(page.req_cons);
    if is_same && gone <= tail && behind <= RING {
        (Indices { req_cons: before.req_cons, rsp_prod: page.rsp_prod }, Settled::Goes)
    } else if page == zero {
        (zero, Settled::Zeroed)
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
            taken: Vec::new(),
            produced: written.wrapping_add(word(io.output.len())),
            unread: io.input.clone(),
            tail: io.output.clone(),
        }
    }

    /// The reverse of [`Way::of`].
    pub(super) fn put(self, io: &mut IoState) {
        io.indices = Some((self.consumed, self.produced.wrapping_sub(word(self.tail.len()))));
        (io.taken, io.input, io.output) = (self.taken, self.unread, self.tail);
    }

    /// These requests were answered with these bytes.
    pub(super) fn answered(&mut self, requests: &[u8], answers: &[u8]) {
        let known = self.unread.len().min(requests.len());
        self.unread.drain(..known);
        self.took(&requests[known..]);
        self.made(answers);
    }

    fn took(&mut self, requests: &[u8]) {
        let is_known = word(self.taken.len()) == self.consumed;
        self.consumed = self.consumed.wrapping_add(word(requests.len()));
        if is_known && self.consumed <= RING {
            self.taken.extend_from_slice(requests);
        } else {
            self.taken.clear();
        }
    }

    /// The guest has set its indices to 0. The last `unsent` bytes of replies and events were not sent yet.
    pub(super) fn zeroed(&mut self, unsent: u32) {
        let keep = self.tail.len().min(unsent as usize);
        self.tail.drain(..self.tail.len() - keep);
        self.taken.clear();
        (self.consumed, self.produced) = (0, unsent);
    }

    /// The last bytes that were made are not written.
    pub(super) fn withhold(&mut self, count: u32) {
        self.produced = self.produced.wrapping_sub(count);
        self.tail.truncate(self.tail.len().saturating_sub(count as usize));
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
        match bytes.get(self.unread.len()..) {
            Some(new) => self.took(new),
            // Some were dropped with the indices that were valid for them: see `zeroed`.
            None => {
                self.taken.clear();
                let fewer = word(self.unread.len() - bytes.len());
                self.consumed = self.consumed.wrapping_sub(fewer);
            }
        }
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
        way.answered(&[1; 20], b"abc");
        assert_eq!((way.consumed, way.produced), (9, 3));
        way.left_over(&[1; 30]);
        assert_eq!(way.consumed, 39);
        way.answered(&[1; 20], b"");
        assert_eq!((way.consumed, way.unread.len()), (39, 10));
        way.answered(&[1; 25], b"d");
        assert_eq!((way.consumed, way.unread.len(), way.produced), (54, 0, 4));
        assert_eq!(way.tail, b"abcd");
        way.left_over(&[1; 7]);
        way.left_over(&[1; 9]);
        assert_eq!(way.consumed, 63);
    }

    // Fails if requests that were taken from index 0 on are not known in their order, or are taken for
    // known when some are missing.
    #[test]
    fn what_was_taken_from_zero_on_is_known() {
        let mut way = Way::default();
        way.answered(b"abc", b"");
        way.left_over(b"de");
        way.left_over(b"def");
        way.answered(b"defg", b"");
        assert_eq!((&way.taken[..], way.consumed), (&b"abcdefg"[..], 7));
        way.answered(&[1; 1017], b"");
        assert_eq!((way.taken.len(), way.consumed), (1024, 1024));
        way.answered(b"h", b"");
        way.answered(b"i", b"");
        assert_eq!((way.taken.len(), way.consumed), (0, 1026));
        let mut way = Way { consumed: 10, ..Way::default() };
        way.answered(b"abc", b"");
        assert_eq!((way.taken.len(), way.consumed), (0, 13), "the first 10 are not known");
    }

    // Fails if, of a ring that its guest has set to 0, old bytes are counted, or any that are still to be
    // written are not.
    #[test]
    fn a_ring_at_zero_counts_from_there() {
        let mut way = Way { consumed: 5000, ..Way::default() };
        way.left_over(b"request and half of ano");
        way.made(b"written, unsent");
        way.left_over(b"request");
        way.zeroed(6);
        assert_eq!((way.consumed, way.produced, &way.tail[..]), (0, 6, &b"unsent"[..]));
        way.answered(b"request", b"!");
        assert_eq!((way.consumed, way.produced, &way.tail[..]), (0, 7, &b"unsent!"[..]));
        way.answered(b"new", b"");
        assert_eq!((way.consumed, &way.taken[..]), (3, &b"new"[..]));
    }

    // Fails if what a guest writes into its page makes us give it bytes that are not its own, or
    // give it up without need.
    #[test]
    fn the_page_is_believed_only_where_it_can_be_right() {
        let indices = |req_cons, rsp_prod| Indices { req_cons, rsp_prod };
        let settle = |page| settle(indices(5000, 800), 100, page, 5100, false);
        let goes = |page| settle(page) == (indices(5000, page.rsp_prod), Settled::Goes);
        assert!(goes(indices(5000, 900)) && goes(indices(4500, 800)));
        for page in [(3975, 900), (5001, 900), (5000, 799), (5000, 901)] {
            assert_eq!(settle(indices(page.0, page.1)).1, Settled::Broken, "{page:?}");
        }
        assert_eq!(settle(indices(0, 0)), (indices(0, 0), Settled::Zeroed));
    }

    // Fails if replies are sent again to a guest that has set its indices to 0, or if a ring without any
    // notification is taken for such a guest's: its replies would be lost.
    #[test]
    fn a_young_ring_is_not_one_that_was_set_to_zero() {
        let indices = |req_cons, rsp_prod| Indices { req_cons, rsp_prod };
        let young = |consumed, put_down, untold| {
            super::settle(indices(consumed, 0), 200, indices(0, 0), put_down, untold)
        };
        assert_eq!(young(0, 0, true), (indices(0, 0), Settled::Goes));
        assert_eq!(young(300, 300, true), (indices(300, 0), Settled::Goes), "not notified");
        assert_eq!(young(300, 0, true), (indices(0, 0), Settled::Zeroed), "idle");
        for put_down in [100, 300, 400] {
            let what = format!("{put_down} bytes of other requests");
            assert_eq!(young(300, put_down, false), (indices(0, 0), Settled::Zeroed), "{what}");
        }
    }

    // Fails if a reply that was withheld still counts as written, or the one that is sent instead does not:
    // a ring would be taken for one that makes no sense after a crash.
    #[test]
    fn a_reply_that_is_sent_later_counts_when_it_is_sent() {
        let mut way = Way::default();
        way.answered(b"request", b"first");
        way.answered(b"update", b"OK");
        way.withhold(2);
        assert_eq!((way.produced, &way.tail[..]), (5, &b"first"[..]));
        way.made(b"a report");
        assert_eq!((way.produced, &way.tail[..]), (13, &b"firsta report"[..]));
    }
}
