//! The ring page of a domain: its layout, and the arithmetic of its indices.
//!
//! The page is `struct xenstore_domain_interface` of `xen/include/public/io/xs_wire.h`;
//! `docs/misc/xenstore-ring.txt` describes it.
//!
//! ```
//! use xenstore_protocol::ring::{SIZE, filled, stretches};
//!
//! let (producer, consumer) = (1030, 1020);
//! let count = filled(producer, consumer).expect("indices of a working peer");
//! assert_eq!(count, 10);
//! assert_eq!(stretches(consumer, count), [1020..1024, 0..6]);
//! assert_eq!(filled(consumer + SIZE + 1, consumer), None);
//! ```

/// Bytes of each ring.
pub const SIZE: u32 = 1024;

/// One of the two rings of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The ring from the guest to the server.
    Requests = 0,
    /// The ring from the server to the guest.
    Replies = 1024,
}

impl Side {
    /// The offset of the ring in the page, in bytes.
    pub fn offset(self) -> usize {
        self as usize
    }
}

/// A 32-bit word of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are those of xs_wire.h
pub enum Word {
    ReqCons = 2048,
    ReqProd = 2052,
    RspCons = 2056,
    RspProd = 2060,
    ServerFeatures = 2064,
    Connection = 2068,
    Error = 2072,
    EvtchnPort = 2076,
}

impl Word {
    /// All words, by offset.
    pub const ALL: [Word; 8] = [
        Word::ReqCons,
        Word::ReqProd,
        Word::RspCons,
        Word::RspProd,
        Word::ServerFeatures,
        Word::Connection,
        Word::Error,
        Word::EvtchnPort,
    ];

    /// The offset of the word in the page, in bytes.
    pub fn offset(self) -> usize {
        self as usize
    }
}

/// Values of [`Word::Connection`].
pub mod connection {
    /// The connection is in use.
    pub const CONNECTED: u32 = 0;
    /// The guest requests reconnection. The server resets the connection, then writes [`CONNECTED`].
    pub const RECONNECT: u32 = 1;
}

/// The reason why the server has stopped serving a ring: the value of [`Word::Error`]
/// (`XENSTORE_ERROR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RingError {
    /// The event channel or the page is unusable.
    Communication = 1,
    /// The indices differ by more than [`SIZE`].
    Indices = 2,
    /// A message violates the protocol.
    Protocol = 3,
}

impl RingError {
    /// The value in the page.
    pub fn as_wire(self) -> u32 {
        self as u32
    }
}

/// Returns the number of bytes between a consumer and a producer index. Returns `None` if it exceeds
/// [`SIZE`]: one of the indices is invalid. Indices are not reduced; they wrap at 2³².
pub fn filled(producer: u32, consumer: u32) -> Option<u32> {
    Some(producer.wrapping_sub(consumer)).filter(|filled| *filled <= SIZE)
}

/// Returns the ranges of a ring that hold `count` bytes from `index` on: one up to the end of the
/// ring, and one from its start, which can be empty.
pub fn stretches(index: u32, count: u32) -> [core::ops::Range<usize>; 2] {
    let at = (index % SIZE) as usize;
    let (count, size) = (count.min(SIZE) as usize, SIZE as usize);
    let first = count.min(size - at);
    [at..at + first, 0..count - first]
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if invalid indices are accepted (XSA-38), or those of a full or wrapped ring refused.
    #[test]
    fn indices_that_differ_by_more_than_a_ring_are_invalid() {
        assert_eq!(filled(0, 0), Some(0));
        assert_eq!(filled(1024, 0), Some(1024));
        assert_eq!(filled(1025, 0), None);
        assert_eq!(filled(0, 1), None);
        assert_eq!(filled(5, u32::MAX - 4), Some(10));
        assert_eq!(filled(0x8000_0000, 0), None);
    }

    // Fails if the ranges miss a byte or overlap, at any index.
    #[test]
    fn stretches_cover_the_requested_bytes_once() {
        assert_eq!(stretches(0, 1024), [0..1024, 0..0]);
        assert_eq!(stretches(1000, 100), [1000..1024, 0..76]);
        assert_eq!(stretches(u32::MAX, 3), [1023..1024, 0..2]);
        for index in [0, 1, 1023, 1024, 5000, u32::MAX - 3] {
            for count in [0, 1, 500, 1023, 1024] {
                let [first, second] = stretches(index, count);
                assert_eq!(first.len() + second.len(), count as usize);
                assert_eq!(first.start, (index % SIZE) as usize);
                assert!(first.end <= 1024 && second.end <= first.start);
            }
        }
    }

    // Fails if an offset differs from struct xenstore_domain_interface.
    #[test]
    fn layout_matches_xs_wire_h() {
        assert_eq!(Word::ALL.map(Word::offset), [2048, 2052, 2056, 2060, 2064, 2068, 2072, 2076]);
        assert_eq!([Side::Requests, Side::Replies].map(Side::offset), [0, 1024]);
    }
}
