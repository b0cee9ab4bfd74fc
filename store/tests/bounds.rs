//! No input causes more than a bounded amount of work, whatever guests have prepared.
//!
//! Each test prepares with default quotas, then looks at the most expensive input. Costs are the units
//! of `Engine::cost`; `XENSTORE_BOUNDS` prints the time of each as well, for a release build.
#![allow(clippy::cast_possible_truncation, clippy::print_stderr)]

mod harness;

use std::time::{Duration, Instant};

use harness::Machine;
use xenstore_protocol::{DomId, Frame, Header, TxId};
use xenstore_store::{Caller, Config, ConnId, DomainInfo, Engine, Outcome};

const WATCH: u32 = 4;
const START: u32 = 6;
const END: u32 = 7;
const INTRODUCE: u32 = 8;
const WRITE: u32 = 11;
const RM: u32 = 13;
const PERMS: u32 = 14;

/// Units that one input may cost: its budget, and what one step of it can be over.
const MOST: u64 = 8192 + 4096;
/// Units of a piece of deferred work, as the server asks for.
const PIECE: u32 = 4096;

struct Host {
    engine: Engine,
    machine: Machine,
    dom0: ConnId,
    guests: Vec<ConnId>,
    /// The most expensive input since it was reset: units, time.
    most: (u64, Duration),
}

impl Host {
    /// Guests 1 to `count`, each with its home, and as many watches as it may have left.
    fn with_guests(count: u16) -> Host {
        let mut engine = Engine::new(&Config::default());
        let dom0 = engine.connect(Caller::Socket);
        let mut machine = Machine::default();
        machine.domains.insert(0, DomainInfo { unique_id: 0, shutdown: false });
        let most = (0, Duration::ZERO);
        let mut host = Host { engine, machine, dom0, guests: Vec::new(), most };
        for domid in 1..=count {
            let info = DomainInfo { unique_id: domid.into(), shutdown: false };
            host.machine.domains.insert(domid, info);
            host.ok(dom0, INTRODUCE, &format!("{domid}|1|1|"));
            host.ok(dom0, WRITE, &format!("/local/domain/{domid}|"));
            host.ok(dom0, PERMS, &format!("/local/domain/{domid}|n{domid}|"));
            host.guests.push(host.engine.connect(Caller::Domain(DomId(domid))));
        }
        host
    }

    /// Does something with the engine, and notes what it cost.
    fn step<T>(&mut self, act: impl FnOnce(&mut Engine, &mut Machine) -> T) -> T {
        let (before, begun) = (self.engine.cost(), Instant::now());
        let result = act(&mut self.engine, &mut self.machine);
        let (units, time) = (self.engine.cost() - before, begun.elapsed());
        self.most = (self.most.0.max(units), self.most.1.max(time));
        result
    }

    /// Sends a frame, again until it is answered, with deferred work between; its type and payload.
    fn ask(&mut self, conn: ConnId, tx_id: u32, ty: u32, payload: &str) -> (u32, String) {
        let payload = payload.replace('|', "\0");
        let header =
            Header { ty, tx_id: TxId(tx_id), len: payload.len() as u32, ..Header::default() };
        loop {
            let mut out = Vec::new();
            let outcome = self.step(|engine, machine| {
                engine.request(
                    conn,
                    &Frame { header, payload: payload.as_bytes() },
                    0,
                    machine,
                    &mut out,
                )
            });
            if outcome == Outcome::Executed {
                let last = last_frame(&out);
                return (last.0, last.1.replace('\0', "|"));
            }
            self.step(|engine, _| engine.work(PIECE));
        }
    }

    fn ok(&mut self, conn: ConnId, ty: u32, payload: &str) {
        let (answer, text) = self.ask(conn, 0, ty, payload);
        assert_eq!(answer, ty, "{payload}: {text}");
    }

    fn start(&mut self, conn: ConnId) -> u32 {
        self.ask(conn, 0, START, "|").1.trim_end_matches('|').parse().unwrap()
    }

    /// Does what is deferred; how many pieces that takes.
    fn finish(&mut self) -> usize {
        let mut pieces = 0;
        while self.engine.has_work() {
            self.step(|engine, _| engine.work(PIECE));
            pieces += 1;
            assert!(pieces < 1_000_000, "it does not end");
        }
        pieces
    }

    fn kill(&mut self, domids: std::ops::RangeInclusive<u16>) {
        domids.for_each(|domid| _ = self.machine.domains.remove(&domid));
        self.step(|engine, machine| engine.domains_changed(machine));
    }

    /// Forgets what preparations have cost.
    fn begin(&mut self) {
        self.most = (0, Duration::ZERO);
    }

    fn is_bounded(&mut self, what: &str) {
        let pieces = self.finish();
        let (units, time) = self.most;
        if std::env::var_os("XENSTORE_BOUNDS").is_some() {
            eprintln!("{what}: {units} units, {time:?}, {pieces} pieces");
        }
        assert!(units <= MOST, "{what}: {units} units at once");
        self.engine.check().unwrap();
    }

