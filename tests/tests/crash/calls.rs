//! The real process, killed by strace at every system call.
//!
//! `XENSTORE_CALLS` is the number of these calls, evenly spread; `all` is possible.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use xenstore_tests::fake_guest::{FakeGuest, PORT};
use xenstore_tests::peers::Daemon;
use xenstore_tests::raw::{Conn, bytes, frame, op, text};
use xenstore_tests::skip;

use crate::LIMIT;

const STRACE: &str = "/usr/bin/strace";

/// The domains with rings, in the order of their index.
const DOMIDS: [u16; 3] = [0, 5, 6];
const KERNEL: usize = 0;
const GUEST: usize = 1;
const FULL: usize = 2;

#[derive(Clone, Debug)]
enum Step {
    Send(usize, Vec<u8>),
    /// This many messages must come.
    Get(usize, usize),
    /// The tool repeats this request until it has a reply. If its connection ends meanwhile, it
    /// first sends the second request, and stops if the reply is the third.
    Tool(Vec<(u32, String)>, (u32, String, String)),
}

/// The steps of an exchange in which only one order is possible.
fn script() -> Vec<Step> {
    let mut steps = Vec::new();
    let send = |who, ty, id, tx, payload: &str| Step::Send(who, frame(ty, id, tx, &bytes(payload)));
    let ask = |who, ty, id, tx, payload: &str| [send(who, ty, id, tx, payload), Step::Get(who, 1)];
    let tool = |requests: &[(u32, &str)], check: (u32, &str, &str)| {
        let requests = requests.iter().map(|(ty, payload)| (*ty, (*payload).to_owned()));
        [Step::Tool(requests.collect(), (check.0, check.1.to_owned(), check.2.to_owned()))]
    };
    let write = |path: &str, value: &str| {
        tool(&[(op::WRITE, &format!("{path}|{value}"))], (op::READ, &format!("{path}|"), value))
    };
    let mut add = |more: &[Step]| steps.extend_from_slice(more);
    add(&write("/big", &"v".repeat(4000)));
    // The kernel waits until the daemon runs.
    add(&[send(KERNEL, op::WATCH, 1, 0, "@introduceDomain|i|"), Step::Get(KERNEL, 2)]);
    add(&tool(&[(op::SET_PERMS, "/big|r0|")], (op::GET_PERMS, "/big|", "r0|")));
    for domid in &DOMIDS[1..] {
        let home = format!("/local/domain/{domid}|");
        let owned = format!("{home}n{domid}|");
        let introduce = format!("{domid}|1|{PORT}|");
        let requests = [(op::WRITE, &*home), (op::SET_PERMS, &owned), (op::INTRODUCE, &introduce)];
        add(&tool(&requests, (op::IS_DOMAIN_INTRODUCED, &format!("{domid}|"), "T|")));
        add(&[Step::Get(KERNEL, 1)]);
    }
    add(&[send(GUEST, op::WATCH, 2, 0, "home|t|"), Step::Get(GUEST, 2)]);
    // More than a ring holds, twice.
    add(&[send(FULL, op::READ, 3, 0, "/big|"), send(FULL, op::READ, 4, 0, "/big|")]);
    let whole = frame(op::WRITE, 5, 0, b"home/a\x001");
    let pieces = [0, 1, 10, 16].into_iter().zip([1, 10, 16, whole.len()]);
    add(&pieces.map(|(from, to)| Step::Send(GUEST, whole[from..to].to_vec())).collect::<Vec<_>>());
    add(&[Step::Get(GUEST, 2)]);
    add(&ask(GUEST, op::TRANSACTION_START, 6, 0, "|"));
    add(&ask(GUEST, op::READ, 7, 1, "home/a|"));
    add(&write("/local/domain/5/home/b", "tool"));
    add(&[Step::Get(GUEST, 1)]);
    add(&ask(GUEST, op::WRITE, 8, 1, "mine|1"));
    add(&ask(GUEST, op::TRANSACTION_END, 9, 1, "T|"));
    add(&ask(GUEST, op::TRANSACTION_START, 10, 0, "|"));
    add(&ask(GUEST, op::READ, 11, 2, "home/b|"));
    let tx = [
        (op::TRANSACTION_START, "|"),
        (op::WRITE, "/local/domain/5/home/b|2"),
        (op::WRITE, "/local/domain/5/home/c|2"),
        (op::TRANSACTION_END, "T|"),
    ];
    add(&tool(&tx, (op::READ, "/local/domain/5/home/c|", "2")));
    add(&[Step::Get(GUEST, 2)]);
    add(&ask(GUEST, op::WRITE, 12, 2, "lost|1"));
    add(&ask(GUEST, op::TRANSACTION_END, 13, 2, "T|"));
    add(&[Step::Get(FULL, 2)]);
    add(&ask(KERNEL, op::DIRECTORY, 14, 0, "/local/domain/5|"));
    add(&ask(KERNEL, op::READ, 15, 0, "/local/domain/5/mine|"));
    add(&ask(KERNEL, op::READ, 16, 0, "/local/domain/5/home/b|"));
    add(&ask(KERNEL, op::CONTROL, 17, 0, "quota|5|"));
    add(&ask(KERNEL, op::CONTROL, 18, 0, "check|"));
    steps
}

