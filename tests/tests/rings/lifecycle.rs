//! Domains that are introduced, introduced again, reconnected, offered features, shut down,
//! destroyed, or older than the daemon.

use std::fs;

use xenstore_tests::fake_guest::{FakeGuest, PORT, set_state, word};
use xenstore_tests::peers::{Daemon, Kind, Quotas};
use xenstore_tests::raw::{Conn, frame, op};

use crate::leaks::Resources;
use crate::{Host, on};

/// When a domain is introduced again, oxenstored 4.17 preserves its transactions and watches, and
/// its port.
const LIKE_C: [Kind; 2] = [Kind::Ours, Kind::C];

// Fails if a domain that is introduced with another port is served only at the old one, or if its
// transactions and watches survive.
#[test]
fn introducing_again_changes_the_port() {
    on(&LIKE_C, "another port", |host| {
        let (_, mut conn) = host.guest(5);
        conn.watch("x|t|").unwrap();
        let mut moved = host.fake(5);
        moved.use_port(2);
        host.introduce(5, 2);
        let mut moved = Conn::new(moved);
        moved.gives(op::READ, "/local/domain/5|", "").unwrap();
        moved.fails(op::UNWATCH, "x|t|", "ENOENT").unwrap();
    });
}

// Fails if a released domain cannot be introduced again, or finds anything from before.
#[test]
fn released_domain_can_be_introduced_again() {
    on(&LIKE_C, "release and introduce", |host| {
        let (_, mut conn) = host.guest(5);
        conn.watch("x|t|").unwrap();
        let tx = conn.begin().unwrap();
        host.dom0.gives(op::RELEASE, "5|", "OK|").unwrap();
        host.dom0.gives(op::IS_DOMAIN_INTRODUCED, "5|", "F|").unwrap();
        host.introduce(5, PORT);
        let mut again = Conn::new(host.fake(5));
        again.end(tx, "T|", "ENOENT").unwrap();
        again.fails(op::UNWATCH, "x|t|", "ENOENT").unwrap();
        again.events(&[]).unwrap();
    });
}

// Fails if a domain that is released before its ring is served, and introduced again, is served
// twice: both tasks would write replies into the same page.
#[test]
fn domain_released_before_its_ring_is_served_has_one_task() {
    on(&LIKE_C, "release and introduce at once", |host| {
        let mut conn = Conn::new(host.fake(5));
        let before = Resources::by(host);
        let introduce = frame(op::INTRODUCE, 1, 0, format!("5\x001\x00{PORT}\0").as_bytes());
        let release = frame(op::RELEASE, 2, 0, b"5\0");
        host.dom0
            .send(&[&introduce[..], &release, &introduce, &release, &introduce].concat())
            .unwrap();
        for ty in [op::INTRODUCE, op::RELEASE, op::INTRODUCE, op::RELEASE, op::INTRODUCE] {
            assert_eq!(host.dom0.reply().unwrap().ty, ty);
        }
        for domid in 0..50 {
            let path = format!("/local/domain/{domid}|");
            conn.gives(op::GET_DOMAIN_PATH, &format!("{domid}|"), &path).unwrap();
            conn.watch(&format!("x|t{domid}|")).unwrap();
        }
        let after = Resources::by(host);
        assert_eq!((after.ports, after.pages), (before.ports + 1, before.pages + 2));
    });
}

// Fails if a guest that requests a reconnection does not get one, or gets anything of the old
// connection: half a request, a watch, a transaction. Its nodes remain.
#[test]
fn reconnection_resets_the_connection() {
    let mut host = Host::ours();
    let (mut fake, mut conn) = host.guest(5);
    conn.ok(op::WRITE, "mine|1").unwrap();
    conn.watch("mine|t|").unwrap();
    let tx = conn.begin().unwrap();
    conn.gives_in(tx, op::WRITE, "mine|2", "OK|").unwrap();
    conn.send(&[op::READ, 1, 0, 900].map(u32::to_le_bytes).concat()).unwrap();
    host.assert_others_served();
    fake.reconnect().unwrap();
    let indices = [word::REQ_CONS, word::REQ_PROD, word::RSP_CONS, word::RSP_PROD];
    assert_eq!(indices.map(|at| fake.get(at).unwrap()), [0; 4]);
    conn.gives(op::READ, "mine|", "1").unwrap();
    conn.fails(op::UNWATCH, "mine|t|", "ENOENT").unwrap();
    conn.end(tx, "T|", "ENOENT").unwrap();
    host.dom0.ok(op::WRITE, "/local/domain/5/mine|3").unwrap();
    conn.events(&[]).unwrap();
    host.assert_sound();
}

