//! The errors of ERROR replies.

use core::fmt;

macro_rules! errnos {
    ($($variant:ident $text:literal $meaning:literal,)*) => {
        /// An error of the protocol (`xsd_errors` in `xs_wire.h`). It is sent by its name. Clients read
        /// any other name as `EINVAL`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Errno {
            $(#[doc = $meaning] $variant,)*
        }

        impl Errno {
            /// All errors, in the order of `xsd_errors`.
            pub const ALL: &'static [Errno] = &[$(Errno::$variant,)*];

            /// The name on the wire, for example `ENOENT`.
            pub fn as_str(self) -> &'static str {
                match self { $(Errno::$variant => $text,)* }
            }

            /// The meaning, in a few words.
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
    /// The error with this name, or `None` if there is none.
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

    // Fails if the names are not those of xs_wire.h.
    #[test]
    fn names_match_xsd_errors_in_order() {
        let table = "EINVAL EACCES EEXIST EISDIR ENOENT ENOMEM ENOSPC EIO ENOTEMPTY ENOSYS EROFS \
                     EBUSY EAGAIN EISCONN E2BIG EPERM";
        let names: alloc::vec::Vec<_> = Errno::ALL.iter().map(|e| e.as_str()).collect();
        assert_eq!(names, table.split_whitespace().collect::<alloc::vec::Vec<_>>());
        for error in Errno::ALL {
            assert_eq!(Errno::parse(error.as_str().as_bytes()), Some(*error));
        }
        assert_eq!(Errno::parse(b"EQUOTA"), None);
    }
}
