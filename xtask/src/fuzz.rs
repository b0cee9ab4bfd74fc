//! Fuzzing: `cargo xtask fuzz`, and the short runs of `cargo xtask test`.

use std::process::{Command, ExitCode, Stdio};

use crate::project;
use crate::steps::Verdict;

/// Targets that must run clean.
pub const TARGETS: &[&str] = &["packet", "request", "engine", "merge", "dump", "ring", "fair"];
/// The target that must fail: it shows that the harness sees a mistake.
pub const CANARY: &str = "canary";

/// Why fuzzing is not possible here, if so. Installs cargo-fuzz if that is all that is missing.
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
    // Set by the cargo that runs us; it would win over +nightly.
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

/// A target must run clean.
pub fn clean(target: &str, seconds: u32) -> Verdict {
    crate::steps::succeed(&mut cargo_fuzz(target, seconds))
}

/// The canary must be found.
pub fn canary() -> Verdict {
    let mut command = cargo_fuzz(CANARY, 60);
    match command.stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Verdict::Fail("the planted mistake was not found".into()),
        Ok(_) => Verdict::Pass,
        Err(error) => Verdict::Fail(error.to_string()),
    }
}

/// `cargo xtask fuzz [TARGET [SECONDS]]`.
pub fn run(args: &[String]) -> ExitCode {
    let seconds = args.get(1).map_or(Ok(60), |text| text.parse());
    let (Ok(seconds), Ok(())) = (seconds, available()) else {
        eprintln!("xtask: fuzz [TARGET [SECONDS]] needs a nightly toolchain and cargo-fuzz");
        return ExitCode::from(2);
    };
    let targets = TARGETS.iter().copied().filter(|t| args.first().is_none_or(|name| name == t));
    let mut steps = crate::steps::Steps::default();
    for target in targets {
        steps.step(target, || clean(target, seconds));
    }
    steps.summary()
}
