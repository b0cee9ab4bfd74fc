//! Errors of requests.

use std::fmt;
use std::io;

use xenstore_protocol::Errno;

/// Why a request failed.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The server refused the request with this error.
    Store(Errno),
    /// An argument cannot be sent; the text states which and why. No request was sent.
    Argument(String),
    /// The server violated the protocol. All later requests on this connection fail.
    Protocol(String),
    /// The connection has ended. All later requests on it fail.
    Closed,
    /// Connecting, reading or writing failed.
    Io(io::ErrorKind, String),
}

impl Error {
    /// Returns the error of the server, if the server refused the request.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Store(name) => Some(*name),
            _ => None,
        }
    }

    /// Returns true if the node does not exist.
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::Enoent)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Store(name) => write!(f, "{name} ({})", name.meaning()),
            Error::Argument(text) => f.write_str(text),
            Error::Protocol(text) => write!(f, "the server violated the protocol: {text}"),
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
