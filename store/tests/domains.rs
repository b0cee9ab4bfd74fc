//! Domains come and go: identity, clean-up, targets, special watches.

mod harness;
use harness::Store;
use xenstore_store::Config;

const READ: u32 = 2;
const WRITE: u32 = 11;
const PERMS: u32 = 14;

// Fails if a new domain with a recycled domid inherits nodes, rights, target or quota use of the
// dead one (XSA-322, XSA-417, XSA-419, XSA-483).
#[test]
fn xsa_322_nothing_is_inherited_from_a_dead_domain() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.guest(7);
    store.ok(dom0, 19, "7|5|");
    store.ok(guest, WRITE, "mine|1");
    store.ok(dom0, WRITE, "/shared|secret");
    store.ok(dom0, PERMS, "/shared|n0|r5|");
    store.kill(5);
    assert_eq!(store.err(dom0, READ, "/local/domain/5|"), "ENOENT", "its nodes are removed");
    assert_eq!(store.ok(dom0, 3, "/shared|"), "n0|", "its entries are removed");
    let guest = store.guest(5);
    assert_eq!(store.err(guest, READ, "/shared|"), "EACCES");
    let model = store.engine.connect(xenstore_store::Caller::Domain(xenstore_protocol::DomId(7)));
    store.ok(guest, WRITE, "mine|2");
    assert_eq!(store.err(model, READ, "/local/domain/5/mine|"), "EACCES", "target was cleared");
}

// Fails if an entry for a domain that does not exist becomes valid for a later one, or an owner
// that does not exist is accepted (XSA-417).
#[test]
fn xsa_417_entries_for_domains_that_do_not_exist_never_become_valid() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.ok(dom0, WRITE, "/a|1");
    store.ok(dom0, PERMS, "/a|n0|b9|");
    assert_eq!(store.err(dom0, PERMS, "/a|n9|"), "ENOENT");
    let guest = store.guest(9);
    assert_eq!(store.err(guest, READ, "/a|"), "EACCES");
    // Set for a domain that exists but is not introduced yet, it counts.
    store.create(10);
    store.ok(dom0, PERMS, "/a|n0|r10|");
    let guest = store.guest(10);
    assert_eq!(store.ok(guest, READ, "/a|"), "1");
}

// Fails if a receiver of @releaseDomain can still find nodes of the dead domain, or if the events
// of its removed nodes do not come first.
#[test]
fn release_fires_last() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.ok(guest, WRITE, "data/x|1");
    store.watch(dom0, "/local/domain/5|home|");
    store.watch(dom0, "@releaseDomain|bare|");
    store.watch(dom0, "@releaseDomain|each|1|");
    store.watch(dom0, "@releaseDomain/6|other|");
    store.kill(5);
    assert_eq!(
        store.events(dom0),
        ["/local/domain/5 home", "@releaseDomain bare", "@releaseDomain/5 each"]
    );
    assert_eq!(store.machine.released, [5]);
    assert_eq!(store.engine.pop_closed(), Some(guest));
}

// Fails if a shutdown fires more than once before RESUME, or if a later death does not fire.
#[test]
fn shutdown_fires_once_until_resume() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.guest(5);
    store.watch(dom0, "@releaseDomain|t|");
    store.machine.domains.get_mut(&5).unwrap().shutdown = true;
    for expected in [&["@releaseDomain t"][..], &[]] {
        store.engine.domains_changed(&mut store.machine);
        assert_eq!(store.events(dom0), expected);
    }
    store.ok(dom0, 18, "5|");
    store.engine.domains_changed(&mut store.machine);
    assert_eq!(store.events(dom0), ["@releaseDomain t"]);
    store.kill(5);
    assert_eq!(store.events(dom0), ["@releaseDomain t"]);
}

// Fails if INTRODUCE fires twice, keeps state of the connection, or ignores the machine's refusal.
#[test]
fn introducing_again_resets_the_connection() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let reader = store.engine.connect(xenstore_store::Caller::Socket);
    store.watch(reader, "@introduceDomain|t|");
    let guest = store.guest(5);
    assert_eq!(store.events(reader), ["@introduceDomain t"]);
    store.watch(guest, "x|t|");
    let tx = store.start(guest);
    store.ok(dom0, 8, "5|1|2|");
    assert_eq!(store.events(reader), Vec::<String>::new());
    assert_eq!(store.end(guest, tx, true), Err("ENOENT".into()));
    assert_eq!(store.err(guest, 5, "x|t|"), "ENOENT");
    store.create(6);
    store.machine.refuse_introduce = Some(xenstore_protocol::Errno::Einval);
    assert_eq!(store.err(dom0, 8, "6|1|1|"), "EINVAL");
    assert_eq!(store.ok(dom0, 17, "6|"), "F|");
    assert_eq!(store.events(reader), Vec::<String>::new());
}

