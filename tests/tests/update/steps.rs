//! Clients get the same bytes whether or not the daemon is updated during an exchange.

use std::fs;
use std::time::Instant;

use xenstore_tests::fake_guest::{FakeGuest, set_state, word};
use xenstore_tests::raw::{PATIENCE, bytes, frame, op, text};

use crate::Host;

/// The client of a step.
#[derive(Clone, Copy, Debug)]
enum Who {
    /// On the socket, privileged.
    Tool,
    /// On the socket, and reads late.
    Slow,
    /// On a ring.
    Guest,
    /// On another ring, with replies that do not fit it.
    Full,
}
use Who::{Full, Guest, Slow, Tool};

#[derive(Clone, Debug)]
enum Step {
    Send(Who, Vec<u8>),
    /// This many messages must come.
    Get(Who, usize),
}

/// The steps of one exchange. If one client depends on another's request, the script waits for the
/// reply first, so that only one order is possible.
fn script() -> Vec<Step> {
    let send = |who, ty, id, tx, payload: &str| Step::Send(who, frame(ty, id, tx, &bytes(payload)));
    let ask = |who, ty, id, tx, payload: &str| [send(who, ty, id, tx, payload), Step::Get(who, 1)];
    let cut = |who, at: &[usize], ty, id, payload: &str| {
        let whole = frame(ty, id, 0, &bytes(payload));
        let ends = at.iter().copied().chain([whole.len()]);
        let starts = [0].iter().chain(at);
        starts.zip(ends).map(|(from, to)| Step::Send(who, whole[*from..to].to_vec())).collect()
    };
    let big = "v".repeat(4000);
    let mut steps = Vec::new();
    let mut add = |more: &[Step]| steps.extend_from_slice(more);
    add(&ask(Tool, op::WRITE, 1, 0, &format!("/big|{big}")));
    // Watches: one with a depth, one relative, one with queued events.
    add(&[send(Tool, op::WATCH, 2, 0, "/w|deep|1|"), Step::Get(Tool, 2)]);
    add(&[send(Guest, op::WATCH, 3, 0, "home|t|"), Step::Get(Guest, 2)]);
    add(&[send(Slow, op::WATCH, 4, 0, "/w|slow|"), Step::Get(Slow, 2)]);
    // More than a socket buffer or a ring holds.
    add(&[Step::Send(Slow, frame(op::READ, 5, 0, b"/big\0").repeat(120))]);
    add(&[send(Full, op::READ, 6, 0, "/big|"), send(Full, op::READ, 7, 0, "/big|")]);
    // A request in pieces, cut in its header and in its payload.
    let pieces: Vec<Step> = cut(Guest, &[1, 10, 16, 20], op::WRITE, 8, "home/a|1");
    add(&pieces);
    add(&[Step::Get(Guest, 2)]);
    // A transaction that commits, over many steps.
    add(&ask(Tool, op::TRANSACTION_START, 9, 0, "|"));
    add(&ask(Tool, op::WRITE, 10, 1, "/w/x|tx"));
    add(&ask(Guest, op::WRITE, 11, 0, "b|outside"));
    add(&ask(Tool, op::READ, 12, 1, "/w/x|"));
    add(&[send(Tool, op::TRANSACTION_END, 13, 1, "T|"), Step::Get(Tool, 2)]);
    // No event for a change below the depth of the watch.
    add(&ask(Tool, op::WRITE, 14, 0, "/w/x/y/z|deep"));
    // One transaction that conflicts, and one that is aborted.
    add(&ask(Tool, op::TRANSACTION_START, 15, 0, "|"));
    add(&ask(Tool, op::TRANSACTION_START, 16, 0, "|"));
    add(&ask(Guest, op::TRANSACTION_START, 17, 0, "|"));
    add(&ask(Tool, op::READ, 18, 2, "/local/domain/5/b|"));
    add(&ask(Tool, op::WRITE, 19, 2, "/w/x|lost"));
    add(&ask(Guest, op::WRITE, 20, 0, "b|changed"));
    add(&ask(Guest, op::WRITE, 21, 1, "c|mine"));
    add(&ask(Tool, op::TRANSACTION_END, 22, 2, "T|"));
    add(&ask(Tool, op::WRITE, 23, 3, "/w/never|1"));
    add(&ask(Tool, op::TRANSACTION_END, 24, 3, "F|"));
    add(&ask(Guest, op::TRANSACTION_END, 25, 1, "T|"));
    // Children are in the order of their creation; the last of two requests is cut.
    add(&[Step::Send(
        Guest,
        [frame(op::MKDIR, 26, 0, b"z\0"), frame(op::MKDIR, 27, 0, b"a\0")].concat()[..30].to_vec(),
    )]);
    add(&[Step::Send(
        Guest,
        [frame(op::MKDIR, 26, 0, b"z\0"), frame(op::MKDIR, 27, 0, b"a\0")].concat()[30..].to_vec(),
    )]);
    add(&[Step::Get(Guest, 2)]);
    add(&ask(Tool, op::DIRECTORY, 28, 0, "/local/domain/5|"));
    // Now the late clients read: replies first, then each change of /w once.
    add(&[Step::Get(Full, 2), Step::Get(Slow, 122)]);
    add(&ask(Slow, op::UNWATCH, 29, 0, "/w|slow|"));
    for query in ["quota|5|", "quota|6|", "watches|", "transactions|", "check|"] {
        add(&ask(Tool, op::CONTROL, 30, 0, query));
    }
    for path in ["/w/x", "/w/x/y/z", "/local/domain/5/c", "/local/domain/5/home/a", "/w/never"] {
        add(&ask(Tool, op::READ, 31, 0, &format!("{path}|")));
        add(&ask(Tool, op::GET_PERMS, 32, 0, &format!("{path}|")));
    }
    steps
}

