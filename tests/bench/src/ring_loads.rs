//! READs, WRITEs and transactions over rings.

use xenstore_tests::raw::{bytes, frame, op};

use crate::bars::Bar::{CpuOfRow, LatencyAtMost, RateOfPeers, RateOfRow};
use crate::drive::{Driver, Repeat};
use crate::meter::{Meter, Result};
use crate::ring::{Guest, PORT, doorbell, make_domain};
use crate::rows::{Case, Load, Row, Stage, case, row};
use crate::tx_loads::Transactions;
use crate::wire::Client;

pub(crate) fn cases() -> Vec<Case> {
    let loads = |name, ty| {
        [
            (1, "1 guest", Some(1.3)),
            (16, "16 guests", Some(2.0)),
            (128, "128 guests", Some(2.0)),
            (1000, "1,000 guests", None),
        ]
        .map(|(count, guests, ratio)| {
            let name = format!("ring {name}, {guests}");
            let row = row(name, move |stage| active(stage, ty, count, count)).floor();
            ratio.map(RateOfPeers).into_iter().fold(row, Row::bar)
        })
    };
    vec![
        case(GROUP, loads("READ", op::READ)),
        case(GROUP, loads("WRITE", op::WRITE)),
        case(
            GROUP,
            [
                row(ALONE, |stage| active(stage, op::READ, 1, 1)),
                row("ring READ, 1 active among 1,000 guests", |stage| {
                    active(stage, op::READ, 1, 1000)
                })
                .bar(CpuOfRow(1.2, ALONE)),
            ],
        ),
        case(
            GROUP,
            [
                row(NONE_OPEN, |stage| active(stage, op::WRITE, 1, 1)),
                row("ring WRITE, 1 guest, a transaction open elsewhere", Beside::prepare)
                    .slow()
                    .bar(RateOfRow(0.9, NONE_OPEN)),
            ],
        ),
        case(
            GROUP,
            [row("ring transactions of 3 WRITEs, 128 guests", transactions)
                .slow()
                .bar(RateOfPeers(5.0))
                .bar(LatencyAtMost(20.0))],
        ),
    ]
}

const GROUP: &str = "Rings";
const ALONE: &str = "ring READ, 1 active among 1 guest";
const NONE_OPEN: &str = "ring WRITE, 1 guest, no transaction open";

/// Introduces domains from 1 on, each with its own node; the first of them as guests.
fn guests(stage: &Stage, open: u32, all: u32) -> Result<Vec<Guest>> {
    let xen = stage.subject.xen()?;
    let (doorbell, mut dom0) = (doorbell(&xen)?, stage.connect()?);
    let mut guests = Vec::new();
    for domid in 1..=all {
        make_domain(&xen, domid)?;
        introduce(&mut dom0, domid)?;
        stage.deadline.check().map_err(|e| format!("{e} ({domid} domains)"))?;
        if domid <= open {
            guests.push(Guest::open(&xen, domid, &doorbell)?);
        }
    }
    let nodes = |domid| {
        let value = format!("/local/domain/{domid}/data/value|");
        [
            (op::WRITE, format!("{value}some text")),
            (op::SET_PERMS, format!("/local/domain/{domid}/data|n{domid}|")),
            (op::SET_PERMS, format!("{value}n{domid}|")),
        ]
    };
    dom0.bulk((1..=all).flat_map(nodes), 0, stage.deadline)?;
    stage.deadline.check()?;
    Ok(guests)
}

/// Lets a daemon serve a domain.
pub(crate) fn introduce(dom0: &mut Client, domid: u32) -> Result<()> {
    dom0.ok(op::INTRODUCE, &format!("{domid}|1|{PORT}|"))?;
    Ok(())
}

/// Some guests with a request in flight each, of all that are there.
fn active(stage: &Stage, ty: u32, some: u32, all: u32) -> Result<Driver<Guest, Repeat>> {
    let request = |domid| {
        let text = if ty == op::READ { "" } else { "some text" };
        frame(ty, 7, 0, &bytes(&format!("/local/domain/{domid}/data/value|{text}")))
    };
    let repeat = |domid| Repeat { ty, frame: request(domid) };
    Driver::new(guests(stage, some, all)?.into_iter().zip((1..).map(repeat)).collect(), 1)
}

/// A guest beside a connection that has a transaction open.
struct Beside {
    guest: Driver<Guest, Repeat>,
    _other: Client,
}

impl Beside {
    fn prepare(stage: &Stage) -> Result<Beside> {
        let guest = active(stage, op::WRITE, 1, 1)?;
        let mut other = stage.connect()?;
        other.ok(op::WRITE, "/bench/other|some text")?;
        let id = other.ok(op::TRANSACTION_START, "|")?;
        let id = std::str::from_utf8(&id)?.trim_end_matches('\0').parse()?;
        other.ask(op::READ, id, b"/bench/other\0")?;
        Ok(Beside { guest, _other: other })
    }
}

impl Load for Beside {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        self.guest.round(meter)
    }
}

/// What a frontend writes when it connects, in each of many guests.
fn transactions(stage: &Stage) -> Result<Driver<Guest, Transactions>> {
    let script = |domid| {
        let node = |name, value| (op::WRITE, format!("/local/domain/{domid}/data/{name}|{value}"));
        let writes = [node("ring-ref", "768"), node("event-channel", "9"), node("state", "4")];
        Transactions::new(vec![writes.into()])
    };
    Driver::new(guests(stage, 128, 128)?.into_iter().zip((1..).map(script)).collect(), 1)
}