/// A client of the socket.
struct Tool {
    socket: PathBuf,
    conn: Option<Conn>,
}

impl Tool {
    fn ask(&mut self, tx: u32, ty: u32, payload: &str) -> Option<Result<String, String>> {
        let answer = self.conn.as_mut()?.tx(tx, ty, payload).ok();
        self.conn.take_if(|_| answer.is_none());
        answer
    }

    fn attempt(&mut self, requests: &[(u32, String)]) -> Option<()> {
        let mut tx = 0;
        for (ty, payload) in requests {
            let answer = self.ask(tx, *ty, payload)?.unwrap_or_else(|e| panic!("{payload}: {e}"));
            if *ty == op::TRANSACTION_START {
                tx = answer.trim_end_matches('|').parse().unwrap();
            }
        }
        Some(())
    }

    fn job(&mut self, requests: &[(u32, String)], check: &(u32, String, String)) {
        let late = Instant::now() + LIMIT;
        while self.attempt(requests).is_none() {
            loop {
                assert!(Instant::now() < late, "{}: no daemon within {LIMIT:?}", check.1);
                self.conn = Conn::connect(&self.socket).ok();
                match self.ask(0, check.0, &check.1) {
                    Some(answer) if answer.as_ref() == Ok(&check.2) => return,
                    Some(_) => break,
                    None => std::thread::yield_now(),
                }
            }
        }
    }
}

/// Plays the script and returns what came over the rings.
fn play(script: &[Step], xen: &Path, socket: PathBuf) -> Vec<String> {
    let mut conns = DOMIDS.map(|domid| Conn::new(FakeGuest::create(xen, domid).unwrap()));
    let (mut tool, mut seen) = (Tool { socket, conn: None }, Vec::new());
    for (number, step) in script.iter().enumerate() {
        match step {
            Step::Send(who, bytes) => conns[*who].send(bytes).unwrap(),
            Step::Tool(requests, check) => tool.job(requests, check),
            Step::Get(who, count) => {
                for _ in 0..*count {
                    let message = conns[*who].message(LIMIT);
                    let message = message.unwrap_or_else(|e| panic!("step {number} {step:?}: {e}"));
                    let message = message.expect("a ring has no end");
                    let (id, tx, payload) = (message.req_id, message.tx_id, text(&message.payload));
                    seen.push(format!("{} {} {id} {tx} {payload:.400}", DOMIDS[*who], message.ty));
                }
            }
        }
    }
    // No more messages come on any ring.
    conns.iter_mut().for_each(|conn| conn.events(&[]).unwrap());
    seen
}

