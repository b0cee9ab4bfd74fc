//! What is counted while a daemon is under load.

use std::error::Error;
use std::time::{Duration, Instant};

use crate::wire::Deadline;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Counts of one round.
#[derive(Default)]
pub(crate) struct Tally {
    /// Operations done.
    pub(crate) ops: usize,
    /// Transactions that had to be done again.
    pub(crate) retries: usize,
    /// From the first byte of an operation to the last of its answer, as the client sees it.
    pub(crate) latencies: Vec<Duration>,
}

impl Tally {
    /// An operation that began then is done; the time now.
    pub(crate) fn done(&mut self, since: Instant) -> Instant {
        let now = Instant::now();
        self.ops += 1;
        self.latencies.push(now - since);
        now
    }
}

/// Measures one round of a load: only what happens inside of [`Meter::measure`].
pub(crate) struct Meter {
    pid: u32,
    round: Duration,
    /// For loads that do not end by themselves when the round is over.
    pub(crate) deadline: Deadline,
    start: Instant,
    measured: Duration,
    cpu: u64,
    tally: Tally,
    /// Bytes of memory for each item that the store holds, where that is asked for.
    pub(crate) bytes_each: Option<f64>,
    /// Something that the reader of the report has to know.
    pub(crate) note: String,
}

impl Meter {
    pub(crate) fn new(pid: u32, round: Duration, deadline: Deadline) -> Meter {
        Meter {
            pid,
            round,
            deadline,
            start: Instant::now(),
            measured: Duration::ZERO,
            cpu: 0,
            tally: Tally::default(),
            bytes_each: None,
            note: String::new(),
        }
    }

    /// Measures for the whole round: `work` is to end at the time that it is given.
    pub(crate) fn round(
        &mut self,
        work: impl FnOnce(&mut Tally, Instant) -> Result<()>,
    ) -> Result<()> {
        let until = Instant::now() + self.round;
        self.measure(|tally| work(tally, until))
    }

    /// Measures a part of the round. Repeat while there is [`Meter::more`].
    pub(crate) fn measure(&mut self, work: impl FnOnce(&mut Tally) -> Result<()>) -> Result<()> {
        let (cpu_before, start) = (cpu(self.pid)?, Instant::now());
        work(&mut self.tally)?;
        self.measured += start.elapsed();
        self.cpu += cpu(self.pid)? - cpu_before;
        Ok(())
    }

    /// Is the round not over yet? Parts that are not measured may take four times as long.
    pub(crate) fn more(&self) -> bool {
        self.measured < self.round && self.start.elapsed() < 4 * self.round
    }

    pub(crate) fn figures(&mut self) -> Figures {
        let (ops, seconds) = (self.tally.ops as f64, self.measured.as_secs_f64());
        let some = |value: f64| (self.tally.ops > 0).then_some(value);
        if self.tally.ops == 0 {
            self.note = "none done within the round".into();
        }
        self.tally.latencies.sort_unstable();
        let p99 = self.tally.latencies.get(self.tally.latencies.len() * 99 / 100);
        Figures {
            rate: some(ops / seconds),
            cpu: some(self.cpu as f64 / 1000.0 / ops),
            p99: p99.map(|latency| latency.as_secs_f64() * 1e6),
            retries: (seconds > 0.0).then_some(self.tally.retries as f64 / seconds),
            bytes_each: self.bytes_each,
        }
    }
}

/// What came of a round, or the medians of several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Operations per second.
    pub(crate) rate: Option<f64>,
    /// Microseconds of the daemon's CPU time for each.
    pub(crate) cpu: Option<f64>,
    /// 99 of 100 took at most so many microseconds.
    pub(crate) p99: Option<f64>,
    /// Transactions done again, per second.
    pub(crate) retries: Option<f64>,
    pub(crate) bytes_each: Option<f64>,
}

/// The median of each figure by itself.
pub(crate) fn medians(rounds: &[Figures]) -> Figures {
    let median = |figure: fn(&Figures) -> Option<f64>| {
        let mut values: Vec<f64> = rounds.iter().filter_map(figure).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Figures {
        rate: median(|f| f.rate),
        cpu: median(|f| f.cpu),
        p99: median(|f| f.p99),
        retries: median(|f| f.retries),
        bytes_each: median(|f| f.bytes_each),
    }
}

/// A process's CPU time in nanoseconds, of all its threads.
fn cpu(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between being listed and being read.
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// A process's memory in bytes: `RssAnon`, its own now, without files that it has mapped; or `VmHWM`,
/// all at its peak.
pub(crate) fn memory(pid: u32, which: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    Ok(1024.0 * kib.ok_or("no such line in /proc/PID/status")?)
}