// Fails if the features in a guest's page differ from those offered, or if the error field is set
// without being offered.
#[test]
fn features_in_the_page_are_those_offered() {
    let mut host = Host::ours();
    for (domid, features) in [(5, None), (6, Some(0)), (7, Some(13)), (8, Some(3))] {
        let mut fake = host.fake(domid);
        // Previous contents of the page.
        fake.put(word::SERVER_FEATURES, 0xffff_ffff).unwrap();
        if let Some(features) = features {
            let payload = format!("{domid}|{features}|");
            host.dom0.gives(op::SET_FEATURE, &payload, "OK|").unwrap();
        }
        host.introduce(domid, PORT);
        let features = features.unwrap_or(15);
        assert_eq!(fake.get(word::SERVER_FEATURES).unwrap(), features);
        fake.put(word::REQ_PROD, 5000).unwrap();
        fake.kick().unwrap();
        match features & 2 {
            0 => host.assert_others_served(),
            _ => fake.await_word(word::ERROR, 2).unwrap(),
        }
        assert_eq!(fake.get(word::ERROR).unwrap(), features & 2);
    }
    host.assert_others_served();
}

// Fails if a violation of the protocol is reported as anything but error 3, or as the death of the
// domain (XSA-325).
#[test]
fn violation_is_not_reported_as_a_death() {
    let mut host = Host::ours();
    let (mut fake, mut conn) = host.guest(5);
    host.dom0.watch("@releaseDomain|t|").unwrap();
    conn.send(&[op::READ, 1, 0, 5000].map(u32::to_le_bytes).concat()).unwrap();
    fake.await_word(word::ERROR, 3).unwrap();
    host.dom0.events(&[]).unwrap();
    host.dom0.gives(op::IS_DOMAIN_INTRODUCED, "5|", "T|").unwrap();
    set_state(&host.daemon.xen(), 5, "gone").unwrap();
    host.dom0.event("@releaseDomain|t|").unwrap();
    host.assert_others_served();
}

// Fails if a guest can fill the log by repeated violations of the protocol.
#[test]
fn violations_do_not_fill_the_log() {
    let mut host = Host::ours();
    let (mut fake, mut conn) = host.guest(5);
    for _ in 0..50 {
        conn.send(&[op::READ, 1, 0, 5000].map(u32::to_le_bytes).concat()).unwrap();
        fake.await_word(word::ERROR, 3).unwrap();
        fake.reconnect().unwrap();
    }
    conn.ok(op::WRITE, "alive|1").unwrap();
    let log = host.daemon.log();
    assert_eq!(log.matches("protocol error").count(), 1, "{log}");
}

// Fails if an operator cannot see which guest is not served because of its ring indices: in the
// log, once, and in CONTROL `connections` until it has reconnected.
#[test]
fn ring_with_invalid_indices_is_shown_to_the_operator() {
    let mut host = Host::ours();
    let (mut fake, mut conn) = host.guest(5);
    const REASON: &str = "the indices of its ring make no sense";
    for _ in 0..3 {
        fake.put(word::REQ_PROD, 5000).unwrap();
        fake.kick().unwrap();
        fake.await_word(word::ERROR, 2).unwrap();
        let shown = host.dom0.ok(op::CONTROL, "connections|").unwrap();
        assert!(format!("{shown:?}").contains(REASON), "{shown:?}");
        fake.reconnect().unwrap();
        conn.ok(op::WRITE, "alive|1").unwrap();
        let shown = host.dom0.ok(op::CONTROL, "connections|").unwrap();
        assert!(!format!("{shown:?}").contains("failed"), "{shown:?}");
    }
    let log = host.daemon.log();
    assert_eq!(log.matches(REASON).count(), 1, "{log}");
}

