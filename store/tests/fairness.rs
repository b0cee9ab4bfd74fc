//! Fairness: guests cannot prevent commits of the control domain, and are not deferred without need.

mod harness;

use harness::{Answer, Store};
use xenstore_protocol::Header;
use xenstore_store::{
    Config, ConnId, Engine, FAILURES, HELD_FOR, Input, Outcome, PROTECTED_FOR, State,
};

const READ: u32 = 2;
const RESET_WATCHES: u32 = 21;
const WRITE: u32 = 11;
const KEY: &str = "/local/domain/5/key|";

/// A transaction that depends on the key of the guest.
fn begin(store: &mut Store) -> u32 {
    let dom0 = store.dom0;
    let tx = store.start(dom0);
    store.tx(dom0, tx, READ, KEY).unwrap();
    store.tx(dom0, tx, WRITE, "/vm|1").unwrap();
    tx
}

/// The guest writes its key. Returns the end of the deferral, if it is deferred.
fn write(store: &mut Store, guest: ConnId, text: &str) -> Option<u64> {
    match store.offer(guest, 0, WRITE, text.replace('|', "\0").as_bytes()) {
        (Outcome::Deferred(until), out) => {
            assert!(out.is_empty(), "nothing is written for a deferred request");
            Some(until)
        }
        (Outcome::Executed, out) => {
            assert_eq!(out[0], 11, "{text}");
            None
        }
    }
}

/// A guest, and a connection of dom0 whose next transaction is protected.
fn starving() -> (Store, ConnId) {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.ok(guest, WRITE, "key|0");
    for i in 0..FAILURES {
        let tx = begin(&mut store);
        assert_eq!(write(&mut store, guest, &format!("key|{i}x")), None, "not protected yet");
        assert_eq!(store.end(store.dom0, tx, true), Err("EAGAIN".into()));
    }
    store.engine.pop_ready();
    (store, guest)
}

fn value(store: &mut Store) -> Answer {
    store.call(store.dom0, READ, KEY)
}

// Fails if a guest that rewrites a key as fast as it can makes a transaction of dom0 fail more than
// FAILURES times, or if its request is lost, answered before the commit or not announced after it.
#[test]
fn a_guest_cannot_keep_dom0_from_committing() {
    let (mut store, guest) = starving();
    store.now = 1000;
    let tx = begin(&mut store);
    assert_eq!(write(&mut store, guest, "key|new"), Some(1000 + PROTECTED_FOR));
    assert_eq!(write(&mut store, guest, "key|new"), Some(1000 + PROTECTED_FOR), "again");
    assert_eq!(value(&mut store), Ok("1x".into()));
    assert_eq!(store.engine.pop_ready(), None);
    assert_eq!(store.end(store.dom0, tx, true), Ok("OK|".into()));
    assert_eq!(store.engine.pop_ready(), Some(guest));
    assert_eq!(write(&mut store, guest, "key|new"), None);
    assert_eq!(value(&mut store), Ok("new".into()));
}

// Fails if a deferred request counts as executed when it is replayed from a record, or requests before
// it do not: the connection would resume at the wrong request.
#[test]
fn replay_counts_the_executed_requests() {
    let (mut store, guest) = starving();
    begin(&mut store);
    let frame = |payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap();
        [&Header { ty: WRITE, len, ..Header::default() }.emit(), payload].concat()
    };
    let (first, held) = (frame(b"other\x001"), frame(b"key\0new"));
    let frames = &[first.clone(), held].concat();
    let input = Input::Requests { conn: guest, now: 0, frames };
    let mut out = Vec::new();
    assert_eq!(store.engine.apply(&input, &mut store.machine, &mut out).executed, first.len());
    let ok = Header { ty: WRITE, len: 3, ..Header::default() }.emit();
    assert_eq!(out, [&ok[..], b"OK\0"].concat());
}

