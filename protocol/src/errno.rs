//! The error names that may stand in an ERROR reply.

use core::fmt;

macro_rules! errnos {
    ($($variant:ident $text:literal $meaning:literal,)*) => {
        /// An error as it goes over the wire: a name from the table in `xs_wire.h`, and no other,
        /// since clients read every unknown name as EINVAL.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Errno {
            $(#[doc = $meaning] $variant,)*
        }

        impl Errno {
            /// Every name, in the order of the table.
            pub const ALL: &'static [Errno] = &[$(Errno::$variant,)*];

            /// The name, for example `ENOENT`.
            pub fn as_str(self) -> &'static str {
                match self { $(Errno::$variant => $text,)* }
            }

            /// What it means, in a few words for a person.
            pub fn meaning(self) -> &'static str {
                match self { $(Errno::$variant => $meaning,)* }
            }
        }
    };
}

errnos! {
    Einval "EINVAL" "malformed request or argument",
    Eacces "EACCES" "permission denied",
    Eexist "EEXIST" "already exists",
    Eisdir "EISDIR" "is a directory",
    Enoent "ENOENT" "no such node, watch, transaction or domain",
    Enomem "ENOMEM" "out of memory",
    Enospc "ENOSPC" "a quota is used up",
    Eio "EIO" "input/output error",
    Enotempty "ENOTEMPTY" "not empty",
    Enosys "ENOSYS" "the server does not know this request",
    Erofs "EROFS" "read-only",
    Ebusy "EBUSY" "busy",
    Eagain "EAGAIN" "the transaction conflicts with another change, try again",
    Eisconn "EISCONN" "already connected",
    E2big "E2BIG" "too long for one message",
    Eperm "EPERM" "operation not permitted",
}

impl Errno {
    /// The error with this name.
    pub fn parse(name: &[u8]) -> Option<Errno> {
        Self::ALL.iter().copied().find(|e| e.as_str().as_bytes() == name)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl core::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a name is missing from, or foreign to, the table of xs_wire.h.
    #[test]
    fn names_are_those_of_the_table_in_its_order() {
        let table = "EINVAL EACCES EEXIST EISDIR ENOENT ENOMEM ENOSPC EIO ENOTEMPTY ENOSYS EROFS \
                     EBUSY EAGAIN EISCONN E2BIG EPERM";
        let ours: alloc::vec::Vec<_> = Errno::ALL.iter().map(|e| e.as_str()).collect();
        assert_eq!(ours, table.split_whitespace().collect::<alloc::vec::Vec<_>>());
        for error in Errno::ALL {
            assert_eq!(Errno::parse(error.as_str().as_bytes()), Some(*error));
        }
        assert_eq!(Errno::parse(b"EQUOTA"), None);
    }
}
