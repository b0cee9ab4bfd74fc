//! Limits and rights at their edges, one test for each check that would not be missed otherwise.

mod harness;

use harness::Store;
use xenstore_protocol::{DomId, Frame, Quota};
use xenstore_store::{Caller, Config, Engine};

const DIRECTORY_PART: u32 = 22;
const GET_PERMS: u32 = 3;
const READ: u32 = 2;
const RM: u32 = 13;
const SET_PERMS: u32 = 14;
const UNWATCH: u32 = 5;
const WATCH: u32 = 4;
const WRITE: u32 = 11;

/// A store, and domain 5 in it, whose memory may grow by `more` bytes from now on.
fn tight(more: i64) -> (Store, xenstore_store::ConnId) {
    let mut store = Store::new();
    let guest = store.guest(5);
    let text = store.ok(store.dom0, 0, "quota|5|");
    let line = text.lines().find(|line| line.starts_with("memory")).unwrap();
    let used: i64 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
    store.ok(store.dom0, 26, &format!("5|memory|{}|", used + more));
    (store, guest)
}

// Fails if watches are not charged to memory (XSA-326).
#[test]
fn xsa_326_watches_are_bounded_by_memory() {
    let (mut store, guest) = tight(1000);
    let long = "x".repeat(1000);
    assert_eq!(store.err(guest, WATCH, &format!("a|{long}|")), "ENOSPC");
    store.watch(guest, "a|t|");
}

// Fails if unfetched events grow beyond the memory of their domain, or are lost instead
// of merged (XSA-326).
#[test]
fn xsa_326_events_are_bounded_by_memory_and_merged() {
    let (mut store, guest) = tight(3000);
    store.ok(store.dom0, SET_PERMS, "/tool|r0|");
    store.watch(guest, "/tool|t|");
    for i in 0..200 {
        store.ok(store.dom0, WRITE, &format!("/tool/{i}|"));
    }
    assert_eq!(store.events(guest), ["/tool t"], "look again at everything");
}

// Fails if what a transaction keeps is not charged while it is open (XSA-326).
#[test]
fn xsa_326_transactions_are_bounded_by_memory() {
    let (mut store, guest) = tight(15_000);
    let tx = store.start(guest);
    let value = "x".repeat(1500);
    let results: Vec<_> =
        (0..8).map(|_| store.tx(guest, tx, WRITE, &format!("same|{value}"))).collect();
    assert!(results[0].is_ok() && results.contains(&Err("ENOSPC".into())), "{results:?}");
    assert_eq!(store.end(guest, tx, true), Err("ENOSPC".into()));
}

// Fails if nodes that a transaction has made do not count until it is committed.
#[test]
fn nodes_of_a_transaction_count_at_once() {
    let (mut store, guest) = tight(12_000);
    let tx = store.start(guest);
    let value = "x".repeat(1900);
    let made = (0..8).take_while(|i| store.tx(guest, tx, WRITE, &format!("n{i}|{value}")).is_ok());
    // Each is kept twice: as a request, and as a node.
    assert_eq!(made.count(), 2);
}

// Fails if the checks of SET_PERMS change their order, which can be seen in the error: C xenstored
// counts the entries before it looks for the owner.
#[test]
fn set_perms_counts_entries_first() {
    let mut store = Store::new();
    let guest = store.guest(5);
    assert_eq!(store.err(guest, SET_PERMS, "/local/domain/5|n99|r1|r2|r3|r4|r6|"), "ENOSPC");
    assert_eq!(store.err(guest, SET_PERMS, "/local/domain/5|n99|"), "ENOENT");
}

// Fails if a domain without the feature can grant rights to every domain.
#[test]
fn rights_for_every_domain_need_the_feature() {
    let mut store = Store::new();
    store.create(5);
    store.ok(store.dom0, 24, "5|7|");
    let (guest, other) = (store.guest(5), store.guest(6));
    store.ok(guest, WRITE, "a|1");
    store.ok(guest, SET_PERMS, "a|n5|r32757|");
    assert_eq!(store.err(other, READ, "/local/domain/5/a|"), "EACCES");
    assert_eq!(store.ok(guest, GET_PERMS, "a|"), "n5|r32757|");
    store.ok(other, WRITE, "a|1");
    store.ok(other, SET_PERMS, "a|n6|r32757|");
    assert_eq!(store.ok(guest, READ, "/local/domain/6/a|"), "1");
}

