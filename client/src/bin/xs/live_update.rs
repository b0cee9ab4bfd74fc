//! `xs live-update`: lets another program go on in the daemon's place.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use xenstore_client::Error;
use xenstore_client::blocking::Client;

use crate::{Doing, Failure};

/// What is asked for.
pub(crate) struct Wanted {
    pub(crate) program: String,
    pub(crate) options: Option<String>,
    pub(crate) dry_run: bool,
    /// Of the migration stream, for C xenstored.
    pub(crate) stream_version: Option<u32>,
    pub(crate) timeout: u32,
    pub(crate) force: bool,
}

/// How long to wait before a daemon that cannot yet is asked again.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) fn run(client: &Client, wanted: &Wanted, out: &mut impl Write) -> Result<(), Failure> {
    // The daemon has another working directory.
    let program = std::fs::canonicalize(&wanted.program).doing("live-update", &wanted.program)?;
    let done = begin(client, wanted, &program).and_then(|()| start(client, wanted));
    if done.is_err() {
        let _ = client.control("live-update", &["-a"]);
    }
    let text = done.doing("live-update", &wanted.program)?;
    out.write_all(text.as_bytes()).doing("print", "the report")
}

/// What the daemon says. It tells what is wrong as the text of an answer.
fn say(client: &Client, args: &[&str]) -> Result<String, Error> {
    let text = client.control("live-update", args)?;
    Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
}

fn expect_ok(text: String) -> Result<(), Error> {
    match text.as_str() {
        "OK" => Ok(()),
        _ => Err(Error::from(std::io::Error::other(text))),
    }
}

fn begin(client: &Client, wanted: &Wanted, program: &Path) -> Result<(), Error> {
    expect_ok(say(client, &["-f", &program.to_string_lossy()])?)?;
    match &wanted.options {
        Some(options) => expect_ok(say(client, &["-c", options])?),
        None => Ok(()),
    }
}

/// The report of a dry run, or a line about what is done.
fn start(client: &Client, wanted: &Wanted) -> Result<String, Error> {
    let seconds = wanted.timeout.to_string();
    let version = wanted.stream_version.map(|version| version.to_string());
    let version = version.iter().flat_map(|version| ["-v", version]);
    if wanted.dry_run {
        let args: Vec<&str> = ["-s", "-n"].into_iter().chain(version).collect();
        return match say(client, &args)? {
            report if report.starts_with("state:") => Ok(report),
            reason => Err(Error::from(std::io::Error::other(reason))),
        };
    }
    let mut args = vec!["-s", "-t", &seconds];
    args.extend(version);
    if wanted.force {
        args.push("-F");
    }
    loop {
        match say(client, &args)?.as_str() {
            "BUSY" => std::thread::sleep(PAUSE),
            text => return expect_ok(text.to_owned()).map(|()| "done\n".to_owned()),
        }
    }
}
