//! What commits and what conflicts. Expected values: the table of conflict scenarios where replay
//! decides ("would the same requests get the same answers now?"), read-only ones always commit.

mod harness;
use harness::Store;

const READ: u32 = 2;
const WRITE: u32 = 11;
const MKDIR: u32 = 12;
const RM: u32 = 13;
const PERMS: u32 = 14;
const DIR: u32 = 1;

/// Before: requests outside; inside: requests in the transaction; meanwhile: requests outside
/// between those and the commit; then what END T answers and what is read afterwards.
struct Row {
    name: &'static str,
    inside: &'static [(u32, &'static str)],
    meanwhile: &'static [(u32, &'static str)],
    commits: bool,
    after: &'static [(u32, &'static str, Result<&'static str, &'static str>)],
}

const ROWS: &[Row] = &[
    Row {
        name: "value read is changed",
        inside: &[(READ, "/p/a|"), (WRITE, "/p/z|1")],
        meanwhile: &[(WRITE, "/p/a|new")],
        commits: false,
        after: &[(READ, "/p/z|", Err("ENOENT"))],
    },
    Row {
        name: "the same without a write: read-only always commits",
        inside: &[(READ, "/p/a|")],
        meanwhile: &[(WRITE, "/p/a|new")],
        commits: true,
        after: &[],
    },
    Row {
        name: "value read is written again with the same content",
        inside: &[(READ, "/p/a|"), (WRITE, "/p/z|1")],
        meanwhile: &[(WRITE, "/p/a|A")],
        commits: true,
        after: &[(READ, "/p/z|", Ok("1"))],
    },
    Row {
        name: "value read is changed and changed back",
        inside: &[(READ, "/p/a|"), (WRITE, "/p/z|1")],
        meanwhile: &[(WRITE, "/p/a|x"), (WRITE, "/p/a|A")],
        commits: true,
        after: &[],
    },
    Row {
        name: "blind writes do not conflict; the transaction comes last",
        inside: &[(WRITE, "/p/a|tx")],
        meanwhile: &[(WRITE, "/p/a|other")],
        commits: true,
        after: &[(READ, "/p/a|", Ok("tx"))],
    },
    Row {
        name: "two create siblings",
        inside: &[(WRITE, "/p/x|1")],
        meanwhile: &[(WRITE, "/p/y|2")],
        commits: true,
        after: &[(DIR, "/p|", Ok("a|y|x|"))],
    },
    Row {
        name: "creates below a node whose value changes",
        inside: &[(WRITE, "/p/x|1")],
        meanwhile: &[(WRITE, "/p|v")],
        commits: true,
        after: &[(READ, "/p|", Ok("v"))],
    },
    Row {
        name: "lists children, another creates one",
        inside: &[(DIR, "/p|"), (WRITE, "/z|1")],
        meanwhile: &[(WRITE, "/p/y|2")],
        commits: false,
        after: &[],
    },
    Row {
        name: "reads a node, another creates a child of it",
        inside: &[(READ, "/p|"), (WRITE, "/z|1")],
        meanwhile: &[(WRITE, "/p/y|2")],
        commits: true,
        after: &[],
    },
    Row {
        name: "finds no node, another creates it",
        inside: &[(READ, "/p/x|"), (WRITE, "/z|1")],
        meanwhile: &[(WRITE, "/p/x|2")],
        commits: false,
        after: &[],
    },
    Row {
        name: "writes below a node that is removed: it comes back",
        inside: &[(WRITE, "/p/x|1")],
        meanwhile: &[(RM, "/p|")],
        commits: true,
        after: &[(DIR, "/p|", Ok("x|"))],
    },
    Row {
        name: "removes a tree into which another writes",
        inside: &[(RM, "/p|")],
        meanwhile: &[(WRITE, "/p/x|2")],
        commits: true,
        after: &[(READ, "/p|", Err("ENOENT"))],
    },
    Row {
        name: "permissions change, the caller may still read",
        inside: &[(READ, "/p/a|"), (WRITE, "/z|1")],
        meanwhile: &[(PERMS, "/p/a|b0|")],
        commits: true,
        after: &[],
    },
    Row {
        name: "nothing in common",
        inside: &[(READ, "/p/a|"), (WRITE, "/p/a|1")],
        meanwhile: &[(WRITE, "/q|1"), (MKDIR, "/r|")],
        commits: true,
        after: &[(READ, "/q|", Ok("1")), (READ, "/p/a|", Ok("1"))],
    },
    Row {
        name: "empty transaction",
        inside: &[],
        meanwhile: &[(WRITE, "/p/a|new")],
        commits: true,
        after: &[],
    },
];