// Fails if a transaction is committed as it was run although what it may do has changed since, with
// the tree as it was.
#[test]
fn commits_notice_changed_targets_and_quotas() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let (model, first) = (store.guest(7), store.guest(5));
    store.guest(6);
    store.ok(first, WRITE, "a|1");
    store.ok(dom0, 19, "7|5|");
    let tx = store.start(model);
    store.tx(model, tx, WRITE, "/local/domain/5/a|2").unwrap();
    store.ok(dom0, 19, "7|6|");
    assert_eq!(store.end(model, tx, true), Err("EAGAIN".into()));

    let tx = store.start(first);
    store.tx(first, tx, WRITE, "b|").unwrap();
    store.tx(first, tx, WRITE, "c|").unwrap();
    store.ok(dom0, 26, "5|nodes|3|");
    assert_eq!(store.end(first, tx, true), Err("ENOSPC".into()));

    let tx = store.start(model);
    store.tx(model, tx, WRITE, "/local/domain/6/a|2").unwrap();
    store.kill(6);
    assert_eq!(store.end(model, tx, true), Err("EAGAIN".into()));
}

// Fails if a list that is read in parts can change in between without being noticed.
#[test]
fn the_generation_of_a_list_changes_with_it() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.ok(dom0, WRITE, "/d/a|");
    store.ok(dom0, WRITE, "/d/b|");
    let generation = |store: &mut Store| {
        let part = store.ok(dom0, DIRECTORY_PART, "/d|0|");
        part.split_once('|').unwrap().0.to_owned()
    };
    let first = generation(&mut store);
    assert_eq!(generation(&mut store), first);
    store.ok(dom0, RM, "/d/a|");
    let second = generation(&mut store);
    assert_ne!(second, first);
    store.ok(dom0, WRITE, "/d/c|");
    assert_ne!(generation(&mut store), second);
}

// Fails if who may read the root, but not the special node, does not hear of domains: C xenstored
// takes the root for the parent of the special nodes.
#[test]
fn readers_of_the_root_hear_of_domains() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let (reader, other) = (store.guest(5), store.guest(6));
    store.watch(reader, "@introduceDomain|t|");
    store.watch(other, "@introduceDomain|t|");
    store.ok(dom0, SET_PERMS, "/|n0|r5|");
    store.guest(7);
    assert_eq!(store.events(reader), ["@introduceDomain t"]);
    assert!(store.events(other).is_empty());
}

// Fails if an event comes after the reply to UNWATCH.
#[test]
fn unwatch_takes_waiting_events_along() {
    let mut store = Store::new();
    let (dom0, guest) = (store.dom0, store.guest(5));
    store.watch(guest, "a|t|");
    store.watch(guest, "a|u|");
    store.ok(dom0, WRITE, "/local/domain/5/a|1");
    let frames = store.all(guest, 0, UNWATCH, b"a\0t\0");
    assert_eq!(frames, [(15, b"a\0u\0".to_vec()), (UNWATCH, b"OK\0".to_vec())]);
    assert!(store.events(guest).is_empty());
}

// Fails if the largest values are not forgotten when asked.
#[test]
fn the_largest_values_can_be_reset() {
    let mut store = Store::new();
    let (dom0, guest) = (store.dom0, store.guest(5));
    (0..20).for_each(|i| drop(store.ok(guest, WRITE, &format!("n{i}|"))));
    (0..20).for_each(|i| drop(store.ok(guest, RM, &format!("n{i}|"))));
    let nodes = |text: String| {
        let line = text.lines().find(|line| line.starts_with("nodes")).unwrap().to_owned();
        line.split_whitespace().last().unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(nodes(store.ok(dom0, 0, "quota|max|-r|")), 21);
    assert_eq!(nodes(store.ok(dom0, 0, "quota|max|")), 1);
}

// Fails if a watch fires after a restore without a change: clients would repeat all their work.
#[test]
fn restored_watches_are_silent_until_something_happens() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.watch(guest, "a|t|");
    let state = store.engine.dump();
    let (mut engine, conns) = Engine::restore(&Config::default(), &state).unwrap();
    let at = state.connections.iter().position(|c| c.caller == Caller::Domain(DomId(5))).unwrap();
    assert_eq!(conns[at], guest);
    assert!(engine.pop_ready().is_none());
    assert!(!engine.emit_events(guest, usize::MAX, &mut Vec::new()));
    store.engine = engine;
    store.ok(store.dom0, WRITE, "/local/domain/5/a|1");
    assert_eq!(store.events(guest), ["a t"]);
    assert_eq!(Quota::ALL.len(), 10, "a new quota wants a test here");
}

