//! Connections that do nothing, held by a separate process: one process may not have enough descriptors
//! for those of all daemons.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use crate::meter::Result;
use crate::wire::Deadline;

/// Makes this program the holder.
pub(crate) const ARGUMENT: &str = "--hold-connections";

/// Connections, until this is dropped.
pub(crate) struct Holder(Child);

impl Holder {
    /// Opens them, one after the other.
    pub(crate) fn start(socket: &Path, count: usize, deadline: Deadline) -> Result<Holder> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(ARGUMENT).arg(socket).arg(count.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().ok_or("no output")?;
        let holder = Holder(child);
        // A line for every 16 connections, and an empty one when there will be no more.
        let mut opened = 0;
        for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
            match line.as_str() {
                "" => break,
                count => opened = count.parse()?,
            }
            if deadline.passed() {
                return Err(format!("{} ({opened} connections)", deadline.text()).into());
            }
        }
        match opened == count {
            true => Ok(holder),
            false => Err(format!("no more than {opened} connections").into()),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Holds connections as long as its parent lives.
pub(crate) fn hold(socket: &Path, count: usize) -> ExitCode {
    let mut connections = Vec::new();
    while connections.len() < count {
        match UnixStream::connect(socket) {
            Ok(connection) => connections.push(connection),
            Err(_) => break,
        }
        if connections.len() % 16 == 0 {
            println!("{}", connections.len());
        }
    }
    println!("{}\n", connections.len());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    ExitCode::SUCCESS
}
