//! The feature bits that a server offers.

use core::fmt;
use core::ops::{BitAnd, BitOr, Not};

/// A set of server features (`XENSTORE_SERVER_FEATURE_*`).
///
/// A set can hold bits that this crate has no name for, since a newer peer may send them. A server
/// offers a subset of [`Features::ALL`].
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Features(u32);

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);
    /// A guest may request reconnection through the ring page.
    pub const RECONNECT: Features = Features(1);
    /// The server writes the `error` field of the ring page.
    pub const ERROR: Features = Features(2);
    /// WATCH takes a depth.
    pub const WATCH_DEPTH: Features = Features(4);
    /// `DOMID_ANY` in a permission entry means every domain.
    pub const DOMID_ANY: Features = Features(8);
    /// All features that this crate knows.
    pub const ALL: Features = Features(15);

    /// The word on the wire and in the ring page.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Returns true if this set has every feature of `other`.
    #[inline]
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// The features of this set and those of `other`; `|` in constants.
    #[inline]
    #[must_use]
    pub const fn union(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// Returns true if this set has no feature.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({:#x})", self.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<u32> for Features {
    #[inline]
    fn from(bits: u32) -> Features {
        Features(bits)
    }
}

impl From<Features> for u32 {
    #[inline]
    fn from(features: Features) -> u32 {
        features.0
    }
}

impl BitOr for Features {
    type Output = Features;

    #[inline]
    fn bitor(self, other: Features) -> Features {
        self.union(other)
    }
}

impl BitAnd for Features {
    type Output = Features;

    #[inline]
    fn bitand(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }
}

impl Not for Features {
    type Output = Features;

    #[inline]
    fn not(self) -> Features {
        Features(!self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a bit differs from xs_wire.h, or ALL contains a bit without a name.
    #[test]
    fn bits_match_xs_wire_h() {
        let all =
            [Features::RECONNECT, Features::ERROR, Features::WATCH_DEPTH, Features::DOMID_ANY];
        assert_eq!(all.map(Features::bits), [1, 2, 4, 8]);
        assert_eq!(all.into_iter().fold(Features::NONE, Features::bitor), Features::ALL);
        assert!(!Features::ALL.contains(Features::from(16)));
        assert_eq!(Features::from(0x1f) & Features::ALL, Features::ALL);
        assert!((!Features::ERROR).contains(Features::RECONNECT | Features::DOMID_ANY));
        assert!((Features::ERROR & !Features::ERROR).is_empty());
    }
}
