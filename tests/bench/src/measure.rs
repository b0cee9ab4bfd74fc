//! Measures the rows of a case: all daemons and all rows take turns in every round.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::bars::Judged;
use crate::meter::{Figures, Meter, Result, medians, memory};
use crate::rows::{Case, Load, Row, Stage};
use crate::subjects::{Pins, Subject, Who};
use crate::wire::Deadline;

/// How long things may take.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    /// Of one load on one daemon.
    pub(crate) round: Duration,
    /// For one daemon in one row: to be prepared, and again for its rounds.
    pub(crate) limit: Duration,
    pub(crate) pins: Pins,
}

impl Plan {
    /// Ours has four times as long: without its figures there is nothing to compare.
    fn deadline(&self, who: Who) -> Deadline {
        Deadline::after(self.limit * if who == Who::Ours { 4 } else { 1 })
    }
}

/// What came of a row.
pub(crate) struct Measured {
    pub(crate) group: &'static str,
    pub(crate) name: String,
    pub(crate) item: &'static str,
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) judged: Vec<Judged>,
}

/// What came of it with one daemon.
pub(crate) struct Outcome {
    pub(crate) who: Who,
    /// Figures, or why there are none.
    pub(crate) figures: std::result::Result<Figures, String>,
    pub(crate) peak: Option<f64>,
    pub(crate) note: String,
}

impl Measured {
    pub(crate) fn figures(&self, who: Who) -> Option<Figures> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.who == who)?;
        outcome.figures.as_ref().ok().copied()
    }
}

/// In place of what went wrong; that has been told on standard error.
const PANIC: &str = "the load has panicked";

/// A daemon with a load.
struct Instance<'a> {
    row: &'a Row,
    who: Who,
    running: Option<(Subject, Box<dyn Load>)>,
    /// Time that its rounds have taken.
    spent: Duration,
    rounds: Vec<Figures>,
    failure: Option<String>,
    peak: Option<f64>,
    note: String,
}

impl<'a> Instance<'a> {
    fn start(row: &'a Row, who: Who, plan: &Plan) -> Instance<'a> {
        let start = || -> Result<(Subject, Box<dyn Load>)> {
            let subject = Subject::start(who, plan.pins)?;
            let deadline = plan.deadline(who);
            let load = (row.prepare)(&Stage { subject: &subject, deadline })?;
            Ok((subject, load))
        };
        let started = catch_unwind(AssertUnwindSafe(start)).unwrap_or_else(|_| Err(PANIC.into()));
        let (running, failure) = match started {
            Ok(running) => (Some(running), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Instance {
            row,
            who,
            running,
            spent: Duration::ZERO,
            rounds: Vec::new(),
            failure,
            peak: None,
            note: String::new(),
        }
    }

    fn round(&mut self, plan: &Plan) {
        let Some((subject, load)) = &mut self.running else { return };
        let (start, length) = (Instant::now(), plan.round * self.row.stretch);
        let mut meter = Meter::new(subject.pid(), length, plan.deadline(self.who));
        // A mistake in one load must not lose the figures of the others.
        let round = catch_unwind(AssertUnwindSafe(|| load.round(&mut meter)));
        match round.unwrap_or_else(|_| Err(PANIC.into())) {
            Ok(()) => self.rounds.push(meter.figures()),
            Err(error) => self.failure = Some(error.to_string()),
        }
        self.note = meter.note;
        self.peak = memory(subject.pid(), "VmHWM").ok();
        self.spent += start.elapsed();
        if self.failure.is_some() || self.row.once || self.spent > plan.limit {
            self.running = None;
        }
    }

    fn outcome(self) -> Outcome {
        let (rounds, mut note) = (self.rounds.len(), self.note);
        let figures = match self.failure {
            Some(why) if rounds == 0 => Err(why),
            Some(why) => {
                note = format!("failed after {rounds} rounds: {why}");
                Ok(medians(&self.rounds))
            }
            None => Ok(medians(&self.rounds)),
        };
        Outcome { who: self.who, figures, peak: self.peak, note }
    }
}

pub(crate) fn measure(case: &Case, plan: &Plan) -> Vec<Measured> {
    let all = case.rows.iter().flat_map(|row| row.who.iter().map(move |who| (row, *who)));
    let mut instances: Vec<Instance> = Vec::new();
    for (row, who) in all {
        let mut instance = Instance::start(row, who, plan);
        if row.once {
            instance.round(plan);
        }
        instances.push(instance);
    }
    for _ in 0..plan.rounds {
        for instance in &mut instances {
            instance.round(plan);
        }
    }
    let mut measured: Vec<Measured> = Vec::new();
    for row in &case.rows {
        let of_row = instances.extract_if(.., |instance| instance.row.name == row.name);
        measured.push(Measured {
            group: case.group,
            name: row.name.clone(),
            item: row.item,
            outcomes: of_row.map(Instance::outcome).collect(),
            judged: Vec::new(),
        });
    }
    judge(case, &mut measured);
    measured
}

fn judge(case: &Case, measured: &mut [Measured]) {
    for (at, row) in case.rows.iter().enumerate() {
        let judge = |bar: &crate::bars::Bar| {
            let base = measured.iter().find(|other| Some(other.name.as_str()) == bar.base());
            let base = base.and_then(|base| base.figures(Who::Ours));
            bar.judge(&|who| measured[at].figures(who), base)
        };
        measured[at].judged = row.bars.iter().map(judge).collect();
    }
}
