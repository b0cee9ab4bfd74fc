//! States: what survives being written and read, what other daemons write, what is refused.

mod harness;
use std::collections::BTreeMap;

use harness::Store;
use xenstore_protocol::stream::{Reader, Writer, kind};
use xenstore_protocol::{DomId, Quota};
use xenstore_store::{CFormat, Caller, Config, Engine, State};

const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 11;
const RM: u32 = 13;
const SET_PERMS: u32 = 14;
const DIRECTORY_PART: u32 = 22;

/// Replaces the store by the one that is restored from its state.
fn renew(store: &mut Store) {
    let state = State::decode(&store.engine.dump().encode()).unwrap();
    let (engine, _) = Engine::restore(&Config::default(), &state).unwrap();
    store.engine = engine;
    store.engine.check().unwrap();
}

fn restored(bytes: &[u8]) -> Result<Engine, String> {
    let state = State::decode(bytes).map_err(|error| error.to_string())?;
    let (engine, _) = Engine::restore(&Config::default(), &state).map_err(|error| error.0)?;
    engine.check().unwrap();
    Ok(engine)
}

// Fails if an open transaction does not go on: what it has seen and done, its conflicts, and the
// generation of a list of which the first part has been fetched.
#[test]
fn open_transactions_go_on() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.ok(guest, WRITE, "a|1");
    let [good, bad] = [(); 2].map(|()| store.start(guest));
    for tx in [good, bad] {
        store.tx(guest, tx, READ, "a|").unwrap();
        store.tx(guest, tx, WRITE, "a|2").unwrap();
        store.tx(guest, tx, READ, "a|").unwrap();
        store.tx(guest, tx, WRITE, &format!("new/{tx}|")).unwrap();
        store.tx(guest, tx, DIRECTORY, "new|").unwrap();
        store.tx(guest, tx, WRITE, &format!("new/{tx}/more|x")).unwrap();
    }
    store.ok(store.dom0, WRITE, "/elsewhere|1");
    let part = store.tx(guest, good, DIRECTORY_PART, "new|0|").unwrap();
    renew(&mut store);
    assert_eq!(store.tx(guest, good, DIRECTORY_PART, "new|0|").unwrap(), part);
    assert_eq!(store.tx(guest, good, READ, "a|").unwrap(), "2");
    assert_eq!(store.ok(guest, READ, "a|"), "1", "not committed yet");
    assert_eq!(store.end(guest, good, true).unwrap(), "OK|");
    renew(&mut store);
    assert_eq!(store.end(guest, bad, true).unwrap_err(), "EAGAIN");
    assert_eq!(store.ok(guest, DIRECTORY, "new|"), format!("{good}|"));
    assert_eq!(store.start(guest), bad + 1, "numbers are not used twice");
}

// Fails if a state that is written as what has changed since another is not that state: nodes that
// came, went, came again and have other permissions, special ones, and what a transaction has made
// that was open meanwhile, with numbers from before.
#[test]
fn what_has_changed_since_is_the_rest() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.watch(guest, "a|token|");
    for path in ["/a/b/c", "/a/b/d", "/gone/x", "/again"] {
        store.ok(store.dom0, WRITE, &format!("{path}|1"));
    }
    let [open, done] = [(); 2].map(|()| store.start(store.dom0));
    for tx in [open, done] {
        store.tx(store.dom0, tx, WRITE, &format!("/made/{tx}|1")).unwrap();
    }
    store.tx(store.dom0, open, READ, "/a/b/c|").unwrap();
    let (before, mut bytes) = (store.engine.dump(), Vec::new());
    before.encode_to(&mut |piece| bytes.extend_from_slice(piece));
    let base = before.into_base();
    let both = |store: &Store| {
        let (state, mut bytes) = (store.engine.dump(), bytes.clone());
        state.encode_since(&base, &mut |piece| bytes.extend_from_slice(piece));
        let read = State::decode(&bytes).unwrap();
        assert!(read.encode() == state.encode());
        bytes
    };
    both(&store);
    assert_eq!(store.end(store.dom0, done, true).unwrap(), "OK|");
    both(&store);
    for path in ["/gone", "/again"] {
        store.ok(store.dom0, RM, &format!("{path}|"));
    }
    for (op, text) in [
        (WRITE, "/a/b/c|2"),
        (WRITE, "/a/new/below|"),
        (WRITE, "/again|2"),
        (WRITE, "/local/domain/5/a/x|"),
        (SET_PERMS, "/a/b/d|n5|r6|"),
        (SET_PERMS, "@releaseDomain|n5|"),
    ] {
        store.ok(store.dom0, op, text);
    }
    store.guest(7);
    let bytes = both(&store);
    store.engine = restored(&bytes).unwrap();
    assert_eq!(store.events(guest), ["a/x token"]);
    assert_eq!(store.ok(store.dom0, DIRECTORY, "/|"), "tool|local|a|made|again|");
    assert_eq!(store.tx(store.dom0, open, READ, &format!("/made/{open}|")).unwrap(), "1");
    assert_eq!(store.end(store.dom0, open, true).unwrap_err(), "EAGAIN");
}

