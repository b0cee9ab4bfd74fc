//! Names that every room uses: connections, their peers, and time.

use core::fmt;

use xenstore_protocol::DomId;

/// Milliseconds of a monotonic clock.
pub type Millis = u64;

/// A connection, by number. Numbers are not used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A process of the domain that the server runs in.
    Socket,
    /// A domain.
    Domain(DomId),
}
