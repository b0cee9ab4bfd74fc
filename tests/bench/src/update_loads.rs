//! How long clients wait for a live update, or after a crash.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xenstore_tests::peers::{self, Daemon, Kind, Quotas, XEN_BIN};
use xenstore_tests::raw::{Conn, op};

use crate::bars::Bar::LatencyAtMost;
use crate::meter::{Meter, Result};
use crate::ring::make_domain;
use crate::ring_loads::introduce;
use crate::rows::{Case, Load, Stage, case, row};
use crate::subjects::Who;
use crate::wire::{Client, Deadline};

pub(crate) fn cases() -> Vec<Case> {
    let name = "live update, 120,000 nodes and 1,000 domains, longest wait for an answer";
    let crash = "kill -9, 120,000 nodes and 1,000 domains, until the first answer";
    vec![
        case("Live update", [row(name, Updates::prepare).once().bar(LatencyAtMost(50.0))]),
        case("Recovery", [row(crash, Crashes::prepare).once().only_ours()]),
    ]
}

const DOMAINS: u32 = 1000;
const NODES_EACH: u32 = 120;
const UPDATES: usize = 5;
const CRASHES: usize = 5;
/// How long there is load between two crashes.
const LOAD: Duration = Duration::from_millis(500);

/// A daemon is replaced by itself, while a client asks without end.
struct Updates {
    socket: PathBuf,
    program: PathBuf,
}

impl Updates {
    fn prepare(stage: &Stage) -> Result<Updates> {
        let program = match stage.subject.who() {
            Who::C => Path::new(XEN_BIN).join("xenstored"),
            Who::Ocaml => Path::new(XEN_BIN).join("oxenstored"),
            Who::Ours | Who::Floor | Who::Unjournaled => peers::program("xenstored")?,
        };
        fill(&stage.subject.xen()?, &mut stage.connect()?, stage.deadline)?;
        Ok(Updates { socket: stage.socket(), program })
    }
}

/// Makes all domains and their nodes.
fn fill(xen: &Path, dom0: &mut Client, deadline: Deadline) -> Result<()> {
    for domid in 1..=DOMAINS {
        make_domain(xen, domid)?;
        introduce(dom0, domid)?;
        let home = format!("/local/domain/{domid}");
        let first = [(op::MKDIR, format!("{home}|")), (op::SET_PERMS, format!("{home}|n{domid}|"))];
        let node = |i| (op::WRITE, format!("{home}/data/{i}|value"));
        // With the home and the directory in it.
        let nodes = (0..NODES_EACH - 2).map(node);
        dom0.bulk(first.into_iter().chain(nodes), 0, deadline)?;
    }
    Ok(())
}

/// A separate daemon is killed while a client writes without end, and restarted at once.
struct Crashes(Daemon);

impl Crashes {
    fn prepare(stage: &Stage) -> Result<Crashes> {
        let daemon = Daemon::start(Kind::Ours, Quotas::Off)?;
        fill(&daemon.xen(), &mut Client::connect(&daemon.socket())?, stage.deadline)?;
        Ok(Crashes(daemon))
    }
}

impl Load for Crashes {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let Crashes(daemon) = self;
        let deadline = meter.deadline;
        meter.measure(|tally| {
            for _ in 0..CRASHES {
                let mut writer = Conn::connect(&daemon.socket())?;
                let writing = std::thread::spawn(move || {
                    // Until the connection ends.
                    (0_u64..)
                        .find(|n| writer.ok(op::WRITE, &format!("/load/{}|{n}", n % 100)).is_err())
                });
                std::thread::sleep(LOAD);
                let killed = Instant::now();
                daemon.crash_without_waiting()?;
                loop {
                    deadline.check()?;
                    let answered = Conn::connect(&daemon.socket())
                        .map_err(|error| error.to_string())
                        .and_then(|mut conn| conn.ok(op::READ, "/local/domain/1000/data/1|"));
                    if answered.is_ok_and(|value| value == "value") {
                        break;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                tally.done(killed);
                writing.join().map_err(|_| "the client has panicked")?;
            }
            Ok(())
        })
    }
}

impl Load for Updates {
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let mut control = Conn::connect(&self.socket)?;
        let file = format!("live-update|-f|{}|", self.program.display());
        let deadline = meter.deadline;
        meter.measure(|tally| {
            for _ in 0..UPDATES {
                let client = Conn::connect(&self.socket)?;
                let longest = waiting(client, || {
                    expect(&control.ok(op::CONTROL, &file)?, "OK|")?;
                    loop {
                        deadline.check()?;
                        match control.ok(op::CONTROL, "live-update|-s|-t|60|")?.as_str() {
                            "BUSY|" => {}
                            answer => return expect(answer, "OK|"),
                        }
                    }
                })?;
                tally.ops += 1;
                tally.latencies.push(longest);
            }
            Ok(())
        })
    }
}

fn expect(answer: &str, expected: &str) -> Result<()> {
    if answer == expected { Ok(()) } else { Err(answer.into()) }
}

/// The longest that a client waits for an answer while something is done.
fn waiting(mut client: Conn, what: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                client.ok(op::GET_DOMAIN_PATH, "1|")?;
                longest = longest.max(start.elapsed());
            }
            Ok::<_, String>(longest)
        });
        let done = what();
        stop.store(true, Ordering::Relaxed);
        let longest = asking.join().map_err(|_| "the client has panicked")?;
        done.and(Ok(longest?))
    })
}
