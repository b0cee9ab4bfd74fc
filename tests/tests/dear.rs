//! Limits the most expensive single step of the engine; see `xenstore_tests::fuzzing::dear`.
#![allow(clippy::print_stdout)] // results for the reader of the test's output

use std::time::{Duration, Instant};

use xenstore_tests::fuzzing::dear::{Step, cpu_time, dearest, describe, known, search};

/// Limit for a step, and the factor for a build without optimization.
const BOUND: Duration = Duration::from_millis(10);
const UNOPTIMIZED: u32 = if cfg!(debug_assertions) { 6 } else { 1 };
/// Duration of the search.
const SEARCH: Duration = Duration::from_secs(10);

fn hold(step: &Step, program: &[u8]) {
    let cost = Duration::from_nanos(step.cost);
    let text = format!("{cost:?} of CPU: {}, in\n{}", step.what, describe(program));
    println!("{text}");
    assert!(cost <= BOUND * UNOPTIMIZED, "{text}");
}

// Fails if a known program has an expensive step again: a death that walks the nodes of other
// domains, a commit that queues all its events at once.
#[test]
fn known_expensive_steps_stay_within_the_limit() {
    let programs = known();
    assert!(programs.len() >= 4, "the corpus is not there");
    for program in programs {
        // Other processes may have disturbed one of the runs.
        let runs = [(); 3].map(|()| dearest(&program, &cpu_time));
        let step = runs.into_iter().min_by_key(|step| step.cost).unwrap_or_default();
        hold(&step, &program);
    }
}

// Fails if a short search finds a more expensive step. A longer one: `cargo xtask fuzz dear`.
#[test]
fn search_finds_no_step_over_the_limit() {
    let end = Instant::now() + SEARCH;
    let (step, program) = search(1, &cpu_time, &known(), || Instant::now() < end, |_, _| ());
    hold(&step, &program);
}
