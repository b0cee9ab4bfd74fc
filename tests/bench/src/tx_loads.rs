//! Transactions: empty ones, small ones in small and large stores, and starts of VMs.

use std::os::unix::net::UnixStream;

use xenstore_tests::raw::{bytes, frame, op};

use crate::bars::Bar::{NoRetries, RateOfPeers, RateOfRow};
use crate::drive::{Driver, Script, Step};
use crate::meter::Result;
use crate::rows::{Case, Stage, case, row};
use crate::tree_loads::fill_up;
use crate::vm::{prepare_for_vms, start_of_vm, stop_of_vm};
use crate::wire::{Reply, connect};

pub(crate) fn cases() -> Vec<Case> {
    let vms = |clients| move |stage: &Stage| starts(stage, clients);
    let writes = |writes, nodes| move |stage: &Stage| in_store(stage, writes, nodes);
    let start = |name: &str, clients| case(GROUP, [row(name, vms(clients)).slow().bar(NoRetries)]);
    let mut cases = vec![
        start("VM start transactions, 1 client", 1),
        start("VM start transactions, 8 clients", 8),
        start("VM start transactions, 64 clients", 64),
        case(GROUP, [row("starts and stops of 300 VMs in parallel", starts_and_stops).slow()]),
        case(GROUP, [row("empty transaction", writes(0, 0)).bar(RateOfPeers(1.5))]),
        case(
            GROUP,
            [
                row(ONE_SMALL, writes(1, 1000)),
                row("transaction with 1 WRITE, 1,000,000 nodes", writes(1, 1_000_000))
                    .bar(RateOfPeers(1.5))
                    .bar(RateOfRow(0.8, ONE_SMALL)),
            ],
        ),
        case(
            GROUP,
            [
                row(TEN_SMALL, writes(10, 10_000)),
                row("transaction with 10 WRITEs, 100,000 nodes", writes(10, 100_000))
                    .bar(RateOfPeers(3.0))
                    .bar(RateOfRow(0.8, TEN_SMALL)),
            ],
        ),
    ];
    for (case, ratio) in cases.iter_mut().zip([3.0, 5.0, 5.0, 3.0]) {
        case.rows[0].bars.push(RateOfPeers(ratio));
    }
    cases
}

const GROUP: &str = "Transactions";
const ONE_SMALL: &str = "transaction with 1 WRITE, 1,000 nodes";
const TEN_SMALL: &str = "transaction with 10 WRITEs, 10,000 nodes";

/// Requests of a transaction, without its start and its end.
pub(crate) type Requests = Vec<(u32, String)>;

/// Transactions one after the other, each until it is committed. One operation is all of them.
pub(crate) struct Transactions {
    /// Frames of each, whose transaction ids are filled in.
    list: Vec<Vec<(u32, Vec<u8>)>>,
    current: usize,
    next: usize,
    id: u32,
}

impl Transactions {
    pub(crate) fn new(list: Vec<Requests>) -> Transactions {
        let whole = |mut requests: Requests| {
            requests.push((op::TRANSACTION_END, "T|".into()));
            let framed = |(ty, payload): (u32, String)| (ty, frame(ty, 1, 0, &bytes(&payload)));
            requests.into_iter().map(framed).collect()
        };
        let list = list.into_iter().map(whole).collect();
        Transactions { list, current: 0, next: 0, id: 0 }
    }

    fn start(&mut self, out: &mut Vec<u8>) {
        self.next = 0;
        out.extend(frame(op::TRANSACTION_START, 1, 0, b"\0"));
    }
}

impl Script for Transactions {
    fn begin(&mut self, out: &mut Vec<u8>) {
        self.current = 0;
        self.start(out);
    }

