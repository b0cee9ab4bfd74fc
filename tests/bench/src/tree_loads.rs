//! Large stores, and nodes with many children.

use std::time::Instant;

use xenstore_tests::raw::{bytes, op};

use crate::bars::Bar::{LinearFrom, RateOfPeers, RateOfRow};
use crate::meter::{Meter, Result};
use crate::rows::{Case, Load, Stage, case, row};
use crate::wire::{Client, Deadline};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case(GROUP, [row("create a node, 100,000 nodes", |stage| Create::prepare(stage, 100_000))]),
        case(
            GROUP,
            [
                row(FIRST, |stage| Children::prepare(stage, 0)),
                row("create the 16,000th child of a node", |stage| {
                    Children::prepare(stage, 15_990)
                })
                .bar(RateOfRow(0.8, FIRST)),
            ],
        ),
        case(
            GROUP,
            [row("remove a node with 16,000 children", |stage| Ok(Remove(stage.connect()?)))
                .bar(RateOfPeers(1.0))],
        ),
        case(
            GROUP,
            [
                row(SHORT_LIST, |stage| Listing::prepare(stage, 1000)),
                row("DIRECTORY_PART, all of 10,000 children", |stage| {
                    Listing::prepare(stage, 10_000)
                })
                .bar(LinearFrom(10.0, SHORT_LIST)),
            ],
        ),
    ]
}

const GROUP: &str = "Tree";
const FIRST: &str = "create the first child of a node";
const SHORT_LIST: &str = "DIRECTORY_PART, all of 1,000 children";

/// Makes small nodes, 100 in each directory, until there are so many or the time is over. How many
/// there are, with the directories.
pub(crate) fn fill(client: &mut Client, nodes: usize, deadline: Deadline) -> Result<usize> {
    let leaf = |i: usize| {
        let (a, b, c) = (i / 10_000, i / 100 % 100, i % 100);
        (op::WRITE, format!("/bench/nodes/{a}/{b}/{c}|value"))
    };
    let directories = |leaves: usize| leaves.div_ceil(100) + leaves.div_ceil(10_000);
    let leaves = nodes * 100 / 101; // about, which is enough
    let made = client.bulk((0..leaves).map(leaf), 0, deadline)?;
    Ok(made + directories(made))
}

/// The same, and they must all be there.
pub(crate) fn fill_up(stage: &Stage, nodes: usize) -> Result<()> {
    let made = fill(&mut stage.connect()?, nodes, stage.deadline)?;
    match stage.deadline.passed() {
        false => Ok(()),
        true => Err(format!("{} ({made} nodes)", stage.deadline.text()).into()),
    }
}

/// Creates some nodes, one at a time, and removes them outside of the measured time.
struct Create(Client);

impl Create {
    fn prepare(stage: &Stage, nodes: usize) -> Result<Create> {
        fill_up(stage, nodes)?;
        Ok(Create(stage.connect()?))
    }
}

impl Load for Create {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        while meter.more() {
            self.0.ok(op::MKDIR, "/bench/new|")?;
            meter.measure(|tally| {
                let mut now = Instant::now();
                for i in 0..100 {
                    self.0.ok(op::WRITE, &format!("/bench/new/{i}|value"))?;
                    now = tally.done(now);
                }
                Ok(())
            })?;
            self.0.ok(op::RM, "/bench/new|")?;
        }
        Ok(())
    }
}

/// Creates the first child of each of some nodes, or some children of a node that has many.
struct Children {
    client: Client,
    new: Vec<String>,
}

impl Children {
    fn prepare(stage: &Stage, there: usize) -> Result<Children> {
        let mut client = stage.connect()?;
        children(&mut client, there, stage.deadline)?;
        let new = |i| match there {
            0 => format!("/bench/parent-{i:04}/new"),
            _ => format!("/bench/parent/new-{i:04}"),
        };
        if there == 0 {
            let parent = |i| (op::MKDIR, format!("/bench/parent-{i:04}|"));
            client.bulk((0..20).map(parent), 0, stage.deadline)?;
        }
        Ok(Children { client, new: (0..20).map(new).collect() })
    }
}

/// A node with so many children.
fn children(client: &mut Client, count: usize, deadline: Deadline) -> Result<()> {
    let child = |i| (op::WRITE, format!("/bench/parent/child-{i:05}|value"));
    client.bulk((0..count).map(child), 0, deadline)?;
    deadline.check()
}

impl Load for Children {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        while meter.more() {
            meter.measure(|tally| {
                let mut now = Instant::now();
                for path in &self.new {
                    self.client.ok(op::WRITE, &format!("{path}|value"))?;
                    now = tally.done(now);
                }
                Ok(())
            })?;
            for path in &self.new {
                self.client.ok(op::RM, &format!("{path}|"))?;
            }
        }
        Ok(())
    }
}

/// Removes a node with many children.
struct Remove(Client);

impl Load for Remove {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        while meter.more() {
            children(&mut self.0, 16_000, meter.deadline)?;
            meter.measure(|tally| {
                let now = Instant::now();
                self.0.ok(op::RM, "/bench/parent|")?;
                tally.done(now);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Lists the children of a node part by part.
struct Listing {
    client: Client,
    children: usize,
}

impl Listing {
    fn prepare(stage: &Stage, count: usize) -> Result<Listing> {
        let mut client = stage.connect()?;
        children(&mut client, count, stage.deadline)?;
        Ok(Listing { client, children: count })
    }

    /// All of it in one pass; the number of names.
    fn list(&mut self) -> Result<usize> {
        let (mut offset, mut names) = (0, 0);
        loop {
            let payload = bytes(&format!("/bench/parent|{offset}|"));
            let part = self.client.ask(op::DIRECTORY_PART, 0, &payload)?;
            let generation = part.iter().position(|byte| *byte == 0).ok_or("no generation")?;
            let mut list = &part[generation + 1..];
            // The last part has an empty name at its end.
            let last = list.is_empty() || list == b"\0" || list.ends_with(b"\0\0");
            if last && !list.is_empty() {
                list = &list[..list.len() - 1];
            }
            names += list.iter().filter(|byte| **byte == 0).count();
            offset += list.len();
            if last {
                return Ok(names);
            }
        }
    }
}

impl Load for Listing {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        meter.round(|tally, until| {
            let mut now = Instant::now();
            while now < until {
                let names = self.list()?;
                if names != self.children {
                    return Err(format!("{names} children in the list").into());
                }
                now = tally.done(now);
            }
            Ok(())
        })
    }
}
