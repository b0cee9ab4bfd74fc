//! Fuzzing: `cargo xtask fuzz`, and the short runs of `cargo xtask test`.

use std::process::{Command, ExitCode, Stdio};

use crate::project;
use crate::steps::Verdict;

/// Every target.
pub const TARGETS: &[&str] =
    &["packet", "request", "engine", "merge", "dump", "ring", "fair", "dear"];

/// The packages with the targets, relative to the project.
const FOLDERS: [&str; 2] = ["fuzz", "fuzz/server"];

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

/// The package that has a target.
fn folder(target: &str) -> &'static str {
    let has = |folder: &&str| {
        project().join(folder).join("fuzz_targets").join(target).with_extension("rs").exists()
    };
    FOLDERS.into_iter().find(has).unwrap_or(FOLDERS[0])
}

fn cargo_fuzz(target: &str, seconds: u32) -> Command {
    let mut command = Command::new("cargo");
    // Set by the cargo that runs this program; it would override +nightly.
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    // New inputs go to a scratch folder; the committed ones are only read.
    let scratch = project().join("target/fuzz-corpus").join(target);
    let _ = std::fs::create_dir_all(&scratch);
    let folder = folder(target);
    command.current_dir(project()).args(["+nightly", "fuzz", "run", "--fuzz-dir", folder, target]);
    command.arg(scratch).arg(format!("{folder}/corpus/{target}")).arg("--");
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

/// Returns the targets with this name; without a name all.
///
/// # Errors
///
/// Lists the targets if there is none with this name.
fn chosen(name: Option<&str>) -> Result<Vec<&'static str>, String> {
    let Some(name) = name else { return Ok(TARGETS.to_vec()) };
    match TARGETS.iter().find(|target| **target == name) {
        Some(target) => Ok(vec![target]),
        None => Err(format!("{name}: no such fuzz target; the targets are {}", TARGETS.join(", "))),
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
        steps.step(target, || clean(target, seconds));
        if target == DEAR && !args.is_empty() {
            steps.step("the most expensive step is cheap", || dear(seconds));
        }
    }
    steps.summary()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if an unknown name runs nothing and passes, or if a target in `fuzz/` has no name.
    #[test]
    fn every_target_has_a_name_and_an_unknown_name_is_refused() {
        assert!(chosen(Some("TYPO")).unwrap_err().contains("packet, request"));
        assert_eq!(chosen(None).unwrap(), TARGETS);
        let mut found: Vec<String> = FOLDERS.iter().flat_map(|folder| targets_in(folder)).collect();
        found.sort();
        let mut named = TARGETS.to_vec();
        named.sort_unstable();
        assert_eq!(found, named);
    }

    fn targets_in(folder: &str) -> Vec<String> {
        let files = std::fs::read_dir(project().join(folder).join("fuzz_targets")).unwrap();
        let name =
            |path: std::path::PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        files.map(|file| name(file.unwrap().path())).collect()
    }
}