/// Returns what came over the rings when the first two processes are run by these programs, and the
/// log of the processes.
fn run(script: &[Step], wrappers: [&[String]; 2]) -> (Vec<String>, String) {
    let mut daemon = Daemon::start_under(wrappers[0]).unwrap();
    let (xen, socket) = (daemon.xen(), daemon.socket());
    let (done, pid) = (&AtomicBool::new(false), &AtomicU32::new(daemon.pid()));
    let stop = || {
        done.store(true, Ordering::SeqCst);
        let pid = Pid::from_raw(pid.load(Ordering::SeqCst).cast_signed()).unwrap();
        let _ = kill_process(pid, Signal::TERM);
    };
    std::thread::scope(|scope| {
        let follow = scope.spawn(move || {
            let mut next = [wrappers[1]].into_iter();
            loop {
                daemon.wait_for_end().unwrap();
                if done.load(Ordering::SeqCst) {
                    return daemon.log();
                }
                daemon.start_again(next.next().unwrap_or_default()).unwrap();
                pid.store(daemon.pid(), Ordering::SeqCst);
                if done.load(Ordering::SeqCst) {
                    stop();
                }
            }
        });
        let player = scope.spawn(|| play(script, &xen, socket));
        let seen = player.join();
        stop();
        let log = follow.join().unwrap();
        (seen.unwrap_or_else(|_| panic!("{log}")), log)
    })
}

/// Returns how often each call was made.
fn calls(trace: &str) -> BTreeMap<String, u32> {
    let mut calls = BTreeMap::new();
    for (call, _) in trace.lines().filter_map(|line| line.split_once('(')) {
        *calls.entry(call.to_owned()).or_default() += 1;
    }
    calls
}

/// Traces the main thread, and forwards signals.
fn strace(args: &[&str]) -> Vec<String> {
    [STRACE, "-qq", "-I2"].iter().chain(args).map(|arg| (*arg).to_owned()).collect()
}

// Fails if a process that is killed at any system call, and the next one at the same call, loses
// anything of a guest, or executes a request twice.
#[test]
fn nothing_is_lost_when_killed_at_any_system_call() {
    if !Command::new(STRACE).args(["-o", "/dev/null", "true"]).status().is_ok_and(|s| s.success()) {
        return skip("killing at every call", "strace does not work here (Debian package strace)");
    }
    let (script, dir) = (script(), tempfile::tempdir().unwrap());
    let (expected, _) = run(&script, [&[], &[]]);
    assert_eq!(expected.len(), 26, "{expected:#?}");
    let trace = dir.path().join("trace");
    let traced = strace(&["-o", trace.to_str().unwrap()]);
    assert_eq!(run(&script, [&traced, &[]]).0, expected);
    let calls = calls(&std::fs::read_to_string(trace).unwrap());
    let all: Vec<_> = calls.iter().flat_map(|(c, n)| (1..=*n).map(move |n| (c, n))).collect();
    let wanted = match std::env::var("XENSTORE_CALLS").as_deref() {
        Ok("all") => all.len(),
        number => number.ok().and_then(|n| n.parse().ok()).unwrap_or(200).min(all.len()),
    };
    let (begun, mut kills) = (Instant::now(), 0);
    for at in 0..wanted {
        let (call, n) = all[at * all.len() / wanted];
        let inject = format!("inject={call}:signal=KILL:when={n}");
        let killed = strace(&["-o", "/dev/null", "-e", &inject]);
        let (seen, log) = run(&script, [&killed, &killed]);
        assert_eq!(seen, expected, "killed at {call} number {n}\n{log}");
        assert!(!log.contains("ERROR") && !log.contains("panic"), "{call} {n}\n{log}");
        kills += log.matches("recovered its journal").count();
    }
    eprintln!(
        "{wanted} of {} calls in {:?}; {kills} times from a journal",
        all.len(),
        begun.elapsed()
    );
}
