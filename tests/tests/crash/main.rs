//! The daemon on the pretend Xen is killed repeatedly; no guest may lose anything.
//!
//! `XENSTORE_CRASHES` and `XENSTORE_SEED` set how often and when; `cargo xtask crash` sets them.

#![allow(clippy::print_stderr)] // figures

mod calls;
mod stored;
mod systemd;
mod unit;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xenstore_tests::fake_guest::{FakeGuest, PORT};
use xenstore_tests::peers::{Daemon, Kind, Quotas};
use xenstore_tests::raw::{Conn, op};

/// Limit for a reply while the daemon is killed and started.
const LIMIT: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A guest that is not aware of crashes. Each reply must be that of a daemon that has executed each
/// request once.
struct Guest {
    conn: Conn,
    domid: u16,
    rounds: u64,
}

impl Guest {
    fn new(daemon: &Daemon, dom0: &mut Conn, domid: u16) -> Guest {
        let guest = FakeGuest::create(&daemon.xen(), domid).unwrap();
        dom0.gives(op::INTRODUCE, &format!("{domid}|1|{PORT}|"), "OK|").unwrap();
        dom0.ok(op::WRITE, &format!("/local/domain/{domid}|")).unwrap();
        dom0.ok(op::SET_PERMS, &format!("/local/domain/{domid}|n{domid}|")).unwrap();
        let mut conn = Conn::new(guest);
        conn.patience = LIMIT;
        conn.watch("/shared|s|").unwrap();
        Guest { conn, domid, rounds: 0 }
    }

    /// One round of requests. A second execution of any of them changes its reply.
    fn round(&mut self) -> Result<(), String> {
        self.rounds += 1;
        let n = self.rounds;
        let conn = &mut self.conn;
        conn.gives(op::WRITE, &format!("n|{n}"), "OK|")?;
        // Executed twice, this would be EEXIST.
        conn.gives(op::WATCH, &format!("mine|{n}|"), "OK|")?;
        // Ids are consecutive.
        conn.gives(op::TRANSACTION_START, "|", &format!("{n}|"))?;
        let id = u32::try_from(n).map_err(|error| error.to_string())?;
        conn.gives_in(id, op::READ, "n|", &n.to_string())?;
        conn.gives_in(id, op::WRITE, &format!("mine/t|{n}{}", "x".repeat(1200)), "OK|")?;
        conn.end(id, "T|", "OK|")?;
        conn.gives(op::READ, "mine/t|", &format!("{n}{}", "x".repeat(1200)))?;
        // Executed twice, this would be ENOENT.
        conn.gives(op::UNWATCH, &format!("mine|{n}|"), "OK|")?;
        conn.gives(op::RM, "mine|", "OK|")?;
        let (mine, shared): (Vec<_>, Vec<_>) =
            conn.events.drain(..).partition(|event| event.starts_with("mine"));
        // The first event, and that of the commit.
        if mine != [format!("mine|{n}|"), format!("mine/t|{n}|")] {
            return Err(format!("round {n}: events {mine:?}"));
        }
        // Acknowledges the number that it has read.
        if !shared.is_empty() {
            let value = conn.ok(op::READ, "/shared|")?;
            conn.gives(op::WRITE, &format!("echo|{value}"), "OK|")?;
        }
        Ok(())
    }
}

/// A client on the socket, whose connection ends with the daemon.
struct Dom0<'a> {
    socket: &'a std::path::Path,
    conn: Option<Conn>,
}

