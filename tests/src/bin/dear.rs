//! Searches for the most expensive single step of the engine: `dear [SECONDS [SEED]]`.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it reports to people

use std::process::ExitCode;
use std::time::{Duration, Instant};

use xenstore_store::Engine;
use xenstore_tests::fuzzing::dear::{GUESTS, Step, cpu_time, dearest, describe, known, search};

/// What a step may cost in a build with optimization.
const BOUND: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let number = |at: usize, default: u64| {
        std::env::args().nth(at).map_or(Ok(default), |text| text.parse::<u64>())
    };
    let (Ok(seconds), Ok(seed)) = (number(1, 60), number(2, 1)) else {
        eprintln!("usage: dear [SECONDS [SEED]]");
        return ExitCode::from(2);
    };
    let known = known();
    let end = Instant::now() + Duration::from_secs(seconds);
    println!("{GUESTS} guests with default quotas, {seconds} s, seed {seed}");
    let found = |step: &Step, _: &[u8]| {
        println!("{:>12.3?}  {}", Duration::from_nanos(step.cost), step.what);
    };
    let (step, program) = search(seed, &cpu_time, &known, || Instant::now() < end, found);
    let cost = Duration::from_nanos(step.cost);
    println!("the dearest step: {cost:.3?} of CPU, {} (line {})", step.what, step.gene + 1);
    print!("{}", describe(&program));
    let hex: String = program.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("as bytes: {hex}");
    let units = dearest(&program, &Engine::cost);
    println!("by units of work: {} in {}", units.cost, units.what);
    if cfg!(debug_assertions) {
        println!("a build without optimization: not held against the bound of {BOUND:?}");
        return ExitCode::SUCCESS;
    }
    println!("{:.2} of the bound of {BOUND:?}", cost.as_secs_f64() / BOUND.as_secs_f64());
    if cost <= BOUND { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
