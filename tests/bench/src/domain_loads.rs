//! Domains that come and go.

use std::path::PathBuf;
use std::time::Instant;

use xenstore_tests::raw::{bytes, frame, op};

use crate::bars::Bar::{RateOfPeers, RateOfRow};
use crate::drive::Link;
use crate::meter::{Meter, Result, memory};
use crate::ring::{Guest, doorbell, make_domain};
use crate::ring_loads::introduce;
use crate::rows::{Case, Load, Stage, case, row};
use crate::wire::{Client, Deadline, Inbox};

pub(crate) fn cases() -> Vec<Case> {
    let turn = |what| move |stage: &Stage| Turns::prepare(stage, what);
    let lives = |count| move |stage: &Stage| Lives::prepare(stage, count);
    vec![
        case(
            GROUP,
            [
                row("introduce 1,000 domains, each", turn(op::INTRODUCE)).bar(RateOfPeers(2.0)),
                row("release 1,000 domains, each", turn(op::RELEASE)).bar(RateOfPeers(2.0)),
            ],
        ),
        case(
            GROUP,
            [
                row(THOUSAND, lives(1000)).item("domain").once(),
                row("10,000 domains with 100 nodes and 10 watches, each life", lives(10_000))
                    .item("domain")
                    .once()
                    .bar(RateOfRow(0.8, THOUSAND)),
            ],
        ),
    ]
}

const GROUP: &str = "Domains";
const THOUSAND: &str = "1,000 domains with 100 nodes and 10 watches, each life";

/// Introduces domains and releases them, of which one is measured.
struct Turns {
    dom0: Client,
    what: u32,
}

const DOMAINS: u32 = 1000;

impl Turns {
    fn prepare(stage: &Stage, what: u32) -> Result<Turns> {
        let xen = stage.subject.xen()?;
        (1..=DOMAINS).try_for_each(|domid| make_domain(&xen, domid))?;
        Ok(Turns { dom0: stage.connect()?, what })
    }
}

impl Load for Turns {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        while meter.more() {
            for turn in [op::INTRODUCE, op::RELEASE] {
                let mut all = |done: &mut dyn FnMut()| {
                    (1..=DOMAINS).try_for_each(|domid| {
                        match turn {
                            op::INTRODUCE => introduce(&mut self.dom0, domid)?,
                            _ => drop(self.dom0.ok(op::RELEASE, &format!("{domid}|"))?),
                        }
                        done();
                        Ok(())
                    })
                };
                if turn != self.what {
                    all(&mut || ())?;
                    continue;
                }
                meter.measure(|tally| {
                    let mut now = Instant::now();
                    all(&mut || now = tally.done(now))
                })?;
            }
        }
        Ok(())
    }
}

/// Domains that are created, get nodes and watches, and are destroyed when all are there.
struct Lives {
    dom0: Client,
    xen: PathBuf,
    pid: u32,
    count: u32,
}

impl Lives {
    fn prepare(stage: &Stage, count: u32) -> Result<Lives> {
        let (xen, pid) = (stage.subject.xen()?, stage.subject.pid());
        Ok(Lives { dom0: stage.connect()?, xen, pid, count })
    }

    fn create(&mut self, domid: u32, deadline: Deadline) -> Result<()> {
        make_domain(&self.xen, domid)?;
        introduce(&mut self.dom0, domid)?;
        let home = format!("/local/domain/{domid}");
        let first = [
            (op::MKDIR, format!("{home}|")),
            (op::SET_PERMS, format!("{home}|n{domid}|")), // what is made below is the domain's, too
        ];
        // With the home, which has a directory for them, 100 nodes.
        let node = |i| (op::WRITE, format!("{home}/data/{i}|value"));
        self.dom0.bulk(first.into_iter().chain((0..98).map(node)), 0, deadline)?;
        Ok(())
    }

    fn destroy(&mut self, domid: u32) -> Result<()> {
        std::fs::write(self.xen.join(format!("{domid}/state")), "gone")?;
        self.dom0.ok(op::RELEASE, &format!("{domid}|"))?;
        self.dom0.ok(op::RM, &format!("/local/domain/{domid}|"))?;
        Ok(())
    }
}

impl Load for Lives {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let (before, doorbell) = (memory(self.pid, "RssAnon")?, doorbell(&self.xen)?);
        let (mut inbox, deadline) = (Inbox::default(), meter.deadline);
        let check = |what: &str, domid: u32| -> Result<()> {
            deadline.check().map_err(|error| format!("{error} ({domid} {what})").into())
        };
        meter.measure(|tally| {
            for domid in 1..=self.count {
                self.create(domid, deadline)?;
                let mut guest = Guest::open(&self.xen, domid, &doorbell)?;
                watch(&mut guest, &mut inbox, domid)?;
                check("created", domid)?;
            }
            tally.ops += self.count as usize;
            Ok(())
        })?;
        meter.bytes_each = Some((memory(self.pid, "RssAnon")? - before) / f64::from(self.count));
        meter.measure(|_| {
            (1..=self.count).try_for_each(|domid| {
                self.destroy(domid)?;
                check("destroyed", domid)
            })
        })
    }
}

/// A guest asks for ten watches on its own nodes.
fn watch(guest: &mut Guest, inbox: &mut Inbox, domid: u32) -> Result<()> {
    let watch = |i| {
        let payload = bytes(&format!("/local/domain/{domid}/data/{i}|token|"));
        frame(op::WATCH, 1, 0, &payload)
    };
    guest.send(&(0..10).flat_map(watch).collect::<Vec<u8>>())?;
    let (mut replies, mut events) = (0, 0);
    while replies < 10 || events < 10 {
        guest.wait()?;
        inbox.fill(|room| guest.receive(room))?;
        while let Some(message) = inbox.next() {
            match message.ty {
                op::WATCH_EVENT => events += 1,
                _ => replies += message.expect(op::WATCH).map(|()| 1)?,
            }
        }
    }
    Ok(())
}
