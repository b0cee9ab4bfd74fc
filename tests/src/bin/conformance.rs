//! Holds a XenStore daemon against the conformance suite.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it reports to people

use std::path::PathBuf;
use std::process::ExitCode;

use xenstore_embedded::Store;
use xenstore_tests::conformance::{Differences, Verdict, cases, run};
use xenstore_tests::peers::Kind;
use xenstore_tests::target::Target;

const USAGE: &str = "usage: conformance [--socket PATH | --daemon memory|ours|c|ocaml [--ring]] \
                     [--differences FILE [--pin]] [--filter TEXT] [--list]";

fn main() -> ExitCode {
    match start() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(line) => {
            eprintln!("conformance: {line}");
            ExitCode::from(2)
        }
    }
}

/// In what the embedded store differs.
const EMBEDDED: &str = include_str!("../../differences/embedded.txt");

fn start() -> Result<bool, String> {
    let (mut socket, mut daemon, mut filter) = (None, None, String::new());
    let mut start = Target::start as fn(Kind) -> Result<Target, String>;
    let (mut differences, mut pin) = (None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} wants a value; {USAGE}"));
        match arg.as_str() {
            "--socket" => socket = Some(PathBuf::from(value()?)),
            "--daemon" => daemon = Some(value()?),
            // Over the ring of dom0.
            "--ring" => start = Target::start_ring,
            "--filter" => filter = value()?,
            "--differences" => {
                let path = value()?;
                let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
                differences = Some(Differences::parse(&text)?);
            }
            // Prints the lines for the list instead of verdicts.
            "--pin" => pin = true,
            "--list" => {
                cases().for_each(|case| println!("{}", case.name));
                return Ok(true);
            }
            _ => return Err(format!("{arg}: unknown; {USAGE}")),
        }
    }
    let in_memory = socket.is_none() && matches!(daemon.as_deref(), Some("memory") | None);
    let differences = match differences {
        Some(differences) => differences,
        None if in_memory => Differences::parse(EMBEDDED)?,
        None => Differences::default(),
    };
    let target = || match (&socket, daemon.as_deref()) {
        (Some(path), None) => Ok(Target::Socket(path.clone())),
        (None, Some("memory") | None) => Ok(Target::Memory(Store::start())),
        (None, Some("ours")) => start(Kind::Ours),
        (None, Some("c")) => start(Kind::C),
        (None, Some("ocaml")) => start(Kind::Ocaml),
        _ => Err(USAGE.into()),
    };
    let mut counts = [0; 4];
    run(target, &differences, &filter, |case, verdict| {
        let (at, word, text) = match verdict {
            Verdict::Passed => (0, "PASS", ""),
            Verdict::Failed(why) => (1, "FAIL", why.as_str()),
            Verdict::Skipped(why) => (2, "SKIP", *why),
            Verdict::Differs(how) => (3, "DIFF", how.as_str()),
        };
        counts[at] += 1;
        if pin {
            if matches!(verdict, Verdict::Failed(_) | Verdict::Differs(_)) {
                println!("{}", differences.line(case.name, text));
            }
            return;
        }
        println!("{word} {:<60} {text}", case.name);
    })?;
    let [passed, failed, skipped, differ] = counts;
    if pin {
        return Ok(true);
    }
    println!("{differ} differ as the list says");
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}