// Fails if a second stream is taken that cannot follow the first.
#[test]
fn only_what_follows_is_taken_for_what_has_changed() {
    let mut store = Store::new();
    let early = store.engine.dump();
    store.ok(store.dom0, WRITE, "/a|1");
    let (state, whole) = (store.engine.dump(), store.engine.dump().encode());
    let base = state.into_base();
    store.ok(store.dom0, WRITE, "/b|1");
    store.ok(store.dom0, WRITE, "/a|2");
    let since = |state: &State| {
        let mut bytes = Vec::new();
        state.encode_since(&base, &mut |piece| bytes.extend_from_slice(piece));
        bytes
    };
    let later = since(&store.engine.dump());
    let decode =
        |parts: &[&[u8]]| State::decode(&parts.concat()).map_err(|error| error.to_string());
    let both = decode(&[&whole, &later]).unwrap();
    assert!(both == store.engine.dump());
    for len in 1..later.len() {
        assert!(decode(&[&whole, &later[..len]]).is_err(), "{len} bytes");
    }
    for (what, parts) in [
        ("no root", &[&later[..], &later][..]),
        ("cannot be added", &[&both.encode(), &later]),
        ("does not follow", &[&whole, &since(&early)]),
        ("in place of", &[&whole, &whole]),
        ("no such node", &[&early.encode(), &later]),
        ("does not follow", &[&stream(1, &[(kind::NODE_DATA, &node("/"))]), &later]),
    ] {
        let error = decode(parts).err().unwrap_or_default();
        assert!(error.contains(what), "{what}: {error}");
    }
}

// Fails if events that wait are lost, told again, or change places.
#[test]
fn events_wait_in_their_order() {
    let mut store = Store::new();
    let guest = store.guest(5);
    for watch in ["a|relative|", "/local/domain/5|absolute|", "a|flat|0|"] {
        store.watch(guest, watch);
    }
    for request in ["a/2|", "a/1|", "a|"] {
        store.ok(store.dom0, WRITE, &format!("/local/domain/5/{request}"));
    }
    let mut twin = Store::new();
    let state = State::decode(&store.engine.dump().encode()).unwrap();
    twin.engine = Engine::restore(&Config::default(), &state).unwrap().0;
    assert_eq!(twin.engine.pop_ready(), Some(guest));
    let events = store.events(guest);
    assert_eq!(events.len(), 7, "{events:?}");
    assert_eq!(twin.events(guest), events);
}

