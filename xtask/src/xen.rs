//! `cargo xtask xen`: the daemon on the real hypervisor, in QEMU.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::steps::Verdict;
use crate::{cargo, packages, project};

/// How a scenario of `tests/xen/scenarios` is run.
pub struct Scenario {
    pub name: &'static str,
    start: Start,
}

/// The daemon at its start.
enum Start {
    Ours,
    /// Our daemon, restarted whenever it ends.
    Restarted,
    /// A daemon of Debian; ours is available to take over.
    Debian(&'static [&'static str]),
}

/// The scenarios of `cargo xtask test`.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "smoke", start: Start::Ours },
    Scenario { name: "lifecycle", start: Start::Ours },
    Scenario { name: "transaction", start: Start::Ours },
    Scenario { name: "devices", start: Start::Ours },
    Scenario { name: "hostile", start: Start::Ours },
    Scenario { name: "kill", start: Start::Restarted },
    Scenario { name: "update", start: Start::Debian(&["@xenstored", "-N"]) },
    Scenario { name: "update", start: Start::Debian(&["@oxenstored", "--no-fork"]) },
];

impl Scenario {
    /// The first daemon, if that is not ours.
    pub fn title(&self) -> String {
        match self.start {
            Start::Debian(command) => format!("{} from {}", self.name, &command[0][1..]),
            _ => self.name.to_owned(),
        }
    }
}

/// Options of our daemon.
const OPTIONS: &[&str] = &["-N", "--require-xen"];

/// Exit status of `tests/xen/run` on a machine that lacks a requirement.
const LACKING: i32 = 77;

/// Our daemon, as a host runs it.
fn our_daemon() -> Result<PathBuf, String> {
    built("xenstored", "xenstored", &[])
}

/// Restarts the daemon, and stores its descriptors meanwhile.
fn fdstore() -> Result<PathBuf, String> {
    built("xenstore-tests", "fdstore", &[])
}

/// Builds an optimised program with these options of cargo. Returns its path.
pub fn built(package: &str, program: &str, options: &[&str]) -> Result<PathBuf, String> {
    let build = ["build", "--release", "--quiet", "-p", package, "--bin", program];
    match cargo(&build).args(options).status() {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(format!("cargo build: {status}")),
        Err(error) => return Err(format!("cargo: {error}")),
    }
    let target = std::env::var_os("CARGO_TARGET_DIR");
    Ok(target.map_or(project().join("target"), PathBuf::from).join("release").join(program))
}

fn harness() -> Command {
    let mut command = Command::new(project().join("tests/xen/run"));
    command.current_dir(project());
    command
}

/// Runs a scenario, and a second time if it fails: the emulated processor has bugs, above all with
/// more than one thread, and programs in dom0 crash occasionally.
pub fn scenario(scenario: &Scenario) -> Verdict {
    match attempt(scenario, &[]) {
        Verdict::Fail(why) => {
            println!("{why}; trying once more, more slowly");
            match attempt(scenario, &[("XEN_VM_ACCEL", "tcg,thread=single")]) {
                Verdict::Fail(again) => Verdict::Fail(format!("{again}; before that: {why}")),
                verdict => verdict,
            }
        }
        verdict => verdict,
    }
}

/// Runs a scenario with our daemon; what it prints goes to `target/xen/TITLE.log`.
fn attempt(scenario: &Scenario, env: &[(&str, &str)]) -> Verdict {
    if let Err(why) = packages::install(packages::FOR_XEN) {
        return Verdict::Skip(why);
    }
    let daemon = match our_daemon() {
        Ok(daemon) => daemon,
        Err(why) => return Verdict::Fail(why),
    };
    let log =
        project().join("target/xen").join(format!("{}.log", scenario.title().replace(' ', "-")));
    let output = std::fs::create_dir_all(project().join("target/xen"))
        .and_then(|()| std::fs::File::create(&log));
    let (out, errors) = match output.and_then(|file| Ok((file.try_clone()?, file))) {
        Ok(files) => files,
        Err(error) => return Verdict::Fail(format!("{}: {error}", log.display())),
    };
    let mut command = harness();
    command.args(["-s", scenario.name]).envs(env.iter().copied());
    match scenario.start {
        Start::Ours => command.arg(daemon).args(OPTIONS),
        Start::Restarted => match fdstore() {
            Ok(fdstore) => command.arg("-r").arg("-d").arg(fdstore).arg(daemon).args(OPTIONS),
            Err(why) => return Verdict::Fail(why),
        },
        Start::Debian(program) => command.arg("-d").arg(daemon).args(program),
    };
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
            // The failures, for the summary.
            let failed = lines.iter().filter(|line| line.contains(" FAIL ")).take(10);
            let failed = failed.copied().collect::<Vec<_>>().join("; ");
            Verdict::Fail(format!("{status}, the whole of it is in {}: {failed}", log.display()))
        }
        Err(error) => Verdict::Fail(error.to_string()),
    }
}

/// `cargo xtask xen [OPTIONS] [XENSTORED [ARGS]]`: as `tests/xen/run`, with our daemon unless
/// another is named.
pub fn run(args: &[String]) -> ExitCode {
    let mut command = harness();
    // Each option but these two has a value.
    let mut rest = args.iter();
    let mut named = false;
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "-i" => {}
            "-r" => match fdstore() {
                Ok(fdstore) => drop(command.arg("-d").arg(fdstore)),
                Err(why) => {
                    eprintln!("xtask: {why}");
                    return ExitCode::FAILURE;
                }
            },
            option if option.starts_with('-') => drop(rest.next()),
            _ => {
                named = true;
                break;
            }
        }
    }
    command.args(args);
    if !named {
        match our_daemon() {
            Ok(daemon) => command.arg(daemon).args(OPTIONS),
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