/// Plays the script, updates the daemon before the steps that `update` selects, and returns what
/// each client got.
fn play(script: &[Step], update: impl Fn(usize) -> bool) -> Vec<String> {
    let mut host = Host::start();
    // Wait for a reply, so that the client is accepted: connections have the same numbers in each
    // run.
    let [tool, slow] = [(); 2].map(|()| {
        let mut client = host.client();
        client.gives(op::GET_DOMAIN_PATH, "0|", "/local/domain/0|").unwrap();
        client
    });
    let (mut guest, full) = (host.guest(5), host.guest(6));
    // The ring indices are not at their start.
    for number in 0..40 {
        let payload = format!("/local/domain/{number}|");
        guest.gives(op::GET_DOMAIN_PATH, &format!("{number}|"), &payload).unwrap();
    }
    // In the order of `Who`.
    let mut conns = [tool, slow, guest, full];
    let (mut seen, mut late) = (Vec::new(), Vec::new());
    for (number, step) in script.iter().enumerate() {
        if update(number) {
            host.update();
        }
        match step {
            Step::Send(who, bytes) => conns[*who as usize].send(bytes).unwrap(),
            Step::Get(who, count) => {
                for _ in 0..*count {
                    let message = conns[*who as usize].message(PATIENCE).unwrap_or_else(|error| {
                        panic!("step {number} {step:?}: {error}\n{}", host.daemon.log())
                    });
                    let message = message.expect("the connection is open");
                    let payload = text(&message.payload);
                    let (ty, req_id, tx_id) = (message.ty, message.req_id, message.tx_id);
                    let line = format!("{who:?} {ty} {req_id} {tx_id} {payload:.400}");
                    // The kernel decides where events come between the replies to another client's
                    // requests, by the amount that it transfers at a time.
                    let between = matches!(who, Slow) && ty == op::WATCH_EVENT;
                    if between { &mut late } else { &mut seen }.push(line);
                }
            }
        }
    }
    // No more messages come.
    for conn in &mut conns {
        conn.events(&[]).unwrap();
    }
    host.assert_sound();
    [seen, late].concat()
}

// Fails if an update at any step of an exchange loses, repeats, reorders or changes a message: half
// a request, unread replies, open transactions, queued events.
#[test]
fn update_at_any_step_changes_no_message() {
    let script = script();
    let expected = play(&script, |_| false);
    assert!(expected.len() > 160, "{} messages", expected.len());
    let same = |seen: &[String], when: &str| {
        let differs = seen.iter().zip(&expected).find(|(seen, expected)| seen != expected);
        assert_eq!(differs, None, "update before {when}");
        assert_eq!(seen.len(), expected.len(), "update before {when}");
    };
    for at in 0..script.len() {
        same(&play(&script, |number| number == at), &format!("step {at}"));
    }
    same(&play(&script, |_| true), "every step");
}

/// Returns the number of open descriptors of the daemon. The thread that prepares the journal's next
/// file has one or two more for a moment.
fn descriptors(host: &Host) -> usize {
    fs::read_dir(format!("/proc/{}/fd", host.daemon.pid())).unwrap().count()
}

/// Returns the daemon's resident memory in KiB.
fn resident(host: &Host) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", host.daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

