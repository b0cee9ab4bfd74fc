//! The shared page of a domain: its layout and the arithmetic of its indices.
//!
//! `struct xenstore_domain_interface` of `xen/include/public/io/xs_wire.h`, described in
//! `docs/misc/xenstore-ring.txt`.

/// Bytes of each of the two rings in the page.
pub const SIZE: u32 = 1024;

/// One of the two rings, by where it starts in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// From the guest to the server.
    Requests = 0,
    /// From the server to the guest.
    Replies = 1024,
}

impl Side {
    /// Offset of its first byte in the page.
    pub fn offset(self) -> usize {
        self as usize
    }
}

/// A 32-bit word of the page, by its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Every word, by offset.
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

    /// Offset in the page, in bytes.
    pub fn offset(self) -> usize {
        self as usize
    }
}

/// Values of [`Word::Connection`].
pub mod connection {
    /// Nothing is being asked for.
    pub const CONNECTED: u32 = 0;
    /// The guest asks for a fresh connection, and waits until the server has put
    /// [`CONNECTED`] there.
    pub const RECONNECT: u32 = 1;
}

/// Why the server no longer looks at a ring, as it stands in [`Word::Error`]
/// (`XENSTORE_ERROR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The event channel, or the page, cannot be used.
    Communication = 1,
    /// Indices that differ by more than the ring is long.
    Indices = 2,
    /// A message that breaks the protocol.
    Protocol = 3,
}

impl RingError {
    /// The number in the page.
    pub fn as_wire(self) -> u32 {
        self as u32
    }
}

/// Bytes between a consumer and a producer index; none if that is more than a ring holds, so that
/// one of the two is garbage. Indices run freely through all 32-bit numbers.
pub fn filled(producer: u32, consumer: u32) -> Option<u32> {
    Some(producer.wrapping_sub(consumer)).filter(|filled| *filled <= SIZE)
}

/// Where in a ring `count` bytes from `index` on are: a stretch up to its end, and one from its
/// start on that may be empty.
pub fn stretches(index: u32, count: u32) -> [core::ops::Range<usize>; 2] {
    let at = (index % SIZE) as usize;
    let (count, size) = (count.min(SIZE) as usize, SIZE as usize);
    let first = count.min(size - at);
    [at..at + first, 0..count - first]
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if garbage is taken for bytes (XSA-38), or a full or wrapped ring for garbage.
    #[test]
    fn indices_may_differ_by_a_ring_at_the_most() {
        assert_eq!(filled(0, 0), Some(0));
        assert_eq!(filled(1024, 0), Some(1024));
        assert_eq!(filled(1025, 0), None);
        assert_eq!(filled(0, 1), None);
        assert_eq!(filled(5, u32::MAX - 4), Some(10));
        assert_eq!(filled(0x8000_0000, 0), None);
    }

    // Fails if a byte of the ring is left out or named twice, at any index.
    #[test]
    fn stretches_cover_what_was_asked_for() {
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

    // Fails if a field moves against struct xenstore_domain_interface.
    #[test]
    fn layout_is_that_of_xs_wire_h() {
        assert_eq!(Word::ALL.map(Word::offset), [2048, 2052, 2056, 2060, 2064, 2068, 2072, 2076]);
        assert_eq!([Side::Requests, Side::Replies].map(Side::offset), [0, 1024]);
    }
}
