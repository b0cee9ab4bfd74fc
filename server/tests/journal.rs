//! The journal of a daemon process: its directory, its lock, its memory and its threads.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

const READ: u32 = 2;
const WRITE: u32 = 11;
const PROGRAM: &str = env!("CARGO_BIN_EXE_xenstored");

/// A directory on a tmpfs to which all users may write, like /tmp.
fn shared_dir() -> TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o1777)).unwrap();
    dir
}

struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn spawn(command: &mut Command, socket: PathBuf) -> Daemon {
        command.env_remove("XENSTORED_PATH").env_remove("XENSTORED_RUNDIR");
        command.arg("-N").arg("--socket").arg(&socket).stdin(Stdio::null());
        let log = fs::File::options().create(true).append(true).open(log_of(&socket)).unwrap();
        let mut child = command.stderr(log).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Daemon { child, socket }
    }

    fn start(socket: PathBuf) -> Daemon {
        Daemon::spawn(&mut Command::new(PROGRAM), socket)
    }

    fn log(&self) -> String {
        fs::read_to_string(log_of(&self.socket)).unwrap()
    }

    /// Sends these requests at once. Returns the payloads of the replies.
    fn ask(&self, ty: u32, payloads: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let frame = |payload: &Vec<u8>| {
            let len = u32::try_from(payload.len()).unwrap();
            [&[ty, 1, 0, len].map(u32::to_le_bytes).concat(), &payload[..]].concat()
        };
        let frames = payloads.iter().flat_map(frame).collect::<Vec<u8>>();
        let mut writer = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || writer.write_all(&frames).unwrap());
        let answer = |_: &Vec<u8>| {
            let mut header = [0; 16];
            stream.read_exact(&mut header).unwrap();
            let len = u32::from_le_bytes(header[12..].try_into().unwrap());
            let mut payload = vec![0; len as usize];
            stream.read_exact(&mut payload).unwrap();
            payload
        };
        let answers = payloads.iter().map(answer).collect();
        writer.join().unwrap();
        answers
    }

    fn write(&self, path: &str, value: &[u8]) {
        assert_eq!(self.ask(WRITE, &[[path.as_bytes(), b"\0", value].concat()]), [b"OK\0"]);
    }

    fn read(&self, path: &str) -> Vec<u8> {
        self.ask(READ, &[[path.as_bytes(), b"\0"].concat()]).remove(0)
    }

    /// Writes `count` nodes of 3,000 bytes.
    fn fill(&self, count: usize, byte: u8) {
        let node = |at: usize| [format!("/n/{at}\0").as_bytes(), &[byte; 3000]].concat();
        let answers = self.ask(WRITE, &(0..count).map(node).collect::<Vec<_>>());
        assert!(answers.iter().all(|answer| answer == b"OK\0"));
    }

    /// Kills the daemon and starts another one.
    fn restart(mut self) -> Daemon {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Daemon::start(self.socket.clone())
    }

    /// Returns a field of `/proc/PID/status`, in KiB.
    fn memory(&self, what: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(what)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_of(socket: &Path) -> PathBuf {
    socket.with_extension("log")
}

// Fails if daemons whose sockets are in one directory share a journal, if one recovers the journal of
// another, or if other users can open them.
#[test]
fn daemons_in_one_directory_have_separate_journals() {
    let dir = shared_dir();
    let [one, two] = ["one", "two"].map(|name| Daemon::start(dir.path().join(name)));
    one.write("/a", b"1");
    two.write("/a", b"2");
    let (one, two) = (one.restart(), two.restart());
    assert_eq!([one.read("/a"), two.read("/a")], [b"1", b"2"]);
    drop(one);
    let three = Daemon::start(dir.path().join("three"));
    assert_eq!(three.read("/a"), b"ENOENT\0");
    for name in ["one", "two", "three"] {
        let journal = dir.path().join(format!("{name}.journal"));
        assert_eq!(fs::metadata(journal).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

// Fails if a daemon starts with a journal that another process uses, or if the error does not name that
// process.
#[test]
fn a_journal_in_use_is_an_error_that_names_the_process() {
    let dir = shared_dir();
    let journal = dir.path().join("journal");
    let mut command = Command::new(PROGRAM);
    let one = Daemon::spawn(command.arg("--journal").arg(&journal), dir.path().join("one"));
    let mut command = Command::new(PROGRAM);
    command.arg("-N").arg("--journal").arg(&journal).arg("--socket").arg(dir.path().join("two"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    let pid = format!("process {} has it locked", one.child.id());
    assert!(text.contains(&pid) && text.contains("journal/journal.1"), "{text}");
}

// Fails if an object that another user has put in place of the directory is read, written or waited for,
// prevents the daemon from serving, or is not logged.
#[test]
fn a_directory_of_another_user_is_not_used() {
    let dir = shared_dir();
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    symlink(&theirs, dir.path().join("s.journal")).unwrap();
    let daemon = Daemon::start(dir.path().join("s"));
    daemon.write("/a", b"secret");
    assert!(fs::read_dir(&theirs).unwrap().next().is_none());
    let log = daemon.log();
    assert!(log.contains("there is no journal") && log.contains("s.journal"), "{log}");
    drop(daemon);
    let mut command = Command::new(PROGRAM);
    let output = command.arg("-N").arg("--journal").arg(dir.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("--journal") && text.contains("other users may write to it"), "{text}");
}

// Fails if recovery takes more memory than the store and the program need: with a limit that was enough
// before, each recovery would end the daemon.
#[test]
fn recovery_takes_no_more_memory_than_the_store() {
    let dir = shared_dir();
    let daemon = Daemon::start(dir.path().join("s"));
    let own = daemon.memory("VmRSS");
    daemon.fill(10_000, b'a');
    let store = daemon.memory("RssAnon");
    assert!(store > 30_000, "{store} KiB");
    let daemon = daemon.restart();
    assert_eq!(daemon.read("/n/9999"), [b'a'; 3000]);
    let peak = daemon.memory("VmHWM");
    assert!(peak < own + store * 12 / 10, "{peak} KiB for a store of {store} KiB");
}

// Fails if the journal needs a thread after the start of the daemon, or if the daemon starts without the
// threads that it needs.
#[test]
fn all_threads_are_started_with_the_daemon() {
    const USER: u32 = 54_321;
    let dir = shared_dir();
    let (program, home) = (dir.path().join("xenstored"), dir.path().join("home"));
    fs::copy(PROGRAM, &program).unwrap();
    fs::create_dir(&home).unwrap();
    // The limit does not hold for root.
    if std::os::unix::fs::chown(&home, Some(USER), Some(USER)).is_err() {
        return;
    }
    let limited = |count: u32, socket: &str| {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nproc={count}")).arg(&program).uid(USER).gid(USER);
        command.current_dir(&home);
        (command, home.join(socket))
    };
    let (mut command, socket) = limited(1, "none");
    let output = command.arg("-N").arg("--socket").arg(socket).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot") && text.contains("temporarily unavailable"), "{text}");
    // The smallest limit with which it starts is enough for rotations.
    let start = |count| {
        let (mut command, socket) = limited(count, "s");
        let daemon = Daemon::spawn(&mut command, socket);
        UnixStream::connect(&daemon.socket).is_ok().then_some(daemon)
    };
    let daemon = (2..20).find_map(start).unwrap();
    let newest = || {
        let names = fs::read_dir(home.join("s.journal")).unwrap().flatten();
        let number = |name: String| name.strip_prefix("journal.")?.parse::<u64>().ok();
        names.filter_map(|entry| number(entry.file_name().into_string().unwrap())).max()
    };
    // Each segment replaces the one before; the last rotation may be incomplete.
    while newest() < Some(4) {
        daemon.fill(1500, b'a');
    }
    assert_eq!(daemon.read("/n/1499"), [b'a'; 3000]);
}
