//! Permission entries and lists (`docs/misc/xenstore.txt`, "Permissions").

use alloc::vec::Vec;
use core::fmt;

use crate::{DomId, decimal};

/// What an entry grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Nothing, written `n`.
    None,
    /// Reading, written `r`.
    Read,
    /// Writing, written `w`.
    Write,
    /// Both, written `b`.
    Both,
}

impl Access {
    /// Reads the letter.
    pub fn parse(letter: u8) -> Option<Access> {
        Some(match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return None,
        })
    }

    /// The letter.
    pub fn letter(self) -> u8 {
        match self {
            Access::None => b'n',
            Access::Read => b'r',
            Access::Write => b'w',
            Access::Both => b'b',
        }
    }

    /// Does it grant all that `wanted` asks for?
    pub fn grants(self, wanted: Access) -> bool {
        self.bits() & wanted.bits() == wanted.bits()
    }

    /// What this and the other grant together.
    #[must_use]
    pub fn union(self, other: Access) -> Access {
        match self.bits() | other.bits() {
            0 => Access::None,
            1 => Access::Read,
            2 => Access::Write,
            _ => Access::Both,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Access::None => 0,
            Access::Read => 1,
            Access::Write => 2,
            Access::Both => 3,
        }
    }
}

/// One entry: what a domain may do. In the first entry of a list the domain is the owner, who may
/// do everything, and the letter is what domains without an entry may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Perm {
    /// What is granted.
    pub access: Access,
    /// To whom.
    pub domid: DomId,
}

impl Perm {
    /// Reads `letter domid`, for example `r5`.
    pub fn parse(text: &[u8]) -> Option<Perm> {
        let (&letter, domid) = text.split_first()?;
        Some(Perm { access: Access::parse(letter)?, domid: DomId(decimal(domid)?) })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.access.letter() as char, self.domid)
    }
}

/// A list of entries on the wire, each NUL-terminated; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Perms(pub Vec<Perm>);

impl Perms {
    /// Reads the entries; bytes behind the last NUL are ignored, as C xenstored does.
    pub fn parse(bytes: &[u8]) -> Option<Perms> {
        let entries: Option<Vec<Perm>> = crate::Strings::new(bytes).map(Perm::parse).collect();
        entries.filter(|e| !e.is_empty()).map(Perms)
    }

    /// Writes the entries.
    pub fn emit(&self, out: &mut Vec<u8>) {
        for perm in &self.0 {
            out.extend_from_slice(alloc::format!("{perm}\0").as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if an entry in a form that no client sends is taken, or a legal one is refused.
    #[test]
    fn entries_round_trip_and_junk_is_refused() {
        for text in ["n0", "r5", "w32757", "b65535"] {
            let perm = Perm::parse(text.as_bytes()).unwrap();
            assert_eq!(alloc::format!("{perm}"), text);
        }
        for bad in ["", "r", "x5", "r-1", "r65536", "r0x5", "5", "R5"] {
            assert_eq!(Perm::parse(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(Perms::parse(b""), None);
        assert_eq!(Perms::parse(b"n0"), None, "an entry needs its NUL");
        assert_eq!(Perms::parse(b"n0\0r1\0junk").unwrap().0.len(), 2);
        assert_eq!(Perms::parse(b"n0\0x1\0"), None);
    }

    // Fails if a right is granted that its letter does not name.
    #[test]
    fn letters_grant_what_they_say() {
        assert!(Access::Both.grants(Access::Read) && Access::Both.grants(Access::Write));
        assert!(!Access::Read.grants(Access::Write) && !Access::Write.grants(Access::Read));
        assert!(!Access::Read.grants(Access::Both) && Access::None.grants(Access::None));
        assert_eq!(Access::Read.union(Access::Write), Access::Both);
    }
}
