//! Compares the charges of domains with the allocator.

use std::alloc::System;
use std::sync::{Mutex, PoisonError};

use cap::Cap;
use xenstore_protocol::{DomId, Quota};
use xenstore_store::Config;
use xenstore_tests::fuzzing::guests::{Answer, Guests};
use xenstore_tests::raw::op;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);
/// The allocator is shared by all tests.
static ALONE: Mutex<()> = Mutex::new(());

/// Uncharged memory of the store: its own lists and maps, and the record and connection of each
/// domain.
const STORE: i64 = 48 * 1024;
const DOMAIN: i64 = 4 * 1024;
const GUESTS: u16 = 3;

fn allocated() -> i64 {
    i64::try_from(ALLOCATOR.allocated()).unwrap()
}

/// A reproducible sequence of numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    /// Returns a path in the home of `who`; for the toolstack, in the home of a guest.
    fn path(&mut self, who: usize) -> String {
        let domid = if who == 0 { self.below(GUESTS.into()) + 1 } else { who as u64 };
        let names: Vec<String> =
            (0..=self.below(4)).map(|_| format!("node-{}", self.below(6))).collect();
        format!("/local/domain/{domid}/{}", names.join("/"))
    }

    fn text(&mut self, most: u64) -> String {
        "v".repeat(usize::try_from(self.below(most)).unwrap())
    }
}

/// A store, and the memory that was allocated before it was created.
struct Measured {
    guests: Guests,
    random: Random,
    open: Vec<(usize, u32)>,
    before: i64,
}

impl Measured {
    fn new(config: &Config, seed: u64) -> Measured {
        let open = Vec::with_capacity(1000);
        let before = allocated();
        let guests = Guests::new(config, GUESTS);
        let before = before + i64::try_from(guests.buffer()).unwrap();
        Measured { guests, random: Random(seed), open, before }
    }

    fn charged(&self) -> i64 {
        (0..=GUESTS).map(|domid| self.guests.engine.charged(DomId(domid))).sum()
    }

    /// Checks that all memory is charged, except for the old versions of nodes that open
    /// transactions of guests retain.
    fn assert_charged(&self, past: i64) {
        let (real, charged) = (allocated() - self.before, self.charged());
        let bound = charged + STORE + DOMAIN * i64::from(GUESTS + 1) + past;
        assert!(real <= bound, "{real} bytes allocated, {charged} charged, at most {bound}");
    }

    fn step(&mut self, transactions: bool) {
        let who = usize::try_from(self.random.below(u64::from(GUESTS) + 1)).unwrap();
        let own: Vec<u32> =
            self.open.iter().filter(|(w, _)| *w == who).map(|(_, id)| *id).collect();
        let tx = if own.is_empty() || self.random.below(3) == 0 { 0 } else { self.random.of(&own) };
        let path = self.random.path(who);
        let (ty, payload) = match self.random.below(if transactions { 14 } else { 11 }) {
            0..3 => (op::WRITE, format!("{path}\0{}", self.random.text(2000))),
            3 => (op::WRITE, format!("{path}\0{}", self.random.text(20))),
            4 => (op::MKDIR, format!("{path}/{}\0", "deep/".repeat(20).trim_end_matches('/'))),
            5 => (op::RM, format!("{path}\0")),
            6 => (op::READ, format!("{path}\0")),
            7 => (op::DIRECTORY, format!("{path}\0")),
            8 => {
                let domid = path.split('/').nth(3).unwrap();
                (op::SET_PERMS, format!("{path}\0n{domid}\0r1\0r2\0b3\0"))
            }
            9 => (op::WATCH, format!("{path}\0{}\0", self.random.text(300))),
            10 => {
                if self.random.below(4) == 0 {
                    self.guests.drain(who);
                }
                return;
            }
            11 => (op::TRANSACTION_START, "\0".into()),
            12 if tx != 0 => (op::TRANSACTION_END, self.random.of(&["T\0", "F\0"]).into()),
            12 => return,
            _ => (op::GET_PERMS, format!("{path}\0")),
        };
        let id = if ty == op::TRANSACTION_START { 0 } else { tx };
        match self.guests.ask(who, id, ty, payload.as_bytes()) {
            Answer::Reply(op::TRANSACTION_START, reply) => {
                let id = String::from_utf8(reply).unwrap().trim_end_matches('\0').parse().unwrap();
                self.open.push((who, id));
            }
            Answer::Reply(..) if ty == op::TRANSACTION_END => {
                self.open.retain(|open| *open != (who, tx));
            }
            Answer::Later(until) => self.guests.now = until,
            Answer::Reply(..) => {}
        }
        self.guests.now += 1;
    }
}

