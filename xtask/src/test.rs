//! `cargo xtask test`.

use std::process::{Command, ExitCode, Stdio};

use crate::steps::{Steps, Verdict, succeed};
use crate::{cargo, deb_check, fuzz, packages, project, release, style, xen};

/// Seconds for each fuzz target.
const FUZZ_SECONDS: u32 = 10;

/// Runs everything.
pub fn run() -> ExitCode {
    let mut steps = Steps::default();
    let mut installed = Ok(());
    steps.step("packages for interop", || {
        installed = packages::install(packages::FOR_INTEROP);
        match &installed {
            Ok(()) => Verdict::Pass,
            Err(why) => Verdict::Skip(why.clone()),
        }
    });
    steps.command("format", &mut cargo(&["fmt", "--all", "--check"]));
    style::steps(&mut steps);
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    steps.command("clippy", &mut cargo(&clippy));
    let doc = ["doc", "--workspace", "--all-features", "--no-deps", "--quiet"];
    steps.command("documentation", cargo(&doc).env("RUSTDOCFLAGS", "-D warnings"));
    steps.step("protocol and store without std", without_std);
    let mut tests = cargo(&["test", "--workspace", "--quiet", "--no-fail-fast"]);
    if installed.is_ok() {
        // All packages are installed, so no test may be skipped for their lack.
        tests.env("XENSTORE_TESTS_REQUIRE", "1");
    }
    steps.command("tests", tests.args(["--", "--nocapture", "--test-threads=2"]));
    steps.step("model of the ring", ring_model);
    let example = ["run", "--quiet", "-p", "xenstore-client", "--example", "test_without_xen"];
    steps.command("example", &mut cargo(&example));
    steps.step("xs against a daemon", xs);
    for scenario in xen::SCENARIOS {
        steps.step(&format!("real Xen: {}", scenario.title()), || xen::scenario(scenario));
    }
    deb_check::steps(&mut steps);
    release::steps(&mut steps);
    match fuzz::available() {
        Err(why) => steps.step("fuzz", || Verdict::Skip(why)),
        Ok(()) => {
            for target in fuzz::TARGETS {
                steps.step(&format!("fuzz {target}"), || fuzz::clean(target, FUZZ_SECONDS));
            }
        }
    }
    steps.summary()
}

/// Builds for a target without std, if one is installed.
fn without_std() -> Verdict {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = sysroot.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    let libraries = format!("{}/lib/rustlib", sysroot.unwrap_or_default());
    let bare = ["x86_64-unknown-none", "aarch64-unknown-none", "thumbv7em-none-eabi"];
    let installed = |target: &&&str| std::path::Path::new(&libraries).join(target).exists();
    match bare.iter().find(installed) {
        None => {
            let why = "no target without std is installed; #![no_std] stands for it".into();
            Verdict::Skip(why)
        }
        Some(target) => {
            let crates = ["-p", "xenstore-protocol", "-p", "xenstore-store"];
            succeed(cargo(&["build", "--quiet", "--target", target]).args(crates))
        }
    }
}

/// Checks every interleaving of a guest and the server in the ring page.
fn ring_model() -> Verdict {
    let test = ["test", "--quiet", "-p", "xenstore-transport", "--lib", "model"];
    // Other flags rebuild everything, so this needs another target directory.
    let target = project().join("target/model");
    let flags = "--cfg xenstore_loom -Copt-level=2";
    succeed(cargo(&test).arg("--target-dir").arg(target).env("RUSTFLAGS", flags))
}

/// Runs the README's first command, and a client.
fn xs() -> Verdict {
    let Ok(dir) = std::fs::canonicalize(project()).map(|dir| dir.join("target/xtask-xs")) else {
        return Verdict::Fail("no project folder".into());
    };
    let socket = dir.join("socket");
    let daemon = cargo(&["run", "--quiet", "-p", "xenstored", "--", "--socket"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn();
    let mut daemon = match daemon {
        Ok(daemon) => daemon,
        Err(error) => return Verdict::Fail(error.to_string()),
    };
    // The daemon prints one line when it serves requests.
    let mut line = String::new();
    if let Some(out) = daemon.stdout.take() {
        let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line);
        print!("{line}");
    }
    let xs = ["run", "--quiet", "-p", "xenstore-xs", "--", "--socket"];
    let verdict = succeed(cargo(&xs).arg(&socket).args(["write", "/hello", "world"]));
    let _ = Command::new("kill").arg(daemon.id().to_string()).status();
    let _ = daemon.wait();
    verdict
}
