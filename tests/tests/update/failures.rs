//! Programs that cannot take over: the daemon that was asked continues.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use xenstore_tests::peers::{self, Daemon, Kind};
use xenstore_tests::raw::{op, text};
use xenstore_tests::skip;

use crate::takeover::sockets;
use crate::{Host, ours};

/// Writes a shell script with this text into the daemon's directory.
pub(crate) fn script(host: &Host, name: &str, text: &str) -> PathBuf {
    let path = host.daemon.xen().join(name);
    let text = text.replace("OURS", ours().to_str().unwrap());
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The help of this project's daemon. The rest of a script handles the check.
pub(crate) const LIKE_OURS: &str = "case \"$*\" in --help) echo --check-state; exit;; esac";

// Fails if a program that is not a XenStore daemon, crashes, hangs up, lies or cannot be executed
// damages the daemon or its state, or if the reason is missing in the reply or in the log.
#[test]
fn program_that_fails_the_check_changes_nothing() {
    let mut host = Host::start();
    let mut guest = host.guest(5);
    guest.watch("x|t|").unwrap();
    let mut client = host.client();
    let tx = client.begin().unwrap();
    client.gives_in(tx, op::WRITE, "/a|in|", "OK|").unwrap();
    let pid = host.daemon.pid();
    let after_check = format!("{LIKE_OURS}\ncase \"$*\" in *--check-state*) ");
    let cases = [
        ("nothing", String::new(), "neither"),
        ("refuses", format!("{LIKE_OURS}\necho no room >&2; exit 3"), "no room"),
        ("killed", format!("{LIKE_OURS}\nkill -9 $$"), "signal: 9"),
        ("aborts", format!("{LIKE_OURS}\nkill -ABRT $$"), "signal: 6"),
        ("says nothing", format!("{LIKE_OURS}\nexit 0"), "refuses"),
        ("is gone", format!("{after_check}rm \"$0\"; echo 5 us;; esac"), "cannot be run"),
        (
            "no longer a program",
            format!("{after_check}chmod -x \"$0\"; echo 5 us;; esac"),
            "cannot be run",
        ),
    ];
    for (name, text, reason) in cases {
        let program = script(&host, &name.replace(' ', "-"), &text);
        let answer = host.update_to(&program);
        assert!(answer.contains(reason), "{name}: {answer}");
        assert!(
            host.daemon.log().contains(answer.lines().last().unwrap()),
            "{}",
            host.daemon.log()
        );
        // All connections are served with their state.
        host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
        guest.event("x|t|").unwrap();
        client.gives_in(tx, op::READ, "/a|", "in|").unwrap();
        assert_eq!((host.daemon.pid(), host.updates()), (pid, 0));
    }
    client.end(tx, "T|", "OK|").unwrap();
    // C xenstored gets blocking descriptors; this project's daemon must not block on any.
    let like_c = script(&host, "like-c", "echo 'xenstored <options>'; rm \"$0\"");
    let answer = host.update_to(&like_c);
    assert!(answer.contains("cannot be run"), "{answer}");
    assert_eq!(sockets(pid, true), [""; 0]);
    client.gives(op::READ, "/a|", "in|").unwrap();
    host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
    guest.event("x|t|").unwrap();
    host.assert_sound();
    host.update();
    guest.gives(op::READ, "x|", "1").unwrap();
}

// Fails if a program that has replaced the daemon and cannot read the state does not execute the
// old one again, or if the requester gets a success.
#[test]
fn program_that_cannot_read_the_state_executes_the_old_one() {
    let mut host = Host::start();
    let mut guest = host.guest(5);
    guest.watch("x|t|").unwrap();
    let program = script(
        &host,
        "late",
        "case \"$*\" in *--resume*) exec OURS --refuse-state \"$@\";; esac\nexec OURS \"$@\"",
    );
    let answer = host.update_to(&program);
    assert!(answer.contains("--refuse-state"), "{answer}");
    let log = host.daemon.log();
    assert!(log.contains("the other program failed") && log.contains("taken over"), "{log}");
    host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
    guest.event("x|t|").unwrap();
    host.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    host.update();
    guest.gives(op::READ, "x|", "1").unwrap();
}

// Fails if a reply differs from that of C xenstored (texts of its lu.c), or if a session outlives
// its connection.
#[test]
fn replies_are_those_of_c_xenstored() {
    let mut host = Host::start();
    let file = ours();
    let file = file.to_str().unwrap();
    let text = |text: &str| Ok(text.to_owned());
    assert_eq!(host.control(&["-f", "/nonexistent"]), text("File not accessible."));
    assert_eq!(host.control(&["-f", "/etc/passwd"]), text("File not executable."));
    assert_eq!(host.control(&["-s"]), text("Not in live-update session."));
    assert_eq!(host.control(&["-c", "-N"]), text("Not in live-update session."));
    assert_eq!(host.control(&["-a"]), text("No live-update session active."));
    assert_eq!(host.control(&["-x"]), Err("EINVAL".into()));
    assert_eq!(host.control(&[]), Err("EINVAL".into()));
    let mut other = host.client();
    let begin = format!("live-update|-f|{file}|");
    other.gives(op::CONTROL, &begin, "OK|").unwrap();
    assert_eq!(host.control(&["-f", file]), text("live-update session already active."));
    assert_eq!(host.control(&["-s"]), text("Not in live-update session."));
    assert_eq!(host.control(&["-a"]), text("OK"));
    other.gives(op::CONTROL, "live-update|-s|", "Not in live-update session.|").unwrap();
    other.gives(op::CONTROL, &begin, "OK|").unwrap();
    other.fails(op::CONTROL, "live-update|-s|-t|x|", "EINVAL").unwrap();
    let version = "live-update|-s|-v|3|";
    other.gives(op::CONTROL, version, "Migration stream version not supported.|").unwrap();
    drop(other);
    // The daemon has processed its end once a new client is served.
    let begun = (0..1000).find_map(|_| {
        let mut next = host.client();
        let answer = next.ok(op::CONTROL, &begin).unwrap();
        (answer == "OK|").then_some(next)
    });
    assert!(begun.is_some(), "the session has outlived its connection");
    drop(begun);
    let mut guest = host.guest(5);
    guest.fails(op::CONTROL, "live-update|-a|", "EACCES").unwrap();
    assert_eq!(host.updates(), 0);
}

// Fails if a dry run has an effect, or does not report size and pause.
#[test]
fn dry_run_reports_and_has_no_effect() {
    let mut host = Host::start();
    let file = ours();
    assert_eq!(host.control(&["-f", file.to_str().unwrap()]), Ok("OK".into()));
    let report = host.control(&["-s", "-n"]).unwrap();
    assert!(report.contains("bytes") && report.contains("ms"), "{report}");
    assert_eq!(host.updates(), 0);
    let xs = |args: &[&str]| {
        let mut command = Command::new(peers::program("xs").unwrap());
        command.arg("--socket").arg(host.daemon.socket()).arg("live-update").args(args);
        let output = command.arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (done, text) = xs(&["--dry-run"]);
    assert!(done && text.contains("lost: nothing"), "{text}");
    assert_eq!(host.updates(), 0);
    assert_eq!(xs(&[]), (true, "done\n".into()));
    assert_eq!(host.updates(), 1);
    let (done, text) = xs(&["--options", "--bogus"]);
    assert!(!done && text.contains("--bogus"), "{text}");
    assert_eq!(host.updates(), 1);
}

// Fails if a dry run has an effect on another daemon, or does not report what that daemon cannot
// tell; or if an invalid option that can be found is not.
#[test]
fn dry_run_reports_what_another_daemon_cannot_tell() {
    for kind in [Kind::C, Kind::Ocaml] {
        let mut daemon = match peers::available(kind)
            .and_then(|()| Daemon::start(kind, peers::Quotas::Default))
        {
            Ok(daemon) => daemon,
            Err(why) => return skip("a dry run of another daemon", &why),
        };
        let xs = |args: &[&str]| {
            let mut command = Command::new(peers::program("xs").unwrap());
            command.arg("--socket").arg(daemon.socket()).args(["live-update", "--dry-run"]);
            let output = command.args(args).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        };
        let program = ours().display().to_string();
        let (done, text) = xs(&[&program]);
        assert!(done && text.contains("not possible: a way back"), "{text}");
        let (done, text) = xs(&["--options", "--bogus", &program]);
        assert!(!done && text.contains("--bogus"), "{text}");
        assert!(!xs(&["/bin/true"]).0);
        assert!(daemon.is_running() && !daemon.log().contains("taken over"));
    }
}

// Fails if a transaction that C xenstored cannot continue is lost without `-F`, is not named, or
// one that ends in time makes the update fail; or if other connections are not served during the
// wait.
#[test]
fn open_transaction_prevents_the_update_to_c_xenstored() {
    if let Err(why) = peers::available(Kind::C) {
        return skip("transactions and C xenstored", &why);
    }
    let mut host = Host::start();
    let program = host.daemon.stand_in(Kind::C).unwrap();
    let program = program.to_str().unwrap();
    let mut client = host.client();
    let tx = client.begin().unwrap();
    client.gives_in(tx, op::WRITE, "/a|in|", "OK|").unwrap();
    assert_eq!(host.control(&["-f", program]), Ok("OK".into()));
    let report = host.control(&["-s", "-n"]).unwrap();
    assert!(report.contains("in the way: conn") && report.contains("requests 1"), "{report}");
    // C xenstored 4.17 exits on a newer stream, without a message.
    let version = if peers::is_c_packaged() { 1 } else { 2 };
    assert!(report.contains(&format!("stream version: {version}")), "{report}");
    assert_eq!(report.matches("lost: transaction 1 of connection").count(), 1, "{report}");
    if peers::is_c_packaged() {
        assert_eq!(host.control(&["-f", program]), Ok("OK".into()));
        let refusal = host.control(&["-s", "-v", "2"]).unwrap();
        assert!(refusal.contains("--stream-version 1"), "{refusal}");
    }
    assert_eq!(host.control(&["-f", program]), Ok("OK".into()));
    assert_eq!(host.control(&["-s", "-t", "60"]), Ok("BUSY".into()));
    let refusal = host.control(&["-s", "-t", "0"]).unwrap();
    assert!(refusal.starts_with("Domains with long running transactions:\nconn"), "{refusal}");
    host.client().ok(op::WRITE, "/b|1").unwrap();
    client.gives_in(tx, op::READ, "/a|", "in|").unwrap();
    // The transaction ends during the wait.
    assert_eq!(host.control(&["-f", program]), Ok("OK".into()));
    host.dom0.start(op::CONTROL, 0, b"live-update\0-s\0-t\x0060\0").unwrap();
    client.end(tx, "T|", "OK|").unwrap();
    let first = text(&host.dom0.reply().unwrap().payload);
    if first != "OK|" {
        assert_eq!(first, "BUSY|");
        assert_eq!(host.control(&["-s", "-t", "60"]), Ok("OK".into()));
    }
    client.gives(op::READ, "/a|", "in|").unwrap();
    client.fails(op::CONTROL, "connections|", "EINVAL").unwrap();
}

// Fails if aborted transactions are not reported, or prevent the update to C xenstored.
#[test]
fn forced_update_aborts_transactions() {
    if let Err(why) = peers::available(Kind::C) {
        return skip("transactions and C xenstored", &why);
    }
    let mut host = Host::start();
    let program = host.daemon.stand_in(Kind::C).unwrap();
    let mut client = host.client();
    let tx = client.begin().unwrap();
    client.gives_in(tx, op::WRITE, "/a|in|", "OK|").unwrap();
    assert_eq!(host.control(&["-f", program.to_str().unwrap()]), Ok("OK".into()));
    assert_eq!(host.control(&["-s", "-t", "0", "-F"]), Ok("OK".into()));
    assert!(host.daemon.log().contains("unfinished"), "{}", host.daemon.log());
    client.fails_in(tx, op::READ, "/a|", "ENOENT").unwrap();
    client.fails(op::READ, "/a|", "ENOENT").unwrap();
}
