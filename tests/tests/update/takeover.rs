//! A daemon replaces another kind, under load, with the packaged `xenstore-control`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use xenstore_tests::fake_guest::{FakeGuest, PORT, set_state, word};
use xenstore_tests::peers::{self, Daemon, Kind, Quotas, XEN_BIN};
use xenstore_tests::raw::{Conn, op};
use xenstore_tests::skip;

/// Runs the packaged `xenstore-control live-update` with this program and these options.
fn control(daemon: &Daemon, options: &[&str], program: &Path) -> Result<(), String> {
    let output = Command::new(Path::new(XEN_BIN).join("xenstore-control"))
        .env("XENSTORED_PATH", daemon.socket())
        .arg("live-update")
        .args(options)
        .arg(program)
        .output()
        .map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// One client under load. A lost request, a request executed twice, or a lost event changes a
/// reply.
fn load(
    mut conn: Conn,
    home: &str,
    stop: &AtomicBool,
    turn: Option<&Mutex<()>>,
) -> Result<u32, String> {
    let (path, token) = (format!("{home}/n"), "load");
    conn.watch(&format!("{path}|{token}|"))?;
    let event = format!("{path}|{token}|");
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) || round < 20 {
        round += 1;
        let _turn = turn.map(|turn| turn.lock().unwrap());
        conn.gives(op::WRITE, &format!("{path}|{round}"), "OK|")?;
        conn.event(&event)?;
        conn.gives(op::READ, &format!("{path}|"), &round.to_string())?;
        // Executed twice, this would be ENOENT.
        conn.gives(op::RM, &format!("{path}|"), "OK|")?;
        conn.event(&event)?;
        // And these would be EEXIST and ENOENT.
        conn.gives(op::WATCH, &format!("{path}|again|"), "OK|")?;
        conn.event(&format!("{path}|again|"))?;
        conn.gives(op::UNWATCH, &format!("{path}|again|"), "OK|")?;
    }
    conn.events(&[])?;
    Ok(round)
}

/// Runs clients on the socket and guests on rings during `change`.
fn under_load(daemon: &Daemon, change: impl FnOnce()) {
    load_with(daemon, None, change);
}

/// The same, with a lock around each round of a client.
fn load_with(daemon: &Daemon, turn: Option<&Mutex<()>>, change: impl FnOnce()) {
    let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
    let mut clients = Vec::new();
    for domid in 10..14 {
        let guest = FakeGuest::create(&daemon.xen(), domid).unwrap();
        dom0.ok(op::INTRODUCE, &format!("{domid}|1|{PORT}|")).unwrap();
        dom0.ok(op::WRITE, &format!("/local/domain/{domid}|")).unwrap();
        dom0.ok(op::SET_PERMS, &format!("/local/domain/{domid}|n{domid}|")).unwrap();
        clients.push((Conn::new(guest), format!("/local/domain/{domid}")));
    }
    for number in 0..4 {
        let conn = Conn::connect(&daemon.socket()).unwrap();
        clients.push((conn, format!("/clients/{number}")));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let run = |(conn, home): (Conn, String)| {
            let stop = &stop;
            scope.spawn(move || load(conn, &home, stop, turn))
        };
        let threads: Vec<_> = clients.into_iter().map(run).collect();
        // Also after a panic, or the clients would never end.
        let done = catch_unwind(AssertUnwindSafe(change));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = done {
            resume_unwind(panic);
        }
        for thread in threads {
            thread.join().unwrap().unwrap_or_else(|error| panic!("{error}\n{}", daemon.log()));
        }
    });
}

/// State before the takeover, which must be the same afterwards.
struct Before {
    dom0: Conn,
    guest: Conn,
    /// Introduced, and sends nothing.
    _silent: FakeGuest,
}

impl Before {
    fn new(daemon: &Daemon) -> Before {
        let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
        let (guest, silent) =
            (FakeGuest::create(&daemon.xen(), 5), FakeGuest::create(&daemon.xen(), 6));
        for domid in [5, 6] {
            dom0.ok(op::INTRODUCE, &format!("{domid}|1|{PORT}|")).unwrap();
        }
        dom0.ok(op::WRITE, "/local/domain/5|").unwrap();
        dom0.ok(op::SET_PERMS, "/local/domain/5|n5|").unwrap();
        // oxenstored does not carry transactions.
        if daemon.kind != Kind::Ocaml {
            dom0.ok(op::SET_TARGET, "6|5|").unwrap();
        }
        let mut guest = Conn::new(guest.unwrap());
        guest.ok(op::WRITE, "binary|\u{1}\u{7f}\n,").unwrap();
        guest.ok(op::WRITE, "empty|").unwrap();
        guest.ok(op::SET_PERMS, "binary|n5|r0|b7|").unwrap();
        guest.watch("watched|rel,ative|").unwrap();
        dom0.watch("/local|abs|").unwrap();
        dom0.watch("@releaseDomain|release|").unwrap();
        dom0.ok(op::SET_PERMS, "@introduceDomain|n0|r5|").unwrap();
        Before { dom0, guest, _silent: silent.unwrap() }
    }

