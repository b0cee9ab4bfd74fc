//! Our daemon beside C xenstored, oxenstored, and a bare echo server as the floor.
//!
//! Quotas are off, the daemons take turns in every round, and the medians of the rounds are shown;
//! `docs/benchmarks/README.md` says what is measured and how.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it reports to people

mod attack_loads;
mod bars;
mod domain_loads;
mod drive;
mod echo;
mod holder;
mod measure;
mod memory;
mod meter;
mod page;
mod plot;
mod report;
mod ring;
mod ring_echo;
mod ring_loads;
mod rows;
mod socket_loads;
mod subjects;
mod tree_loads;
mod tx_loads;
mod update_loads;
mod vm;
mod watch_loads;
mod wire;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

use measure::Plan;
use meter::Result;
use page::About;
use subjects::{Cores, Pins};

/// Compares our daemon with C xenstored, oxenstored and a bare echo server.
#[derive(Parser)]
#[command(name = "bench")]
struct Options {
    /// Only rows whose name is this, or contains it, and those that they are compared with.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Print the names of the rows.
    #[arg(long)]
    list: bool,
    /// Short rounds, and little patience with slow daemons: about three minutes.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Long rounds and much patience: about an hour.
    #[arg(long)]
    full: bool,
    /// Rounds of each load.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Length of a round.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// A daemon that has not been prepared for a row after this time is left out of it.
    #[arg(long, value_name = "SECONDS")]
    limit: Option<f64>,
    /// Where client and daemon run.
    #[arg(long, value_enum, default_value = "same")]
    cores: Cores,
    /// Write a page with plots as well, into this directory or into docs/benchmarks.
    #[arg(long, value_name = "DIRECTORY", num_args = 0..=1,
          default_missing_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/benchmarks"))]
    page: Option<PathBuf>,
}

impl Options {
    /// Rounds, their length and the limit, in seconds.
    fn times(&self) -> (usize, f64, f64) {
        let (rounds, seconds, limit) = match (self.quick, self.full) {
            (true, _) => (3, 0.1, 4.0),
            (_, true) => (5, 1.0, 180.0),
            _ => (3, 0.3, 15.0),
        };
        (
            self.rounds.unwrap_or(rounds),
            self.seconds.unwrap_or(seconds),
            self.limit.unwrap_or(limit),
        )
    }
}

fn main() -> ExitCode {
    // The servers and helpers that are measured run this same program.
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [echo::ARGUMENT, socket] => return echo::serve(socket.into()),
        [holder::ARGUMENT, socket, count] => {
            return holder::hold(Path::new(socket), count.parse().unwrap_or(0));
        }
        _ => {}
    }
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let cases = rows::selected(&options.only);
    if cases.is_empty() {
        return Err(format!("no row has {:?} in its name; --list shows them", options.only).into());
    }
    if options.list {
        cases.iter().flat_map(|case| &case.rows).for_each(|row| println!("{}", row.name));
        return Ok(());
    }
    let (rounds, seconds, limit) = options.times();
    let pins = Pins::choose(options.cores)?;
    let split = Pins::choose(Cores::Split).unwrap_or(pins);
    subjects::raise_descriptor_limit();
    in_memory();
    xenstore_tests::peers::program("xenstored")?; // built now rather than while it is measured
    let plan = Plan {
        rounds,
        round: Duration::from_secs_f64(seconds),
        limit: Duration::from_secs_f64(limit),
        pins,
    };
    let cores = match options.cores {
        Cores::Same => "client and daemon on one core",
        Cores::Split => "client and daemon on a core each",
    };
    let how = format!("{rounds} rounds of {seconds} s, {cores}, quotas off; medians");
    let option = if options.cores == Cores::Split { " --cores split" } else { "" };
    let command =
        format!("cargo xtask bench --rounds {rounds} --seconds {seconds} --limit {limit}{option}");
    let about = About { machine: report::machine(), how, command };
    about.machine.iter().for_each(|(what, value)| println!("{what:>8}: {value}"));
    println!("{:>8}: {}", "how", about.how);
    report::print_head();
    let (start, mut all) = (Instant::now(), Vec::new());
    for (at, case) in (1..).zip(&cases) {
        let (spent, rows) = (start.elapsed().as_secs(), case.rows.len());
        let (of, first) = (cases.len(), &case.rows[0].name);
        eprintln!("bench: {at} of {of}, after {spent} s: {first} ({rows} rows)");
        let plan = Plan { pins: if case.split { split } else { pins }, ..plan };
        plan.pins.pin_client()?;
        let measured = measure::measure(case, &plan);
        measured.iter().for_each(report::print);
        all.extend(measured);
        // Each time, so that what has been measured stays if the rest does not come to its end.
        if let Some(dir) = &options.page {
            page::write(dir, &all, &about)?;
        }
    }
    println!("\n{}; {:.0} s", report::counts(&all), start.elapsed().as_secs_f64());
    Ok(())
}

/// Ring pages are files of the pretend Xen; writing them back to a disk would disturb.
fn in_memory() {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        let _ = tempfile::env::override_temp_dir(memory);
    }
}
