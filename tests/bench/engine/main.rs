//! What requests cost in the engine alone: no sockets, no frames to find, no other thread.
//!
//!     cargo run --release -p xenstore-bench --bin engine-bench [TEXT]
//!
//! runs the rows whose names contain TEXT. Each figure is the CPU time of the thread that answers,
//! the least of several runs: what is above it is the machine's noise. Quotas are off.
#![allow(clippy::print_stdout)] // it reports to people

mod memory;
mod rows;
mod state;
mod store;

use std::time::Duration;

/// CPU time of this thread.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below 10^9"))
}

/// The time of one `step` in microseconds: the least mean of 5 runs of `count` steps.
pub(crate) fn measure(count: usize, mut step: impl FnMut(usize)) -> f64 {
    let mut best = f64::MAX;
    for run in 0..5 {
        let start = cpu();
        (0..count).for_each(|i| step(run * count + i));
        best = best.min((cpu() - start).as_secs_f64());
    }
    best * 1e6 / count as f64
}

/// The time of something that happens once, in microseconds.
pub(crate) fn once(step: impl FnOnce()) -> f64 {
    let start = cpu();
    step();
    (cpu() - start).as_secs_f64() * 1e6
}

pub(crate) fn show(name: &str, micros: f64) {
    println!("{name:<72} {micros:>12.3} us");
}

fn main() {
    let mut args = std::env::args().skip(1);
    let only = args.next().unwrap_or_default();
    if only == memory::ARGUMENT {
        return memory::report(args.next().and_then(|text| text.parse().ok()).unwrap_or_default());
    }
    for (name, row) in rows::ROWS.iter().filter(|(name, _)| name.contains(&only)) {
        row(name);
    }
    memory::all(&only);
}
