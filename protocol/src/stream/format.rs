//! Constants of the format, and what can be wrong with a stream.

use core::fmt;

/// Record types. A reader skips types that it does not know.
#[allow(missing_docs)] // the names are those of the design document
pub mod kind {
    pub const END: u32 = 0;
    pub const GLOBAL_DATA: u32 = 1;
    pub const CONNECTION_DATA: u32 = 2;
    pub const WATCH_DATA: u32 = 3;
    pub const TRANSACTION_DATA: u32 = 4;
    pub const NODE_DATA: u32 = 5;
    pub const GLOBAL_QUOTA_DATA: u32 = 6;
    pub const DOMAIN_DATA: u32 = 7;
    pub const WATCH_DATA_EXTENDED: u32 = 8;
    /// The counters of an engine. This type and those below are private to this project.
    pub const ENGINE: u32 = 0x8000_0000;
    /// The state of a domain besides its quotas.
    pub const DOMAIN_DETAIL: u32 = 0x8000_0001;
    /// The state of a connection besides its watches.
    pub const CONNECTION_DETAIL: u32 = 0x8000_0002;
    /// The state of the server.
    pub const SERVER: u32 = 0x8000_0003;
    /// Nodes, as the difference from the nodes of the stream before.
    pub const NODES_SINCE: u32 = 0x8000_0004;
    /// An open transaction.
    pub const TRANSACTION_DETAIL: u32 = 0x8000_0005;
    /// Nodes with their generations.
    pub const NODES: u32 = 0x8000_0006;
    /// The number of dead domains for each domid.
    pub const ERAS: u32 = 0x8000_0007;
}

/// The newest version of the format.
pub const VERSION: u32 = 2;

/// The first bytes of a stream.
pub(super) const IDENT: [u8; 8] = *b"xenstore";
/// Bytes of the header: identification, version and flags.
pub(super) const HEADER: usize = 16;

/// A stream that cannot be read, and the position of the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamError {
    /// Byte of the stream.
    pub offset: usize,
    /// What is wrong there.
    pub kind: StreamErrorKind,
}

/// What is wrong with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamErrorKind {
    /// The stream does not begin with the identification.
    NotAStream,
    /// The header states a version above [`VERSION`], or 0.
    UnknownVersion,
    /// The header has flags that this crate does not know.
    UnknownFlags,
    /// The stream ends in the middle of a field, a record, or before the END record.
    Truncated,
    /// A string has no NUL at its end, or one before.
    MisplacedNul,
    /// A variable-length number does not fit 64 bits.
    NumberTooLarge,
    /// The content of a record is invalid, for this reason.
    Invalid(&'static str),
}

impl fmt::Display for StreamErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StreamErrorKind::NotAStream => "not a XenStore state",
            StreamErrorKind::UnknownVersion => "unknown version of the format",
            StreamErrorKind::UnknownFlags => "unknown flags",
            StreamErrorKind::Truncated => "the state ends too early",
            StreamErrorKind::MisplacedNul => "a string does not end at its first NUL",
            StreamErrorKind::NumberTooLarge => "a number does not fit 64 bits",
            StreamErrorKind::Invalid(reason) => reason,
        })
    }
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state at byte {}: {}", self.offset, self.kind)
    }
}

impl core::error::Error for StreamError {}
