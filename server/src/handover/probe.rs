//! Probes of the other program: which daemon it is, and whether it accepts the state.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::child::{self, ProgramOutput, on_thread};
use super::error::ProgramError;

/// Time limit of `--help`.
const HELP_LIMIT: Duration = Duration::from_secs(10);
/// Time limit of `--check-state`.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// Which daemon a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProgramKind {
    /// This daemon, in any version that can be updated.
    Xenstored,
    /// C xenstored.
    CXenstored,
}

/// Runs a program on another thread.
async fn run(command: Command, limit: Duration) -> Result<ProgramOutput, ProgramError> {
    on_thread(move || child::run(command, limit)).await?
}

/// Returns which daemon a program is, and its help. C xenstored starts at any option that it does not
/// know, so only its help can be used.
pub(crate) async fn kind(file: &Path) -> Result<(ProgramKind, String), ProgramError> {
    let mut command = Command::new(file);
    command.arg("--help").stdin(Stdio::null());
    let output = run(command, HELP_LIMIT).await?;
    let help = output.output + &output.errors;
    match () {
        () if help.contains("--check-state") => Ok((ProgramKind::Xenstored, help)),
        () if help.contains("xenstored <options>") => Ok((ProgramKind::CXenstored, help)),
        () => Err(ProgramError::Unknown),
    }
}

/// Runs another build of this daemon with `--check-state`, this state and these options: it does what a
/// start does, except for adopting descriptors. Returns how long it took to restore a store.
pub(crate) async fn check(
    file: &Path,
    args: &[OsString],
    state: File,
) -> Result<Duration, ProgramError> {
    let mut command = Command::new(file);
    command.args(args).arg("--check-state").stdin(Stdio::from(state));
    let ProgramOutput { status, output, errors } = run(command, CHECK_LIMIT).await?;
    let micros = output.trim().strip_suffix(" us").and_then(|count| count.parse().ok());
    match (status.success(), micros) {
        (true, Some(micros)) => Ok(Duration::from_micros(micros)),
        _ => {
            let reason = errors
                .lines()
                .find(|line| !line.is_empty())
                .unwrap_or("its output is not that of --check-state");
            Err(ProgramError::Refused { status, reason: reason.into() })
        }
    }
}
