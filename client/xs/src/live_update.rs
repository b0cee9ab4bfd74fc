//! `xs live-update`: lets another program go on in the daemon's place.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
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
    // Only this daemon lists its connections, and has a dry run: another might take that for the update itself.
    let known = client.control("connections", &[]).is_ok_and(|text| text.starts_with(b"conn"));
    if wanted.dry_run && !known {
        let text = dry_run_of_another(wanted, &program).doing("live-update", &wanted.program)?;
        return out.write_all(text.as_bytes()).doing("print", "the report");
    }
    let done = begin(client, wanted, &program).and_then(|()| start(client, wanted));
    if done.is_err() {
        let _ = client.control("live-update", &["-a"]);
    }
    let text = done.doing("live-update", &wanted.program)?;
    out.write_all(text.as_bytes()).doing("print", "the report")
}

/// What can be said without the running daemon, which is C xenstored or oxenstored.
fn dry_run_of_another(wanted: &Wanted, program: &Path) -> Result<String, Error> {
    let run = |args: &mut dyn Iterator<Item = &str>| {
        let output = Command::new(program).args(args).stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        Ok::<_, std::io::Error>((output.status.success(), text))
    };
    let (_, help) = run(&mut std::iter::once("--help"))?;
    if !help.contains("--config-test") {
        return Err(
            std::io::Error::other("not a program that this daemon can be updated to").into()
        );
    }
    let options = wanted.options.as_deref().unwrap_or_default().split_ascii_whitespace();
    if let (false, reason) = run(&mut options.chain(std::iter::once("--config-test")))? {
        return Err(std::io::Error::other(reason.trim().to_owned()).into());
    }
    Ok("the running daemon is not xenstored of this project, and has no dry run:\n\
        checked: the program and the options given here\n\
        not possible: size, pause and check of the state; a check of the daemon's own options and \
        files (oxenstored tries them at the update, C xenstored does not)\n\
        not possible: a way back, once the program has been started\n"
        .to_owned())
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