// Fails if a shutdown is reported twice or as a death, a death after a shutdown is not reported, a
// watch with a depth or a domid gets too many or too few events, or a dead domain leaves nodes or
// permission entries.
#[test]
fn shutdown_and_death_are_reported_once_each() {
    let mut host = Host::ours();
    let (_, mut conn) = host.guest(5);
    host.guest(6);
    conn.ok(op::WRITE, "mine|1").unwrap();
    host.dom0.ok(op::WRITE, "/shared|1").unwrap();
    host.dom0.ok(op::SET_PERMS, "/shared|n0|r5|r6|").unwrap();
    host.dom0.watch("@releaseDomain|bare|").unwrap();
    host.dom0.watch("@releaseDomain/5|five|").unwrap();
    host.dom0.watch("@releaseDomain/6|six|").unwrap();
    host.dom0.gives(op::WATCH, "@releaseDomain|deep|1|", "OK|").unwrap();
    host.dom0.event("@releaseDomain|deep|").unwrap();
    let told = ["@releaseDomain|bare|", "@releaseDomain/5|five|", "@releaseDomain/5|deep|"];
    let xen = host.daemon.xen();
    for state in ["shutdown", "shutdown", "gone", "gone"] {
        let fresh = fs::read_to_string(xen.join("5/state")).map_or(true, |old| old != state);
        set_state(&xen, 5, state).unwrap();
        if fresh {
            for _ in 0..3 {
                let got = match host.dom0.events.pop_front() {
                    Some(event) => event,
                    None => {
                        let event = host.dom0.message(xenstore_tests::raw::PATIENCE);
                        xenstore_tests::raw::text(&event.unwrap().unwrap().payload)
                    }
                };
                assert!(told.contains(&got.as_str()), "{got}");
            }
        }
        // The guest's request comes after the event for the domain, and dom0's messages are in
        // order.
        host.assert_others_served();
        host.dom0.events(&[]).unwrap();
        let alive = if state == "gone" { "F|" } else { "T|" };
        host.dom0.gives(op::IS_DOMAIN_INTRODUCED, "5|", alive).unwrap();
    }
    host.dom0.fails(op::READ, "/local/domain/5|", "ENOENT").unwrap();
    host.dom0.gives(op::GET_PERMS, "/shared|", "n0|r6|").unwrap();
    host.assert_sound();
}

// Fails if a domain that was built before the daemon ran is not introduced at its start, or if one
// without a port is.
#[test]
fn waiting_domains_are_introduced_at_the_start() {
    let prepare = |xen: &std::path::Path| {
        for (domid, port) in [(5, PORT), (6, 0)] {
            let fake = FakeGuest::create(xen, domid)?;
            fake.put(word::EVTCHN_PORT, port)?;
            fake.put(word::CONNECTION, 1)?;
        }
        Ok(())
    };
    let daemon = Daemon::start_in(Kind::Ours, Quotas::Default, &[], prepare).unwrap();
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    dom0.gives(op::IS_DOMAIN_INTRODUCED, "5|", "T|").unwrap();
    dom0.gives(op::IS_DOMAIN_INTRODUCED, "6|", "F|").unwrap();
    let mut fake = FakeGuest::create(&daemon.xen(), 5).unwrap();
    fake.await_word(word::CONNECTION, 0).unwrap();
    assert_eq!(fake.get(word::SERVER_FEATURES).unwrap(), 15);
    Conn::new(fake).gives(op::GET_DOMAIN_PATH, "5|", "/local/domain/5|").unwrap();
    // As a toolstack does later.
    dom0.gives(op::INTRODUCE, &format!("5|1|{PORT}|"), "OK|").unwrap();
    let again = FakeGuest::create(&daemon.xen(), 5).unwrap();
    Conn::new(again).gives(op::GET_DOMAIN_PATH, "5|", "/local/domain/5|").unwrap();
}