impl Dom0<'_> {
    /// Repeats a request until there is a reply. The request may be executed twice.
    fn ask(&mut self, ty: u32, payload: &str) -> Result<String, String> {
        let late = Instant::now() + LIMIT;
        loop {
            let conn = match &mut self.conn {
                Some(conn) => Some(conn),
                None => {
                    self.conn = Conn::connect(self.socket).ok();
                    self.conn.as_mut()
                }
            };
            if let Some(Ok(answer)) = conn.map(|conn| conn.tx(0, ty, payload)) {
                return answer.map_err(|name| format!("{payload}: {name}"));
            }
            self.conn = None;
            if Instant::now() > late {
                return Err(format!("{payload}: no daemon within {LIMIT:?}"));
            }
            std::thread::yield_now();
        }
    }

    /// Writes a number that every guest watches, and waits until each has acknowledged it.
    fn round(&mut self, n: u64, guests: &[u16]) -> Result<(), String> {
        self.ask(op::WRITE, &format!("/shared|{n}"))?;
        // An acknowledged write must be there.
        let there = self.ask(op::READ, "/shared|")?;
        if there != n.to_string() {
            return Err(format!("{n} was written, {there} is there"));
        }
        let late = Instant::now() + LIMIT;
        for domid in guests {
            let path = format!("/local/domain/{domid}/echo|");
            while self.ask(op::READ, &path).ok() != Some(n.to_string()) {
                if Instant::now() > late {
                    return Err(format!("domain {domid} has not acknowledged {n}"));
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

// Fails if a process that is killed at a random moment loses an acknowledged write, a watch, an
// event or a partly transferred message; if a request is executed twice; or if the charges do not
// match the store.
#[test]
fn nothing_is_lost_when_the_daemon_is_killed() {
    kill_often(Daemon::start(Kind::Ours, Quotas::Default).unwrap());
}

// Fails if the same does not hold with stored event channels and a stored socket, or if the event
// channels are bound again although they were stored.
#[test]
fn nothing_is_lost_when_descriptors_are_stored() {
    let (log, ends) = kill_often(Daemon::start_with_fdstore().unwrap());
    // Those of dom0's kernel, of three guests, and VIRQ_DOM_EXC.
    let (all, full) = (log.matches("event channels were stored"), log.matches("stored adopted=5"));
    let (all, full) = (all.count() as u64, full.count() as u64);
    // Not after a stop, nor after a kill before anything has been stored.
    assert!(all == full && full * 2 > ends, "{full} of {all}, {ends} ends\n{log}");
}

/// Ends the daemon up to `crashes` times, at random moments and in several ways, until `finished`.
/// Returns the times until it answered again, and the number of ends.
fn end_repeatedly(
    daemon: &mut Daemon,
    crashes: u64,
    seed: u64,
    finished: impl Fn() -> bool,
) -> (Vec<Duration>, u64) {
    let (mut random, mut starts, mut ends) = (seed, Vec::new(), 0);
    for _ in 0..crashes {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(random >> 33 & 0x7fff));
        if finished() {
            break;
        }
        let begun = Instant::now();
        match random >> 60 {
            // Sometimes a stop, which must make no difference,
            0 => daemon.restart().unwrap(),
            // or a second kill during the start.
            1..5 => daemon.crash_twice(Duration::from_micros(random >> 20 & 0x1_ffff)).unwrap(),
            _ => {
                daemon.crash().unwrap();
                starts.push(begun.elapsed());
            }
        }
        ends += 1;
    }
    (starts, ends)
}

/// Ends the daemon in many ways while guests and dom0 use it. Returns its log and the number of
/// ends.
fn kill_often(mut daemon: Daemon) -> (String, u64) {
    let (crashes, seed) = (number("XENSTORE_CRASHES", 25), number("XENSTORE_SEED", 1));
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    dom0.ok(op::WRITE, "/shared|0").unwrap();
    dom0.ok(op::SET_PERMS, "/shared|r0|").unwrap();
    let domids = [1, 2, 3];
    let guests = domids.map(|domid| Guest::new(&daemon, &mut dom0, domid));
    let (ending, stop) = (&AtomicBool::new(false), &AtomicBool::new(false));
    let (shared, socket) = (&AtomicU64::new(0), daemon.socket());
    let (rounds, mut starts, ends) = std::thread::scope(|scope| {
        let guests = guests.map(|mut guest| {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    guest.round().map_err(|error| format!("domain {}: {error}", guest.domid))?;
                }
                Ok::<u64, String>(guest.rounds)
            })
        });
        let dom0 = scope.spawn({
            let mut dom0 = Dom0 { socket: &socket, conn: None };
            move || {
                while !ending.load(Ordering::Relaxed) {
                    let n = shared.fetch_add(1, Ordering::Relaxed) + 1;
                    dom0.round(n, &domids)?;
                }
                Ok::<(), String>(())
            }
        });
        let finished = || dom0.is_finished() || guests.iter().any(|guest| guest.is_finished());
        let (starts, ends) = end_repeatedly(&mut daemon, crashes, seed, finished);
        // The guests continue until dom0 has read the acknowledgement of each.
        ending.store(true, Ordering::Relaxed);
        let result = dom0.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        let rounds = guests.map(|guest| guest.join().unwrap());
        result.unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()));
        (rounds, starts, ends)
    });
    let log = daemon.log();
    for result in &rounds {
        assert!(result.is_ok(), "{result:?} seed {seed} after {ends}\n{log}");
    }
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    let quota = dom0.ok(op::CONTROL, "quota|1|").unwrap();
    starts.sort_unstable();
    let median = starts.get(starts.len() / 2).copied().unwrap_or_default();
    let longest = starts.last().copied().unwrap_or_default();
    eprintln!(
        "killed {ends} times; rounds {rounds:?}, {} of dom0; until it answers again: median {median:?}, longest {longest:?}\n{quota}",
        shared.load(Ordering::Relaxed)
    );
    assert!(!log.contains("ERROR") && !log.contains("panic"), "{log}");
    (log, ends)
}

// Fails if dom0's ring is lost after a request whose reply does not follow from the engine alone: a
// reproduced reply must have the length of the original.
#[test]
fn ring_of_dom0_survives_a_crash_after_control_requests() {
    let mut daemon = Daemon::start(Kind::Ours, Quotas::Default).unwrap();
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    let kernel = FakeGuest::create(&daemon.xen(), 0).unwrap();
    let guest = FakeGuest::create(&daemon.xen(), 5).unwrap();
    dom0.ok(op::INTRODUCE, &format!("5|1|{PORT}|")).unwrap();
    dom0.ok(op::WRITE, "/local/domain/5|").unwrap();
    dom0.ok(op::SET_PERMS, "/local/domain/5|n5|").unwrap();
    let (mut kernel, mut guest) = (Conn::new(kernel), Conn::new(guest));
    kernel.watch("/local/domain/5/n|k|").unwrap();
    guest.watch("n|t|").unwrap();
    for round in ["1", "2", "3"] {
        daemon.restart().unwrap();
        guest.ok(op::WRITE, &format!("n|{round}")).unwrap();
        guest.event("n|t|").unwrap();
        kernel.event("/local/domain/5/n|k|").unwrap();
        // The text depends on the machine; a reproduced one has the same length.
        kernel.ok(op::CONTROL, "help|").unwrap();
    }
    // A reply that was sent later than it was created.
    let program = xenstore_tests::peers::program("xenstored").unwrap();
    kernel.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    kernel.ok(op::CONTROL, "live-update|-s|-n|").unwrap();
    kernel.events(&[]).unwrap();
    daemon.crash().unwrap();
    kernel.events(&[]).unwrap();
    guest.events(&[]).unwrap();
    // And one that the next program created.
    kernel.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    kernel.gives(op::CONTROL, "live-update|-s|", "OK|").unwrap();
    daemon.crash().unwrap();
    kernel.events(&[]).unwrap();
    guest.events(&[]).unwrap();
    assert!(!daemon.log().contains("reconnected"), "{}", daemon.log());
}
