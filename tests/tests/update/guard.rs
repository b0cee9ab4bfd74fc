//! Programs that pass the check and do not serve: the guard resumes.

use std::fs;
use std::path::{Path, PathBuf};

use xenstore_tests::fdstore::FdStore;
use xenstore_tests::peers::{self, Daemon, Kind, Quotas};
use xenstore_tests::raw::{Conn, op, text};
use xenstore_tests::skip;

use crate::failures::{LIKE_OURS, script};
use crate::{Host, ours};

/// A daemon with a pid file, which names the process that serves.
struct Guarded {
    host: Host,
    pid_file: PathBuf,
}

impl Guarded {
    fn start() -> Guarded {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.keep().join("pid");
        let args = ["--pid-file", pid_file.to_str().unwrap()];
        let daemon = Daemon::start_with(Kind::Ours, Quotas::Default, &args).unwrap();
        let dom0 = Conn::connect(&daemon.socket()).unwrap();
        Guarded { host: Host { daemon, dom0 }, pid_file }
    }

    fn pid(&self) -> i32 {
        fs::read_to_string(&self.pid_file).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // The guard that resumed is not a child of this process.
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = fs::remove_dir_all(self.pid_file.parent().unwrap());
    }
}

/// Updates to programs with these first lines and this rest, and checks that everything is
/// unchanged.
fn assert_each_undone(asked: &str, cases: &[(&str, &str, &str)]) {
    let mut guarded = Guarded::start();
    let pid = guarded.pid();
    let host = &mut guarded.host;
    let mut guest = host.guest(5);
    guest.watch("x|t|").unwrap();
    let mut client = host.client();
    let tx = if asked.starts_with(LIKE_OURS) { client.begin().unwrap() } else { 0 };
    client.gives_in(tx, op::WRITE, "/a|in|", "OK|").unwrap();
    for (number, (name, text, reason)) in cases.iter().enumerate() {
        let program = script(host, &name.replace(' ', "-"), &format!("{asked}\n{text}"));
        let answer = answer_of(host, &program);
        assert!(answer.contains(reason), "{name}: {answer}");
        // All connections are served with their state.
        host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
        guest.event("x|t|").unwrap();
        client.gives_in(tx, op::READ, "/a|", "in|").unwrap();
        host.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
        is_logged(host, "taken over", number + 1);
        // A death is reported: the virtual interrupt is still bound.
        let late = host.guest(20);
        host.dom0.watch("@releaseDomain|r|").unwrap();
        xenstore_tests::fake_guest::set_state(&host.daemon.xen(), 20, "gone").unwrap();
        host.dom0.event("@releaseDomain|r|").unwrap();
        host.dom0.ok(op::UNWATCH, "@releaseDomain|r|").unwrap();
        drop(late);
    }
    is_logged(host, "the other program failed", cases.len());
    assert!(!host.daemon.log().contains("panic"), "{}", host.daemon.log());
    assert!(!left_behind(&host.daemon.xen()), "processes of a program are left");
    host.update();
    guest.gives(op::READ, "x|", "1").unwrap();
    drop(client);
    assert_ne!(guarded.pid(), pid);
}

/// Waits until the log has `count` lines with this text: the process that writes it is not known
/// here.
fn is_logged(host: &Host, what: &str, count: usize) {
    let has = || host.daemon.log().matches(what).count() == count;
    let wait = || std::thread::sleep(std::time::Duration::from_millis(1));
    assert!((0..10_000).any(|_| has() || (wait(), false).1), "{what}: {}", host.daemon.log());
}

/// Returns the reply to an update, which may take as long as a guard waits.
fn answer_of(host: &mut Host, program: &Path) -> String {
    assert_eq!(host.control(&["-f", program.to_str().unwrap()]), Ok("OK".into()));
    host.dom0.start(op::CONTROL, 0, b"live-update\0-s\0").unwrap();
    let reply = (0..5).find_map(|_| host.dom0.reply().ok()).expect("an answer");
    text(&reply.payload)
}

/// Returns true if a process runs that a script in this directory has started.
fn left_behind(dir: &Path) -> bool {
    let marker = dir.join("marker").display().to_string();
    fs::read_dir("/proc").unwrap().flatten().any(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&marker)
    })
}

