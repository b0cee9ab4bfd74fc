//! The program that is to go on: what it is, and whether it could.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use futures_lite::future;
use smol::Timer;
use smol::process::Command;

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

/// Runs a program with nothing to read, or this, and within this time. Its output, or why there is
/// none, in one line.
async fn run(mut command: Command, limit: Duration) -> Result<Output, String> {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().map_err(|error| format!("cannot be run: {error}"))?;
    let output = async { child.output().await.map_err(|error| format!("lost: {error}")) };
    let late = async {
        Timer::after(limit).await;
        Err(format!("has not ended within {} s", limit.as_secs()))
    };
    future::or(output, late).await
}

/// Asks a program what it is, and returns its help as well. Help is all that C xenstored can be asked
/// for: anything else that it does not know makes it start.
pub(crate) async fn kind(file: &Path) -> Result<(Kind, String), String> {
    let mut command = Command::new(file);
    command.arg("--help").stdin(Stdio::null());
    let output = run(command, HELP_LIMIT).await?;
    let help = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    match () {
        () if help.contains("--check-state") => Ok((Kind::Ours, help)),
        () if help.contains("xenstored <options>") => Ok((Kind::C, help)),
        () => Err("is neither this daemon nor C xenstored, by its --help".into()),
    }
}

/// Has a program of ours look at a state with the options that it will get; how long that took.
pub(crate) async fn check(file: &Path, args: &[OsString], state: File) -> Result<Duration, String> {
    let mut command = Command::new(file);
    command.args(args).arg("--check-state").stdin(Stdio::from(state));
    let output = run(command, CHECK_LIMIT).await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let micros = text.trim().strip_suffix(" us").and_then(|count| count.parse().ok());
    match (output.status.success(), micros) {
        (true, Some(micros)) => Ok(Duration::from_micros(micros)),
        _ => {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            let reason = errors.lines().next().unwrap_or_default();
            Err(format!("refuses the state ({}): {reason}", output.status))
        }
    }
}
