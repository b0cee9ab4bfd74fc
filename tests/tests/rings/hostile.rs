//! Guests that write arbitrary bytes into their page, beside guests that must not be affected.

use std::sync::atomic::{AtomicBool, Ordering};

use xenstore_tests::fake_guest::{FakeGuest, PORT, set_state, word};
use xenstore_tests::peers::Kind;
use xenstore_tests::raw::{Link, PATIENCE, frame, op};

use crate::{Host, on_each};

const BAD: u16 = 5;

/// A reproducible sequence of numbers.
struct Numbers(u32);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

/// Repeats an action of a guest while other guests are served.
fn meanwhile(host: &mut Host, act: impl Fn(&mut FakeGuest, &mut Numbers) + Sync) {
    let mut bad = host.fake(BAD);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = Numbers(12345);
            while !stop.load(Ordering::Relaxed) {
                act(&mut bad, &mut numbers);
            }
        });
        for _ in 0..100 {
            host.assert_others_served();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

// Fails if an invalid index (XSA-38) does more than end its connection; with this project's daemon,
// also if it does not end the connection, is not reported, or prevents a reconnection.
#[test]
fn invalid_index_ends_only_its_connection() {
    on_each("garbage in an index", |host| {
        let (mut bad, mut conn) = host.guest(BAD);
        for word in [word::REQ_CONS, word::REQ_PROD, word::RSP_CONS, word::RSP_PROD] {
            bad.put(word, 0x8000_0001).unwrap();
            bad.kick().unwrap();
            host.assert_others_served();
            if host.daemon.kind != Kind::Ours {
                host.introduce(BAD, PORT);
                continue;
            }
            match word {
                word::REQ_PROD => bad.await_word(word::ERROR, 2).unwrap(),
                word::RSP_CONS => {
                    // The index is checked when there is something to send.
                    bad.scribble(0, &frame(op::READ, 1, 0, b"x\0")).unwrap();
                    bad.put(word::REQ_PROD, 18).unwrap();
                    bad.kick().unwrap();
                    bad.await_word(word::ERROR, 2).unwrap();
                }
                // The server does not read its own indices from the page.
                _ => assert_eq!(bad.get(word::ERROR).unwrap(), 0),
            }
            bad.reconnect().unwrap();
            assert_eq!(bad.get(word::ERROR).unwrap(), 0);
            conn.ok(op::WRITE, "alive|yes").unwrap();
            host.introduce(BAD, PORT);
        }
    });
}

// Fails if a guest that sets the indices of its idle ring to 0 is not served, or loses the state of
// its connection. Boot firmware and crash kernels do so once, OpenBSD's first driver after every
// reply.
#[test]
fn idle_ring_set_to_zero_is_served() {
    on_each("indices that are set to 0", |host| {
        let (page, mut conn) = host.guest(BAD);
        conn.watch("x|t|").unwrap();
        let tx = conn.begin().unwrap();
        for value in ["1", "2", "a longer one", "3"] {
            conn.gives(op::WRITE, &format!("y|{value}"), "OK|").unwrap();
            page.zero().unwrap();
            conn.gives(op::READ, "y|", value).unwrap();
            page.zero().unwrap();
        }
        host.dom0.ok(op::WRITE, &format!("/local/domain/{BAD}/x|1")).unwrap();
        conn.event("x|t|").unwrap();
        page.zero().unwrap();
        conn.end(tx, "T|", "OK|").unwrap();
        if host.daemon.kind == Kind::Ours {
            assert_eq!(page.get(word::ERROR).unwrap(), 0);
        }
    });
}

// Fails if indices that change between any two accesses do more than that.
#[test]
fn flipping_indices_end_only_their_connection() {
    on_each("indices that flip", |host| {
        host.guest(BAD);
        meanwhile(host, |bad, numbers| {
            let words =
                [word::REQ_CONS, word::REQ_PROD, word::RSP_CONS, word::RSP_PROD, word::CONNECTION];
            let at = words[numbers.next() as usize % 5];
            let value = numbers.next() >> (numbers.next() % 32);
            bad.put(at, if at == word::CONNECTION { value & 1 } else { value }).unwrap();
            bad.kick().unwrap();
        });
    });
}

// Fails if bytes that change while they are read do more than that. The indices are valid; the
// bytes between them are not.
#[test]
fn changing_bytes_affect_only_their_connection() {
    on_each("bytes that change", |host| {
        host.guest(BAD);
        meanwhile(host, |bad, numbers| {
            let cons = bad.get(word::REQ_CONS).unwrap();
            let len = [2, 5, 40, 900, 4096, 5000, u32::MAX][numbers.next() as usize % 7];
            let header = [numbers.next() % 28, 1, 0, len].map(u32::to_le_bytes).concat();
            bad.scribble(cons, &header).unwrap();
            bad.put(word::REQ_PROD, cons.wrapping_add(1024)).unwrap();
            bad.kick().unwrap();
            bad.scribble(cons.wrapping_add(numbers.next() % 1024), &header).unwrap();
            bad.put(word::RSP_CONS, bad.get(word::RSP_PROD).unwrap()).unwrap();
            if numbers.next() % 8 == 0 {
                bad.put(word::CONNECTION, 1).unwrap();
            }
        });
    });
}

// Fails if the server waits for a guest that sends no event, or does not answer it after an event.
#[test]
fn guest_without_events_delays_no_other() {
    on_each("a guest that does not ring", |host| {
        let (mut bad, mut conn) = host.guest(BAD);
        let request = frame(op::READ, 9, 0, format!("/local/domain/{BAD}\0").as_bytes());
        bad.scribble(bad.get(word::REQ_PROD).unwrap(), &request).unwrap();
        let prod = bad.get(word::REQ_PROD).unwrap();
        bad.put(word::REQ_PROD, prod.wrapping_add(u32::try_from(request.len()).unwrap())).unwrap();
        host.assert_others_served();
        bad.kick().unwrap();
        let reply = conn.message(PATIENCE).unwrap().unwrap();
        assert_eq!((reply.ty, reply.req_id), (op::READ, 9));
    });
}

// Fails if a guest that dies in the middle of a request leaves anything behind, or if its death is
// not reported.
#[test]
fn guest_that_dies_in_a_request_leaves_nothing() {
    on_each("death in a request", |host| {
        let (mut bad, mut conn) = host.guest(BAD);
        conn.ok(op::WRITE, "mine|1").unwrap();
        host.dom0.watch("@releaseDomain|t|").unwrap();
        bad.send(&frame(op::WRITE, 1, 0, b"half\0of it")[..21]).unwrap();
        host.assert_others_served();
        set_state(&host.daemon.xen(), BAD, "gone").unwrap();
        host.dom0.event("@releaseDomain|t|").unwrap();
        host.dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{BAD}|"), "F|").unwrap();
        if host.daemon.kind == Kind::Ours {
            host.dom0.fails(op::READ, &format!("/local/domain/{BAD}|"), "ENOENT").unwrap();
        }
        host.assert_others_served();
    });
}

// Fails if transactions or watches of a guest outlive it, if one of its transactions takes effect,
// or if a later domain finds anything of it.
#[test]
fn guest_killed_with_open_transactions_leaves_nothing() {
    let mut host = Host::ours();
    let (_, mut conn) = host.guest(BAD);
    let listing = |host: &mut Host, what: &str| host.dom0.ok(op::CONTROL, what).unwrap();
    let before = [listing(&mut host, "transactions|"), listing(&mut host, "watches|")];
    conn.watch("x|t|").unwrap();
    conn.watch("@releaseDomain|t|").unwrap();
    for _ in 0..3 {
        let tx = conn.begin().unwrap();
        conn.gives_in(tx, op::WRITE, "never|1", "OK|").unwrap();
    }
    let open = [listing(&mut host, "transactions|"), listing(&mut host, "watches|")];
    assert!(open[0] != before[0] && open[1] != before[1], "{open:?}");
    host.dom0.watch("@releaseDomain|t|").unwrap();
    set_state(&host.daemon.xen(), BAD, "gone").unwrap();
    host.dom0.event("@releaseDomain|t|").unwrap();
    host.dom0.gives(op::UNWATCH, "@releaseDomain|t|", "OK|").unwrap();
    assert_eq!([listing(&mut host, "transactions|"), listing(&mut host, "watches|")], before);
    let (_, mut later) = host.guest(BAD);
    later.fails(op::READ, "never|", "ENOENT").unwrap();
    later.fails(op::UNWATCH, "x|t|", "ENOENT").unwrap();
    later.events(&[]).unwrap();
    host.assert_others_served();
    host.assert_sound();
}