// Fails if a row conflicts that should not, or the reverse, or if a failed one leaves a trace.
#[test]
fn conflicts_are_those_that_a_client_could_notice() {
    for row in ROWS {
        let mut store = Store::new();
        let (dom0, name) = (store.dom0, row.name);
        store.ok(dom0, WRITE, "/p/a|A");
        let tx = store.start(dom0);
        for (ty, payload) in row.inside {
            let _ = store.tx(dom0, tx, *ty, payload);
        }
        for (ty, payload) in row.meanwhile {
            store.ok(dom0, *ty, payload);
        }
        let expected = if row.commits { Ok("OK|".into()) } else { Err("EAGAIN".into()) };
        assert_eq!(store.end(dom0, tx, true), expected, "{name}");
        for (ty, payload, expected) in row.after {
            let expected = expected.map(String::from).map_err(String::from);
            assert_eq!(store.call(dom0, *ty, payload), expected, "{name}: {payload}");
        }
        // END always ends.
        assert_eq!(store.end(dom0, tx, false), Err("ENOENT".into()), "{name}");
    }
}

// Fails if a transaction sees half of what another client did at once, even if it cannot commit.
#[test]
fn a_transaction_sees_one_state_of_the_store() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.ok(dom0, WRITE, "/a|1");
    store.ok(dom0, WRITE, "/b|1");
    let tx = store.start(dom0);
    assert_eq!(store.tx(dom0, tx, READ, "/a|"), Ok("1".into()));
    store.ok(dom0, WRITE, "/a|2");
    store.ok(dom0, WRITE, "/b|2");
    assert_eq!(store.tx(dom0, tx, READ, "/b|"), Ok("1".into()));
    assert_eq!(store.tx(dom0, tx, WRITE, "/a|3"), Ok("OK|".into()));
    assert_eq!(store.tx(dom0, tx, READ, "/a|"), Ok("3".into()));
    assert_eq!(store.call(dom0, READ, "/a|"), Ok("2".into()), "not before the commit");
    assert_eq!(store.end(dom0, tx, true), Err("EAGAIN".into()));
}

// Fails if events leave before the commit, twice, in another order, or without a commit.
#[test]
fn events_come_with_the_commit_once_per_path() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.watch(dom0, "/p|t|");
    let tx = store.start(dom0);
    for payload in ["/p/b|1", "/p/a|1", "/p/b|2", "/p/gone|1"] {
        store.tx(dom0, tx, WRITE, payload).unwrap();
    }
    store.tx(dom0, tx, RM, "/p/gone|").unwrap();
    assert_eq!(store.events(dom0), Vec::<String>::new());
    let frames = store.all(dom0, tx, 7, b"T\0");
    let texts: Vec<String> =
        frames.iter().map(|(_, p)| String::from_utf8_lossy(p).replace('\0', " ")).collect();
    assert_eq!(texts, ["/p/b t ", "/p/a t ", "OK "]);
    let tx = store.start(dom0);
    store.tx(dom0, tx, WRITE, "/p/c|1").unwrap();
    store.end(dom0, tx, false).unwrap();
    assert_eq!(store.events(dom0), Vec::<String>::new());
}

// Fails if an id is valid for another connection, or a request that is not about the tree minds.
#[test]
fn ids_belong_to_their_connection() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let other = store.guest(5);
    let tx = store.start(dom0);
    assert_eq!(tx, 1, "the first id is 1");
    assert_eq!(store.tx(other, tx, READ, "/p|"), Err("ENOENT".into()));
    assert_eq!(store.tx(other, tx, 10, "5|"), Err("ENOENT".into()));
    assert_eq!(store.tx(dom0, tx, 10, "5|"), Ok("/local/domain/5|".into()));
    assert_eq!(store.tx(dom0, tx, 6, "|"), Err("EBUSY".into()));
    assert_eq!(store.tx(dom0, tx, 7, "X|"), Err("EINVAL".into()), "and stays open");
    assert_eq!(store.end(dom0, tx, true), Ok("OK|".into()));
    assert_eq!(store.end(dom0, 0, true), Err("ENOENT".into()));
}

// Fails if the quota of another time than that of the commit decides (XSA-440: two transactions,
// each within the quota).
#[test]
fn quota_is_checked_when_it_counts() {
    let mut store = Store::with_quota(xenstore_protocol::Quota::Nodes, 3);
    let guest = store.guest(5); // owns its home
    let (a, b) = (store.start(guest), store.start(guest));
    for (tx, name) in [(a, "x"), (b, "y")] {
        store.tx(guest, tx, WRITE, &format!("{name}|1")).unwrap();
        store.tx(guest, tx, WRITE, &format!("{name}{name}|1")).unwrap();
    }
    assert_eq!(store.end(guest, a, true), Ok("OK|".into()));
    assert_eq!(store.end(guest, b, true), Err("ENOSPC".into()));
    assert_eq!(store.err(guest, WRITE, "z|1"), "ENOSPC");
    // Both delete the same nodes: counts must not go wrong.
    let (a, b) = (store.start(guest), store.start(guest));
    for tx in [a, b] {
        store.tx(guest, tx, RM, "x|").unwrap();
        store.tx(guest, tx, RM, "xx|").unwrap();
    }
    assert_eq!(store.end(guest, a, true), Ok("OK|".into()));
    assert_eq!(store.end(guest, b, true), Ok("OK|".into()));
    store.ok(guest, WRITE, "z|1");
}

