//! The daemon as a process: start, stop, invalid options, misuse.
#![allow(clippy::print_stderr)] // figures, for the reader of the test's output

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

struct Daemon {
    child: Child,
    dir: TempDir,
    line: String,
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
    command.env_remove("XENSTORED_PATH").env("XENSTORED_RUNDIR", dir);
    // Removed with the directory, also if the daemon is not stopped.
    command.arg("--journal").arg(dir);
    command.stdin(Stdio::null());
    command
}

impl Daemon {
    /// Starts one and waits for its one line.
    fn start(args: &[&str]) -> Daemon {
        Daemon::start_with_log(args, Stdio::inherit())
    }

    /// The same with its log somewhere else.
    fn start_with_log(args: &[&str], log: Stdio) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let mut command = command(dir.path());
        command.args(args).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Daemon { child, dir, line }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Resident memory in KiB.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Names of its threads.
    fn threads(&self) -> Vec<String> {
        let all = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let name = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("comm")).unwrap();
        let mut names: Vec<_> = all.map(|entry| name(entry.unwrap())).collect();
        names.sort_unstable();
        names
    }

    fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn frame(ty: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&[ty, 1, 0, len].map(u32::to_le_bytes).concat(), payload].concat()
}

/// A request and its answer: type and payload.
fn ask(stream: &mut UnixStream, ty: u32, payload: &[u8]) -> (u32, Vec<u8>) {
    stream.write_all(&frame(ty, payload)).unwrap();
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(12) as usize];
    stream.read_exact(&mut payload).unwrap();
    (word(0), payload)
}

const READ: u32 = 2;
const WRITE: u32 = 11;

// Fails if the one line does not say where and what next, or SIGTERM leaves anything behind.
#[test]
fn says_where_it_is_and_stops_on_sigterm() {
    let mut daemon = Daemon::start(&["-N"]);
    let socket = daemon.socket();
    let path = socket.to_str().unwrap();
    assert!(daemon.line.contains(path) && daemon.line.contains("xenstore-ls"), "{}", daemon.line);
    assert_eq!(ask(&mut daemon.connect(), WRITE, b"/a\0v"), (WRITE, b"OK\0".to_vec()));
    daemon.signal(rustix::process::Signal::TERM);
    assert!(daemon.child.wait().unwrap().success());
    assert!(!socket.exists());
}

// Fails if a daemon whose socket is on a disk keeps its journal there, or leaves it in memory when it
// stops.
#[test]
fn a_journal_is_not_on_a_disk_and_goes_with_the_daemon() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
    command.args(["-N", "--socket"]).arg(dir.path().join("socket")).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let path = dir.path().canonicalize().unwrap();
    let memory = format!("/dev/shm/xenstored-{}{}", path.metadata().unwrap().uid(), path.display());
    let is_memory = rustix::fs::statfs(&path).unwrap().f_type == 0x0102_1994;
    let journal = if is_memory { path } else { memory.into() }.join("socket.journal/journal.1");
    assert!(journal.exists(), "{}", journal.display());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!journal.parent().unwrap().exists());
}

// Fails if a daemon with a pid file does not go to the background, or two share a pid file.
#[test]
fn goes_to_the_background_with_a_locked_pid_file() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let start = |run: &str| {
        let mut command = command(&dir.path().join(run));
        command.arg("--pid-file").arg(&pid_file).output().unwrap()
    };
    // The daemon keeps our end of standard error open, so that its end cannot be waited for.
    let mut first = command(&dir.path().join("1"));
    first.arg("--pid-file").arg(&pid_file).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(first.status().unwrap().success());
    // It answers by the time that the first process has ended.
    let mut stream = UnixStream::connect(dir.path().join("1/socket")).unwrap();
    assert_eq!(ask(&mut stream, READ, b"/tool\0").0, READ);
    let second = start("2");
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{text}");
    assert!(text.contains("another daemon runs") && text.lines().count() == 1, "{text}");
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap(); // ends when the daemon does
}

/// What systemd has been told so far.
fn told(systemd: &UnixDatagram) -> Option<String> {
    let mut message = [0; 200];
    let len = systemd.recv(&mut message).ok()?;
    Some(String::from_utf8_lossy(&message[..len]).trim_end().to_owned())
}

/// Returns the first message that does not store a descriptor; those precede `READY=1`, so that a
/// daemon that is killed just after it has its descriptors back.
fn after_stored(systemd: &UnixDatagram) -> Option<String> {
    loop {
        let message = told(systemd)?;
        if !message.starts_with("FDSTORE=1\n") {
            return Some(message);
        }
    }
}

