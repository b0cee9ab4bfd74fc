//! Systemd keeps the listening socket while there is no process.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use xenstore_tests::peers;
use xenstore_tests::raw::{Conn, op};

/// What the daemon calls it.
const KEPT: &str = "xenstored-listener";

/// A part of systemd: what is told to it, and what it keeps.
struct Systemd {
    dir: tempfile::TempDir,
    notify: UnixDatagram,
}

impl Systemd {
    fn new() -> Systemd {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Systemd { dir, notify }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the daemon, with a descriptor of this name, as systemd does: as number 3, and with a
    /// variable that says for which process.
    fn start(&self, given: Option<(OwnedFd, &str)>) -> Process {
        let mut command = Command::new("sh");
        let how = given.as_ref().map_or(String::new(), |(_, name)| {
            format!("exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_FDNAMES={name} LISTEN_PID=$$")
        });
        command.arg("-c").arg(format!("{how} exec \"$@\"")).arg("sh");
        command.arg(peers::program("xenstored").unwrap()).args(["-N", "--journal"]);
        command.arg(self.dir.path()).arg("--socket").arg(self.socket());
        command.env("NOTIFY_SOCKET", self.dir.path().join("notify"));
        let input = given.map_or(Stdio::null(), |(descriptor, _)| Stdio::from(descriptor));
        command.stdin(input).stdout(Stdio::null());
        Process(command.spawn().unwrap())
    }

    /// The next message, and the descriptor that comes with it.
    fn message(&self) -> (String, Option<OwnedFd>) {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(&self.notify, &mut parts, &mut control, flags).unwrap().bytes;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        (String::from_utf8_lossy(&bytes[..count]).into_owned(), descriptor)
    }

    /// Waits until it is told this; what came with it.
    fn told(&self, what: &str) -> Option<OwnedFd> {
        loop {
            let (text, descriptor) = self.message();
            if text.lines().any(|line| line == what) {
                return descriptor;
            }
        }
    }
}

/// A daemon that ends with this at the latest.
struct Process(Child);

impl Process {
    fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// READ of `/a`, without an id.
fn read(path: &[u8]) -> Vec<u8> {
    let len = u32::try_from(path.len()).unwrap();
    [&[op::READ, 0, 0, len].map(u32::to_le_bytes).concat(), path].concat()
}

fn answer(stream: &mut UnixStream, expected: &[u8]) {
    let mut answer = vec![0; 16 + expected.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer[16..], expected);
}

fn ask(socket: &Path, ty: u32, payload: &str) -> String {
    Conn::connect(socket).unwrap().ok(ty, payload).unwrap()
}

fn update(socket: &Path) {
    let program = peers::program("xenstored").unwrap();
    let mut control = Conn::connect(socket).unwrap();
    control.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    control.gives(op::CONTROL, "live-update|-s|", "OK|").unwrap();
}

// Fails if a socket that systemd has opened is not used, kept a second time, or gone when the daemon
// stops, with another program in its place or not.
#[test]
fn a_socket_of_systemd_is_its_own() {
    let systemd = Systemd::new();
    let socket = UnixListener::bind(systemd.socket()).unwrap();
    for updates in 0..2 {
        let given = socket.try_clone().unwrap().into();
        let mut child = systemd.start(Some((given, "xenstored.socket")));
        assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
        (0..updates).for_each(|_| update(&systemd.socket()));
        child.stop();
        assert!(systemd.socket().exists());
    }
    systemd.notify.set_nonblocking(true).unwrap();
    let mut text = [0; 4096];
    while let Ok(count) = systemd.notify.recv(&mut text) {
        let text = String::from_utf8_lossy(&text[..count]);
        assert!(!text.contains("FDSTORE=1"), "{text}");
    }
}

// Fails if a client that comes while there is no process is refused or not answered, if the next
// process has a socket that it did not need, or if a daemon that was stopped leaves something behind,
// here or with systemd.
#[test]
fn a_client_that_comes_while_there_is_no_process_is_answered() {
    let systemd = Systemd::new();
    let first = systemd.start(None);
    let kept = systemd.told("FDSTORE=1").expect("a descriptor");
    assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
    // Killed.
    drop(first);
    let mut client = UnixStream::connect(systemd.socket()).expect("the backlog");
    client.write_all(&read(b"/a\0")).unwrap();
    let mut second = systemd.start(Some((kept, KEPT)));
    answer(&mut client, b"1");
    assert_eq!(ask(&systemd.socket(), op::READ, "/a|"), "1");
    // Another program in its place has it as well, and stops like it.
    update(&systemd.socket());
    second.stop();
    systemd.told("FDSTOREREMOVE=1");
    assert!(!systemd.socket().exists());
}

// Fails if a descriptor that is none of a listening socket, or of one elsewhere, is taken, or keeps
// the daemon from starting.
#[test]
fn another_descriptor_is_not_taken() {
    let systemd = Systemd::new();
    let elsewhere = UnixListener::bind(systemd.dir.path().join("other"));
    let wrong: [OwnedFd; 3] = [
        tempfile::tempfile().unwrap().into(),
        UnixStream::pair().unwrap().0.into(),
        elsewhere.unwrap().into(),
    ];
    for descriptor in wrong {
        let mut child = systemd.start(Some((descriptor, KEPT)));
        systemd.told("READY=1");
        assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
        child.stop();
    }
}