// Fails if a transaction can grow without bound, or one over its limit can commit or not be ended.
#[test]
fn transactions_are_bounded() {
    let mut store = Store::with_quota(xenstore_protocol::Quota::TransactionNodes, 3);
    let guest = store.guest(5);
    for (commit, expected) in [(true, Err("ENOSPC".into())), (false, Ok("OK|".into()))] {
        let tx = store.start(guest);
        for _ in 0..3 {
            store.tx(guest, tx, WRITE, "a|1").unwrap();
        }
        assert_eq!(store.tx(guest, tx, READ, "a|"), Err("ENOSPC".into()));
        assert_eq!(store.end(guest, tx, commit), expected);
    }
    let mut store = Store::with_quota(xenstore_protocol::Quota::Transactions, 2);
    let guest = store.guest(5);
    let first = store.start(guest);
    store.start(guest);
    assert_eq!(store.err(guest, 6, "|"), "ENOSPC");
    store.end(guest, first, false).unwrap();
    store.start(guest);
}

// Fails if RESET_WATCHES inside a transaction does not end it, or crashes (XSA-484).
#[test]
fn reset_watches_ends_transactions() {
    let mut store = Store::new();
    let guest = store.guest(5);
    let tx = store.start(guest);
    store.tx(guest, tx, WRITE, "a|1").unwrap();
    assert_eq!(store.tx(guest, tx, 21, "|"), Ok("OK|".into()));
    assert_eq!(store.end(guest, tx, true), Err("ENOENT".into()));
    assert_eq!(store.err(guest, READ, "a|"), "ENOENT");
}

// Fails if ids or memory grow with the number of transactions.
#[test]
fn ten_thousand_transactions_leave_nothing_behind() {
    let mut store = Store::new();
    let guest = store.guest(5);
    for round in 0..10_000 {
        let tx = store.start(guest);
        store.tx(guest, tx, WRITE, "a|1").unwrap();
        store.end(guest, tx, round % 3 != 0).unwrap();
    }
    store.ok(guest, RM, "a|");
}

// Fails if an operator cannot see at which path, and because of which connection, a transaction has
// failed, or if a transaction that failed by injection, or not at all, is among them.
#[test]
fn conflict_is_reported_with_path_and_cause() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.ok(guest, WRITE, "key|1");
    let shown = |store: &mut Store| store.ok(dom0, 0, "conflicts|");
    assert_eq!(shown(&mut store), "0 so far, the last first\n|");
    let tx = store.start(dom0);
    store.tx(dom0, tx, READ, "/local/domain/5/key|").unwrap();
    store.tx(dom0, tx, WRITE, "/z|1").unwrap();
    store.ok(dom0, WRITE, "/local/domain/5/other|1");
    store.ok(guest, WRITE, "key|2");
    store.ok(dom0, WRITE, "/q|1");
    assert_eq!(store.end(dom0, tx, true), Err("EAGAIN".into()));
    store.engine.inject_eagain(1);
    let tx = store.start(dom0);
    store.tx(dom0, tx, WRITE, "/z|1").unwrap();
    assert_eq!(store.end(dom0, tx, true), Err("EAGAIN".into()));
    let expected = "1 so far, the last first\n\
                    0 s ago conn 1 socket at /local/domain/5/key because of conn 2 domain 5\n|";
    assert_eq!(shown(&mut store), expected);
}

// Fails if a conflict is because of "unknown" when the one who caused it only overwrote a value, which
// gives no node a new number; or because of a change from before the transaction.
#[test]
fn overwriting_a_value_is_a_cause_too() {
    let mut store = Store::new();
    let (a, b, c) = (store.guest(5), store.guest(6), store.guest(7));
    let dom0 = store.dom0;
    for path in ["/n", "/m"] {
        store.ok(dom0, WRITE, &format!("{path}|0"));
        store.ok(dom0, PERMS, &format!("{path}|b0|"));
    }
    for (round, writes) in [[Some(c), Some(b)], [Some(c), None]].into_iter().enumerate() {
        store.ok(c, WRITE, &format!("/n|{round} before"));
        let tx = store.start(a);
        store.tx(a, tx, READ, "/n|").unwrap();
        for conn in writes.into_iter().flatten() {
            store.ok(conn, WRITE, &format!("/n|{round} by {conn}"));
        }
        store.tx(a, tx, WRITE, "/m|1").unwrap();
        assert_eq!(store.end(a, tx, true), Err("EAGAIN".into()));
        let shown = store.ok(dom0, 0, "conflicts|");
        let last = writes.into_iter().flatten().last().unwrap();
        let domid = if last == b { 6 } else { 7 };
        let cause = format!("at /n because of conn {last} domain {domid}");
        assert!(shown.lines().nth(1).unwrap().ends_with(&cause), "{shown}");
    }
}
