//! Fair progress through the whole server: frames that are put off wait in their connection.

use std::sync::atomic::{AtomicBool, Ordering};

use xenstore_tests::raw::{Conn, op};
use xenstored::embedded::Store;

const KEY: &str = "/local/domain/5/key|";

fn guest(store: &Store) -> Conn {
    let mut dom0 = Conn::new(store.connect(0));
    let guest = Conn::new(store.connect(5));
    dom0.ok(op::WRITE, &format!("{KEY}0")).unwrap();
    dom0.ok(op::SET_PERMS, &format!("{KEY}n5|")).unwrap();
    guest
}

/// One attempt of a transaction that depends on the key of the guest.
fn attempt(dom0: &mut Conn) -> String {
    let tx = dom0.begin().unwrap();
    dom0.tx(tx, op::READ, KEY).unwrap().unwrap();
    dom0.tx(tx, op::WRITE, "/vm|1").unwrap().unwrap();
    // Others get their turn before the end.
    Conn::ok(dom0, op::READ, "/vm|").ok();
    dom0.tx(tx, op::TRANSACTION_END, "T|").unwrap().unwrap_or_else(|name| name)
}

// Fails if guests that rewrite a key as fast as they can make a toolstack try more than three times,
// or if one of their requests is lost or answered twice: the ids of replies are checked.
#[test]
fn a_toolstack_commits_at_the_third_try() {
    let store = Store::start();
    drop(guest(&store));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..3 {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let mut guest = Conn::new(store.connect(5));
                for i in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    guest.ok(op::WRITE, &format!("key|{number} {i}")).unwrap();
                }
            });
        }
        let mut dom0 = Conn::new(store.connect(0));
        // Until the guests have been in the way often enough.
        let mut failed = 0;
        while failed < 20 {
            let tries = (1..=3).find(|_| attempt(&mut dom0) == "OK|");
            failed += tries.expect("the third try is protected") - 1;
            if failed % 2 == 0 {
                dom0 = Conn::new(store.connect(0)); // which has not failed yet
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    store.check().unwrap();
}

/// A store with a protected transaction, whose connection comes along, and a guest that waits.
fn waiting(store: &Store) -> (Conn, u32, Conn) {
    let mut guest = guest(store);
    let mut dom0 = Conn::new(store.connect(0));
    for i in 1..=2 {
        let tx = dom0.begin().unwrap();
        dom0.gives_in(tx, op::READ, KEY, &format!("{}", i - 1)).unwrap();
        dom0.tx(tx, op::WRITE, "/vm|1").unwrap().unwrap();
        guest.ok(op::WRITE, &format!("key|{i}")).unwrap();
        dom0.end(tx, "T|", "EAGAIN").unwrap();
    }
    let tx = dom0.begin().unwrap();
    dom0.gives_in(tx, op::READ, KEY, "2").unwrap();
    dom0.tx(tx, op::WRITE, "/vm|2").unwrap().unwrap();
    // Two requests in one go: the second waits behind the first.
    guest.start(op::WRITE, 0, b"key\x003").unwrap();
    guest.start(op::READ, 0, b"key\0").unwrap();
    // Mostly it has been read by then; the tests hold as well if it has not.
    (0..1000).find(|_| dom0.ok(op::CONTROL, "connections|").unwrap().contains("waits"));
    (dom0, tx, guest)
}

fn replies(guest: &mut Conn) {
    assert_eq!(guest.reply().unwrap().payload, b"OK\0");
    assert_eq!(guest.reply().unwrap().payload, b"3");
}

// Fails if a request that was put off is not answered once the transaction has ended, or what came
// behind it is answered before, twice or not at all.
#[test]
fn requests_behind_one_that_waits_keep_their_order() {
    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    dom0.end(tx, "T|", "OK|").unwrap();
    replies(&mut guest);
    dom0.gives(op::READ, KEY, "3").unwrap();
}

// Fails if a transaction that is never ended holds a guest for ever.
#[test]
fn a_toolstack_that_hangs_does_not_hold_a_guest_for_ever() {
    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    replies(&mut guest);
    dom0.end(tx, "T|", "EAGAIN").unwrap();
}

// Fails if a guest that goes while its request waits, or whose domain does, is answered to nobody's
// use, keeps the toolstack from committing or leaves something behind.
#[test]
fn a_guest_that_waits_can_leave() {
    let store = Store::start();
    let (mut dom0, tx, guest) = waiting(&store);
    drop(guest);
    dom0.end(tx, "T|", "OK|").unwrap();
    store.check().unwrap();

    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    store.release(5).unwrap();
    guest.ends().unwrap();
    dom0.end(tx, "T|", "EAGAIN").unwrap();
    store.check().unwrap();
}

// Fails if a guest that does not read its replies is answered for as long as there is room in
// memory: its quota `outstanding` says how many replies may wait (C xenstored: 20).
#[test]
fn a_guest_that_does_not_read_has_few_replies_waiting() {
    let store = Store::start();
    let mut guest = guest(&store);
    let mut dom0 = Conn::new(store.connect(0));
    let value = "x".repeat(2000);
    dom0.ok(op::WRITE, &format!("/big|{value}")).unwrap();
    dom0.ok(op::SET_PERMS, "/big|r0|").unwrap();
    for i in 0..100 {
        guest.start(op::WRITE, 0, format!("key\0{i}").as_bytes()).unwrap();
        guest.start(op::READ, 0, b"/big\0").unwrap();
    }
    // Until nothing happens any more.
    let (mut last, mut same) = (String::new(), 0);
    while same < 1000 {
        let now = dom0.ok(op::READ, KEY).unwrap();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    let in_the_pipe = xenstore_transport::memory::CAPACITY / (16 + 2000 + 16 + 3);
    let answered: usize = last.parse().unwrap();
    assert!(answered <= in_the_pipe + 20 / 2 + 1, "{answered}");
    for _ in 0..200 {
        guest.reply().unwrap();
    }
    dom0.gives(op::READ, KEY, "99").unwrap();
}
