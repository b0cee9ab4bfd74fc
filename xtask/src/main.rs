//! `cargo xtask`: the project's own commands.

mod deb;
mod deb_check;
mod fuzz;
mod licences;
mod packages;
mod release;
mod steps;
mod style;
mod test;
mod xen;

use std::path::Path;
use std::process::{Command, ExitCode};

const HELP: &str = "cargo xtask COMMAND

  test                    run everything that can be tested here; a summary at the end says what was
                          skipped and why (installs the Debian packages that are needed, if it may)
  conformance [OPTIONS]   run the conformance suite on a daemon: --socket PATH, or
                          --daemon memory|ours|c|ocaml; --filter TEXT, --differences FILE, --list
  bench [OPTIONS]         compare our daemon with C xenstored, oxenstored and a bare echo server
  crash [COUNT [SEED]]    kill the daemon that often (default: 1000) while guests and clients use it,
                          at moments that SEED decides, and check that no client has lost anything
  deb [check]             build the Debian package; check: compare it with the files of Debian's
                          packages, and start it with Debian's scripts
  fuzz [TARGET [SECONDS]] run a fuzz target, or all, for a while (default: 60 seconds each)
  style                   check words, line lengths, paths and links against docs/style.md
  xen [OPTIONS]           boot the real Xen in QEMU with our daemon and run a scenario: -s NAME (smoke,
                          lifecycle, …), -i for a shell; see tests/xen/README.md
  help                    this text";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("test") => test::run(),
        Some("conformance") => status_of(&mut program("xenstore-tests", "conformance", rest)),
        Some("bench") => bench(rest),
        Some("crash") => crash(rest),
        Some("deb") => deb::run(rest),
        Some("fuzz") => fuzz::run(rest),
        Some("style") => style::run(),
        Some("xen") => xen::run(rest),
        None | Some("help" | "--help" | "-h") => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        Some(other) => {
            eprintln!("xtask: no such command: {other}\n\n{HELP}");
            ExitCode::from(2)
        }
    }
}

/// The project's folder.
fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ is in the project")
}

/// `cargo`, in the project's folder.
fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(project()).args(args);
    command
}

/// Compares daemons. Their runtime directories are memory, as `/run` is on a host.
fn bench(args: &[String]) -> ExitCode {
    let mut cargo = program("xenstore-bench", "bench", args);
    if Path::new("/dev/shm").is_dir() {
        cargo.env("TMPDIR", "/dev/shm");
    }
    status_of(&mut cargo)
}

/// Kills the daemon repeatedly.
fn crash(args: &[String]) -> ExitCode {
    let test = ["test", "--release", "--quiet", "-p", "xenstore-tests", "--test", "crash"];
    let mut cargo = cargo(&test);
    cargo.args(["--", "--nocapture"]);
    cargo.env("XENSTORE_CALLS", "all");
    cargo.env("XENSTORE_CRASHES", args.first().map_or("1000", String::as_str));
    if let Some(seed) = args.get(1) {
        cargo.env("XENSTORE_SEED", seed);
    }
    status_of(&mut cargo)
}

/// A program of a package, optimised.
fn program(package: &str, name: &str, args: &[String]) -> Command {
    let mut cargo = cargo(&["run", "--release", "--quiet", "-p", package, "--bin", name, "--"]);
    cargo.args(args);
    cargo
}

fn status_of(command: &mut Command) -> ExitCode {
    match command.status() {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("xtask: cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