/// A socket as systemd has it for a unit of Type=notify, and a daemon that uses it.
fn under_systemd(dir: &Path) -> (UnixDatagram, Command) {
    let systemd = UnixDatagram::bind(dir.join("notify")).unwrap();
    let mut command = command(dir);
    command.env("NOTIFY_SOCKET", dir.join("notify")).arg("--pid-file").arg(dir.join("pid"));
    (systemd, command)
}

// Fails if the daemon does not notify the watchdog of systemd regularly, or notifies it although the main
// thread does not run its tasks.
#[test]
fn systemd_notices_a_daemon_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let (systemd, mut command) = under_systemd(dir.path());
    command.arg("-N").env("WATCHDOG_USEC", "400000").stdout(Stdio::null());
    let mut daemon = Daemon { child: command.spawn().unwrap(), dir, line: String::new() };
    systemd.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut heard = 0;
    while heard < 3 {
        heard += usize::from(told(&systemd).unwrap() == "WATCHDOG=1");
    }
    daemon.signal(rustix::process::Signal::STOP);
    // What it said before it stopped, and then nothing more.
    systemd.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
    while told(&systemd).is_some_and(|text| text == "WATCHDOG=1") {
        heard += 1;
    }
    assert!(heard < 6, "{heard}");
    daemon.signal(rustix::process::Signal::CONT);
    assert_eq!(told(&systemd).as_deref(), Some("WATCHDOG=1"));
    daemon.child.kill().unwrap();
}

// Fails if systemd is notified before the daemon answers and its pid file is written, or of a start
// that fails.
#[test]
fn systemd_is_notified_when_the_daemon_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (systemd, mut command) = under_systemd(dir.path());
    let child = command.arg("-N").stdout(Stdio::null()).spawn().unwrap();
    let mut daemon = Daemon { child, dir, line: String::new() };
    systemd.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    assert_eq!(after_stored(&systemd).as_deref(), Some("READY=1"));
    let pid = fs::read_to_string(daemon.dir.path().join("pid")).unwrap();
    assert_eq!(pid.trim(), daemon.child.id().to_string());
    assert_eq!(ask(&mut daemon.connect(), READ, b"/tool\0").0, READ);
    daemon.signal(rustix::process::Signal::TERM);
    daemon.child.wait().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let (systemd, mut command) = under_systemd(dir.path());
    command.args(["-N", "--socket", "/proc/socket"]).stderr(Stdio::null());
    assert_eq!(command.status().unwrap().code(), Some(1));
    systemd.set_nonblocking(true).unwrap();
    assert_eq!(told(&systemd), None);
}

// Fails if the process in the foreground ends before systemd has been told, as launch-xenstore has
// it, or the pid file has another process than the one that stays.
#[test]
fn systemd_is_notified_before_the_foreground_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (systemd, mut command) = under_systemd(dir.path());
    let mut foreground = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(foreground.wait().unwrap().success());
    systemd.set_nonblocking(true).unwrap();
    assert_eq!(after_stored(&systemd).as_deref(), Some("READY=1"));
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    let program = fs::read_link(format!("/proc/{}/exe", pid.trim())).unwrap();
    assert_eq!(program, Path::new(env!("CARGO_BIN_EXE_xenstored")));
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let mut stream = UnixStream::connect(dir.path().join("socket")).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap(); // ends when the daemon does
}

// Fails if a mistake is not told in one line that names it, with status 2, or 1 for trouble.
#[test]
fn mistakes_are_one_line_and_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("conf");
    fs::write(&conf, "quota-maxwatch = lots\n").unwrap();
    let conf = conf.to_str().unwrap();
    for (args, status, name) in [
        (&["--bogus"][..], 2, "--bogus"),
        (&["-W", "many"], 2, "many"),
        (&["-Q", "nodes"], 2, "--quota nodes"),
        (&["--config-file", conf], 2, "quota-maxwatch"),
        (&["--config-file", "/nonexistent"], 2, "/nonexistent"),
        (&["-T", "/nonexistent/trace"], 1, "/nonexistent/trace"),
        (&["--socket", "/proc/socket"], 1, "/proc/socket"),
    ] {
        let output = command(dir.path()).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
        assert!(text.contains(name) && text.lines().count() == 1, "{args:?}: {text}");
    }
}