    fn reply(&mut self, reply: &Reply<'_>, out: &mut Vec<u8>) -> Result<Step> {
        let requests = &mut self.list[self.current];
        let asked = self.next.checked_sub(1).map_or(op::TRANSACTION_START, |at| requests[at].0);
        if asked == op::TRANSACTION_END && reply.payload == b"EAGAIN\0" {
            self.start(out);
            return Ok(Step::Again);
        }
        reply.expect(asked)?;
        if asked == op::TRANSACTION_START {
            let id = std::str::from_utf8(reply.payload)?;
            self.id = id.trim_end_matches('\0').parse()?;
        }
        if let Some((_, frame)) = requests.get_mut(self.next) {
            frame[8..12].copy_from_slice(&self.id.to_le_bytes());
            out.extend_from_slice(frame);
            self.next += 1;
            return Ok(Step::More);
        }
        self.current += 1;
        if self.current == self.list.len() {
            return Ok(Step::Done);
        }
        self.start(out);
        Ok(Step::More)
    }
}

type Clients = Driver<UnixStream, Transactions>;

fn clients(
    stage: &Stage,
    count: u32,
    transactions: impl Fn(u32) -> Vec<Requests>,
) -> Result<Clients> {
    let socket = stage.socket();
    let client = |n| Ok((connect(&socket)?, Transactions::new(transactions(n))));
    Driver::new((1..=count).map(client).collect::<Result<_>>()?, 1)
}

/// Each client starts its own domain repeatedly.
fn starts(stage: &Stage, count: u32) -> Result<Clients> {
    prepare_for_vms(stage, count)?;
    clients(stage, count, |domid| vec![start_of_vm(domid)])
}

/// Each client starts and stops its own domain.
fn starts_and_stops(stage: &Stage) -> Result<Clients> {
    prepare_for_vms(stage, 300)?;
    clients(stage, 300, |domid| vec![start_of_vm(domid), stop_of_vm(domid)])
}

/// One client, in a store with so many nodes.
fn in_store(stage: &Stage, writes: usize, nodes: usize) -> Result<Clients> {
    fill_up(stage, nodes)?;
    let write = |i| (op::WRITE, format!("/bench/written/{i}|some text"));
    clients(stage, 1, |_| vec![(0..writes).map(write).collect()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::word;

    fn types(out: &[u8]) -> Vec<(u32, u32)> {
        let (mut rest, mut types) = (out, Vec::new());
        while let Some(header) = rest.get(..16) {
            types.push((word(header, 0), word(header, 8)));
            rest = &rest[16 + word(header, 12) as usize..];
        }
        types
    }

    // Fails if a transaction is not begun again from its start after EAGAIN, if its requests lack its
    // id, or if it counts as done before it is committed.
    #[test]
    fn a_transaction_is_done_when_it_is_committed() {
        let mut script = Transactions::new(vec![vec![(op::WRITE, "/a|b".into())]]);
        let mut out = Vec::new();
        script.begin(&mut out);
        let mut answer = |script: &mut Transactions, ty, payload: &[u8]| {
            script.reply(&Reply { ty, payload }, &mut out).unwrap()
        };
        assert!(matches!(answer(&mut script, op::TRANSACTION_START, b"5\0"), Step::More));
        assert!(matches!(answer(&mut script, op::WRITE, b"OK\0"), Step::More));
        assert!(matches!(answer(&mut script, op::ERROR, b"EAGAIN\0"), Step::Again));
        assert!(matches!(answer(&mut script, op::TRANSACTION_START, b"6\0"), Step::More));
        assert!(matches!(answer(&mut script, op::WRITE, b"OK\0"), Step::More));
        assert!(matches!(answer(&mut script, op::TRANSACTION_END, b"OK\0"), Step::Done));
        let (start, write, end) = (op::TRANSACTION_START, op::WRITE, op::TRANSACTION_END);
        let expected = [(start, 0), (write, 5), (end, 5), (start, 0), (write, 6), (end, 6)];
        assert_eq!(types(&out), expected);
    }

    // Fails if the start of a VM is not what the benchmark's documentation says.
    #[test]
    fn the_start_of_a_vm_is_42_requests() {
        assert_eq!(start_of_vm(7).len() + 2, 42);
    }
}
