//! Attacks of guests on the latency of other guests, in the engine: no step takes long, and the
//! memory that a step uses is freed.
#![allow(clippy::print_stdout)] // figures for the reader of the test's output

use std::alloc::System;
use std::time::Duration;

use cap::Cap;
use xenstore_store::Config;
use xenstore_tests::attacks::{Answer, Arena, Attack};
use xenstore_tests::fuzzing::dear::cpu_time;
use xenstore_tests::fuzzing::guests::{self, Guests};
use xenstore_tests::raw::{bytes, op, text};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Limit for a step, and the factor for a build without optimization.
const BOUND: Duration = Duration::from_millis(10);
const UNOPTIMIZED: u32 = if cfg!(debug_assertions) { 20 } else { 1 };
/// Units of deferred work that a server executes at a time.
const PIECE: u32 = 4096;

/// The engine, and its most expensive step.
struct InProcess {
    guests: Guests,
    worst: (Duration, String),
}

impl InProcess {
    /// Executes a step, and then the deferred work.
    fn step<T>(&mut self, what: &str, step: impl FnOnce(&mut Guests) -> T) -> T {
        let result = self.measure(what, step);
        while self.guests.engine.has_work() {
            self.measure(&format!("left of {what}"), |guests| guests.engine.work(PIECE));
        }
        result
    }

    fn measure<T>(&mut self, what: &str, step: impl FnOnce(&mut Guests) -> T) -> T {
        let before = cpu_time(&self.guests.engine);
        let result = step(&mut self.guests);
        let cost = Duration::from_nanos(cpu_time(&self.guests.engine) - before);
        if cost > self.worst.0 {
            self.worst = (cost, what.to_owned());
        }
        result
    }
}

impl Arena for InProcess {
    fn introduce(&mut self, _: u16) -> Result<(), String> {
        Ok(()) // all were there when the store was made
    }

    fn ask(&mut self, domid: u16, tx: u32, ty: u32, payload: &str) -> Result<Answer, String> {
        let (who, payload) = (usize::from(domid), bytes(payload));
        let what = format!("type {ty} of domain {domid}");
        let answer = self.step(&what, |guests| guests.ask(who, tx, ty, &payload));
        self.step("events", |guests| guests.drain(who));
        match answer {
            guests::Answer::Reply(op::ERROR, name) => Ok(Err(text(&name))),
            guests::Answer::Reply(_, payload) => Ok(Ok(text(&payload))),
            guests::Answer::Later(_) => Err(format!("{what} waits")),
        }
    }

    fn die(&mut self, domid: u16) -> Result<(), String> {
        self.step(&format!("death of domain {domid}"), |guests| guests.dies(domid));
        Ok(())
    }
}

// Fails if guests can prepare or cause a step of more than 10 ms of CPU time, or if memory that a
// step has used is not freed. `XENSTORE_GUESTS` adds a number of guests.
#[test]
fn no_attack_has_a_step_over_the_limit() {
    let more = std::env::var("XENSTORE_GUESTS").ok().map(|number| number.parse().unwrap());
    let guests = [60, 100].into_iter().chain(more);
    for (attack, guests) in
        Attack::ALL.into_iter().flat_map(|a| guests.clone().map(move |n| (a, n)))
    {
        let worst = (Duration::ZERO, String::new());
        let mut arena = InProcess { guests: Guests::new(&Config::default(), guests + 1), worst };
        let prepared = attack.prepare(&mut arena, guests).unwrap();
        let before = ALLOCATOR.allocated();
        prepared.strike(&mut arena).unwrap();
        for who in 0..=usize::from(guests) {
            arena.step("events", |guests| guests.drain(who));
        }
        let after = ALLOCATOR.allocated();
        let (cost, what) = &arena.worst;
        println!("{attack:?}, {guests} guests: {cost:?} for {what}; {before} bytes, then {after}");
        assert!(*cost <= BOUND * UNOPTIMIZED, "{attack:?}, {guests} guests: {cost:?} for {what}");
        assert!(
            after <= before / 5 * 6,
            "{attack:?}, {guests} guests: {before} bytes, then {after}"
        );
        arena.guests.engine.check().unwrap();
    }
}
