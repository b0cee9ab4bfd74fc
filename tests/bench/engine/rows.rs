//! The rows of the report.

use xenstore_tests::raw::op;

use crate::store::{Store, vm_start};
use crate::{measure, once, show};

type Row = fn(&str);

pub(crate) const ROWS: &[(&str, Row)] = &[
    ("READ", read),
    ("WRITE", write),
    ("fresh node, filling up to 100,000", fill),
    ("empty transaction", empty_transaction),
    ("VM start", start_vms),
    ("transaction with writes", transactions),
    ("transactions of guests", transactions_of_guests),
    ("transaction with 100 READs, 10 DIRECTORYs, 1 write, beside a WRITE", mostly_reading),
    ("create a child", create_child),
    ("remove a node with children", remove_children),
    ("DIRECTORY", directory),
    ("WRITE beside watches that do not match", unmatched_watches),
    ("WRITE that fires watches", fire_watches),
    ("introduce and release", introduce),
    ("death of a domain", death),
    ("10,000 domains", many_domains),
    ("state of 120,000 nodes and 1,000 domains", crate::state::state),
];

fn read(name: &str) {
    let mut store = Store::with_nodes(10_000);
    let dom0 = store.dom0;
    let time = measure(100_000, |_| store.ok(dom0, op::READ, 0, b"/n/5/key-5\0"));
    show(name, time);
}

fn write(name: &str) {
    let mut store = Store::with_nodes(10_000);
    let dom0 = store.dom0;
    let time = measure(100_000, |_| store.ok(dom0, op::WRITE, 0, b"/n/5/key-5\0value-77"));
    show(name, time);
    let tx = store.start(dom0);
    let time = measure(100_000, |_| store.ok(dom0, op::WRITE, 0, b"/n/5/key-5\0value-77"));
    show("WRITE while a transaction is open", time);
    store.commit(dom0, tx);
}

fn fill(name: &str) {
    let time = (0..3).map(|_| once(|| drop(Store::with_nodes(100_000))) / 1e5);
    show(name, time.fold(f64::MAX, f64::min));
}

fn empty_transaction(name: &str) {
    for nodes in [1_000, 1_000_000] {
        let mut store = Store::with_nodes(nodes);
        let dom0 = store.dom0;
        let time = measure(20_000, |_| {
            let tx = store.start(dom0);
            assert!(!store.commit(dom0, tx));
        });
        show(&format!("{name}, {nodes} nodes"), time);
    }
}

fn start_vms(name: &str) {
    let mut store = Store::with_nodes(10_000);
    let dom0 = store.dom0;
    let scripts: Vec<_> = (1..=64).map(vm_start).collect();
    let time = measure(400, |i| {
        let tx = store.start(dom0);
        for (ty, payload) in &scripts[i % 64] {
            store.call(dom0, *ty, tx, payload);
        }
        assert!(!store.commit(dom0, tx));
    });
    show(&format!("{name}, {} requests, 1 client", scripts[0].len()), time);
    let clients: Vec<_> =
        (0..64).map(|_| store.engine.connect(xenstore_store::Caller::Socket)).collect();
    let mut refused = 0;
    let mut commits = 0;
    // All 64 are open at the same time, and take turns request by request.
    let time = measure(20, |_| {
        let open: Vec<u32> = clients.iter().map(|client| store.start(*client)).collect();
        for step in 0..40 {
            for ((client, tx), script) in clients.iter().zip(&open).zip(&scripts) {
                let (ty, payload) = &script[step];
                store.call(*client, *ty, *tx, payload);
            }
        }
        for (client, tx) in clients.iter().zip(open) {
            refused += usize::from(store.commit(*client, tx));
            commits += 1;
        }
    });
    let name = format!("{name}, each of 64 at once ({refused} of {commits} refused)");
    show(&name, time / 64.0);
}

fn transactions(name: &str) {
    for (writes, nodes) in [(1, 1_000), (1, 1_000_000), (10, 10_000), (10, 100_000)] {
        let mut store = Store::with_nodes(nodes);
        let dom0 = store.dom0;
        let keys: Vec<String> = (0..writes).map(|i| format!("/n/{}/key-5\0x", i % 9)).collect();
        for others in [false, true] {
            let time = measure(5_000, |_| {
                let tx = store.start(dom0);
                for key in &keys {
                    store.ok(dom0, op::WRITE, tx, key.as_bytes());
                }
                if others {
                    store.ok(dom0, op::WRITE, 0, b"/n/0/key-9\0x");
                }
                assert!(!store.commit(dom0, tx));
            });
            let beside = if others { ", beside a WRITE" } else { "" };
            show(&format!("{name}: {writes}, {nodes} nodes{beside}"), time);
        }
    }
}