// Fails if RELEASE reaches the store's own domain or answers for a domain it does not know, or a
// released domain leaves its neighbours damaged (XSA-425).
#[test]
fn xsa_425_release_is_for_introduced_domains_only() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    assert_eq!(store.err(dom0, 9, "0|"), "EINVAL");
    assert_eq!(store.err(dom0, 9, "5|"), "ENOENT");
    let (guest, neighbour) = (store.guest(5), store.guest(6));
    assert_eq!(store.err(guest, 9, "6|"), "EACCES");
    store.ok(dom0, 9, "5|");
    assert_eq!(store.ok(dom0, 17, "5|"), "F|");
    store.ok(neighbour, WRITE, "alive|1");
    assert_eq!(store.err(dom0, 18, "5|"), "ENOENT");
}

// Fails if a domain and the one that has it as target cannot die in any order (XSA-233).
#[test]
fn xsa_233_targets_may_die_in_any_order() {
    for order in [[5, 7], [7, 5]] {
        let mut store = Store::new();
        let dom0 = store.dom0;
        store.guest(5);
        let model = store.guest(7);
        assert_eq!(store.err(dom0, 19, "7|9|"), "ENOENT");
        store.ok(dom0, 19, "7|5|");
        store.ok(model, WRITE, "/local/domain/5/device|1");
        for domid in order {
            store.kill(domid);
        }
    }
}

// Fails if orphans are removed although they are to be kept, or stay with the dead domain.
#[test]
fn orphans_can_be_kept() {
    let mut store = Store::with(&Config { keep_orphans: true, ..Config::default() });
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.ok(guest, WRITE, "mine|1");
    store.kill(5);
    assert_eq!(store.ok(dom0, READ, "/local/domain/5/mine|"), "1");
    assert_eq!(store.ok(dom0, 3, "/local/domain/5/mine|"), "n0|");
}

// Fails if an entry for a dead domain stays below a node that was its own and stays, be it the root
// or an orphan: a later domain with its domid would have the right (XSA-322).
#[test]
fn xsa_322_no_entry_stays_below_what_stays() {
    for keep_orphans in [false, true] {
        let mut store = Store::with(&Config { keep_orphans, ..Config::default() });
        let dom0 = store.dom0;
        let guest = store.guest(5);
        store.ok(guest, WRITE, "mine/below|1");
        for (path, perms) in [("/", "n5|"), ("/tool", "n0|r5|"), ("/tool/xenstored", "b5|")] {
            store.ok(dom0, PERMS, &format!("{path}|{perms}"));
        }
        store.ok(dom0, PERMS, "/local/domain/5/mine|n0|b5|");
        store.kill(5);
        assert_eq!(store.ok(dom0, 3, "/|"), "n0|");
        assert_eq!(store.ok(dom0, 3, "/tool|"), "n0|");
        if keep_orphans {
            assert_eq!(store.ok(dom0, 3, "/tool/xenstored|"), "b0|");
            assert_eq!(store.ok(dom0, 3, "/local/domain/5/mine|"), "n0|");
            assert_eq!(store.ok(dom0, 3, "/local/domain/5/mine/below|"), "n0|");
        } else {
            assert_eq!(store.err(dom0, READ, "/tool/xenstored|"), "ENOENT");
            assert_eq!(store.err(dom0, READ, "/local/domain/5|"), "ENOENT");
        }
        store.engine.check().unwrap();
    }
}

// Fails if a domain that is introduced before the death of its predecessor was noticed inherits
// anything of it (XSA-322).
#[test]
fn xsa_322_a_successor_that_comes_early_inherits_nothing() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let guest = store.guest(5);
    store.ok(guest, WRITE, "mine|1");
    store.ok(dom0, WRITE, "/a|1");
    store.ok(dom0, PERMS, "/a|n0|r5|");
    store.create(5); // another one
    let guest = store.guest(5);
    assert_eq!(store.machine.released, [5]);
    assert_eq!(store.err(guest, READ, "mine|"), "ENOENT");
    assert_eq!(store.err(guest, READ, "/a|"), "EACCES");
}

// Fails if features can change under a guest's feet, or quotas and features are mixed up between
// domains.
#[test]
fn features_and_quotas_are_per_domain() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.create(5);
    assert_eq!(store.ok(dom0, 23, "5|"), "15|");
    assert_eq!(store.err(dom0, 24, "5|16|"), "EINVAL");
    assert_eq!(store.err(dom0, 24, "9|2|"), "ENOENT");
    store.ok(dom0, 24, "5|11|");
    let guest = store.guest(5);
    assert_eq!(store.err(dom0, 24, "5|15|"), "EBUSY");
    assert_eq!(store.ok(guest, 23, ""), "11|");
    assert_eq!(store.err(guest, 23, "5|"), "EACCES");
    assert_eq!(store.err(guest, 4, "x|t|1|"), "EINVAL", "no depth without the feature");
    store.ok(dom0, 26, "5|watches|1|");
    assert_eq!(store.ok(dom0, 25, "5|watches|"), "1|");
    assert_eq!(store.ok(dom0, 25, "watches|"), "128|");
    store.watch(guest, "x|t|");
    assert_eq!(store.err(guest, 4, "y|t|"), "ENOSPC");
    store.ok(dom0, 26, "watches|2|");
    assert_eq!(store.ok(dom0, 25, "5|watches|"), "1|", "later global changes do not reach it");
    assert_eq!(store.err(dom0, 25, "9|watches|"), "ENOENT");
}
