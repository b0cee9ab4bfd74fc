//! Every refusal is counted and named, and told once.

mod harness;

use harness::Store;
use xenstore_protocol::Quota;
use xenstore_store::Config;

const RM: u32 = 13;
const WATCH: u32 = 4;
const WRITE: u32 = 11;

fn notices(store: &mut Store) -> Vec<String> {
    std::iter::from_fn(|| store.engine.pop_warning()).collect()
}

// Fails if a refusal by any quota is not counted with domain, quota, limit, amount and path, is not
// logged, or is logged for each request, with which a guest could fill the log.
#[test]
fn refusals_are_counted_and_told_once() {
    let mut config = Config::default();
    for (quota, limit) in [
        (Quota::Nodes, 3),
        (Quota::Watches, 1),
        (Quota::Transactions, 1),
        (Quota::TransactionNodes, 2),
        (Quota::NodePermissions, 2),
        (Quota::NodeSize, 100),
        (Quota::PathMax, 30),
    ] {
        config.quotas.set(quota, limit);
    }
    let mut store = Store::with(&config);
    let guest = store.guest(5);
    let dom0 = store.dom0;
    assert_eq!(store.ok(dom0, 0, "refusals|"), "|");
    for _ in 0..3 {
        store.err(guest, WRITE, "a/b/c|");
        store.err(guest, WRITE, &format!("a|{}", "x".repeat(100)));
        store.err(guest, 2, &format!("{}|", "x".repeat(31)));
        store.err(guest, 14, "/local/domain/5|n5|r1|r2|");
        store.call(guest, WATCH, "a|1|").ok();
        store.err(guest, WATCH, "a|2|");
    }
    let tx = store.start(guest);
    store.err(guest, 6, "|");
    for _ in 0..3 {
        let _ = store.tx(guest, tx, 2, "a|");
    }
    store.ok(dom0, 26, "5|memory|100|");
    store.err(guest, WRITE, &format!("a|{}", "x".repeat(70)));
    let shown = "domain 5 nodes count 3 limit 3 wanted 4 at /local/domain/5/a/b/c\n\
                 domain 5 watches count 3 limit 1 wanted 2\n\
                 domain 5 memory count 1 limit 100 wanted ";
    let text = store.ok(dom0, 0, "refusals|");
    assert!(text.starts_with(shown), "{text}");
    let long = "x".repeat(31);
    let rest = format!(
        "\ndomain 5 transactions count 1 limit 1 wanted 2\n\
                domain 5 transaction-nodes count 1 limit 2 wanted 3\n\
                domain 5 node-permissions count 3 limit 2 wanted 3 at /local/domain/5\n\
                domain 5 path-max count 3 limit 30 wanted 31 at /local/domain/5/{long}\n\
                domain 5 node-size count 3 limit 100 wanted "
    );
    assert!(text.contains(&rest), "{text}");
    assert!(text.ends_with(" at /local/domain/5/a\n|"), "{text}");
    let told = notices(&mut store);
    assert_eq!(told.len(), 8, "{told:#?}");
    let first =
        "domain 5 has reached its quota nodes: limit 3, wanted 4 at /local/domain/5/a/b/c; ";
    assert!(told[0].starts_with(first), "{}", told[0]);
    // After a reset it is logged again.
    store.ok(dom0, 0, "refusals|-r|");
    assert_eq!(store.ok(dom0, 0, "refusals|"), "|");
    store.err(guest, WATCH, "a|2|");
    assert_eq!(notices(&mut store).len(), 1);
    // A later domain with this domid starts with none.
    store.kill(5);
    assert_eq!(store.ok(dom0, 0, "refusals|"), "|");
}

// Fails if dom0 is refused anything, or its failures are counted as refusals of a quota.
#[test]
fn nothing_is_refused_to_dom0() {
    let mut store = Store::with_quota(Quota::Nodes, 1);
    let dom0 = store.dom0;
    (0..100).for_each(|i| drop(store.ok(dom0, WRITE, &format!("/n/{i}|"))));
    store.err(dom0, 2, "/nothing|");
    assert_eq!(store.ok(dom0, 0, "refusals|"), "|");
}

// Fails if a domain that exceeds its soft quota is not logged, is logged with each request, or can fill
// the log by crossing the quota repeatedly.
#[test]
fn soft_memory_is_logged_when_it_is_exceeded() {
    let mut store = Store::with_quota(Quota::SoftMemory, 4000);
    let guest = store.guest(5);
    let value = "x".repeat(1900);
    store.ok(guest, WRITE, &format!("a|{value}"));
    assert!(notices(&mut store).is_empty());
    for _ in 0..10 {
        store.ok(guest, WRITE, &format!("b|{value}"));
        store.ok(guest, WRITE, &format!("c|{value}"));
        store.ok(guest, RM, "b|");
        store.ok(guest, RM, "c|");
    }
    let told = notices(&mut store);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("domain 5 has more than its quota soft-memory: "), "{told:?}");
    assert!(told[0].ends_with(" of 4000"), "{told:?}");
    store.now += 10_000;
    store.ok(guest, WRITE, &format!("b|{value}"));
    store.ok(guest, WRITE, &format!("c|{value}"));
    assert_eq!(notices(&mut store).len(), 1, "told again after a while");
}

// Fails if lowering a quota below what a domain has takes something away, lets it have more, or
// keeps it from giving back.
#[test]
fn a_quota_can_be_lowered_below_what_is_there() {
    let mut store = Store::new();
    let guest = store.guest(5);
    (0..10).for_each(|i| drop(store.ok(guest, WRITE, &format!("n{i}|x"))));
    (0..3).for_each(|i| store.watch(guest, &format!("n{i}|t|")));
    for quota in ["nodes|5", "watches|1", "memory|100"] {
        store.ok(store.dom0, 26, &format!("5|{quota}|"));
    }
    assert_eq!(store.ok(guest, 2, "n9|"), "x");
    assert_eq!(store.err(guest, WRITE, "n10|"), "ENOSPC");
    assert_eq!(store.err(guest, WATCH, "n4|t|"), "ENOSPC");
    assert_eq!(store.ok(guest, WRITE, "n1|y"), "OK|", "not more than before");
    assert_eq!(store.err(guest, WRITE, "n1|longer"), "ENOSPC");
    // What happens is still told.
    store.ok(store.dom0, WRITE, "/local/domain/5/n1|by dom0");
    assert!(!store.events(guest).is_empty());
    store.ok(guest, RM, "n9|");
    store.ok(guest, 5, "n0|t|");
    store.ok(store.dom0, 26, "5|memory|100000|");
    // The home of the guest is one of its nodes.
    (1..7).for_each(|i| drop(store.ok(guest, RM, &format!("n{i}|"))));
    assert_eq!(store.ok(guest, WRITE, "again|"), "OK|");
    assert_eq!(store.err(guest, WRITE, "more|"), "ENOSPC");
}
