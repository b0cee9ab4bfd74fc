//! Why no engine can be restored from a journal or from the state of another program.

use std::fmt;
use std::io;
use std::path::PathBuf;

use xenstore_protocol::stream::StreamError;
use xenstore_store::{RestoreError, Violation};

/// Why no engine can be restored from a journal or from the state of another program.
#[derive(Debug)]
pub(crate) enum RecoveryError {
    /// Another process writes this journal. Its pid is known if the kernel reports it.
    InUse { path: PathBuf, pid: Option<u32> },
    /// The file cannot be locked.
    Lock { path: PathBuf, error: io::Error },
    /// The file cannot be read.
    Read(io::Error),
    /// The file has no header.
    TooShort,
    /// The file ends in the snapshot.
    TruncatedSnapshot,
    /// The file has the magic number of another version, or none.
    OtherVersion,
    /// The file is from before the host was started.
    OtherBoot,
    /// A checksum of the header or of the snapshot is wrong.
    DamagedSnapshot,
    /// A record is not one of this version.
    UnknownRecord,
    /// A record lacks replies of the hypervisor.
    MissingReplies,
    /// The snapshot cannot be decoded.
    Decode(StreamError),
    /// The snapshot makes no engine.
    Restore(RestoreError),
    /// The restored engine violates an invariant.
    Violation(Violation),
    /// Reading the journal panics.
    Panic,
    /// `--refuse-state`, for tests.
    Refused,
    /// There is no valid journal to restore from.
    NoJournal,
}

impl fmt::Display for RecoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecoveryError::InUse { path, pid } => {
                write!(f, "journal {}: ", path.display())?;
                match pid {
                    Some(pid) => write!(f, "process {pid}")?,
                    None => write!(f, "another process")?,
                }
                write!(
                    f,
                    " has it locked and still runs; two daemons cannot share a journal: \
                     stop that process, or start this one with another --socket or --journal"
                )
            }
            RecoveryError::Lock { path, error } => {
                write!(f, "journal {} cannot be locked: {error}", path.display())
            }
            RecoveryError::Read(error) => error.fmt(f),
            RecoveryError::TooShort => write!(f, "the file is too short"),
            RecoveryError::TruncatedSnapshot => write!(f, "its snapshot is truncated"),
            RecoveryError::OtherVersion => write!(f, "it is not a journal of this version"),
            RecoveryError::OtherBoot => write!(f, "it is from before the host was started"),
            RecoveryError::DamagedSnapshot => write!(f, "its snapshot is damaged"),
            RecoveryError::UnknownRecord => write!(f, "it has an unknown record"),
            RecoveryError::MissingReplies => write!(f, "it lacks replies of the hypervisor"),
            RecoveryError::Decode(error) => error.fmt(f),
            RecoveryError::Restore(error) => error.fmt(f),
            RecoveryError::Violation(error) => {
                write!(f, "the store made from it is damaged: {error}")
            }
            RecoveryError::Panic => write!(f, "panic while reading it"),
            RecoveryError::Refused => write!(f, "--refuse-state"),
            RecoveryError::NoJournal => write!(f, "there is no journal"),
        }
    }
}

impl std::error::Error for RecoveryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            RecoveryError::Lock { error, .. } | RecoveryError::Read(error) => Some(error),
            RecoveryError::Decode(error) => Some(error),
            RecoveryError::Restore(error) => Some(error),
            RecoveryError::Violation(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for RecoveryError {
    fn from(error: io::Error) -> RecoveryError {
        RecoveryError::Read(error)
    }
}

impl From<StreamError> for RecoveryError {
    fn from(error: StreamError) -> RecoveryError {
        RecoveryError::Decode(error)
    }
}

impl From<RestoreError> for RecoveryError {
    fn from(error: RestoreError) -> RecoveryError {
        RecoveryError::Restore(error)
    }
}

impl From<Violation> for RecoveryError {
    fn from(error: Violation) -> RecoveryError {
        RecoveryError::Violation(error)
    }
}
