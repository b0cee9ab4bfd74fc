//! Steps that pass, fail or are skipped, and their summary.

use std::process::{Command, ExitCode};
use std::time::Instant;

/// The result of a step.
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed, with the reason.
    Fail(String),
    /// It was not run, with the reason.
    Skip(String),
}

/// Runs all steps, also after one has failed.
#[derive(Default)]
pub struct Steps(Vec<(String, Verdict, f64)>);

impl Steps {
    /// Runs a step.
    pub fn step(&mut self, name: &str, run: impl FnOnce() -> Verdict) {
        println!("\n== {name}");
        let start = Instant::now();
        let verdict = run();
        self.0.push((name.into(), verdict, start.elapsed().as_secs_f64()));
    }

    /// Runs a command; its status is the verdict.
    pub fn command(&mut self, name: &str, command: &mut Command) {
        self.step(name, || succeed(command));
    }

    /// Prints a line for each step, then the counts.
    pub fn summary(&self) -> ExitCode {
        println!("\n== summary");
        let mut counts = [0; 3];
        for (name, verdict, seconds) in &self.0 {
            let (at, word, why) = match verdict {
                Verdict::Pass => (0, "PASS", ""),
                Verdict::Fail(why) => (1, "FAIL", why.as_str()),
                Verdict::Skip(why) => (2, "SKIP", why.as_str()),
            };
            counts[at] += 1;
            println!(
                "{word} {seconds:>6.0} s  {name}{}{why}",
                if why.is_empty() { "" } else { ": " }
            );
        }
        let [passed, failed, skipped] = counts;
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Runs a command; its status is the verdict.
pub fn succeed(command: &mut Command) -> Verdict {
    match command.status() {
        Ok(status) if status.success() => Verdict::Pass,
        Ok(status) => Verdict::Fail(status.to_string()),
        Err(error) => Verdict::Fail(format!("{}: {error}", command.get_program().display())),
    }
}