// Fails if a program that passes the check and then ends in any way, hangs, or closes its
// descriptors is not undone: no daemon runs, it has lost state, or the reply lacks the reason.
#[test]
fn program_that_does_not_serve_is_undone() {
    let check = format!("{LIKE_OURS}\ncase \"$*\" in *--check-state*) echo 5 us; exit;; esac");
    assert_each_undone(
        &check,
        &[
            ("ends well", "exit 0", "ended before it answered"),
            ("ends badly", "exit 3", "ended before it answered"),
            ("is killed", "kill -9 $$", "ended before it answered"),
            ("aborts", "kill -ABRT $$", "ended before it answered"),
            ("is another program", "exec true", "ended before it answered"),
            ("hangs", "tail -f /dev/null \"$0-marker\"; exit 3", "has not answered within"),
        ],
    );
}

// Fails if a program that looks like C xenstored and does not serve is not undone.
#[test]
fn program_like_c_xenstored_that_does_not_serve_is_undone() {
    assert_each_undone(
        "case \"$*\" in --help) echo 'xenstored <options>'; exit;; esac",
        &[
            ("ends well", "exit 0", "ended before it answered"),
            ("is killed", "kill -9 $$", "ended before it answered"),
        ],
    );
}

// Fails if C xenstored is not undone when it cannot read the state, or ends while it reads it, with
// its own event channels bound.
#[test]
fn c_xenstored_that_does_not_serve_is_undone() {
    if let Err(why) = peers::available(Kind::C) {
        return skip("C xenstored that does not serve", &why);
    }
    let mut guarded = Guarded::start();
    let stand_in = guarded.host.daemon.stand_in(Kind::C).unwrap();
    let start = format!("case \"$*\" in --help) exec {0} --help;; esac", stand_in.display());
    let dump = guarded.host.daemon.socket().with_file_name("state_dump");
    let (dump, program) = (dump.display(), stand_in.display());
    let mut guest = guarded.host.guest(5);
    guest.watch("x|t|").unwrap();
    for (name, text) in [
        ("nothing", format!(": > {dump}; exec {program} \"$@\"")),
        ("noise", format!("head -c 999 /dev/zero > {dump}; exec {program} \"$@\"")),
    ] {
        let host = &mut guarded.host;
        let program = script(host, &name.replace(' ', "-"), &format!("{start}\n{text}"));
        let answer = answer_of(host, &program);
        assert!(answer.contains("before it answered"), "{name}: {answer}: {}", host.daemon.log());
        host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
        guest.event("x|t|").unwrap();
        host.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    }
    guarded.host.update();
    guest.gives(op::READ, "x|", "1").unwrap();
}

// Fails if systemd is not notified which process is the daemon at each moment: it would end the
// unit together with the failed program, or not detect the end of the one that serves.
#[test]
fn systemd_is_notified_of_the_serving_process() {
    let daemon = Daemon::start_with_fdstore().unwrap();
    let pid = daemon.pid();
    let dom0 = Conn::connect(&daemon.socket()).unwrap();
    let told = |daemon: &mut Daemon| {
        let fdstore: &mut FdStore = daemon.fdstore.as_mut().unwrap();
        let mut pids = Vec::new();
        let limit = std::time::Duration::from_secs(10);
        while pids.last() != Some(&pid) {
            let text = fdstore.message(limit).unwrap();
            let found = text.lines().find_map(|line| line.strip_prefix("MAINPID="));
            pids.extend(found.map(|number| number.parse::<u32>().unwrap()));
        }
        pids
    };
    let mut host = Host { daemon, dom0 };
    let answer = host.update_to(&ours());
    assert_eq!(answer, "OK");
    let pids = told(&mut host.daemon);
    assert!(pids.len() == 2 && pids[0] != pid, "the guard, then the daemon again: {pids:?}");
    // The guard has ended, and no child is left.
    let children = format!("/proc/{pid}/task/{pid}/children");
    let gone = (0..5000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        fs::read_to_string(&children).unwrap().is_empty()
    });
    assert!(gone, "{}", fs::read_to_string(&children).unwrap());
}
