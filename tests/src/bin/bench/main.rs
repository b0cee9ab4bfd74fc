//! Our daemon beside C xenstored, oxenstored, and a bare echo server as the floor.
//!
//! Client and daemon share one core, quotas are off, the daemons take turns in every round, and the
//! medians of the rounds are shown: requests per second, and the daemon's own CPU time for each.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it reports to people

mod echo;
mod load;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};
use xenstore_tests::peers::{Daemon, Kind, Quotas};

use load::{Figures, LOADS, Load};

const USAGE: &str = "usage: bench [--rounds N] [--seconds S] [--only TEXT]";

/// Who is measured.
enum Subject {
    Daemon(Daemon),
    Echo(echo::Echo),
}

impl Subject {
    fn name(&self) -> &'static str {
        match self {
            Subject::Daemon(daemon) => match daemon.kind {
                Kind::Ours => "ours",
                Kind::C => "C",
                Kind::Ocaml => "O",
            },
            Subject::Echo(_) => "echo",
        }
    }

    fn socket(&self) -> PathBuf {
        match self {
            Subject::Daemon(daemon) => daemon.socket(),
            Subject::Echo(echo) => echo.socket(),
        }
    }

    fn pid(&self) -> u32 {
        match self {
            Subject::Daemon(daemon) => daemon.pid(),
            Subject::Echo(echo) => echo.pid(),
        }
    }
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(echo::ARGUMENT) {
        return echo::serve(std::env::args_os().nth(2).unwrap_or_default().into());
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("bench: {line}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), String> {
    let (mut rounds, mut seconds, mut only) = (3_usize, 1.0_f64, String::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or(USAGE)?;
        match arg.as_str() {
            "--rounds" => rounds = value.parse().map_err(|_| USAGE)?,
            "--seconds" => seconds = value.parse().map_err(|_| USAGE)?,
            "--only" => only = value,
            _ => return Err(format!("{arg}: unknown; {USAGE}")),
        }
    }
    pin()?;
    load::raise_descriptor_limit();
    println!("{}", machine());
    println!(
        "{rounds} rounds of {seconds} s, client and daemon on one core, quotas off; medians\n"
    );
    println!(
        "{:<44} {:>6} {:>10} {:>9}  ratio of operations to C, O, echo",
        "load", "", "ops/s", "µs CPU"
    );
    for load in LOADS.iter().filter(|load| load.name.contains(&only)) {
        measure(load, rounds, Duration::from_secs_f64(seconds))?;
    }
    Ok(())
}

/// Starts everybody anew for each load, so that none inherits the tree of the one before.
fn measure(load: &Load, rounds: usize, time: Duration) -> Result<(), String> {
    let mut subjects = Vec::new();
    for kind in [Kind::Ours, Kind::C, Kind::Ocaml] {
        match Daemon::start(kind, Quotas::Off) {
            Ok(daemon) => subjects.push(Subject::Daemon(daemon)),
            Err(why) => eprintln!("{} is left out: {why}", kind.name()),
        }
    }
    if !load.watches {
        subjects.push(Subject::Echo(echo::Echo::start()?));
    }
    let mut results: Vec<Vec<Figures>> = subjects.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (subject, results) in subjects.iter().zip(&mut results) {
            let figures = load::run(load, &subject.socket(), subject.pid(), time);
            results.push(figures.map_err(|e| format!("{}, {}: {e}", load.name, subject.name()))?);
        }
    }
    let medians: Vec<Figures> = results.into_iter().map(load::median).collect();
    for (at, (subject, figures)) in subjects.iter().zip(&medians).enumerate() {
        let name = if at == 0 { load.name } else { "" };
        print!("{name:<44} {:>6} {:>10.0} {:>9.1}", subject.name(), figures.rate, figures.cpu);
        if subject.name() == "ours" {
            for other in &medians[1..] {
                print!("  {:.2}", figures.rate / other.rate);
            }
        }
        println!();
    }
    Ok(())
}

/// This process and all that it starts share the last core.
fn pin() -> Result<(), String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(cores - 1);
    sched_setaffinity(None, &set).map_err(|error| format!("cannot pin to a core: {error}"))
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, Linux {}", model.trim_start_matches([' ', '\t', ':']), kernel.trim())
}
