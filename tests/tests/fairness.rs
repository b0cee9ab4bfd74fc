//! Fairness through the whole server: a deferred frame waits in its connection.

use std::sync::atomic::{AtomicBool, Ordering};

use xenstore_tests::raw::{Conn, op};
use xenstore_tests::served::Store;

const KEY: &str = "/local/domain/5/key|";

fn guest(store: &Store) -> Conn {
    let mut dom0 = Conn::new(store.connect(0));
    let guest = Conn::new(store.connect(5));
    dom0.ok(op::WRITE, &format!("{KEY}0")).unwrap();
    dom0.ok(op::SET_PERMS, &format!("{KEY}n5|")).unwrap();
    guest
}

/// One try of a transaction that depends on the guest's key.
fn attempt(dom0: &mut Conn) -> String {
    let tx = dom0.begin().unwrap();
    dom0.tx(tx, op::READ, KEY).unwrap().unwrap();
    dom0.tx(tx, op::WRITE, "/vm|1").unwrap().unwrap();
    // Guests get their turn before the end.
    Conn::ok(dom0, op::READ, "/vm|").ok();
    dom0.tx(tx, op::TRANSACTION_END, "T|").unwrap().unwrap_or_else(|name| name)
}

// Fails if guests that rewrite a key at full speed make a toolstack try more than three times, or
// if one of their requests is lost or executed twice: the ids of replies are checked.
#[test]
fn toolstack_commits_at_the_third_try() {
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
        // Until the guests have caused enough conflicts.
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

/// A store with a protected transaction, the connection of that transaction, and a guest whose
/// request is deferred.
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
    // Two requests in one write: the second waits for the first.
    guest.start(op::WRITE, 0, b"key\x003").unwrap();
    guest.start(op::READ, 0, b"key\0").unwrap();
    // The server has usually read it by now; the tests also hold if not.
    (0..1000).find(|_| dom0.ok(op::CONTROL, "connections|").unwrap().contains("waits"));
    (dom0, tx, guest)
}

fn replies(guest: &mut Conn) {
    assert_eq!(guest.reply().unwrap().payload, b"OK\0");
    assert_eq!(guest.reply().unwrap().payload, b"3");
}

// Fails if a deferred request gets no reply after the end of the transaction, or if requests behind
// it are executed before it, twice or never.
#[test]
fn requests_behind_a_deferred_one_keep_their_order() {
    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    dom0.end(tx, "T|", "OK|").unwrap();
    replies(&mut guest);
    dom0.gives(op::READ, KEY, "3").unwrap();
}

// Fails if a transaction that is never ended defers a guest's request without limit.
#[test]
fn deferral_ends_when_a_toolstack_hangs() {
    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    replies(&mut guest);
    dom0.end(tx, "T|", "EAGAIN").unwrap();
}

// Fails if a guest that disconnects, or whose domain dies, while its request is deferred prevents
// the toolstack's commit or leaves anything behind.
#[test]
fn guest_with_a_deferred_request_can_disconnect() {
    let store = Store::start();
    let (mut dom0, tx, guest) = waiting(&store);
    drop(guest);
    dom0.end(tx, "T|", "OK|").unwrap();
    store.check().unwrap();

    let store = Store::start();
    let (mut dom0, tx, mut guest) = waiting(&store);
    store.release(5);
    guest.ends().unwrap();
    dom0.end(tx, "T|", "EAGAIN").unwrap();
    store.check().unwrap();
}

// Fails if a guest that does not read its replies gets replies as long as memory lasts: the quota
// `outstanding` limits unread replies (C xenstored: 20).
#[test]
fn unread_replies_of_a_guest_are_limited() {
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
    // Until nothing changes any more.
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
