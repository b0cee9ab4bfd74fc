//! Fuzzing: `cargo xtask fuzz`, and the short runs of `cargo xtask test`.

use std::process::{Command, ExitCode, Stdio};

use crate::project;
use crate::steps::Verdict;

/// Targets that must run clean.
pub const TARGETS: &[&str] =
    &["packet", "request", "engine", "merge", "dump", "ring", "fair", "dear"];
/// The target that must fail: it shows that the harness detects a bug.
pub const CANARY: &str = "canary";

/// Installs cargo-fuzz if only that is missing.
///
/// # Errors
///
/// States why fuzzing is not possible on this machine.
pub fn available() -> Result<(), String> {
    let works = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
        command.env_remove("RUSTUP_TOOLCHAIN").status().is_ok_and(|status| status.success())
    };
    if !works("cargo", &["+nightly", "--version"]) {
        return Err("no nightly toolchain".into());
    }
    if works("cargo", &["+nightly", "fuzz", "--version"]) {
        return Ok(());
    }
    match works("cargo", &["+nightly", "install", "cargo-fuzz", "--locked", "--quiet"]) {
        true => Ok(()),
        false => Err("cargo-fuzz is missing and cannot be installed".into()),
    }
}

fn cargo_fuzz(target: &str, seconds: u32) -> Command {
    let mut command = Command::new("cargo");
    // Set by the cargo that runs this program; it would override +nightly.
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    // New inputs go to a scratch folder; the committed ones are only read.
    let scratch = project().join("target/fuzz-corpus").join(target);
    let _ = std::fs::create_dir_all(&scratch);
    command.current_dir(project()).args(["+nightly", "fuzz", "run", target]);
    command.arg(scratch).arg(format!("fuzz/corpus/{target}")).arg("--");
    command.args(["-dict=fuzz/xenstore.dict", "-max_len=4096", "-timeout=20", "-verbosity=0"]);
    command.arg(format!("-max_total_time={seconds}"));
    command
}

/// Runs a target, which must find nothing.
pub fn clean(target: &str, seconds: u32) -> Verdict {
    crate::steps::succeed(&mut cargo_fuzz(target, seconds))
}

/// The target that can also run as a search for the most expensive step: `tests/src/bin/dear.rs`.
const DEAR: &str = "dear";

/// Searches for the most expensive step, with optimization.
fn dear(seconds: u32) -> Verdict {
    let mut command = Command::new("cargo");
    command.current_dir(project());
    command.args(["run", "--quiet", "--release", "-p", "xenstore-tests", "--bin", DEAR, "--"]);
    crate::steps::succeed(command.arg(seconds.to_string()))
}

/// Runs the canary, which must fail.
pub fn canary() -> Verdict {
    let mut command = cargo_fuzz(CANARY, 60);
    match command.stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Verdict::Fail("the planted mistake was not found".into()),
        Ok(_) => Verdict::Pass,
        Err(error) => Verdict::Fail(error.to_string()),
    }
}

/// Returns the targets with this name; without a name all but the canary.
fn chosen(name: Option<&str>) -> Result<Vec<&'static str>, String> {
    let all = TARGETS.iter().copied().chain([CANARY]);
    match name {
        None => Ok(TARGETS.to_vec()),
        Some(name) => match all.clone().find(|target| *target == name) {
            Some(target) => Ok(vec![target]),
            None => Err(format!(
                "{name}: no such fuzz target; there are {}",
                all.collect::<Vec<_>>().join(", ")
            )),
        },
    }
}

/// `cargo xtask fuzz [TARGET [SECONDS]]`.
pub fn run(args: &[String]) -> ExitCode {
    let targets = match chosen(args.first().map(String::as_str)) {
        Ok(targets) => targets,
        Err(error) => {
            eprintln!("xtask: {error}");
            return ExitCode::from(2);
        }
    };
    let seconds = args.get(1).map_or(Ok(60), |text| text.parse());
    let (Ok(seconds), Ok(())) = (seconds, available()) else {
        eprintln!("xtask: fuzz [TARGET [SECONDS]] needs a nightly toolchain and cargo-fuzz");
        return ExitCode::from(2);
    };
    let mut steps = crate::steps::Steps::default();
    for target in targets {
        if target == CANARY {
            println!("the canary has a planted mistake: it passes if fuzzing finds that");
            steps.step("the planted mistake of the canary is found", canary);
        } else {
            steps.step(target, || clean(target, seconds));
        }
        if target == DEAR && !args.is_empty() {
            steps.step("the most expensive step is cheap", || dear(seconds));
        }
    }
    steps.summary()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a name that is no target runs nothing and passes, or if a target of `fuzz/` cannot be
    // run by its name.
    #[test]
    fn every_target_and_nothing_else_has_a_name() {
        assert!(chosen(Some("TYPO")).unwrap_err().contains("packet, request"));
        assert_eq!(chosen(Some(CANARY)), Ok(vec![CANARY]));
        assert_eq!(chosen(None).unwrap(), TARGETS);
        for file in std::fs::read_dir(project().join("fuzz/fuzz_targets")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_stem().and_then(|name| name.to_str()).unwrap();
            assert_eq!(chosen(Some(name)).unwrap(), [name]);
        }
    }
}
