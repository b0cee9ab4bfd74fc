//! The program that is to go on: what it is, and whether it could.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::child::{self, Said, on_thread};

/// How long a program may take to say what it is.
const HELP_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to look at the state.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// Which program it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// This daemon, in any version that can be updated.
    Ours,
    /// C xenstored.
    C,
}

/// What a program says, on another thread.
async fn run(command: Command, limit: Duration) -> Result<Said, String> {
    on_thread(move || child::run(command, limit)).await?
}

/// Asks a program what it is, and returns its help as well. Help is all that C xenstored can be asked
/// for: anything else that it does not know makes it start.
pub(crate) async fn kind(file: &Path) -> Result<(Kind, String), String> {
    let mut command = Command::new(file);
    command.arg("--help").stdin(Stdio::null());
    let said = run(command, HELP_LIMIT).await?;
    let help = said.output + &said.errors;
    match () {
        () if help.contains("--check-state") => Ok((Kind::Ours, help)),
        () if help.contains("xenstored <options>") => Ok((Kind::C, help)),
        () => Err("is neither this daemon nor C xenstored, by its --help".into()),
    }
}

/// Runs another build of this daemon with `--check-state`, this state and these options: it does what a
/// start does, except for taking over descriptors. Returns how long it took to make a store of the state.
pub(crate) async fn check(file: &Path, args: &[OsString], state: File) -> Result<Duration, String> {
    let mut command = Command::new(file);
    command.args(args).arg("--check-state").stdin(Stdio::from(state));
    let Said { status, output, errors } = run(command, CHECK_LIMIT).await?;
    let micros = output.trim().strip_suffix(" us").and_then(|count| count.parse().ok());
    match (status.success(), micros) {
        (true, Some(micros)) => Ok(Duration::from_micros(micros)),
        _ => {
            let reason = errors
                .lines()
                .find(|line| !line.is_empty())
                .unwrap_or("it does not say that it has checked it");
            Err(format!("refuses the state ({status}): {reason}"))
        }
    }
}
