//! Name and value of a node, in one piece.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Bytes of name and value that need no memory of their own: with them a node fills a block of 64
/// bytes of the usual allocators. Most nodes of a host have no more.
const INLINE_MAX: usize = 21;

/// A name, which stays, and a value behind it.
#[derive(Clone)]
pub(crate) enum InlineStr {
    Inline { name: u8, len: u8, bytes: [u8; INLINE_MAX] },
    // A name is shorter than a path, and that than 4 KiB.
    Boxed { name: u16, bytes: Box<[u8]> },
}

impl InlineStr {
    pub(crate) fn new(name: &[u8], value: &[u8]) -> InlineStr {
        let len = name.len() + value.len();
        if len > INLINE_MAX {
            let mut bytes = Vec::with_capacity(len);
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(value);
            let name = u16::try_from(name.len()).expect("a name is short");
            return InlineStr::Boxed { name, bytes: bytes.into() };
        }
        let short = |len: usize| u8::try_from(len).expect("it fits");
        let mut bytes = [0; INLINE_MAX];
        bytes[..name.len()].copy_from_slice(name);
        bytes[name.len()..len].copy_from_slice(value);
        InlineStr::Inline { name: short(name.len()), len: short(len), bytes }
    }

    /// The name, then the value.
    fn parts(&self) -> (&[u8], &[u8]) {
        match self {
            InlineStr::Inline { name, len, bytes } => {
                bytes[..usize::from(*len)].split_at(usize::from(*name))
            }
            InlineStr::Boxed { name, bytes } => bytes.split_at(usize::from(*name)),
        }
    }

    pub(crate) fn name(&self) -> &[u8] {
        self.parts().0
    }

    pub(crate) fn value(&self) -> &[u8] {
        self.parts().1
    }

    pub(crate) fn set_value(&mut self, value: &[u8]) {
        *self = InlineStr::new(self.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if name or value come back different at any length around that which needs memory.
    #[test]
    fn short_and_long_texts_come_back() {
        let long = [b'x'; 64];
        for name in [0, 1, 20, 21, 22, 40] {
            for (first, second) in [(0, 30), (1, 0), (20, 21), (22, 1), (64, 64)] {
                let mut text = InlineStr::new(&long[..name], &long[..first]);
                assert_eq!((text.name(), text.value()), (&long[..name], &long[..first]));
                text.set_value(&long[..second]);
                assert_eq!((text.name(), text.value()), (&long[..name], &long[..second]));
            }
        }
    }
}