// Fails if memory that guests or a toolstack make the store use is not charged where it is
// allocated, or if its charge is released before it is freed.
#[test]
fn all_allocated_memory_is_charged() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for seed in 0..8 {
        let mut measured = Measured::new(&Config::default(), seed);
        for _ in 0..60 {
            (0..50).for_each(|_| measured.step(false));
            measured.assert_charged(0);
        }
        measured.guests.engine.check().unwrap();
        (1..=GUESTS).for_each(|domid| measured.guests.replace(domid));
        measured.assert_charged(0);
    }
}

// Fails if transactions use more memory than is charged for them, besides old versions of nodes, or
// retain more old versions than 1.25 times the quota `memory`.
#[test]
fn memory_of_transactions_is_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for seed in 0..8 {
        let mut config = Config::default();
        config.quotas.set(Quota::Memory, 200_000);
        let mut measured = Measured::new(&config, seed);
        for _ in 0..100 {
            (0..50).for_each(|_| measured.step(true));
            // Transactions of the toolstack have no limit; those of this test retain little.
            let open = measured.open.iter().filter(|(who, _)| *who == 0).count() as i64;
            measured.assert_charged(250_000 * i64::from(GUESTS) + 100_000 * open);
        }
        measured.guests.engine.check().unwrap();
        for (who, id) in std::mem::take(&mut measured.open) {
            measured.guests.ask(who, id, op::TRANSACTION_END, b"F\0");
        }
        measured.assert_charged(0);
    }
}

/// A single guest with the quotas of C xenstored.
fn single_guest() -> Measured {
    let mut measured = Measured::new(&Config::default(), 0);
    measured.guests.now = 1;
    measured
}

/// Checks that the guest uses its charges and at most `past` bytes more.
fn assert_uses(measured: &Measured, past: i64) {
    let charged = measured.guests.engine.charged(DomId(1));
    // The request that reaches the limit may exceed it by its value and its reply.
    assert!(charged <= 2_621_440 + 8192, "{charged}");
    measured.assert_charged(past);
}

// Fails if a guest cannot use what the same quotas allow with C xenstored: 1,000 nodes of the
// largest size, 128 watches, 10 transactions.
#[test]
fn default_quotas_allow_their_numbers() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut measured = single_guest();
    let value = "x".repeat(1900);
    // Together with its home and ten folders, which hold this many names.
    for i in 0..989 {
        let path = format!("folder-{}/node-{i:03}", i % 10);
        measured.guests.ok(1, 0, op::WRITE, format!("{path}\0{value}").as_bytes());
    }
    let refused = measured.guests.ask(1, 0, op::WRITE, b"one-more\0");
    assert_eq!(refused, Answer::Reply(op::ERROR, b"ENOSPC\0".to_vec()));
    (0..128)
        .for_each(|i| drop(measured.guests.ok(1, 0, op::WATCH, format!("x{i}\0t\0").as_bytes())));
    (0..10).for_each(|_| drop(measured.guests.ok(1, 0, op::TRANSACTION_START, b"\0")));
    assert_uses(&measured, 0);
}

// Fails if a transaction can copy a deep tree repeatedly without charge: nodes that have been read
// are retained, so each write below copies all of them.
#[test]
fn copies_of_a_deep_tree_are_charged() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut measured = single_guest();
    let deep = format!("a{}", "/b".repeat(900));
    measured.guests.ok(1, 0, op::MKDIR, format!("{deep}\0").as_bytes());
    for round in 0..10 {
        let reply = measured.guests.ok(1, 0, op::TRANSACTION_START, b"\0");
        let tx = String::from_utf8(reply).unwrap().trim_end_matches('\0').parse().unwrap();
        for i in 0..100 {
            measured.guests.ask(1, tx, op::READ, b"a\0");
            if round % 2 == 0 {
                measured.guests.ask(1, tx, op::WRITE, format!("{deep}\0{i}").as_bytes());
            } else {
                measured.guests.ask(1, tx, op::RM, b"a\0");
                measured.guests.ask(1, tx, op::MKDIR, format!("{deep}\0").as_bytes());
            }
            assert_uses(&measured, 0);
        }
    }
}