    fn events(&mut self, conn: ConnId) -> usize {
        let mut out = Vec::new();
        self.engine.emit_events(conn, usize::MAX, &mut out);
        frames(&out).len()
    }
}

fn frames(mut bytes: &[u8]) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk() {
        let header = Header::parse(header);
        let (payload, rest) = rest.split_at(header.len as usize);
        found.push((header.ty, String::from_utf8_lossy(payload).into_owned()));
        bytes = rest;
    }
    found
}

fn last_frame(bytes: &[u8]) -> (u32, String) {
    frames(bytes).into_iter().rev().find(|(ty, _)| *ty != 15).unwrap()
}

/// A path of so many levels below the home of a guest.
fn chain(levels: usize) -> String {
    "/x".repeat(levels)
}

// Fails if the death of a domain visits the nodes that name it: here chains of 980 nodes of each of 100
// guests inherit an entry for it.
#[test]
fn a_death_does_not_visit_nodes_that_name_the_domain() {
    let mut host = Host::with_guests(101);
    for guest in 1..=100 {
        let conn = host.guests[guest - 1];
        host.ok(conn, WRITE, "a|");
        host.ok(conn, PERMS, &format!("a|n{guest}|r101|"));
        host.ok(conn, WRITE, &format!("a{}|", chain(980)));
    }
    assert!(host.engine.node_count() > 98_000);
    host.begin();
    host.kill(101..=101);
    assert!(host.most.0 < 100, "{:?}", host.most);
    host.is_bounded("death of a domain that 98,000 nodes name");
}

// Fails if the nodes of a domain that dies cannot be removed in pieces: here each is at the end of a
// chain of another guest, or above what other guests have written.
#[test]
fn the_nodes_of_a_dead_domain_go_in_pieces() {
    let mut host = Host::with_guests(60);
    let dying = host.guests[59];
    for guest in 1..60 {
        let conn = host.guests[guest - 1];
        host.ok(conn, WRITE, "a|");
        host.ok(conn, PERMS, &format!("a|n{guest}|b60|"));
        host.ok(conn, WRITE, &format!("a{}|", chain(900)));
        let end = format!("/local/domain/{guest}/a{}/mine", chain(900));
        host.ok(dying, WRITE, &format!("{end}|"));
    }
    host.ok(dying, WRITE, "top|");
    host.ok(dying, PERMS, "top|b60|");
    for guest in 1..60 {
        let conn = host.guests[guest - 1];
        for i in 0..90 {
            host.ok(conn, WRITE, &format!("/local/domain/60/top/{guest}/{i}|"));
        }
    }
    host.ok(host.dom0, WATCH, "@releaseDomain|t|");
    host.events(host.dom0);
    host.begin();
    host.kill(60..=60);
    assert!(host.engine.has_work());
    assert_eq!(host.events(host.dom0), 0, "@releaseDomain fires when the nodes have gone");
    // Its domid is not used again before its nodes have gone.
    host.machine.domains.insert(60, DomainInfo { unique_id: 1000, shutdown: false });
    host.ok(host.dom0, INTRODUCE, "60|1|1|");
    assert_eq!(host.ask(host.dom0, 0, 2, "/local/domain/60/top|").1, "ENOENT|");
    assert_eq!(
        host.ask(host.dom0, 0, 2, &format!("/local/domain/7/a{}/mine|", chain(900))).1,
        "ENOENT|"
    );
    host.is_bounded("death of a domain with nodes everywhere");
}

// Fails if a removal releases the charges of all owners at once, or frees all nodes at once.
#[test]
fn removed_nodes_are_freed_in_pieces() {
    let mut host = Host::with_guests(60);
    let owner = host.guests[0];
    host.ok(owner, WRITE, "top|");
    host.ok(owner, PERMS, "top|b1|");
    for guest in 1..60 {
        let conn = host.guests[guest];
        for i in 0..95 {
            host.ok(conn, WRITE, &format!("/local/domain/1/top/{}/{i}/a/b/c|", guest));
        }
    }
    let before = host.engine.node_count();
    let held = host.start(host.guests[7]);
    host.begin();
    host.ok(owner, RM, "top|");
    assert!(host.engine.has_work());
    // The charges are released before the next request of the connection that removed the nodes.
    host.ok(owner, WRITE, "again|");
    assert!(host.engine.node_count() < before - 22_000, "{}", host.engine.node_count());
    // A snapshot frees what it alone has kept.
    assert_eq!(host.ask(host.guests[7], held, END, "F|").0, END);
    host.is_bounded("removal of what others have written");
}