    fn is_there(&mut self, daemon: &Daemon) {
        let Before { dom0, guest, .. } = self;
        dom0.events.clear();
        dom0.gives(op::READ, "/local/domain/5/binary|", "\u{1}\u{7f}\n,").unwrap();
        guest.gives(op::READ, "empty|", "").unwrap();
        let perms = dom0.ok(op::GET_PERMS, "/local/domain/5/binary|").unwrap();
        assert!(perms.starts_with("n5|r0|"), "{perms}");
        // C xenstored 4.17 does not carry these.
        if let Ok(perms) = dom0.tx(0, op::GET_PERMS, "@introduceDomain|").unwrap() {
            assert_eq!(perms, "n0|r5|");
        }
        dom0.events.clear();
        dom0.ok(op::WRITE, "/local/domain/5/watched|1").unwrap();
        guest.event("watched|rel,ative|").unwrap();
        dom0.event("/local/domain/5/watched|abs|").unwrap();
        // It has this token already: it is the same watch.
        guest.fails(op::WATCH, "watched|rel,ative|", "EEXIST").unwrap();
        guest.events(&[]).unwrap();
        for domid in [5, 6] {
            dom0.gives(op::IS_DOMAIN_INTRODUCED, &format!("{domid}|"), "T|").unwrap();
        }
        // A new guest, and the end of an old one.
        let late = FakeGuest::create(&daemon.xen(), 20).unwrap();
        dom0.ok(op::INTRODUCE, &format!("20|1|{PORT}|")).unwrap();
        Conn::new(late).gives(op::GET_DOMAIN_PATH, "20|", "/local/domain/20|").unwrap();
        dom0.events(&[]).unwrap();
        set_state(&daemon.xen(), 20, "gone").unwrap();
        dom0.event("@releaseDomain|release|").unwrap();
    }
}

fn start(kind: Kind, what: &str) -> Option<Daemon> {
    match peers::available(kind).and_then(|()| Daemon::start(kind, Quotas::Default)) {
        Ok(daemon) => Some(daemon),
        Err(why) => {
            skip(what, &why);
            None
        }
    }
}

// Fails if this project's daemon cannot take over from C xenstored while guests and tools work, or
// loses anything of its state: nodes, permissions, watches, connections, requests, events.
#[test]
fn takeover_from_c_xenstored_loses_nothing() {
    let Some(mut daemon) = start(Kind::C, "takeover of C xenstored") else { return };
    let mut before = Before::new(&daemon);
    let (program, pid) = (daemon.stand_in(Kind::Ours).unwrap(), daemon.pid());
    under_load(&daemon, || control(&daemon, &[], &program).unwrap());
    let log = daemon.log();
    assert!(log.contains("taken over") && log.contains("C xenstored"), "{log}");
    before.is_there(&daemon);
    before.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    assert!(daemon.is_running() && daemon.pid() == pid);
    // And then an update to the same program.
    under_load(&daemon, || control(&daemon, &[], &program).unwrap());
    assert_eq!(daemon.log().matches("taken over").count(), 2, "{}", daemon.log());
}

/// Options that are invalid, or name a resource that is not available.
const MISTAKES: [&str; 9] = [
    "--trace-file /proc/no/such/x",
    "--pid-file /proc/nope",
    "--socket /proc/no/such/s",
    "--journal /proc/no/such",
    "--config-file /nonexistent",
    "--bogus -Q nodes -E many -Q nodes=7",
    "--help",
    "--config-test",
    "--check-state",
];

// Fails if invalid options end this daemon when it has taken over from C xenstored, which neither
// checks them nor can resume.
#[test]
fn invalid_option_does_not_end_a_takeover_from_c_xenstored() {
    for mistake in MISTAKES {
        let Some(mut daemon) = start(Kind::C, "options at a takeover from C xenstored") else {
            return;
        };
        let mut before = Before::new(&daemon);
        let program = daemon.stand_in(Kind::Ours).unwrap();
        let done = control(&daemon, &["-c", mistake], &program);
        assert!(daemon.is_running(), "{mistake}: {}", daemon.log());
        done.unwrap_or_else(|error| panic!("{mistake}: {error}: {}", daemon.log()));
        before.is_there(&daemon);
        before.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
        assert!(daemon.log().contains("taken over"), "{}", daemon.log());
    }
}