// Fails if what Debian's C xenstored 4.17 has written is read otherwise than it was meant: two
// guests with a request in half, an answer in half, events, watches and nodes.
#[test]
fn streams_of_c_xenstored_are_read() {
    let state = State::decode(include_bytes!("states/c-4.17")).unwrap();
    assert_eq!(state.lost, [""; 0]);
    assert_eq!((state.io.listener, state.io.evtchn), (Some(3), Some(6)));
    let callers: Vec<Caller> = state.connections.iter().map(|c| c.caller).collect();
    let guests = [0, 5, 6].map(|domid| Caller::Domain(DomId(domid)));
    assert!(guests.iter().all(|guest| callers.contains(guest)), "{callers:?}");
    let guest = state.connections.iter().find(|c| c.caller == guests[1]).unwrap();
    assert_eq!((guest.io.port, guest.io.unread.len()), (Some(3), 19));
    assert_eq!((guest.io.partly_sent, guest.io.unsent.len()), (24, 1234));
    let watches: Vec<_> =
        guest.watches.iter().map(|w| (w.path(), w.token.escape_ascii().to_string())).collect();
    let of = |path, token: &str| (path, token.to_owned());
    assert_eq!(
        watches,
        [of("data", "relative"), of("/local/domain/6", "absolute"), of("@releaseDomain", "gone")]
    );
    let (engine, _) = Engine::restore(&Config::default(), &state).unwrap();
    engine.check().unwrap();
    let mut store = Store::new();
    store.engine = engine;
    store.dom0 = store.engine.connect(Caller::Socket);
    assert_eq!(store.ok(store.dom0, READ, "/local/domain/5/data/a|"), "value of a");
    assert_eq!(store.ok(store.dom0, 3, "/local/domain/5|"), "n5|r6|");
    assert_eq!(store.ok(store.dom0, DIRECTORY, "/local/domain|"), "5|6|");
}

