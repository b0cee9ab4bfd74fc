//! Runs a program again whenever it ends, and keeps its descriptors meanwhile, as systemd does with the
//! daemon's unit: `keeper DIR PROGRAM ARGS…`. While `DIR/forget` is there, it keeps none.
#![allow(clippy::print_stderr)] // for whoever reads the log

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use xenstore_tests::keeper::Keeper;

/// `RestartSec` of the unit.
const PAUSE: Duration = Duration::from_millis(50);

fn run() -> std::io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let usage = || std::io::Error::other("keeper DIR PROGRAM ARGS...");
    let dir = PathBuf::from(args.next().ok_or_else(usage)?);
    let mut command = Command::new(args.next().ok_or_else(usage)?);
    command.args(args);
    let mut keeper = Keeper::new(&dir)?;
    loop {
        let mut child = keeper.run(&command)?.stderr(Stdio::inherit()).spawn()?;
        // Whoever tells it something waits if it does not listen.
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            let _ = keeper.message(PAUSE / 5);
        };
        keeper.messages()?;
        if dir.join("forget").exists() {
            keeper.kept.clear();
        }
        let names: Vec<_> = keeper.kept.iter().map(|(name, _)| name).collect();
        eprintln!("keeper: {status}; kept: {names:?}");
        std::thread::sleep(PAUSE);
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keeper: {error}");
            ExitCode::FAILURE
        }
    }
}