// Fails if invalid options end the host's XenStore at a takeover from oxenstored. oxenstored tries
// the program with them first: it must refuse the update and continue.
#[test]
fn invalid_option_is_refused_at_a_takeover_from_oxenstored() {
    let Some(mut daemon) = start(Kind::Ocaml, "options at a takeover from oxenstored") else {
        return;
    };
    let mut before = Before::new(&daemon);
    let program = daemon.stand_in(Kind::Ours).unwrap();
    // A program that takes over accepts the last two.
    for mistake in &MISTAKES[..7] {
        // It passes all of them as one option.
        let done = control(&daemon, &["-c", &mistake.replacen(' ', "=", 1)], &program);
        assert!(daemon.is_running(), "{mistake}: {}", daemon.log());
        assert!(done.is_err(), "{mistake}: {}", daemon.log());
        assert!(!daemon.log().contains("taken over"), "{mistake}: {}", daemon.log());
    }
    before.is_there(&daemon);
}

// Fails if this project's daemon cannot take over from oxenstored while guests and tools work, or
// loses anything of its state.
#[test]
fn takeover_from_oxenstored_loses_nothing() {
    let Some(mut daemon) = start(Kind::Ocaml, "takeover of oxenstored") else { return };
    let mut before = Before::new(&daemon);
    let (program, pid) = (daemon.stand_in(Kind::Ours).unwrap(), daemon.pid());
    // oxenstored waits until no message is in transit.
    let turn = Mutex::new(());
    load_with(&daemon, Some(&turn), || control(&daemon, &[], &program).unwrap());
    let log = daemon.log();
    assert!(log.contains("taken over") && log.contains("oxenstored"), "{log}");
    before.is_there(&daemon);
    before.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    assert!(daemon.is_running() && daemon.pid() == pid);
    under_load(&daemon, || control(&daemon, &[], &program).unwrap());
    assert_eq!(daemon.log().matches("taken over").count(), 2, "{}", daemon.log());
}

/// Returns the sockets of a process that block, or those that do not.
pub(crate) fn sockets(pid: u32, waits: bool) -> Vec<String> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let names = descriptors.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let is_one = |name: &String| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{name}")).unwrap_or_default();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        link.to_string_lossy().starts_with("socket:")
            && flags.is_some_and(|flags| {
                OFlags::from_bits_retain(flags).contains(OFlags::NONBLOCK) != waits
            })
    };
    names.filter(is_one).collect()
}

// Fails if C xenstored cannot take over while guests and tools work, loses state that it supports,
// or gets non-blocking sockets: it closes the connection of a client whose header arrives before
// the rest.
#[test]
fn handover_to_c_xenstored_keeps_what_it_supports() {
    if let Err(why) = peers::available(Kind::C) {
        return skip("takeover by C xenstored", &why);
    }
    let mut daemon = start(Kind::Ours, "takeover by C xenstored").unwrap();
    let mut before = Before::new(&daemon);
    let mut deep = Conn::connect(&daemon.socket()).unwrap();
    deep.gives(op::WATCH, "/deep|d|1|", "OK|").unwrap();
    deep.event("/deep|d|").unwrap();
    let (program, pid) = (daemon.stand_in(Kind::C).unwrap(), daemon.pid());
    under_load(&daemon, || control(&daemon, &[], &program).unwrap());
    before.is_there(&daemon);
    assert!(daemon.is_running() && daemon.pid() == pid);
    assert_eq!(sockets(pid, false), [""; 0]);
    // C xenstored 4.17 offers no features, so a guest must not rely on depths. That of 4.23 offers error
    // reports, depths and DOMID_ANY.
    let page = FakeGuest::create(&daemon.xen(), 5).unwrap();
    let features = if peers::is_c_packaged() { 0 } else { 2 | 4 | 8 };
    assert_eq!(page.get(word::SERVER_FEATURES).unwrap(), features);
    // C xenstored does not have this command.
    before.dom0.fails(op::CONTROL, "connections|", "EINVAL").unwrap();
    before.dom0.ok(op::WRITE, "/deep/er/still|1").unwrap();
    deep.event("/deep/er/still|d|").unwrap();
    assert!(!daemon.socket().with_file_name("state_dump").exists());
}

// Fails if a host cannot be switched to this project's daemon and back repeatedly.
#[test]
fn switching_back_and_forth_loses_nothing() {
    let Some(mut daemon) = start(Kind::C, "C xenstored to ours and back") else { return };
    let pid = daemon.pid();
    let [to_ours, to_c] = [Kind::Ours, Kind::C].map(|kind| daemon.stand_in(kind).unwrap());
    let mut before = Before::new(&daemon);
    under_load(&daemon, || {
        for program in [&to_ours, &to_ours, &to_c, &to_ours, &to_c] {
            let done = control(&daemon, &[], program);
            done.unwrap_or_else(|error| panic!("{program:?}: {error}\n{}", daemon.log()));
        }
    });
    before.is_there(&daemon);
    assert!(daemon.is_running() && daemon.pid() == pid);
    assert_eq!(daemon.log().matches("taken over").count(), 3, "{}", daemon.log());
}