// Fails if it is enough to write between the start of a transaction and its first look: what a
// transaction sees is otherwise as it was at its start.
#[test]
fn a_guest_cannot_get_in_before_the_first_look() {
    let (mut store, guest) = starving();
    let dom0 = store.dom0;
    let tx = store.start(dom0);
    assert_eq!(write(&mut store, guest, "other|1"), None);
    store.tx(dom0, tx, WRITE, "/vm|1").unwrap();
    assert_eq!(write(&mut store, guest, "key|late"), None);
    assert_eq!(store.tx(dom0, tx, READ, KEY), Ok("late".into()));
    assert!(write(&mut store, guest, "key|later").is_some());
    assert_eq!(write(&mut store, guest, "other|2"), None);
    assert_eq!(store.tx(dom0, tx, READ, "/local/domain/5/other|"), Ok("2".into()));
    assert_eq!(store.tx(dom0, tx, READ, "/vm|"), Ok("1".into()));
    assert_eq!(store.end(dom0, tx, true), Ok("OK|".into()));
}

// Fails if a request waits that makes no difference to the transaction: another key, the same
// value, a child, a key that the transaction has only written, or what another guest does.
#[test]
fn only_what_the_transaction_has_read_waits() {
    let (mut store, guest) = starving();
    let other = store.guest(6);
    let tx = begin(&mut store);
    store.tx(store.dom0, tx, WRITE, "/local/domain/5/written|1").unwrap();
    store.tx(store.dom0, tx, READ, "/local/domain/5/written|").unwrap();
    for text in ["other|1", "key|1x", "key/below|1", "written|2"] {
        assert_eq!(write(&mut store, guest, text), None, "{text}");
    }
    assert_eq!(write(&mut store, other, "key|1"), None);
    assert_eq!(store.end(store.dom0, tx, true), Ok("OK|".into()));
}

// Fails if a guest evades the deferral by a transaction, or if the deferral damages that transaction.
#[test]
fn a_commit_of_a_guest_waits_as_well() {
    let (mut store, guest) = starving();
    let tx = begin(&mut store);
    let own = store.start(guest);
    store.tx(guest, own, READ, "key|").unwrap();
    store.tx(guest, own, WRITE, "key|mine").unwrap();
    let (outcome, out) = store.offer(guest, own, 7, b"T\0");
    assert_eq!((outcome, out.len()), (Outcome::Deferred(PROTECTED_FOR), 0));
    assert_eq!(store.end(store.dom0, tx, true), Ok("OK|".into()));
    assert_eq!(store.end(guest, own, true), Ok("OK|".into()));
    assert_eq!(value(&mut store), Ok("mine".into()));
}

// Fails if a transaction that does not end holds a guest for longer than was said.
#[test]
fn deferral_ends_with_the_protection() {
    let (mut store, guest) = starving();
    let tx = begin(&mut store);
    store.now = 100;
    assert_eq!(write(&mut store, guest, "key|new"), Some(PROTECTED_FOR));
    store.now = PROTECTED_FOR;
    assert_eq!(write(&mut store, guest, "key|new"), None);
    assert_eq!(store.end(store.dom0, tx, true), Err("EAGAIN".into()));
}

// Fails if protected transactions that follow each other hold a request for as long as they like.
#[test]
fn deferral_is_limited_for_successive_transactions() {
    let (mut store, guest) = starving();
    let first = begin(&mut store);
    store.now = 400;
    assert_eq!(write(&mut store, guest, "key|new"), Some(PROTECTED_FOR));
    store.end(store.dom0, first, false).unwrap();
    begin(&mut store);
    assert_eq!(write(&mut store, guest, "key|new"), Some(400 + HELD_FOR));
    store.now = 400 + HELD_FOR - 1;
    begin(&mut store);
    assert_eq!(write(&mut store, guest, "key|new"), Some(400 + HELD_FOR));
    store.now = 400 + HELD_FOR;
    assert_eq!(write(&mut store, guest, "key|new"), None);
}

