//! The feature bits that a server offers.

use core::fmt;
use core::ops::{BitAnd, BitOr, Not};

/// A set of server features (`XENSTORE_SERVER_FEATURE_*`).
///
/// A set holds only the bits in [`Features::ALL`]; [`Features::from_bits`] refuses any other.
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

    /// Reads the word; returns `None` if it has a bit outside [`Features::ALL`].
    #[inline]
    pub const fn from_bits(bits: u32) -> Option<Features> {
        if bits & !Self::ALL.0 == 0 { Some(Features(bits)) } else { None }
    }

    /// Reads the word and drops the bits outside [`Features::ALL`].
    #[inline]
    pub const fn from_bits_truncate(bits: u32) -> Features {
        Features(bits & Self::ALL.0)
    }

    /// Returns true if this set has every feature of `other`.
    #[inline]
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
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
        Features(self.0 | other.0)
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

    /// The features of [`Features::ALL`] that are not in this set.
    #[inline]
    fn not(self) -> Features {
        Features(!self.0 & Self::ALL.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a bit differs from xs_wire.h, or a set takes a bit that has no name.
    #[test]
    fn bits_are_those_of_xs_wire_h() {
        let all =
            [Features::RECONNECT, Features::ERROR, Features::WATCH_DEPTH, Features::DOMID_ANY];
        assert_eq!(all.map(Features::bits), [1, 2, 4, 8]);
        assert_eq!(all.into_iter().fold(Features::NONE, Features::bitor), Features::ALL);
        assert_eq!(Features::from_bits(16), None);
        assert_eq!(Features::from_bits_truncate(0x1f), Features::ALL);
        assert!((!Features::ERROR).contains(Features::RECONNECT | Features::DOMID_ANY));
        assert!((Features::ERROR & !Features::ERROR).is_empty());
    }
}