// Fails if garbage on one connection is felt by another, or ends anything but its own connection.
#[test]
fn garbage_ends_its_own_connection_only() {
    let daemon = Daemon::start(&["-N"]);
    let mut good = daemon.connect();
    let mut state = 88_172_645_463_325_252_u64;
    let mut garbage = |len: usize| -> Vec<u8> {
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| byte()).collect()
    };
    for round in 0..200 {
        let mut bad = daemon.connect();
        let bytes = match round % 4 {
            0 => garbage(500),
            1 => frame(WRITE, b"/half\0")[..19].to_vec(),
            2 => [2_u32, 1, 0, u32::MAX].map(u32::to_le_bytes).concat(),
            _ => [2_u32, 1, 0, 4097].map(u32::to_le_bytes).concat(),
        };
        // The daemon may end it while we still write.
        let _ = bad.write_all(&bytes);
        if round % 4 > 1 {
            let mut rest = Vec::new();
            let _ = bad.read_to_end(&mut rest);
            assert!(rest.is_empty(), "a frame that is too long is not answered");
        }
        assert_eq!(ask(&mut good, WRITE, b"/good\0yes").0, WRITE);
    }
    assert_eq!(ask(&mut good, READ, b"/good\0"), (READ, b"yes".to_vec()));
    assert_eq!(ask(&mut good, READ, b"/half\0").0, 16);
}

// Fails if connections leave memory or descriptors behind.
#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let daemon = Daemon::start(&["-N"]);
    let mut good = daemon.connect();
    let mut round = || {
        for _ in 0..50 {
            let streams: Vec<UnixStream> = (0..200).map(|_| daemon.connect()).collect();
            drop(streams);
        }
        // Everything before has been accepted, and most of it ended.
        assert_eq!(ask(&mut daemon.connect(), WRITE, b"/a\0v").0, WRITE);
        assert_eq!(ask(&mut good, WRITE, b"/a\0v").0, WRITE);
    };
    round(); // lets the allocator settle
    let (memory, mut descriptors) = (daemon.memory(), daemon.descriptors());
    round();
    // Descriptors are closed when their tasks get their turn; each answer gives them one.
    let after = (0..10_000).find_map(|_| {
        assert_eq!(ask(&mut good, READ, b"/a\0").0, READ);
        descriptors = daemon.descriptors();
        (descriptors < 30).then_some(daemon.memory())
    });
    let after = after.unwrap_or_else(|| panic!("{descriptors} descriptors are open"));
    eprintln!(
        "10,000 connections: {memory} KiB before, {after} KiB after, {descriptors} descriptors"
    );
    assert!(after < memory + 2048, "{memory} KiB became {after} KiB");
}

// Fails if a client that never reads makes the daemon keep its answers, or delays others.
#[test]
fn a_reader_that_never_reads_costs_a_bounded_amount() {
    let daemon = Daemon::start(&["-N"]);
    let mut good = daemon.connect();
    let value = [b'v'; 4000];
    assert_eq!(ask(&mut good, WRITE, &[b"/big\0", &value[..]].concat()).0, WRITE);
    let mut greedy = daemon.connect();
    greedy.set_nonblocking(true).unwrap();
    let before = daemon.memory();
    // 4,000 bytes for each 21: until the daemon takes no more.
    let requests = frame(READ, b"/big\0").repeat(100);
    let mut sent = 0;
    let mut refused = 0;
    while refused < 50 {
        match greedy.write(&requests) {
            Ok(count) => sent += count,
            Err(_) => refused += 1,
        }
        assert_eq!(ask(&mut good, READ, b"/big\0").0, READ);
    }
    // The same with events: it watches and does not read.
    let mut deaf = daemon.connect();
    deaf.write_all(&frame(4, b"/\0token\0")).unwrap();
    for i in 0..20_000 {
        assert_eq!(ask(&mut good, WRITE, format!("/w/{}\0v", i % 5000).as_bytes()).0, WRITE);
    }
    let after = daemon.memory();
    eprintln!("requests of {sent} bytes sent and not read: {before} KiB before, {after} KiB after");
    assert!(after < before + 8192, "{before} KiB became {after} KiB");
}

