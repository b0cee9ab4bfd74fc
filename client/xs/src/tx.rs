//! `xs tx`: commands in one transaction.

use std::io::{BufRead, Write};

use xenstore_client::Error;
use xenstore_client::blocking::{Client, Transaction};

use crate::output::{escape, perms};
use crate::{Doing, Failure};

/// Runs the commands on standard input in one transaction. Prints their output after the commit.
pub(crate) fn run(client: &Client, tries: u32, out: &mut impl Write) -> Result<(), Failure> {
    let lines: Result<Vec<String>, _> = std::io::stdin().lock().lines().collect();
    let lines = lines.doing("read", "standard input")?;
    let mut at = 0;
    let printed = client.transaction(tries, |tx| {
        let mut printed = String::new();
        for (number, line) in (1..).zip(&lines) {
            at = number;
            command(tx, line, &mut printed)?;
        }
        at = 0;
        Ok(printed)
    });
    let place = if at == 0 { "commit".into() } else { format!("line {at}") };
    out.write_all(printed.doing("tx:", &place)?.as_bytes()).doing("print", "")
}

/// `read PATH`, `write PATH VALUE`, `rm PATH`, `mkdir PATH`, `perms PATH [PERM…]`; the value is the
/// rest of the line.
fn command(tx: &Transaction<'_>, line: &str, printed: &mut String) -> Result<(), Error> {
    let line = line.trim_start();
    if line.is_empty() || line.starts_with('#') {
        return Ok(());
    }
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (path, rest) = rest.trim_start().split_once(' ').unwrap_or((rest.trim(), ""));
    match verb {
        "read" => *printed += &(escape(&tx.read(path)?) + "\n"),
        "write" => tx.write(path, rest)?,
        "rm" => tx.rm(path)?,
        "mkdir" => tx.mkdir(path)?,
        "perms" if rest.is_empty() => *printed += &(perms(&tx.perms(path)?) + "\n"),
        "perms" => tx.set_perms(path, rest)?,
        _ => {
            return Err(Error::Argument(format!(
                "unknown command {verb:?}: expected read, write, rm, mkdir or perms"
            )));
        }
    }
    Ok(())
}
