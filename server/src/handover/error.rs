//! Why a handover fails, on either side.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use crate::journal::RecoveryError;

/// Why the other program cannot be used.
#[derive(Debug)]
pub(crate) enum ProgramError {
    /// It cannot be executed.
    Run(io::Error),
    /// No thread can be started that waits for it.
    Thread(io::Error),
    /// The thread that waits for it has panicked.
    Panic,
    /// It has not ended within this time.
    Timeout(Duration),
    /// Its help is that of no known daemon.
    Unknown,
    /// It does not read the wanted version of the migration stream.
    StreamVersion { wanted: u32, newest: u32 },
    /// Its options would change what a live update cannot change.
    Options(String),
    /// It refuses the state.
    Refused { status: ExitStatus, reason: String },
    /// No guard can be started.
    Guard(io::Error),
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProgramError::Run(error) => write!(f, "cannot be run: {error}"),
            ProgramError::Thread(error) => write!(f, "no thread can be started: {error}"),
            ProgramError::Panic => write!(f, "its thread has panicked"),
            ProgramError::Timeout(limit) => {
                write!(f, "has not ended within {} s", limit.as_secs())
            }
            ProgramError::Unknown => {
                write!(f, "is neither this daemon nor C xenstored, by its --help")
            }
            ProgramError::StreamVersion { wanted, newest } => write!(
                f,
                "does not read migration streams of version {wanted} (use --stream-version {newest})"
            ),
            ProgramError::Options(reason) => reason.fmt(f),
            ProgramError::Refused { status, reason } => {
                write!(f, "refuses the state ({status}): {reason}")
            }
            ProgramError::Guard(error) => write!(f, "no way back: {error}"),
        }
    }
}

impl std::error::Error for ProgramError {}

/// Why a live update was not done. The daemon continues to serve.
#[derive(Debug)]
pub(crate) enum HandoverError {
    /// Transactions are open: the requester retries.
    Busy,
    /// The requester cancelled the update.
    Cancelled,
    /// Transactions were open for longer than the requester waits. The text lists them.
    LongTransactions(String),
    /// The state cannot be written.
    Snapshot(io::Error),
    /// The other program cannot be used.
    Program { file: PathBuf, error: ProgramError },
}

impl fmt::Display for HandoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandoverError::Busy => write!(f, "BUSY"),
            HandoverError::Cancelled => write!(f, "Cancellation was requested"),
            HandoverError::LongTransactions(open) => {
                write!(f, "Domains with long running transactions:\n{open}")
            }
            HandoverError::Snapshot(error) => error.fmt(f),
            HandoverError::Program { file, error } => write!(f, "{}: {error}", file.display()),
        }
    }
}

impl std::error::Error for HandoverError {}

/// Why this program cannot continue with the state of another one.
#[derive(Debug)]
pub(crate) enum ReceiveError {
    /// Only one of `--resume` and `--errand` is there.
    OptionsApart,
    /// The descriptor of this option cannot be used.
    Descriptor { option: &'static str, error: io::Error },
    /// The bytes of this option are not those of another version of this daemon.
    Invalid { option: &'static str, reason: &'static str },
    /// The state on standard input cannot be used.
    Input(RecoveryError),
    /// The state in this file cannot be used.
    File { path: PathBuf, error: RecoveryError },
    /// The state of `--resume` cannot be used, nor the program that wrote it be executed again.
    Resume { error: RecoveryError, fallback: Option<io::Error> },
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReceiveError::OptionsApart => write!(f, "--resume and --errand require each other"),
            ReceiveError::Descriptor { option, error } => write!(f, "--{option}: {error}"),
            ReceiveError::Invalid { option, reason } => write!(f, "--{option}: {reason}"),
            ReceiveError::Input(RecoveryError::Read(error)) => {
                write!(f, "standard input: {error}")
            }
            ReceiveError::Input(error) => error.fmt(f),
            ReceiveError::File { path, error } => write!(f, "{}: {error}", path.display()),
            ReceiveError::Resume { error, fallback } => {
                write!(f, "--resume: {error}")?;
                let Some(fallback) = fallback else { return Ok(()) };
                write!(f, "; and the previous program cannot be run: {fallback}")
            }
        }
    }
}

impl std::error::Error for ReceiveError {}