/// Breaks the protocol on so many connections; each is a line in the log.
fn break_protocol(daemon: &Daemon, count: u32) {
    for _ in 0..count {
        let mut bad = daemon.connect();
        bad.write_all(&[2_u32, 1, 0, 4097].map(u32::to_le_bytes).concat()).unwrap();
        assert_eq!(bad.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    }
}

// Fails if requests, the trace, signals or the exit wait for a log that no process reads.
#[test]
fn a_log_that_is_not_read_stops_nothing() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    while writer.write(b"x").is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let daemon = Daemon::start_with_log(&["-N"], writer.into());
    let mut good = daemon.connect();
    break_protocol(&daemon, 1000);
    for _ in 0..1000 {
        assert_eq!(ask(&mut good, 0, b"print\0text\0").1, b"OK\0");
    }
    daemon.signal(rustix::process::Signal::HUP);
    assert_eq!(ask(&mut good, WRITE, b"/a\0v"), (WRITE, b"OK\0".to_vec()));
    daemon.stop();
    drop(reader);
}

// Fails if clients can make the log grow as fast as they like, or if it does not say how many lines are
// missing.
#[test]
fn lines_that_clients_cause_have_a_rate() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let daemon = Daemon::start_with_log(&["-N"], writer.into());
    break_protocol(&daemon, 1000);
    daemon.stop();
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    let written = log.matches("protocol error").count();
    // 100 at once, and 10 a second meanwhile.
    assert!((100..700).contains(&written), "{written}");
    let suppressed = log.lines().filter_map(|line| line.strip_prefix("xenstored: suppressed "));
    let counts = suppressed.map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap());
    assert_eq!(counts.sum::<usize>() + written, 1000, "{log}");
}

// Fails if a signal that the daemon does not use ends it.
#[test]
fn other_signals_do_not_end_it() {
    use rustix::process::Signal;
    let daemon = Daemon::start(&["-N"]);
    let mut good = daemon.connect();
    for signal in [Signal::USR1, Signal::USR2, Signal::HUP, Signal::PIPE, Signal::ALARM] {
        daemon.signal(signal);
        assert_eq!(ask(&mut good, WRITE, b"/a\0v"), (WRITE, b"OK\0".to_vec()), "{signal:?}");
    }
    daemon.stop();
}

// Fails if a daemon without free descriptors says so more than once, does not serve who waits when there
// are some again, or does not say that.
#[test]
fn client_that_cannot_be_accepted_is_logged_once() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let (mut reader, writer) = std::io::pipe().unwrap();
    let daemon = Daemon::start_with_log(&["-N"], writer.into());
    let mut good = daemon.connect();
    assert_eq!(ask(&mut good, WRITE, b"/a\0v").0, WRITE);
    let pid = Some(Pid::from_child(&daemon.child));
    let limit = |current| Rlimit { current: Some(current), maximum: Some(4096) };
    prlimit(pid, Resource::Nofile, limit(daemon.descriptors() as u64)).unwrap();
    let mut waiting = daemon.connect();
    waiting.write_all(&frame(READ, b"/a\0")).unwrap();
    // Until it has been tried more than once.
    let started = std::time::Instant::now();
    while started.elapsed() < std::time::Duration::from_millis(300) {
        assert_eq!(ask(&mut good, READ, b"/a\0").0, READ);
    }
    prlimit(pid, Resource::Nofile, limit(4096)).unwrap();
    let mut answer = [0; 17];
    waiting.read_exact(&mut answer).unwrap();
    assert_eq!(&answer[16..], b"v");
    // The one that waited may have had the last descriptor.
    assert_eq!(ask(&mut daemon.connect(), READ, b"/a\0").0, READ);
    daemon.stop();
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    assert_eq!(log.matches("cannot accept a client").count(), 1, "{log}");
    assert_eq!(log.matches("accepting clients again").count(), 1, "{log}");
}

// Fails if something needs a thread that is not there from the start: when the limit of processes has
// been reached it would wait for ever, or panic. The trace has one from when it is asked for.
#[test]
fn no_thread_is_made_while_it_serves() {
    let daemon = Daemon::start(&["-N"]);
    let mut good = daemon.connect();
    assert_eq!(ask(&mut good, WRITE, b"/a\0v").0, WRITE);
    let threads = daemon.threads();
    break_protocol(&daemon, 10);
    daemon.signal(rustix::process::Signal::HUP);
    daemon.signal(rustix::process::Signal::USR1);
    assert_eq!(ask(&mut good, 0, b"memreport\0").0, 16);
    assert_eq!(ask(&mut good, READ, b"/a\0").0, READ);
    assert_eq!(daemon.threads(), threads);
    daemon.stop();
}