// Fails if the events of a commit, of one write, of a removal or of a death are all made at once: here
// 100 guests have all their watches at the same place.
#[test]
fn events_of_many_watches_are_queued_in_pieces() {
    let mut host = Host::with_guests(101);
    let writer = host.guests[100];
    host.ok(writer, WRITE, "w|");
    host.ok(writer, PERMS, "w|r101|");
    host.ok(writer, WRITE, "w/a/b|");
    for guest in 0..100 {
        for i in 0..128 {
            let path = ["/local/domain/101/w", "/local/domain/101/w/a/b", "@releaseDomain"][i % 3];
            host.ok(host.guests[guest], WATCH, &format!("{path}|{i}|"));
        }
        host.events(host.guests[guest]);
    }
    host.begin();
    host.ok(writer, WRITE, "w/x|");
    host.finish();
    assert!((0..100).all(|guest| host.events(host.guests[guest]) == 43), "one for each watch");
    let tx = host.start(writer);
    for i in 0..960 {
        assert_eq!(host.ask(writer, tx, WRITE, &format!("w/{}/{}|1|", i % 31, i / 31)).0, WRITE);
    }
    assert_eq!(host.ask(writer, tx, END, "T|").0, END);
    assert!(host.engine.has_work());
    host.finish();
    for guest in 0..100 {
        let events = host.events(host.guests[guest]);
        assert!((43..=43 * 65).contains(&events), "{events} events");
    }
    host.ok(writer, RM, "w/a|");
    host.finish();
    assert!((0..100).all(|guest| host.events(host.guests[guest]) == 43 + 43));
    host.kill(101..=101);
    host.finish();
    assert!((0..100).all(|guest| host.events(host.guests[guest]) == 43 + 42));
    host.is_bounded("events for 12,800 watches");
}

// Fails if watches below what a commit removes are looked through without limit: here once for each level
// of a chain that is removed from its end on.
#[test]
fn watches_below_removed_nodes_are_counted() {
    let mut host = Host::with_guests(9);
    let writer = host.guests[8];
    let levels = 150;
    let end = chain(levels);
    host.ok(writer, WRITE, &format!("a{end}|"));
    for guest in 0..8 {
        for i in 0..128 {
            let path = format!("/local/domain/9/a{end}/w/{guest}/{i}");
            host.ok(host.guests[guest], WATCH, &format!("{path}|t|"));
        }
    }
    let tx = host.start(writer);
    for level in (0..=levels).rev() {
        assert_eq!(host.ask(writer, tx, RM, &format!("a{}|", chain(level))).0, RM);
    }
    host.begin();
    assert_eq!(host.ask(writer, tx, END, "T|").0, END);
    assert!(host.engine.has_work());
    host.is_bounded("removal of a chain above 1,024 watches");
}

// Fails if guests that may not read cost as much as if they could, or get an event.
#[test]
fn watches_without_rights_get_no_events_of_a_large_commit() {
    let mut host = Host::with_guests(101);
    let writer = host.guests[100];
    host.ok(writer, WRITE, "w|");
    for guest in 0..100 {
        for i in 0..128 {
            host.ok(host.guests[guest], WATCH, &format!("/local/domain/101/w|{i}|"));
        }
        host.events(host.guests[guest]);
    }
    host.begin();
    let tx = host.start(writer);
    for i in 0..960 {
        assert_eq!(host.ask(writer, tx, WRITE, &format!("w/{}/{}|1|", i % 31, i / 31)).0, WRITE);
    }
    assert_eq!(host.ask(writer, tx, END, "T|").0, END);
    host.is_bounded("a commit that no guest may read");
    assert!((0..100).all(|guest| host.events(host.guests[guest]) == 0));
}

// Fails if queues that are full make each further event search them.
#[test]
fn full_queues_are_not_searched_for_each_event() {
    let mut host = Host::with_guests(3);
    let (writer, watcher) = (host.guests[0], host.guests[1]);
    host.ok(writer, WRITE, "w|");
    host.ok(writer, PERMS, "w|r1|");
    for i in 0..120 {
        host.ok(watcher, WATCH, &format!("/local/domain/1/w|{i}|"));
    }
    let long = "y".repeat(200);
    host.begin();
    for i in 0..900 {
        host.ok(writer, WRITE, &format!("w/{long}{}|1|", i % 9));
        host.ok(writer, WRITE, &format!("w/{}/{}|1|", i % 30, i / 30));
    }
    host.is_bounded("queues that are full");
    let events = host.events(watcher);
    assert!((120..30_000).contains(&events), "{events}");
}

// Fails if the commit of a guest can be made as long as its paths are (it is run again at once when
// others have changed something), or if one of the usual size is refused.
#[test]
fn a_transaction_of_a_guest_has_a_limited_number_of_steps() {
    let mut host = Host::with_guests(2);
    let conn = host.guests[0];
    host.ok(conn, WRITE, &format!("a{}|", chain(900)));
    let tx = host.start(conn);
    let answers: Vec<u32> =
        (0..1000).map(|i| host.ask(conn, tx, WRITE, &format!("a{}|{i}|", chain(900))).0).collect();
    let done = answers.iter().take_while(|ty| **ty == WRITE).count();
    assert!((100..200).contains(&done), "{done} of 900 levels each");
    assert_eq!(host.ask(conn, tx, END, "T|").1, "ENOSPC|");
    let tx = host.start(conn);
    for i in 0..1000 {
        assert_eq!(host.ask(conn, tx, WRITE, &format!("b/{}/c/d/e|{i}|", i % 10)).0, WRITE);
    }
    host.ok(host.guests[1], WRITE, "other|");
    assert_eq!(host.ask(conn, tx, END, "T|").0, END);
    host.is_bounded("a long transaction");
}