fn transactions_of_guests(name: &str) {
    let mut store = Store::with_nodes(1_000);
    let guests: Vec<_> = (1..=128)
        .map(|domid| {
            store.introduce(domid);
            store.connect(domid)
        })
        .collect();
    // All 128 are open at the same time, and take turns request by request.
    let time = measure(50, |_| {
        let open: Vec<u32> = guests.iter().map(|guest| store.start(*guest)).collect();
        for key in 0..3 {
            for (guest, tx) in guests.iter().zip(&open) {
                store.ok(*guest, op::WRITE, *tx, format!("data/{key}\0some text").as_bytes());
            }
        }
        for (guest, tx) in guests.iter().zip(open) {
            assert!(!store.commit(*guest, tx));
        }
    });
    show(&format!("{name}: 3 WRITEs, each of 128 at once"), time / 128.0);
}

fn mostly_reading(name: &str) {
    let mut store = Store::with_nodes(10_000);
    let dom0 = store.dom0;
    let keys: Vec<String> = (0..100).map(|i| format!("/n/{i}/key-5\0")).collect();
    let time = measure(1_000, |_| {
        let tx = store.start(dom0);
        keys.iter().for_each(|key| store.ok(dom0, op::READ, tx, key.as_bytes()));
        (0..10).for_each(|i| store.ok(dom0, op::DIRECTORY, tx, format!("/n/{i}\0").as_bytes()));
        store.ok(dom0, op::WRITE, tx, b"/n/5/key-5\0x");
        store.ok(dom0, op::WRITE, 0, b"/n/0/key-9\0x");
        assert!(!store.commit(dom0, tx));
    });
    show(name, time);
}

fn create_child(name: &str) {
    for others in [0_usize, 16_000, 1_000_000] {
        let mut store = Store::new();
        let dom0 = store.dom0;
        store.ok(dom0, op::MKDIR, 0, b"/p\0");
        for i in 0..others {
            // In an order that is none, as with names that carry a random part.
            let key = format!("/p/c{}\0", (i * 7_919) % 1_000_003);
            store.ok(dom0, op::WRITE, 0, key.as_bytes());
        }
        let time = measure(10_000, |i| {
            let key = format!("/p/x{}\0", (i * 7_919) % 10_007);
            store.ok(dom0, op::WRITE, 0, key.as_bytes());
            store.ok(dom0, op::RM, 0, key.as_bytes());
        });
        show(&format!("{name}, and remove it, beside {others}"), time);
    }
}

fn remove_children(name: &str) {
    for count in [1_000_usize, 16_000] {
        let mut best = f64::MAX;
        for _ in 0..3 {
            let mut store = Store::new();
            let dom0 = store.dom0;
            (0..count).for_each(|i| store.ok(dom0, op::WRITE, 0, format!("/p/c{i}\0").as_bytes()));
            best = best.min(once(|| store.ok(dom0, op::RM, 0, b"/p\0")));
        }
        show(&format!("{name}, {count} of them"), best);
    }
}

fn directory(name: &str) {
    for count in [10_usize, 100, 1_000, 10_000, 100_000] {
        let mut store = Store::new();
        let dom0 = store.dom0;
        (0..count).for_each(|i| store.ok(dom0, op::WRITE, 0, format!("/p/c{i}\0").as_bytes()));
        if count <= 100 {
            let time = measure(10_000, |_| store.ok(dom0, op::DIRECTORY, 0, b"/p\0"));
            show(&format!("{name} of {count} children"), time);
            continue;
        }
        let mut pages = 0;
        let time = measure(3, |_| {
            let mut offset = 0;
            pages = 0;
            loop {
                let payload = format!("/p\0{offset}\0");
                store.ok(dom0, op::DIRECTORY_PART, 0, payload.as_bytes());
                pages += 1;
                let names = store.payload();
                let start = names.iter().position(|b| *b == 0).expect("a generation") + 1;
                if names.ends_with(b"\0\0") || names.len() == start + 1 {
                    break;
                }
                offset += names.len() - start;
            }
        });
        show(&format!("{name}_PART, all {pages} pages of {count} children"), time);
    }
}