// Fails if an update leaves a descriptor, a port or memory behind, or changes the process.
#[test]
fn a_hundred_updates_leave_nothing_behind() {
    let mut host = Host::start();
    let mut guest = host.guest(5);
    guest.watch("x|t|").unwrap();
    let pid = host.daemon.pid();
    host.update();
    host.update();
    // The pretend Xen opens a guest's event channel at its first event.
    host.dom0.ok(op::WRITE, "/local/domain/5/x|first").unwrap();
    guest.event("x|t|").unwrap();
    let (before, memory) = (descriptors(&host), resident(&host));
    let ports = fs::read(host.daemon.xen().join("ports")).unwrap();
    for round in 0..100 {
        host.update();
        host.dom0.ok(op::WRITE, &format!("/local/domain/5/x|{round}")).unwrap();
        guest.event("x|t|").unwrap();
    }
    assert_eq!(host.updates(), 102);
    assert_eq!(fs::read(host.daemon.xen().join("ports")).unwrap(), ports);
    let memory_after = resident(&host);
    eprintln!("100 updates: {memory} KiB before, {memory_after} KiB after");
    let deadline = Instant::now() + PATIENCE;
    while descriptors(&host) > before {
        assert!(Instant::now() < deadline, "{before} descriptors became {}", descriptors(&host));
        std::thread::yield_now();
    }
    assert!(memory_after < memory + 1024, "{memory} KiB became {memory_after} KiB");
    assert_eq!(host.daemon.pid(), pid);
    host.assert_sound();
}

// Fails if a domain that is destroyed during an update remains, a shutdown is reported twice, or a
// domain is mistaken for another because its identity was not carried.
#[test]
fn domains_are_queried_after_an_update() {
    let mut host = Host::start();
    let (_alive, _gone) = (host.guest(5), host.guest(6));
    set_state(&host.daemon.xen(), 5, "shutdown").unwrap();
    let mut watcher = host.client();
    watcher.watch("@releaseDomain|t|").unwrap();
    host.dom0.ok(op::WRITE, "/local/domain/6/x|1").unwrap();
    // Without an event.
    fs::write(host.daemon.xen().join("6/state"), "gone").unwrap();
    host.update();
    watcher.event("@releaseDomain|t|").unwrap();
    host.dom0.gives(op::IS_DOMAIN_INTRODUCED, "5|", "T|").unwrap();
    host.dom0.gives(op::IS_DOMAIN_INTRODUCED, "6|", "F|").unwrap();
    host.dom0.fails(op::READ, "/local/domain/6/x|", "ENOENT").unwrap();
    host.update();
    watcher.events(&[]).unwrap();
    host.assert_sound();
}

// Fails if a guest that violated the protocol is served after an update without having requested a
// reconnection, or cannot reconnect.
#[test]
fn failed_ring_stays_failed_until_it_reconnects() {
    let mut host = Host::start();
    let mut guest = host.guest(5);
    let mut page = FakeGuest::create(&host.daemon.xen(), 5).unwrap();
    guest.send(&[op::READ, 1, 0, 5000].map(u32::to_le_bytes).concat()).unwrap();
    page.await_word(word::ERROR, 3).unwrap();
    host.update();
    guest.send(&frame(op::WRITE, 2, 0, b"x\0heard")).unwrap();
    host.dom0.fails(op::READ, "/local/domain/5/x|", "ENOENT").unwrap();
    assert_eq!(page.get(word::ERROR).unwrap(), 3);
    page.reconnect().unwrap();
    guest.gives(op::WRITE, "x|1", "OK|").unwrap();
    host.update();
    guest.gives(op::READ, "x|", "1").unwrap();
}

// Fails if a guest that sets the indices of its idle ring to 0 is not served by the next program,
// which got the previous indices.
#[test]
fn ring_set_to_zero_is_served_after_an_update() {
    let mut host = Host::start();
    let mut guest = host.guest(5);
    let page = FakeGuest::create(&host.daemon.xen(), 5).unwrap();
    guest.watch("x|t|").unwrap();
    for value in ["1", "22"] {
        page.zero().unwrap();
        host.update();
        guest.gives(op::WRITE, &format!("y|{value}"), "OK|").unwrap();
        host.update();
        page.zero().unwrap();
        guest.gives(op::READ, "y|", value).unwrap();
    }
    host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
    guest.event("x|t|").unwrap();
}

// Fails if requests that came together with that for the update are lost, executed twice, or
// executed before it.
#[test]
fn requests_behind_the_update_request_are_executed_once() {
    let mut host = Host::start();
    let file = crate::ours();
    let begin = format!("live-update|-f|{}|", file.to_str().unwrap());
    let all = [
        frame(op::CONTROL, 1, 0, &bytes(&begin)),
        frame(op::CONTROL, 2, 0, &bytes("live-update|-s|")),
        frame(op::MKDIR, 3, 0, b"/once\0"),
        frame(op::DIRECTORY, 4, 0, b"/\0"),
    ];
    host.dom0.send(&all.concat()).unwrap();
    let answers: Vec<(u32, String)> = (0..4)
        .map(|_| host.dom0.reply().unwrap())
        .map(|reply| (reply.req_id, text(&reply.payload)))
        .collect();
    let ok = || "OK|".to_owned();
    assert_eq!(answers[..3], [(1, ok()), (2, ok()), (3, ok())]);
    assert!(answers[3].1.matches("once|").count() == 1, "{answers:?}");
    assert_eq!(host.updates(), 1);
}
