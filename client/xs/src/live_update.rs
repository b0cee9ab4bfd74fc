//! `xs live-update`: replaces the daemon by another program.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use xenstore_client::Error;
use xenstore_client::blocking::Client;

use crate::{Doing, Failure};

/// The arguments of the command.
pub(crate) struct Wanted {
    pub(crate) program: String,
    pub(crate) options: Option<String>,
    pub(crate) dry_run: bool,
    /// Version of the migration stream for C xenstored.
    pub(crate) stream_version: Option<u32>,
    pub(crate) timeout: u32,
    pub(crate) force: bool,
}

/// Delay before the request to a busy daemon is repeated.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) fn run(client: &Client, wanted: &Wanted, out: &mut impl Write) -> Result<(), Failure> {
    // The daemon has another working directory, so it needs an absolute path.
    let program = std::fs::canonicalize(&wanted.program).doing("live-update", &wanted.program)?;
    // Only this daemon has a dry run; another could start the update instead. Only this one lists its
    // connections.
    let known = client.control("connections", &[]).is_ok_and(|text| text.starts_with(b"conn"));
    if wanted.dry_run && !known {
        let text = check_program_alone(wanted, &program).doing("live-update", &wanted.program)?;
        return out.write_all(text.as_bytes()).doing("print", "the report");
    }
    let done = begin(client, wanted, &program).and_then(|()| start(client, wanted));
    if done.is_err() {
        let _ = client.control("live-update", &["-a"]);
    }
    let text = done.doing("live-update", &wanted.program)?;
    out.write_all(text.as_bytes()).doing("print", "the report")
}

/// Checks what is possible without the running daemon, which is C xenstored or oxenstored.
fn check_program_alone(wanted: &Wanted, program: &Path) -> Result<String, Error> {
    let run = |args: &mut dyn Iterator<Item = &str>| {
        let output = Command::new(program).args(args).stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        Ok::<_, std::io::Error>((output.status.success(), text))
    };
    let (_, help) = run(&mut std::iter::once("--help"))?;
    if !help.contains("--config-test") {
        return Err(std::io::Error::other(
            "the program has no --config-test: not an xenstored of this project",
        )
        .into());
    }
    let options = wanted.options.as_deref().unwrap_or_default().split_ascii_whitespace();
    if let (false, reason) = run(&mut options.chain(std::iter::once("--config-test")))? {
        return Err(std::io::Error::other(reason.trim().to_owned()).into());
    }
    Ok("the running daemon is another XenStore daemon and has no dry run:\n\
        checked: the program and the options given here\n\
        not possible: size, pause and check of the state; a check of the daemon's own options and \
        files (oxenstored tries them at the update, C xenstored does not)\n\
        not possible: a way back, once the program has started\n"
        .to_owned())
}

/// Sends a `live-update` command and returns the reply. The daemon reports failures as reply text too.
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

/// Starts the update. Returns the report of a dry run, or a line for the user.
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
