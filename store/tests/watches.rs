//! Which watches fire, and in which order.

mod harness;
use harness::Store;

const WRITE: u32 = 11;
const RM: u32 = 13;
const PERMS: u32 = 14;

// Fails if the removal of a tree fires other watches than exact ones of its nodes, or not deepest
// first.
#[test]
fn removal_fires_deepest_first() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    for path in ["/p/b/c|", "/p/a|", "/p/a/z|"] {
        store.ok(dom0, WRITE, path);
    }
    for path in ["/p", "/p/a", "/p/b/c", "/p/never", "/"] {
        store.watch(dom0, &format!("{path}|w|"));
    }
    let frames = store.all(dom0, 0, RM, b"/p\0");
    let texts: Vec<String> =
        frames.iter().map(|(_, p)| String::from_utf8_lossy(p).replace('\0', " ")).collect();
    assert_eq!(texts, ["/p/b/c w ", "/p/a w ", "/p w ", "/p w ", "OK "]);
}

// Fails if a watch fires for a node that its connection may not read (XSA-115), or does not fire for
// one that it can read by the node or by its parent, before or after the change.
#[test]
fn xsa_115_events_are_for_those_who_may_read() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.ok(dom0, WRITE, "/p/secret|1");
    store.ok(dom0, WRITE, "/p/open|1");
    store.ok(dom0, PERMS, "/p/open|n0|r5|");
    store.watch(guest, "/|t|");
    store.ok(dom0, WRITE, "/p/secret|2");
    assert_eq!(store.events(guest), Vec::<String>::new());
    store.ok(dom0, WRITE, "/p/open|2");
    assert_eq!(store.events(guest), ["/p/open t"]);
    store.ok(dom0, PERMS, "/p/open|n0|");
    assert_eq!(store.events(guest), ["/p/open t"], "it could read it before");
    store.ok(dom0, WRITE, "/p/open|3");
    assert_eq!(store.events(guest), Vec::<String>::new());
    store.ok(dom0, PERMS, "/p|r0|");
    store.events(guest);
    store.ok(dom0, WRITE, "/p/secret|3");
    assert_eq!(store.events(guest), ["/p/secret t"], "it can read the parent");
    store.ok(dom0, RM, "/p/secret|");
    assert_eq!(store.events(guest), ["/p/secret t"]);
    // The same in a transaction that removes the node.
    store.ok(dom0, WRITE, "/p/secret|1");
    store.events(guest);
    let tx = store.start(dom0);
    store.tx(dom0, tx, RM, "/p/secret|").unwrap();
    store.end(dom0, tx, true).unwrap();
    assert_eq!(store.events(guest), ["/p/secret t"]);
}

// Fails if a guest gets events for domains without the right to read the special node.
#[test]
fn xsa_115_special_events_need_rights() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.watch(guest, "@introduceDomain|i|");
    store.watch(guest, "@releaseDomain|r|");
    store.guest(6);
    store.kill(6);
    assert_eq!(store.events(guest), ["@releaseDomain r"], "every domain may watch releases");
    store.ok(dom0, PERMS, "@introduceDomain|n0|r5|");
    store.ok(dom0, PERMS, "@releaseDomain|n0|");
    assert_eq!(store.events(guest), ["@introduceDomain i", "@releaseDomain r"], "of SET_PERMS");
    store.guest(6);
    store.kill(6);
    assert_eq!(store.events(guest), ["@introduceDomain i"]);
}

// Fails if paths of relative watches are told otherwise than they were written.
#[test]
fn relative_watches_get_relative_paths() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.watch(guest, "data|t|");
    store.watch(guest, "/local/domain/5/data|abs|");
    assert_eq!(store.err(guest, 4, "/local/domain/5/data|t|"), "EEXIST");
    store.ok(store.dom0, WRITE, "/local/domain/5/data/x|1");
    assert_eq!(store.events(guest), ["data/x t", "/local/domain/5/data/x abs"]);
}