// Fails if a stream of C xenstored 4.23 is misread: it announces 4 bytes more of a watch with a
// depth than it writes, so that the next record begins before the announced end of the watch.
#[test]
fn streams_of_newer_c_xenstored_are_read() {
    macro_rules! read {
        ($($name:literal)*) => {[
            $(($name, &include_bytes!(concat!("states/c-4.23/", $name))[..])),*
        ]};
    }
    let streams = read!("plain" "swatch" "sspec" "sdepth" "sdepth-v1" "dp1" "dp3" "dp5" "dp8" "dom"
        "dom-rwatch" "dom-rdepth" "dom-rdepth-v1" "dom-feat" "dom-quota" "gquota");
    for (name, bytes) in streams {
        let state = State::decode(bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let guest = state.connections.iter().find(|c| c.caller == Caller::Domain(DomId(77)));
        assert_eq!(guest.is_some(), name.starts_with("dom"), "{name}");
        let watches: Vec<_> = state.connections.iter().flat_map(|c| &c.watches).collect();
        let read: Vec<_> = watches.iter().map(|w| (w.path(), &*w.token)).collect();
        let written: &[(&str, &[u8])] = match name {
            "swatch" | "sdepth" | "sdepth-v1" => &[("/lu", b"s")],
            "sspec" => &[("@releaseDomain/77", b"s")],
            "dp1" => &[("/a", b"s")],
            "dp3" => &[("/aaa", b"s")],
            "dp5" => &[("/aaaaa", b"s")],
            "dp8" => &[("/aaaaaaaa", b"s")],
            "dom-rdepth" | "dom-rdepth-v1" => &[("a", b"t0")],
            "dom-rwatch" => &[("b", b"t1")],
            _ => &[],
        };
        assert_eq!(read, written, "{name}");
        let depths = state.lost.iter().filter(|text| text.contains("depth")).count();
        assert_eq!(depths, usize::from(name.contains("depth") || name.starts_with("dp")), "{name}");
        let mut store = Store::new();
        store.engine = restored(bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        store.dom0 = store.engine.connect(Caller::Socket);
        assert_eq!(store.ok(store.dom0, DIRECTORY, "/tool|"), "xenstored|", "{name}");
        let (connections, domains) = (&state.connections, &state.domains);
        let answers = connections.iter().filter(|c| c.io.unsent.ends_with(b"OK\0")).count();
        assert_eq!(answers, 1, "{name}: the requester has its answer");
        assert!(domains.iter().all(|domain| domain.quotas.is_some()), "{name}");
    }
    let streams: BTreeMap<_, _> = streams.into_iter().collect();
    let state = |name| State::decode(streams[name]).unwrap();
    let guest = |name| {
        let state = state(name);
        let guest = state.domains.iter().find(|domain| domain.domid == DomId(77)).unwrap();
        (guest.features.bits(), guest.quotas.unwrap().get(Quota::Nodes))
    };
    assert_eq!(state("gquota").quotas.unwrap().get(Quota::Watches), 99);
    assert_eq!(guest("dom"), (0xe, 1000));
    assert_eq!(guest("dom-feat"), (0x6, 1000));
    assert_eq!(guest("dom-quota"), (0xe, 33));
    assert_eq!(guest("dom-rdepth-v1"), (0xf, 1000), "a stream of version 1 has no features");
}

// Fails if a stream of another daemon in which one byte is wrong is the end of the process, or makes
// a store that is not sound, instead of an error with which the old daemon can go on.
#[test]
fn a_wrong_byte_in_a_stream_is_an_error_or_harmless() {
    let mut refused = 0;
    for bytes in [
        &include_bytes!("states/c-4.23/dom-rdepth")[..],
        include_bytes!("states/c-4.23/sdepth-v1"),
        include_bytes!("states/oxenstored-4.17"),
    ] {
        for at in 0..bytes.len() {
            for bits in [0x01, 0x08, 0x80, 0xff] {
                let mut bytes = bytes.to_vec();
                bytes[at] ^= bits;
                refused += usize::from(restored(&bytes).is_err());
            }
        }
    }
    assert!(refused > 100, "only {refused} streams were refused");
}

// Fails if what Debian's oxenstored 4.17 has written is read otherwise than it was meant.
#[test]
fn dumps_of_oxenstored_are_read() {
    let bytes = include_bytes!("states/oxenstored-4.17");
    let state = State::decode(bytes).unwrap();
    assert_eq!(state.lost, [""; 0]);
    assert_eq!(
        (state.io.listener, state.io.evtchn, state.io.virq_port),
        (Some(3), Some(5), Some(1))
    );
    let guest = state.connections.iter().find(|c| c.caller == Caller::Domain(DomId(5))).unwrap();
    assert_eq!((guest.io.gfn, guest.io.remote_port, guest.io.port), (Some(1005), Some(1), Some(3)));
    let paths: Vec<&str> = guest.watches.iter().map(|watch| watch.path()).collect();
    assert_eq!(paths, ["/local/domain/6", "data"]);
    let mut store = Store::new();
    store.engine = restored(bytes).unwrap();
    store.dom0 = store.engine.connect(Caller::Socket);
    assert_eq!(store.ok(store.dom0, READ, "/local/domain/5/data/a|"), "value of a");
    assert_eq!(store.ok(store.dom0, 3, "@releaseDomain|"), "n0|");
    assert_eq!(store.ok(store.dom0, DIRECTORY, "/|"), "tool|local|");
    let cut = &bytes[..bytes.len() - 1];
    assert!(restored(cut).unwrap_err().contains("within a line"));
}

// Fails if C xenstored 4.17 is given a record that it does not know, or loses an event.
#[test]
fn streams_for_c_xenstored_are_what_it_reads() {
    let mut store = Store::new();
    let guest = store.guest(5);
    store.watch(guest, "a|t|1|");
    store.start(guest);
    store.ok(store.dom0, WRITE, "/local/domain/5/a|1");
    let (bytes, lost) = store.engine.dump().encode_for_c(&CFormat::XEN_4_20, 1);
    assert_eq!(bytes[8..12], 1_u32.to_be_bytes());
    let mut reader = Reader::new(&bytes).unwrap();
    while let Some(record) = reader.next_record().unwrap() {
        let known = [kind::GLOBAL_DATA, kind::CONNECTION_DATA, kind::WATCH_DATA, kind::NODE_DATA];
        assert!(known.contains(&record.kind), "{}", record.kind);
    }
    let state = State::decode(&bytes).unwrap();
    let connection =
        state.connections.iter().find(|c| c.caller == Caller::Domain(DomId(5))).unwrap();
    assert_eq!(&connection.io.unsent[16..], b"a\0t\0");
    let lost = lost.join(", ");
    for what in ["depth 1", "transaction 1"] {
        assert!(lost.contains(what), "{what}: {lost}");
    }
}

// Fails if quotas or features are lost on the way to C xenstored 4.22, or anything that another one
// does not take is not named.
#[test]
fn what_c_xenstored_does_not_take_is_named() {
    const SET_FEATURE: u32 = 24;
    const SET_QUOTA: u32 = 26;
    let mut store = Store::new();
    store.create(5);
    store.ok(store.dom0, SET_FEATURE, "5|6|");
    store.guest(5);
    store.guest(6);
    store.ok(store.dom0, SET_QUOTA, "5|nodes|33|");
    store.ok(store.dom0, SET_QUOTA, "watches|99|");
    let state = store.engine.dump();
    let guest = |format: &CFormat, version| {
        let (bytes, lost) = state.encode_for_c(format, version);
        let read = State::decode(&bytes).unwrap();
        let quotas = read.quotas.map(|quotas| quotas.get(Quota::Watches));
        let guest = read.domains.iter().find(|domain| domain.domid == DomId(5)).unwrap();
        let nodes = guest.quotas.map(|quotas| quotas.get(Quota::Nodes));
        (quotas, nodes, guest.features.bits(), lost)
    };
    let reconnection = "feature reconnection: no longer offered to domains 0, 6".to_owned();
    let expected = (Some(99), Some(33), 6, vec![reconnection.clone()]);
    assert_eq!(guest(&CFormat::XEN_4_22, 2), expected);
    let (watches, nodes, _, lost) = guest(&CFormat::XEN_4_22, 1);
    assert_eq!((watches, nodes), (Some(99), Some(33)), "quotas are in both versions");
    assert_eq!(lost, ["feature DOMID_ANY: offered again to domain 5".to_owned(), reconnection]);
    let (.., features, lost) = guest(&CFormat::XEN_4_21, 2);
    assert_eq!(features, 2);
    let all = lost.join(", ");
    for text in [
        "feature watch depth: no longer offered to domains 0, 5, 6",
        "quota watches = 99 of all domains",
        "quota nodes = 33 of domain 5",
        "permission of all domains (DOMID_ANY) at @releaseDomain",
    ] {
        assert!(all.contains(text), "{text}: {all}");
    }
}

/// A stream of another daemon with these records.
fn stream(version: u32, records: &[(u32, &[u8])]) -> Vec<u8> {
    let mut writer = Writer::new(version, 0);
    for (kind, body) in records {
        writer.begin(*kind);
        writer.bytes(body);
    }
    writer.finish()
}

fn node(path: &str) -> Vec<u8> {
    let len = u8::try_from(path.len() + 1).unwrap();
    let mut body = vec![0, 0, 0, 0, 0, 0, 0, 0, len, 0, 0, 0, 0, 0, 1, 0, b'n', 0, 0, 0];
    body.extend_from_slice(path.as_bytes());
    body.push(0);
    body
}

const SOCKET: &[u8] = &[1, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

// Fails if records of newer versions are misread: depths as the design document and as C xenstored
// of 4.22 write them, quotas of a domain that nothing else names, transactions.
#[test]
fn records_of_newer_streams_are_read() {
    let root = node("/");
    let documented = b"\x01\0\0\0\x03\0\x02\0\x01\0\0\0/a\0t\0";
    let without_depth = b"\x01\0\0\0\x03\0\x01\0/b\0\0";
    let domain = b"\x07\0\x02\0\x0e\0\0\0\x09\0\0\0\x05\0\0\0nodes\0bogus\0";
    let bytes = stream(
        2,
        &[
            (kind::CONNECTION_DATA, SOCKET),
            (kind::WATCH_DATA_EXTENDED, documented),
            (kind::WATCH_DATA_EXTENDED, without_depth),
            (kind::TRANSACTION_DATA, &[1, 0, 0, 0, 9, 0, 0, 0]),
            (kind::NODE_DATA, &root),
            (kind::DOMAIN_DATA, domain),
            (99, b"?"),
        ],
    );
    let state = State::decode(&bytes).unwrap();
    let watches: Vec<_> =
        state.connections[0].watches.iter().map(|w| (w.path(), w.depth)).collect();
    assert_eq!(watches, [("/a", Some(1)), ("/b", None)]);
    assert_eq!(state.domains[0].quotas.unwrap().get(Quota::Nodes), 9);
    let lost = state.lost.join(", ");
    for what in ["depth", "bogus", "0x63", "transaction 9"] {
        assert!(lost.contains(what), "{what}: {lost}");
    }
    // What came over of the transaction is too little to commit it.
    let mut store = Store::new();
    let (engine, conns) = Engine::restore(&Config::default(), &state).unwrap();
    store.engine = engine;
    store.tx(conns[0], 9, WRITE, "/x|1").unwrap();
    assert_eq!(store.end(conns[0], 9, true).unwrap_err(), "EAGAIN");
}

// Fails if a state that cannot be is taken.
#[test]
fn impossible_states_are_refused() {
    let [root, a, below] = ["/", "/a", "/b/c"].map(node);
    let nodes = |nodes: &[&[u8]]| {
        let records: Vec<_> = nodes.iter().map(|body| (kind::NODE_DATA, *body)).collect();
        restored(&stream(1, &records))
    };
    assert!(nodes(&[&root, &a]).is_ok());
    let none = node("/")[..14].iter().copied().chain([0, 0, b'/', 0]).collect::<Vec<u8>>();
    for (what, bodies) in [
        ("no root", &[][..]),
        ("no parent", &[&root[..], &below]),
        ("no parent", &[&a]),
        ("twice", &[&root, &a, &a]),
        ("without permissions", &[&none]),
        ("path is none", &[&root, &node("/a b")]),
        ("special node", &[&root, &node("@other")]),
    ] {
        let error = nodes(bodies).err().unwrap_or_default();
        assert!(error.contains(what), "{what}: {error}");
    }
    let twice = [(kind::CONNECTION_DATA, SOCKET), (kind::CONNECTION_DATA, SOCKET)];
    assert!(restored(&stream(1, &twice)).unwrap_err().contains("twice"));
    let watch = [(kind::WATCH_DATA, &b"\x01\0\0\0\x03\0\x02\0/a\0t\0"[..])];
    assert!(restored(&stream(1, &watch)).unwrap_err().contains("not there"));
    let mut store = Store::new();
    store.ok(store.dom0, WRITE, "/a|1");
    store.ok(store.dom0, RM, "/a|");
    let whole = store.engine.dump().encode();
    for len in 0..whole.len() {
        assert!(State::decode(&whole[..len]).is_err(), "{len} bytes");
    }
}

/// A stream of this daemon with these nodes.
fn of_nodes(nodes: &[u8]) -> Vec<u8> {
    let whole = Store::new().engine.dump().encode();
    let (mut reader, mut writer) = (Reader::new(&whole).unwrap(), Writer::new(2, 0));
    while let Some(mut record) = reader.next_record().unwrap() {
        writer.begin(record.kind);
        if record.kind == kind::NODES {
            writer.bytes(nodes);
            continue;
        }
        while let Ok(byte) = record.body.u8() {
            writer.u8(byte);
        }
    }
    writer.finish()
}

// Fails if nodes as we write them are misread, or are taken if they cannot be: the fuzzer would
// have to find each of these.
#[test]
fn invalid_compact_nodes_are_refused() {
    let root: &[u8] = &[2, 0, 2, b'n', 0, 0, 0, 0, 0, 0];
    let a: &[u8] = &[2, 1, b'a', 0, 1, b'1', 2, 0];
    let below: &[u8] = &[2, 1, b'b', 1, 0, 2, 0];
    let beside: &[u8] = &[4, 1, b'c', 0, 0, 1, 0];
    let state = |parts: &[&[u8]]| restored(&of_nodes(&parts.concat()));
    // `/a` from 1 on, `/a/b` from 2 on, and `/c`, which is no older than `/a`.
    assert!(state(&[root, a, below, &[4, 1, b'c', 0, 0, 2, 0]]).is_ok());
    for (what, parts) in [
        ("no root", &[&[0_u8][..]][..]),
        ("no parent", &[a]),
        ("no parent", &[root, &[4, 1, b'a', 0, 0, 2, 0]]),
        ("twice", &[root, &[3, 0, 2, b'n', 0, 0, 0, 0, 2, 0]]),
        ("twice", &[root, a, &[3, 1, b'a', 0, 0, 2, 0]]),
        ("permissions of no node", &[&[2, 0, 0, 0, 0, 0]]),
        ("no permission letter", &[&[2, 0, 2, b'x', 0, 0, 0, 0, 0, 0]]),
        ("no name", &[root, &[2, 3, b'a', b'/', b'b', 0, 0, 2, 0]]),
        ("no name", &[root, &[2, 0, 0, 0, 2, 0]]),
        ("future", &[root, &[2, 1, b'a', 0, 0, 200, 100, 0]]),
        ("future", &[root, &[2, 1, b'a', 0, 0, 2, 100]]),
        ("same stamp", &[root, a, below, beside]),
        ("special node", &[root, &[1, 2, b'@', b'x', 2, b'n', 0, 0, 0, 0, 2, 0]]),
        ("too early", &[root, &[2, 100, b'a', 0, 0, 2, 0]]),
    ] {
        let error = state(parts).err().unwrap_or_default();
        assert!(error.contains(what), "{what}: {error}");
    }
}

// Fails if a domain with the domid of a dead one is not known as another after a restore: it would have
// the rights of its predecessor, or not its own (XSA-322).
#[test]
fn eras_of_domids_survive() {
    let mut store = Store::new();
    let dom0 = store.dom0;
    store.guest(5);
    store.ok(dom0, WRITE, "/a|1");
    store.ok(dom0, SET_PERMS, "/a|n0|r5|");
    let first = store.engine.dump();
    store.kill(5);
    let guest = store.guest(5);
    store.ok(dom0, WRITE, "/b|1");
    store.ok(dom0, SET_PERMS, "/b|n0|r5|");
    for both in [false, true] {
        let mut bytes = Vec::new();
        let now = store.engine.dump();
        if both {
            bytes = first.encode();
            now.encode_since(&first.clone().into_base(), &mut |piece| bytes.extend(piece));
        } else {
            bytes.extend(now.encode());
        }
        store.engine = restored(&bytes).unwrap();
        assert_eq!(store.ok(guest, WRITE, "mine|1"), "OK|");
        assert_eq!(store.ok(guest, READ, "/b|"), "1");
        assert_eq!(store.err(guest, READ, "/a|"), "EACCES");
        assert_eq!(store.ok(dom0, 3, "/a|"), "n0|");
    }
}

// Fails if the charges of a transaction depend on what else holds the nodes: a replay, during which no
// state is written, would refuse other requests than the original.
#[test]
fn charges_do_not_depend_on_who_holds_the_nodes() {
    let charges = |takes_states: bool| {
        let mut store = Store::new();
        let guest = store.guest(5);
        store.ok(guest, WRITE, "a/b/c|1");
        let tx = store.start(guest);
        let (mut held, mut charges) = (Vec::new(), Vec::new());
        for i in 0..20 {
            if takes_states {
                held.push(store.engine.dump());
            }
            let other = store.start(guest);
            store.tx(guest, tx, READ, ["a/b/c|", "a|", "x|"][i % 3]).ok();
            store.tx(guest, tx, WRITE, &format!("a/b/{}|1", i % 4)).unwrap();
            store.tx(guest, tx, RM, &format!("a/b/{}|", i % 5)).ok();
            store.ok(guest, WRITE, &format!("other/{i}|"));
            charges.push(store.engine.charged(DomId(5)));
            store.end(guest, other, false).unwrap();
        }
        charges
    };
    assert_eq!(charges(true), charges(false));
}