// Fails if a connection that has ended, or one of a domain that is not introduced, may do anything.
#[test]
fn connections_that_have_ended_may_do_nothing() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.ok(dom0, WRITE, "/secret|top");
    let guest = store.guest(5);
    store.kill(5);
    for conn in [guest, store.engine.connect(Caller::Domain(DomId(7)))] {
        assert_eq!(store.err(conn, READ, "/secret|"), "EIO");
        assert_eq!(store.err(conn, WRITE, "/secret|1"), "EIO");
        assert_eq!(store.err(conn, 0, "quota|"), "EIO");
        assert!(!store.engine.is_connected(conn));
    }
}

// Fails if a domain of a state that does not say which it was is taken for another at the first
// look, and all that it owns goes.
#[test]
fn domains_without_identity_are_taken_for_those_that_are_there() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.ok(guest, WRITE, "mine|1");
    let mut state = store.engine.dump();
    state.domains.iter_mut().for_each(|domain| domain.unique_id = 0);
    let (engine, _) = Engine::restore(&Config::default(), &state).unwrap();
    store.engine = engine;
    store.dom0 = store.engine.connect(Caller::Socket);
    store.engine.domains_changed(&mut store.machine);
    assert_eq!(store.ok(store.dom0, READ, "/local/domain/5/mine|"), "1");
    store.create(5); // another one
    store.engine.domains_changed(&mut store.machine);
    assert_eq!(store.err(store.dom0, READ, "/local/domain/5/mine|"), "ENOENT");
}

// Fails if a token can forge lines or reach the terminal of a reader of the list.
#[test]
fn tokens_are_shown_escaped() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.watch(guest, "a|x\nconn 1 /forged \x1b[31m|");
    let shown = store.ok(store.dom0, 0, "watches|");
    assert_eq!(shown.lines().count(), 2, "one line, and the NUL: {shown}");
    assert!(shown.contains(r"x\nconn 1 /forged \x1b[31m"), "{shown}");
}

// Fails if the limit on paths can be stretched with zeroes (XSA-323).
#[test]
fn xsa_323_zeroes_do_not_stretch_a_path() {
    let mut store = Store::new();
    let guest = store.guest(5);
    let (zeroes, rest) = ("0".repeat(2000), "x".repeat(500));
    assert_eq!(store.err(guest, WATCH, &format!("/local/domain/{zeroes}5/{rest}|t|")), "EINVAL");
}

// Fails if ending a connection takes time that grows with the square of its watches.
#[test]
fn many_watches_with_events_end_quickly() {
    let mut store = Store::new();
    let many = store.engine.connect(Caller::Socket);
    let header = |ty, len: usize| xenstore_protocol::Header {
        ty,
        len: len.try_into().unwrap(),
        ..Default::default()
    };
    // Without the check of all invariants after each request that the harness makes.
    let send = |store: &mut Store, conn, ty, payload: &[u8]| {
        let (mut out, header) = (Vec::new(), header(ty, payload.len()));
        let _ =
            store.engine.request(conn, &Frame { header, payload }, 0, &mut store.machine, &mut out);
    };
    for i in 0..100_000 {
        send(&mut store, many, WATCH, format!("/a\0{i}\0").as_bytes());
    }
    let dom0 = store.dom0;
    send(&mut store, dom0, WRITE, b"/a\0");
    // With the square of them this would take minutes.
    store.engine.disconnect(many);
    store.engine.check().unwrap();
}

// Fails if a list that is being read in parts is taken for that of another node: the newest child
// was made at the same moment as its parent's list.
#[test]
fn lists_in_parts_are_not_mixed_up() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    for i in 0..1000 {
        store.ok(dom0, WRITE, &format!("/d/child-{i}|"));
    }
    let part = store.ok(dom0, DIRECTORY_PART, "/d|0|");
    assert!(part.contains("|child-0|") && !part.ends_with("||"));
    let part = store.ok(dom0, DIRECTORY_PART, "/d/child-999|0|");
    assert!(part.ends_with("||") && !part.contains("child"), "{part:.60}");
}