// Fails if open transactions of a guest retain more old versions than 1.25 times its quota
// `memory`, if newer transactions are aborted before the oldest, or if an aborted transaction
// cannot be ended.
#[test]
fn old_versions_in_snapshots_are_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut measured = single_guest();
    let guests = &mut measured.guests;
    let write = |guests: &mut Guests, round: usize| {
        for i in 0..300 {
            let value = format!("{round:04}").repeat(475);
            guests.ok(0, 0, op::WRITE, format!("/tool/node-{i}\0{value}").as_bytes());
        }
    };
    write(guests, 0);
    let mut open = Vec::new();
    for round in 1..=10 {
        let reply = guests.ok(1, 0, op::TRANSACTION_START, b"\0");
        let tx: u32 = String::from_utf8(reply).unwrap().trim_end_matches('\0').parse().unwrap();
        guests.ok(1, tx, op::WRITE, format!("tx-{round}\0x").as_bytes());
        open.push(tx);
        write(guests, round);
    }
    guests.engine.check().unwrap();
    assert_uses(&measured, 2_621_440 * 5 / 4);
    let guests = &mut measured.guests;
    let refused = |name: &str| Answer::Reply(op::ERROR, format!("{name}\0").into_bytes());
    let first = guests.ask(1, open[0], op::READ, b"\0");
    assert_eq!(first, refused("EINVAL"), "a malformed request is still told from others");
    assert_eq!(guests.ask(1, open[0], op::READ, b"x\0"), refused("ENOSPC"));
    assert_eq!(guests.ask(1, open[0], op::TRANSACTION_END, b"T\0"), refused("EAGAIN"));
    guests.ok(1, open[1], op::TRANSACTION_END, b"F\0");
    // The newest transaction is complete.
    guests.ok(1, open[9], op::TRANSACTION_END, b"T\0");
    guests.ok(1, 0, op::READ, b"tx-10\0");
    let refusals = guests.ok(0, 0, op::CONTROL, b"refusals\0");
    assert!(String::from_utf8_lossy(&refusals).contains("domain 1 memory count"));
    for tx in &open[2..9] {
        guests.ask(1, *tx, op::TRANSACTION_END, b"F\0");
    }
    assert_uses(&measured, 0);
}

// Fails if small queued events, or small requests of a transaction, use more memory than is charged
// for them.
#[test]
fn many_small_events_and_requests_are_charged() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut measured = single_guest();
    for i in 0..128 {
        measured.guests.ok(1, 0, op::WATCH, format!("/local/domain/1\0{i}\0").as_bytes());
    }
    measured.guests.drain(1);
    assert_uses(&measured, 0);
    for i in 0..100 {
        measured.guests.ok(0, 0, op::WRITE, format!("/local/domain/1/{i}\0").as_bytes());
        assert_uses(&measured, 0);
    }
    measured.guests.drain(1);
    assert_uses(&measured, 0);
    for _ in 0..10 {
        let reply = measured.guests.ok(1, 0, op::TRANSACTION_START, b"\0");
        let tx = String::from_utf8(reply).unwrap().trim_end_matches('\0').parse().unwrap();
        (0..1024).for_each(|_| drop(measured.guests.ask(1, tx, op::READ, b"1\0")));
        assert_uses(&measured, 0);
    }
}

// Fails if distinct permission lists, and the index entries of the domains in them, use more memory
// than is charged for them.
#[test]
fn permission_lists_are_charged() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut measured = single_guest();
    for i in 0..980 {
        let path = format!("f{}/n{i}", i % 10);
        measured.guests.ok(1, 0, op::MKDIR, format!("{path}\0").as_bytes());
        let perms = ["n1\0r2\0w3\0b4\0r5\0", "r1\0w2\0r3\0n4\0w5\0"][i % 2];
        measured.guests.ok(1, 0, op::SET_PERMS, format!("{path}\0{perms}").as_bytes());
    }
    assert_uses(&measured, 0);
}
