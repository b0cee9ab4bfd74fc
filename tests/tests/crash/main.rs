//! The daemon is killed again and again, on the pretend Xen, and nobody is to lose anything by it.
//!
//! `XENSTORE_CRASHES` and `XENSTORE_SEED` say how often and when; `cargo xtask crash` sets them.

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

/// How long an answer may take while the daemon is killed and started.
const LIMIT: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A guest that does not know that its daemon dies. Every answer must be that of a daemon which has
/// executed every request once.
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

    /// One round of requests, none of which can be executed twice without being noticed.
    fn round(&mut self) -> Result<(), String> {
        self.rounds += 1;
        let n = self.rounds;
        let conn = &mut self.conn;
        conn.gives(op::WRITE, &format!("n|{n}"), "OK|")?;
        // A second time, it would be there already.
        conn.gives(op::WATCH, &format!("mine|{n}|"), "OK|")?;
        // Ids grow by one.
        conn.gives(op::TRANSACTION_START, "|", &format!("{n}|"))?;
        let id = u32::try_from(n).map_err(|error| error.to_string())?;
        conn.gives_in(id, op::READ, "n|", &n.to_string())?;
        conn.gives_in(id, op::WRITE, &format!("mine/t|{n}{}", "x".repeat(1200)), "OK|")?;
        conn.end(id, "T|", "OK|")?;
        conn.gives(op::READ, "mine/t|", &format!("{n}{}", "x".repeat(1200)))?;
        // A second time, it would not be there any more.
        conn.gives(op::UNWATCH, &format!("mine|{n}|"), "OK|")?;
        conn.gives(op::RM, "mine|", "OK|")?;
        let (mine, shared): (Vec<_>, Vec<_>) =
            conn.events.drain(..).partition(|event| event.starts_with("mine"));
        // The first, and that of the commit.
        if mine != [format!("mine|{n}|"), format!("mine/t|{n}|")] {
            return Err(format!("round {n}: events {mine:?}"));
        }
        // Says what it has seen.
        if !shared.is_empty() {
            let value = conn.ok(op::READ, "/shared|")?;
            conn.gives(op::WRITE, &format!("echo|{value}"), "OK|")?;
        }
        Ok(())
    }
}

/// A client of the socket, whose connection ends with the daemon.
struct Dom0<'a> {
    socket: &'a std::path::Path,
    conn: Option<Conn>,
}

impl Dom0<'_> {
    /// Asks until there is an answer. What is asked may be asked twice.
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

    /// Writes a number that every guest watches, and waits until each says that it has seen it.
    fn round(&mut self, n: u64, guests: &[u16]) -> Result<(), String> {
        self.ask(op::WRITE, &format!("/shared|{n}"))?;
        // What was acknowledged is there.
        let there = self.ask(op::READ, "/shared|")?;
        if there != n.to_string() {
            return Err(format!("{n} was written, {there} is there"));
        }
        let late = Instant::now() + LIMIT;
        for domid in guests {
            let path = format!("/local/domain/{domid}/echo|");
            while self.ask(op::READ, &path).ok() != Some(n.to_string()) {
                if Instant::now() > late {
                    return Err(format!("domain {domid} has not heard of {n}"));
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

// Fails if a process that is killed at any moment takes anything with it: an acknowledged write, a
// watch, an event, an open exchange; if a request is executed twice; or if what is charged does not
// fit what is there.
#[test]
fn nothing_is_lost_when_the_daemon_is_killed() {
    kill_often(Daemon::start(Kind::Ours, Quotas::Default).unwrap());
}

// Fails if the same is not so when the event channels and the socket are kept meanwhile, or if the
// event channels are bound anew nevertheless.
#[test]
fn nothing_is_lost_when_descriptors_are_stored() {
    let (log, ends) = kill_often(Daemon::start_with_fdstore().unwrap());
    // Of dom0's kernel, three guests, and VIRQ_DOM_EXC.
    let (all, kept) = (log.matches("event channels were stored"), log.matches("stored adopted=5"));
    let (all, kept) = (all.count() as u64, kept.count() as u64);
    // Not after a stop, nor after a kill so soon after it that nothing had been kept yet.
    assert!(all == kept && kept * 2 > ends, "{kept} of {all}, {ends} ends\n{log}");
}

/// Ends the daemon in many ways; its log, and how often that was.
fn kill_often(mut daemon: Daemon) -> (String, u64) {
    let (crashes, seed) = (number("XENSTORE_CRASHES", 25), number("XENSTORE_SEED", 1));
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    dom0.ok(op::WRITE, "/shared|0").unwrap();
    dom0.ok(op::SET_PERMS, "/shared|r0|").unwrap();
    let domids = [1, 2, 3];
    let guests = domids.map(|domid| Guest::new(&daemon, &mut dom0, domid));
    let (ending, stop) = (&AtomicBool::new(false), &AtomicBool::new(false));
    let (shared, socket) = (&AtomicU64::new(0), daemon.socket());
    let (rounds, starts, ends) = std::thread::scope(|scope| {
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
        let (mut random, mut starts, mut ends) = (seed, Vec::new(), 0);
        for _ in 0..crashes {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Any moment will do.
            std::thread::sleep(Duration::from_micros(random >> 33 & 0x7fff));
            if dom0.is_finished() || guests.iter().any(|guest| guest.is_finished()) {
                break;
            }
            let begun = Instant::now();
            match random >> 60 {
                // Now and then it is asked to stop, which is to make no difference;
                0 => daemon.restart().unwrap(),
                // or killed while it comes back.
                1..5 => daemon.crash_twice(Duration::from_micros(random >> 20 & 0x1_ffff)).unwrap(),
                _ => {
                    daemon.crash().unwrap();
                    starts.push(begun.elapsed());
                }
            }
            ends += 1;
        }
        // The guests go on until dom0 has heard all of them.
        ending.store(true, Ordering::Relaxed);
        let heard = dom0.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        let rounds = guests.map(|guest| guest.join().unwrap());
        heard.unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()));
        (rounds, starts, ends)
    });
    let log = daemon.log();
    for result in &rounds {
        assert!(result.is_ok(), "{result:?} seed {seed} after {ends}\n{log}");
    }
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    let quota = dom0.ok(op::CONTROL, "quota|1|").unwrap();
    let mut starts = starts;
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

// Fails if dom0's ring is lost after a request whose answer does not follow from the engine alone: what
// is made of it again must be as long as what was written.
#[test]
fn the_ring_of_dom0_goes_on_after_questions_about_the_server() {
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
        // What it says depends on the machine, and is as long as it was when it is made again.
        kernel.ok(op::CONTROL, "help|").unwrap();
    }
    // A reply that came later than it was made.
    let program = xenstore_tests::peers::program("xenstored").unwrap();
    kernel.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    kernel.ok(op::CONTROL, "live-update|-s|-n|").unwrap();
    kernel.events(&[]).unwrap();
    daemon.crash().unwrap();
    kernel.events(&[]).unwrap();
    guest.events(&[]).unwrap();
    // And one that the next program made.
    kernel.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    kernel.gives(op::CONTROL, "live-update|-s|", "OK|").unwrap();
    daemon.crash().unwrap();
    kernel.events(&[]).unwrap();
    guest.events(&[]).unwrap();
    assert!(!daemon.log().contains("starts anew"), "{}", daemon.log());
}
