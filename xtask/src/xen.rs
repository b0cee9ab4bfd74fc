//! `cargo xtask xen`: the daemon on the real hypervisor, in QEMU.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::steps::Verdict;
use crate::{cargo, packages, project};

/// Scenarios of `tests/xen/scenarios` that `cargo xtask test` runs.
pub const SCENARIOS: &[&str] = &["smoke", "lifecycle", "transaction", "devices", "hostile"];

/// What `tests/xen/run` exits with where this machine lacks something that it takes.
const LACKING: i32 = 77;

/// Our daemon, as a host runs it.
fn our_daemon() -> Result<PathBuf, String> {
    let build = ["build", "--release", "--quiet", "-p", "xenstored"];
    match cargo(&build).status() {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(format!("cargo build: {status}")),
        Err(error) => return Err(format!("cargo: {error}")),
    }
    let target = std::env::var_os("CARGO_TARGET_DIR");
    Ok(target.map_or(project().join("target"), PathBuf::from).join("release/xenstored"))
}

fn harness() -> Command {
    let mut command = Command::new(project().join("tests/xen/run"));
    command.current_dir(project());
    command
}

/// Runs a scenario with our daemon; what it prints goes to `target/xen/NAME.log`.
pub fn scenario(name: &str) -> Verdict {
    if let Err(why) = packages::install(packages::FOR_XEN) {
        return Verdict::Skip(why);
    }
    let daemon = match our_daemon() {
        Ok(daemon) => daemon,
        Err(why) => return Verdict::Fail(why),
    };
    let log = project().join("target/xen").join(format!("{name}.log"));
    let output = std::fs::create_dir_all(project().join("target/xen"))
        .and_then(|()| std::fs::File::create(&log));
    let (out, errors) = match output.and_then(|file| Ok((file.try_clone()?, file))) {
        Ok(files) => files,
        Err(error) => return Verdict::Fail(format!("{}: {error}", log.display())),
    };
    let mut command = harness();
    command.args(["-s", name]).arg(daemon).args(["-N", "--require-xen"]);
    match command.stdin(std::process::Stdio::null()).stdout(out).stderr(errors).status() {
        Ok(status) if status.success() => Verdict::Pass,
        Ok(status) if status.code() == Some(LACKING) => {
            Verdict::Skip(format!("this machine lacks something, see {}", log.display()))
        }
        Ok(status) => {
            let text = std::fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(60)..].iter().for_each(|line| println!("{line}"));
            Verdict::Fail(format!("{status}, the whole of it is in {}", log.display()))
        }
        Err(error) => Verdict::Fail(error.to_string()),
    }
}

/// `cargo xtask xen [OPTIONS] [XENSTORED [ARGS]]`: as `tests/xen/run`, with our daemon unless
/// another is named.
pub fn run(args: &[String]) -> ExitCode {
    let mut command = harness();
    command.args(args);
    // Options come with a value each, but for -i.
    let mut rest = args.iter();
    let mut named = false;
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "-i" => {}
            option if option.starts_with('-') => drop(rest.next()),
            _ => {
                named = true;
                break;
            }
        }
    }
    if !named {
        match our_daemon() {
            Ok(daemon) => command.arg(daemon).args(["-N", "--require-xen"]),
            Err(why) => {
                eprintln!("xtask: {why}");
                return ExitCode::FAILURE;
            }
        };
    }
    match command.status() {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("xtask: tests/xen/run: {error}");
            ExitCode::FAILURE
        }
    }
}
