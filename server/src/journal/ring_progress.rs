//! Where to resume a ring after a crash, by the journal and the page.

use xenstore_protocol::ring::{SIZE, filled};
use xenstore_store::ConnectionIo;
use xenstore_transport::ring::Indices;

/// How a ring is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingResume {
    /// At its indices.
    Continued,
    /// At index 0: the guest has set both indices of the server to 0. Its connection stays.
    Zeroed,
    /// At the indices of the page, after a restart: these contradict the journal.
    Restarted,
}

/// Returns the indices at which a ring is resumed. The journal knows that requests were read up to
/// `before`, and that `unsent` bytes of replies follow it; it does not know how many of these were sent.
///
/// The guest can write anything into the page. `page` has the indices of the server there, `req_prod` is
/// the guest's. What the page says only affects bytes of this guest.
///
/// Indices of 0 in the page mean that nothing has been published on this ring yet, or that the guest has
/// set them to 0. In a ring that is `unpublished`, all requests that were read are still present.
pub(crate) fn settle(
    before: Indices,
    unsent: usize,
    page: Indices,
    req_prod: u32,
    unpublished: bool,
) -> (Indices, RingResume) {
    let zero = Indices::default();
    if page == zero && before.req_cons != 0 && !unpublished {
        return (zero, RingResume::Zeroed);
    }
    // Fewer requests were written than read if the guest has set its indices to 0.
    let is_same = filled(req_prod, before.req_cons).is_some();
    let sent = page.rsp_prod.wrapping_sub(before.rsp_prod) as usize;
    let unacknowledged = before.req_cons.wrapping_sub(page.req_cons);
    if is_same && sent <= unsent && unacknowledged <= SIZE {
        (Indices { req_cons: before.req_cons, rsp_prod: page.rsp_prod }, RingResume::Continued)
    } else if page == zero {
        (zero, RingResume::Zeroed)
    } else {
        (page, RingResume::Restarted)
    }
}

/// Moves a connection to the indices at which its ring is resumed.
pub(crate) fn move_to(io: &mut ConnectionIo, indices: Indices, resume: RingResume) {
    let (_, before) = io.indices.unwrap_or_default();
    if resume == RingResume::Continued {
        let sent = indices.rsp_prod.wrapping_sub(before) as usize;
        io.unsent.drain(..sent.min(io.unsent.len()));
    } else {
        (io.unread, io.unsent) = (Vec::new(), Vec::new());
        io.failed = resume == RingResume::Restarted;
    }
    io.indices = Some((indices.req_cons, indices.rsp_prod));
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a guest can get bytes that are not its own by what it writes into its page, or if a valid
    // ring is restarted.
    #[test]
    fn a_ring_continues_only_where_the_page_agrees_with_the_journal() {
        let indices = |req_cons, rsp_prod| Indices { req_cons, rsp_prod };
        let settle = |page| settle(indices(5000, 800), 100, page, 5100, false);
        let continues =
            |page| settle(page) == (indices(5000, page.rsp_prod), RingResume::Continued);
        assert!(continues(indices(5000, 900)) && continues(indices(4500, 800)));
        for page in [(3975, 900), (5001, 900), (5000, 799), (5000, 901)] {
            assert_eq!(settle(indices(page.0, page.1)).1, RingResume::Restarted, "{page:?}");
        }
        assert_eq!(settle(indices(0, 0)), (indices(0, 0), RingResume::Zeroed));
    }

    // Fails if replies are sent again to a guest that has set its indices to 0, or if those of a ring
    // without published indices are lost.
    #[test]
    fn an_unpublished_ring_is_not_one_that_was_set_to_0() {
        let indices = |req_cons, rsp_prod| Indices { req_cons, rsp_prod };
        let settle = |read, req_prod, unpublished| {
            super::settle(indices(read, 0), 200, indices(0, 0), req_prod, unpublished)
        };
        assert_eq!(settle(0, 0, true), (indices(0, 0), RingResume::Continued));
        assert_eq!(settle(300, 300, true), (indices(300, 0), RingResume::Continued), "unpublished");
        assert_eq!(settle(300, 0, true), (indices(0, 0), RingResume::Zeroed), "idle");
        for req_prod in [100, 300, 400] {
            let what = format!("{req_prod} bytes of other requests");
            assert_eq!(settle(300, req_prod, false), (indices(0, 0), RingResume::Zeroed), "{what}");
        }
    }
}
