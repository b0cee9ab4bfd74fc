//! What can go wrong.

use std::fmt;
use std::io;

use xenstore_protocol::Errno;

/// Why a request has no answer, or not the one that was hoped for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The store said no.
    Store(Errno),
    /// The argument cannot be sent: what is wrong with it.
    Argument(String),
    /// The server broke the protocol; the connection is of no more use.
    Protocol(String),
    /// The connection has ended.
    Closed,
    /// Bytes do not go through.
    Io(io::ErrorKind, String),
}

impl Error {
    /// The name that the store answered with.
    pub fn name(&self) -> Option<Errno> {
        match self {
            Error::Store(name) => Some(*name),
            _ => None,
        }
    }

    /// Is it that there is no such node?
    pub fn is_not_found(&self) -> bool {
        self.name() == Some(Errno::Enoent)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Store(name) => write!(f, "{name} ({})", name.meaning()),
            Error::Argument(text) => f.write_str(text),
            Error::Protocol(text) => write!(f, "the server broke the protocol: {text}"),
            Error::Closed => f.write_str("the server closed the connection"),
            Error::Io(_, text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::Io(error.kind(), error.to_string())
    }
}

impl From<Errno> for Error {
    fn from(name: Errno) -> Error {
        Error::Store(name)
    }
}