fn unmatched_watches(name: &str) {
    for count in [0_usize, 10_000, 100_000] {
        let mut store = Store::with_nodes(1_000);
        let dom0 = store.dom0;
        let watchers: Vec<_> =
            (0..100).map(|_| store.engine.connect(xenstore_store::Caller::Socket)).collect();
        for i in 0..count {
            let payload = format!("/w/{}/{i}\0token\0", i / 100);
            store.ok(watchers[i % 100], op::WATCH, 0, payload.as_bytes());
        }
        let time = measure(100_000, |_| store.ok(dom0, op::WRITE, 0, b"/n/5/key-5\0value-77"));
        show(&format!("{name}: {count}"), time);
    }
}

fn fire_watches(name: &str) {
    let mut store = Store::with_nodes(1_000);
    let dom0 = store.dom0;
    let watchers: Vec<_> =
        (0..100).map(|_| store.engine.connect(xenstore_store::Caller::Socket)).collect();
    for i in 0..1_000 {
        let payload = format!("/n/5\0token-{i}\0");
        store.ok(watchers[i % 100], op::WATCH, 0, payload.as_bytes());
    }
    let time = measure(1_000, |_| {
        store.ok(dom0, op::WRITE, 0, b"/n/5/key-5\0value-77");
        for watcher in &watchers {
            assert!(store.events(*watcher) > 0);
        }
    });
    show(&format!("{name}: 1,000 on 100 connections, and fetching the events"), time);
    let time = measure(1_000, |_| store.ok(dom0, op::WRITE, 0, b"/n/5/key-5\0value-77"));
    show(&format!("{name}: the same, events waiting already"), time);
}

fn introduce(name: &str) {
    let mut store = Store::with_nodes(10_000);
    let dom0 = store.dom0;
    let mut times = [f64::MAX; 2];
    for _ in 0..3 {
        let time = once(|| (1..=1000).for_each(|domid| store.introduce(domid)));
        times[0] = times[0].min(time / 1e3);
        let time = once(|| {
            for domid in 1..=1000 {
                store.ok(dom0, op::RELEASE, 0, format!("{domid}\0").as_bytes());
            }
        });
        times[1] = times[1].min(time / 1e3);
        store.ok(dom0, op::RM, 0, b"/local\0");
    }
    show(&format!("{name}: introduce, with a home, each of 1,000"), times[0]);
    show(&format!("{name}: release, each of 1,000"), times[1]);
}

fn death(name: &str) {
    for nodes in [1_000, 100_000, 1_000_000] {
        let mut store = Store::with_nodes(nodes);
        let dom0 = store.dom0;
        let mut best = f64::MAX;
        for _ in 0..5 {
            store.introduce(7);
            let guest = store.connect(7);
            for i in 0..100 {
                let payload = format!("data/{i}\0value");
                store.ok(guest, op::WRITE, 0, payload.as_bytes());
            }
            store.ok(dom0, op::SET_PERMS, 0, b"/n/3\0n0\0r7\0");
            best = best.min(once(|| store.ok(dom0, op::RELEASE, 0, b"7\0")));
        }
        show(&format!("{name} with 100 nodes in a store of {nodes}"), best);
    }
}

fn many_domains(name: &str) {
    let mut store = Store::new();
    let dom0 = store.dom0;
    let create = |store: &mut Store, domid: usize| {
        store.introduce(domid);
        let guest = store.connect(domid);
        for i in 0..100 {
            let payload = format!("data/{i}\0value");
            store.ok(guest, op::WRITE, 0, payload.as_bytes());
        }
        for i in 0..10 {
            store.ok(guest, op::WATCH, 0, format!("data/{i}\0token\0").as_bytes());
        }
    };
    for (from, to) in [(1, 1_001), (1_001, 9_001), (9_001, 10_001)] {
        let time = once(|| (from..to).for_each(|domid| create(&mut store, domid)));
        let title = format!("{name}: create, each of {from} to {}", to - 1);
        show(&title, time / (to - from) as f64);
    }
    for (from, to) in [(1, 1_001), (1_001, 9_001), (9_001, 10_001)] {
        let time = once(|| {
            for domid in from..to {
                store.ok(dom0, op::RELEASE, 0, format!("{domid}\0").as_bytes());
                while store.engine.pop_closed().is_some() {}
            }
        });
        let title = format!("{name}: destroy, each of {from} to {}", to - 1);
        show(&title, time / (to - from) as f64);
    }
    store.engine.check().expect("sound");
}
