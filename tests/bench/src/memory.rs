//! Memory for each node.

use crate::bars::Bar::BytesOfPeers;
use crate::meter::{Meter, Result, memory};
use crate::rows::{Case, Load, Row, Stage, case, row};
use crate::tree_loads::fill;
use crate::wire::Client;

pub(crate) fn cases() -> Vec<Case> {
    let filled = |name: &str, nodes| {
        let row = row(name, move |stage| Filled::prepare(stage, nodes)).item("node").once();
        case(GROUP, [row])
    };
    let bar = |mut case: Case| {
        case.rows = case.rows.into_iter().map(|row: Row| row.bar(BytesOfPeers(1.0))).collect();
        case
    };
    vec![
        filled("memory for each of 10,000 nodes", 10_000),
        bar(filled("memory for each of 100,000 nodes", 100_000)),
        bar(filled("memory for each of 1,000,000 nodes", 1_000_000)),
    ]
}

const GROUP: &str = "Memory";

/// Creates small nodes, 64 requests in flight, as many as there is time for.
struct Filled {
    client: Client,
    pid: u32,
    nodes: usize,
}

impl Filled {
    fn prepare(stage: &Stage, nodes: usize) -> Result<Filled> {
        let client = stage.connect()?;
        Ok(Filled { client, pid: stage.subject.pid(), nodes })
    }
}

impl Load for Filled {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let before = memory(self.pid, "RssAnon")?;
        let (mut made, deadline) = (0, meter.deadline);
        meter.measure(|tally| {
            made = fill(&mut self.client, self.nodes, deadline)?;
            tally.ops += made;
            Ok(())
        })?;
        meter.bytes_each = Some((memory(self.pid, "RssAnon")? - before) / made as f64);
        if deadline.passed() {
            meter.note = format!("only {made} nodes within the time");
        }
        Ok(())
    }
}
