//! Rows of the report: what is asked of the daemons, and what ours has to reach.

use std::path::PathBuf;
use std::time::Instant;

use crate::bars::Bar;
use crate::drive::{Driver, Link, Script};
use crate::meter::{Meter, Result};
use crate::subjects::{Subject, Who};
use crate::wire::{Client, Deadline};

/// A load that has been prepared on a daemon.
pub(crate) trait Load {
    /// Works until the round is over.
    fn round(&mut self, meter: &mut Meter) -> Result<()>;
}

impl<L: Link, S: Script> Load for Driver<L, S> {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        meter.round(|tally, until| self.drive(tally, || Instant::now() < until))?;
        self.rest()
    }
}

/// What a load is prepared with.
pub(crate) struct Stage<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) deadline: Deadline,
}

impl Stage<'_> {
    pub(crate) fn socket(&self) -> PathBuf {
        self.subject.socket()
    }

    pub(crate) fn connect(&self) -> Result<Client> {
        self.subject.connect()
    }
}

type Prepare = dyn Fn(&Stage) -> Result<Box<dyn Load>>;

/// A row.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) who: Vec<Who>,
    pub(crate) bars: Vec<Bar>,
    /// Of what there are [`crate::meter::Figures::bytes_each`].
    pub(crate) item: &'static str,
    /// It is too long for more than one round, or it cannot be done again.
    pub(crate) once: bool,
    /// Its rounds are so many times as long.
    pub(crate) stretch: u32,
    pub(crate) prepare: Box<Prepare>,
}

/// A row for the three daemons.
pub(crate) fn row<L: Load + 'static>(
    name: impl Into<String>,
    prepare: impl Fn(&Stage) -> Result<L> + 'static,
) -> Row {
    Row {
        name: name.into(),
        who: vec![Who::Ours, Who::C, Who::Ocaml],
        bars: Vec::new(),
        item: "",
        once: false,
        stretch: 1,
        prepare: Box::new(move |stage| Ok(Box::new(prepare(stage)?))),
    }
}

impl Row {
    /// The echo server can do it too.
    pub(crate) fn floor(mut self) -> Row {
        self.who.push(Who::Floor);
        self
    }

    /// Only our own daemon does it.
    pub(crate) fn only_ours(mut self) -> Row {
        self.who = vec![Who::Ours];
        self
    }

    /// Only our own daemon does it, with its journal and without, for longer: the difference is small.
    pub(crate) fn journal(mut self) -> Row {
        self.who = vec![Who::Ours, Who::Unjournaled];
        self.slow().bar(Bar::RateUnjournaled(0.95))
    }

    pub(crate) fn bar(mut self, bar: Bar) -> Row {
        self.bars.push(bar);
        self
    }

    pub(crate) fn item(mut self, item: &'static str) -> Row {
        self.item = item;
        self
    }

    /// Rounds five times as long, for operations that are, and for daemons that first let through more
    /// than they can process.
    pub(crate) fn slow(mut self) -> Row {
        self.stretch = 5;
        self
    }

    /// One round is enough.
    pub(crate) fn once(mut self) -> Row {
        self.once = true;
        self
    }
}

/// Rows that are measured in turns, since they are compared with each other.
pub(crate) struct Case {
    pub(crate) group: &'static str,
    pub(crate) rows: Vec<Row>,
    /// Client and daemon have a core each, if there are two.
    pub(crate) split: bool,
}

pub(crate) fn case(group: &'static str, rows: impl IntoIterator<Item = Row>) -> Case {
    Case { group, rows: rows.into_iter().collect(), split: false }
}

impl Case {
    /// On a core each, whatever is asked for.
    pub(crate) fn split(mut self) -> Case {
        self.split = true;
        self
    }
}

/// All of them, in the order of the report.
pub(crate) fn all() -> Vec<Case> {
    let groups = [
        crate::socket_loads::cases(),
        crate::watch_loads::cases(),
        crate::tx_loads::cases(),
        crate::tree_loads::cases(),
        crate::ring_loads::cases(),
        crate::domain_loads::cases(),
        crate::attack_loads::cases(),
        crate::update_loads::cases(),
        crate::memory::cases(),
    ];
    groups.into_iter().flatten().collect()
}

/// Those whose name contains the text, or is the text, and those that they are compared with.
pub(crate) fn selected(only: &str) -> Vec<Case> {
    let mut cases = all();
    let exact = cases.iter().flat_map(|case| &case.rows).any(|row| row.name == only);
    for case in &mut cases {
        let wanted = |row: &Row| if exact { row.name == only } else { row.name.contains(only) };
        let chosen = case.rows.iter().filter(|row| wanted(row));
        let bases: Vec<String> =
            chosen.flat_map(|row| &row.bars).filter_map(|bar| bar.base().map(Into::into)).collect();
        case.rows.retain(|row| wanted(row) || bases.contains(&row.name));
    }
    cases.retain(|case| !case.rows.is_empty());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a row is compared with one that is not measured in the same rounds, or two have the
    // same name.
    #[test]
    fn rows_are_compared_within_their_case() {
        let mut names = Vec::new();
        for case in all() {
            let here: Vec<&str> = case.rows.iter().map(|row| row.name.as_str()).collect();
            for base in case.rows.iter().flat_map(|row| &row.bars).filter_map(Bar::base) {
                assert!(here.contains(&base), "{base}");
            }
            names.extend(case.rows.into_iter().map(|row| row.name));
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    // Fails if a row is measured without what it is compared with.
    #[test]
    fn a_row_brings_its_base() {
        let cases = selected("create the 16,000th child of a node");
        let names = cases.iter().flat_map(|case| &case.rows).map(|row| row.name.as_str());
        assert_eq!(
            names.collect::<Vec<_>>(),
            ["create the first child of a node", "create the 16,000th child of a node"]
        );
    }
}
