//! Permission entries and lists (`docs/misc/xenstore.txt`, "Permissions").

use alloc::vec::Vec;
use core::fmt;

use crate::ids::DomId;
use crate::strings::{Strings, decimal};

/// The access that an entry grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Nothing, written `n`.
    None,
    /// Read access, written `r`.
    Read,
    /// Write access, written `w`.
    Write,
    /// Both, written `b`.
    Both,
}

impl Access {
    /// Reads a letter. Returns `None` for any other.
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

    /// Returns true if it grants all access in `wanted`.
    pub fn grants(self, wanted: Access) -> bool {
        self.bits() & wanted.bits() == wanted.bits()
    }

    /// The access that this and `other` grant together.
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

/// One entry of a permission list.
///
/// The first entry of a list names the owner, which has all access; its letter is the access of
/// domains without an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Perm {
    /// The access.
    pub access: Access,
    /// The domain that has it.
    pub domid: DomId,
}

impl Perm {
    /// Reads an entry, for example `r5`. Returns `None` if it is malformed.
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

/// A permission list: at least one entry, each NUL-terminated on the wire.
///
/// ```
/// use xenstore_protocol::Perms;
///
/// let perms = Perms::parse(b"n0\0r5\0").expect("a valid list");
/// assert_eq!(perms.0[1].to_string(), "r5");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Perms(pub Vec<Perm>);

impl Perms {
    /// Reads the entries. Ignores bytes after the last NUL, as C xenstored does. Returns `None` if an
    /// entry is malformed or there is none.
    pub fn parse(bytes: &[u8]) -> Option<Perms> {
        let entries: Option<Vec<Perm>> = Strings::new(bytes).map(Perm::parse).collect();
        entries.filter(|e| !e.is_empty()).map(Perms)
    }

    /// Appends the entries.
    pub fn emit(&self, out: &mut Vec<u8>) {
        for perm in &self.0 {
            out.extend_from_slice(alloc::format!("{perm}\0").as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a malformed entry is accepted, or a valid one refused.
    #[test]
    fn valid_entries_round_trip_and_others_are_refused() {
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

    // Fails if a letter grants access that it does not stand for.
    #[test]
    fn letter_grants_only_its_access() {
        assert!(Access::Both.grants(Access::Read) && Access::Both.grants(Access::Write));
        assert!(!Access::Read.grants(Access::Write) && !Access::Write.grants(Access::Read));
        assert!(!Access::Read.grants(Access::Both) && Access::None.grants(Access::None));
        assert_eq!(Access::Read.union(Access::Write), Access::Both);
    }
}