// Fails if guests wait for a transaction that is lost already, or one that cannot be found any
// more: its connection has ended, or was reset.
#[test]
fn requests_are_not_deferred_for_a_lost_transaction() {
    let (mut store, guest) = starving();
    begin(&mut store);
    store.ok(store.dom0, WRITE, "/local/domain/5/key|by dom0");
    assert_eq!(write(&mut store, guest, "key|new"), None);

    for reset in [true, false] {
        let (mut store, guest) = starving();
        begin(&mut store);
        assert!(write(&mut store, guest, "key|new").is_some());
        match reset {
            true => drop(store.ok(store.dom0, RESET_WATCHES, "|")),
            false => store.engine.disconnect(store.dom0),
        }
        assert_eq!(store.engine.pop_ready(), Some(guest));
        assert_eq!(write(&mut store, guest, "key|new"), None);
    }
}

// Fails if a guest can make others wait: its own transactions are not protected.
#[test]
fn a_guest_cannot_hold_anybody() {
    let mut store = Store::new();
    let (guest, other) = (store.guest(5), store.guest(6));
    store.ok(store.dom0, WRITE, "/shared|0");
    store.ok(store.dom0, 14, "/shared|b0|");
    for i in 0..10 {
        let tx = store.start(guest);
        store.tx(guest, tx, READ, "/shared|").unwrap();
        store.tx(guest, tx, WRITE, "key|1").unwrap();
        assert_eq!(write(&mut store, other, &format!("/shared|{i}x")), None);
        assert_eq!(store.end(guest, tx, true), Err("EAGAIN".into()));
    }
}

// Fails if a domain that dies while its request waits leaves something behind, or if dom0 has to
// wait itself.
#[test]
fn a_guest_that_waits_can_go() {
    let (mut store, guest) = starving();
    let tx = begin(&mut store);
    assert!(write(&mut store, guest, "key|new").is_some());
    let waits = |store: &mut Store| store.ok(store.dom0, 0, "connections|").contains("waits");
    assert!(waits(&mut store));
    assert!(store.ok(store.dom0, 0, "transactions|").contains("protected for 500 ms"));
    store.kill(5);
    assert!(!waits(&mut store));
    assert_eq!(store.end(store.dom0, tx, true), Err("EAGAIN".into()), "the key has gone");
    assert!(store.ok(store.dom0, 0, "conflicts|").contains("1 transactions protected, 1 requests"));
}

// Fails if a protected transaction that has created a node, and was then moved to the current tree, makes
// a state that cannot be read: an update would be refused, and a journal lost.
#[test]
fn a_transaction_that_went_on_from_a_later_tree_can_be_handed_over() {
    let (mut store, guest) = starving();
    let tx = begin(&mut store);
    store.tx(store.dom0, tx, WRITE, "/vm/made|1").unwrap();
    store.ok(guest, WRITE, "other|1");
    store.tx(store.dom0, tx, READ, "/local/domain/5/other|").unwrap();
    let state = State::decode(&store.engine.dump().encode()).unwrap();
    store.engine = Engine::restore(&Config::default(), &state).unwrap().0;
    store.engine.check().unwrap();
    assert_eq!(store.end(store.dom0, tx, true), Ok("OK|".into()));
    assert_eq!(store.ok(store.dom0, READ, "/vm/made|"), "1");
}

// Fails if a conflict is attributed to a change that a protected transaction saw when it was moved to a
// later tree.
#[test]
fn what_a_transaction_has_seen_is_not_why_it_fails() {
    let (mut store, guest) = starving();
    let early = store.guest(6);
    store.ok(store.dom0, WRITE, "/shared|0");
    store.ok(store.dom0, 14, "/shared|b0|");
    let tx = begin(&mut store);
    store.ok(early, WRITE, "/shared|1");
    store.tx(store.dom0, tx, READ, "/shared|").unwrap();
    store.now += PROTECTED_FOR;
    store.ok(guest, WRITE, "/local/domain/5/key|2");
    store.ok(guest, WRITE, "/shared|2");
    store.ok(early, WRITE, "elsewhere|2");
    assert_eq!(store.end(store.dom0, tx, true), Err("EAGAIN".into()));
    let shown = store.ok(store.dom0, 0, "conflicts|");
    assert!(shown.contains("/local/domain/5/key because of conn 2 domain 5\n"), "{shown}");
}
