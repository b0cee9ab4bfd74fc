//! The most expensive single step of the engine stays cheap; see `xenstore_tests::fuzzing::dear`.
#![allow(clippy::print_stdout)] // results for the reader of the test's output

use std::time::{Duration, Instant};

use xenstore_tests::fuzzing::dear::{Step, cpu_time, dearest, describe, known, search};

/// What a step may cost, and how many times more without optimization.
const BOUND: Duration = Duration::from_millis(10);
const UNOPTIMIZED: u32 = if cfg!(debug_assertions) { 6 } else { 1 };
/// How long is searched.
const SEARCH: Duration = Duration::from_secs(10);

fn hold(step: &Step, program: &[u8]) {
    let cost = Duration::from_nanos(step.cost);
    let text = format!("{cost:?} of CPU: {}, in\n{}", step.what, describe(program));
    println!("{text}");
    assert!(cost <= BOUND * UNOPTIMIZED, "{text}");
}

// Fails if a program that was found once has a step again that keeps others waiting for long: a death
// that walks what others own, a commit that queues all its events at once.
#[test]
fn the_dear_steps_that_are_known_stay_cheap() {
    let programs = known();
    assert!(programs.len() >= 4, "the corpus is not there");
    for program in programs {
        // The machine may have done something else in one of the runs.
        let runs = [(); 3].map(|()| dearest(&program, &cpu_time));
        let step = runs.into_iter().min_by_key(|step| step.cost).unwrap_or_default();
        hold(&step, &program);
    }
}

// Fails if a short search finds a step that costs more. A longer one: `cargo xtask fuzz dear`.
#[test]
fn a_search_finds_no_dear_step() {
    let end = Instant::now() + SEARCH;
    let (step, program) = search(1, &cpu_time, &known(), || Instant::now() < end, |_, _| ());
    hold(&step, &program);
}