// Fails if events of a connection that does not read pile up, or one that matters is lost: many
// paths become one event for the watched path, and what comes after it has been read comes again.
#[test]
fn unread_events_are_bounded_and_not_lost() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let reader = store.engine.connect(xenstore_store::Caller::Socket);
    store.watch(reader, "/p|t|");
    for round in 0..3 {
        for _ in 0..3 {
            store.ok(dom0, WRITE, &format!("/p/{round}|1"));
        }
    }
    assert_eq!(store.events(reader), ["/p/0 t", "/p/1 t", "/p/2 t"], "equal ones are merged");
    for i in 0..3000 {
        store.ok(dom0, WRITE, &format!("/p/{i}|1"));
    }
    assert_eq!(store.events(reader), ["/p t"]);
    store.ok(dom0, WRITE, "/p/x|1");
    assert_eq!(store.events(reader), ["/p/x t"]);
}

// Fails if a token near the limit makes an event that is too long to send, or is lost (XSA-324).
#[test]
fn xsa_324_events_that_do_not_fit_become_the_watched_path() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    for len in [4080, 4090, 4092] {
        let token = "t".repeat(len);
        store.watch(dom0, &format!("/p|{token}|"));
        store.ok(dom0, WRITE, "/p/a/quite/long/path|1");
        store.ok(dom0, 5, &format!("/p|{token}|"));
    }
    let reader = store.engine.connect(xenstore_store::Caller::Socket);
    let token = "t".repeat(4080);
    store.watch(reader, &format!("/p|{token}|"));
    store.ok(dom0, WRITE, "/p/a/quite/long/path|2");
    assert_eq!(store.events(reader), [format!("/p {token}")]);
}

// Fails if watches leave anything behind (XSA-330).
#[test]
fn xsa_330_reset_watches_removes_them_from_every_index() {
    let mut store = Store::new();
    let guest = store.guest(5);
    for round in 0..1000 {
        store.watch(guest, &format!("a/{round}|t|"));
        store.watch(guest, "@releaseDomain|t|");
        store.ok(guest, 21, "|");
    }
    store.ok(guest, WRITE, "a/1|x");
    assert_eq!(store.events(guest), Vec::<String>::new());
}

// Fails if a commit fires an event that its requests, made one by one outside of a transaction, would not
// fire: a guest that may read `/d` before or after the commit learns the name of a node that was closed
// when it was made or removed (XSA-115). C xenstored fires none of the events of `/d/secret`.
#[test]
fn xsa_115_a_commit_fires_as_its_requests_would_one_by_one() {
    type Requests = &'static [(u32, &'static str)];
    let cases: [(&str, Requests, &[&str]); 5] = [
        ("closed first", &[(PERMS, "/d|n0|"), (WRITE, "/d/secret|")], &["/d t"]),
        (
            "made again, closed",
            &[(RM, "/d|"), (WRITE, "/d|"), (PERMS, "/d|n0|"), (WRITE, "/d/secret|")],
            &["/d t"],
        ),
        (
            "closed all along",
            &[(PERMS, "/d|n0|"), (WRITE, "/d/closed|2"), (PERMS, "/d|r0|")],
            &["/d t"],
        ),
        (
            "removed while closed",
            &[(PERMS, "/d|n0|"), (RM, "/d/closed|"), (PERMS, "/d|r0|")],
            &["/d t"],
        ),
        ("opened first", &[(PERMS, "/d/closed|r0|"), (WRITE, "/d/closed|2")], &["/d/closed t"]),
    ];
    for (what, requests, expected) in cases {
        for in_transaction in [false, true] {
            let mut store = Store::new();
            let dom0 = store.dom0;
            let guest = store.guest(5);
            store.ok(dom0, WRITE, "/d|1");
            store.ok(dom0, WRITE, "/d/closed|1");
            store.ok(dom0, PERMS, "/d|r0|");
            store.watch(guest, "/d|t|");
            let tx = if in_transaction { store.start(dom0) } else { 0 };
            for (ty, payload) in requests {
                store.tx(dom0, tx, *ty, payload).unwrap();
            }
            if in_transaction {
                store.end(dom0, tx, true).unwrap();
            }
            assert_eq!(store.events(guest), expected, "{what}, in a transaction: {in_transaction}");
        }
    }
}
