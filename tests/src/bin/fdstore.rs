//! `fdstore DIR PROGRAM ARGS…`: restarts a program whenever it ends, and stores its descriptors
//! meanwhile, as systemd does with the daemon's unit. It stores none while `DIR/forget` exists.
#![allow(clippy::print_stderr)] // reports to the log

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use xenstore_tests::fdstore::FdStore;

/// `RestartSec` of the unit.
const PAUSE: Duration = Duration::from_millis(50);

fn run() -> std::io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let usage = || std::io::Error::other("fdstore DIR PROGRAM ARGS...");
    let dir = PathBuf::from(args.next().ok_or_else(usage)?);
    let mut command = Command::new(args.next().ok_or_else(usage)?);
    command.args(args);
    let mut fdstore = FdStore::new(&dir)?;
    loop {
        let mut child = fdstore.run(&command)?.stderr(Stdio::inherit()).spawn()?;
        // A program that sends a message blocks until it is received.
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            let _ = fdstore.message(PAUSE / 5);
        };
        fdstore.messages()?;
        if dir.join("forget").exists() {
            fdstore.stored.clear();
        }
        let names: Vec<_> = fdstore.stored.iter().map(|(name, _)| name).collect();
        eprintln!("fdstore: {status}; stored: {names:?}");
        std::thread::sleep(PAUSE);
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fdstore: {error}");
            ExitCode::FAILURE
        }
    }
}
