//! Systemd stores the listening socket while no process runs.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use xenstore_tests::fdstore::FdStore;
use xenstore_tests::peers;
use xenstore_tests::raw::{Conn, op};

/// The name under which the daemon stores it.
const STORED: &str = "xenstored-listener";

/// A test double for systemd, and the directory of a daemon.
struct Systemd {
    dir: tempfile::TempDir,
    fdstore: FdStore,
}

impl Systemd {
    fn new() -> Systemd {
        let dir = tempfile::tempdir().unwrap();
        let fdstore = FdStore::new(dir.path()).unwrap();
        Systemd { dir, fdstore }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Starts the daemon with the stored descriptors.
    fn start(&self) -> Process {
        let mut command = Command::new(peers::program("xenstored").unwrap());
        command.args(["-N", "--journal"]).arg(self.dir.path()).arg("--socket").arg(self.socket());
        Process(self.fdstore.run(&command).unwrap().spawn().unwrap())
    }

    /// Waits for this message of the daemon.
    fn await_message(&mut self, what: &str) {
        while !self.fdstore.message(Duration::from_secs(60)).unwrap().lines().any(|l| l == what) {}
    }
}

/// A daemon that is killed on drop.
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

/// The frame of a READ, with id 0.
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

// Fails if a socket that systemd has opened is not used, is stored a second time, or is removed
// when the daemon stops, after a live update or without one.
#[test]
fn socket_opened_by_systemd_is_used_and_not_removed() {
    let mut systemd = Systemd::new();
    let socket = OwnedFd::from(UnixListener::bind(systemd.socket()).unwrap());
    systemd.fdstore.stored.push(("xenstored.socket".into(), socket));
    for updates in 0..2 {
        let mut child = systemd.start();
        assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
        (0..updates).for_each(|_| update(&systemd.socket()));
        child.stop();
        assert!(systemd.socket().exists());
    }
    for text in systemd.fdstore.messages().unwrap() {
        assert!(!text.contains("FDSTORE=1"), "{text}");
    }
}

// Fails if a client that connects while no process runs is refused or gets no reply, if the next
// process creates a second socket, or if a stopped daemon leaves anything behind, in the directory
// or in systemd.
#[test]
fn client_that_connects_during_a_restart_is_served() {
    let mut systemd = Systemd::new();
    let first = systemd.start();
    systemd.await_message("FDSTORE=1");
    assert!(systemd.fdstore.number(STORED).is_some());
    assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
    // Killed.
    drop(first);
    let mut client = UnixStream::connect(systemd.socket()).expect("the backlog");
    client.write_all(&read(b"/a\0")).unwrap();
    let mut second = systemd.start();
    answer(&mut client, b"1");
    assert_eq!(ask(&systemd.socket(), op::READ, "/a|"), "1");
    // After a live update the socket is stored as well, and removed at a stop.
    update(&systemd.socket());
    second.stop();
    systemd.fdstore.messages().unwrap();
    assert_eq!(systemd.fdstore.stored.len(), 0);
    assert!(!systemd.socket().exists());
}

// Fails if a descriptor that is not a listening socket, or is the socket of another path, is
// adopted, prevents the start of the daemon, or remains stored instead of the right one.
#[test]
fn wrong_stored_socket_is_not_adopted() {
    let mut systemd = Systemd::new();
    let elsewhere = UnixListener::bind(systemd.dir.path().join("other"));
    let wrong: [OwnedFd; 3] = [
        tempfile::tempfile().unwrap().into(),
        UnixStream::pair().unwrap().0.into(),
        elsewhere.unwrap().into(),
    ];
    for descriptor in wrong {
        systemd.fdstore.stored = vec![(STORED.into(), descriptor)];
        let wrong = systemd.fdstore.stored[0].1.try_clone().unwrap();
        let mut child = systemd.start();
        systemd.await_message("FDSTORE=1");
        assert_eq!(ask(&systemd.socket(), op::WRITE, "/a|1"), "OK|");
        let [(_, kept)] = &systemd.fdstore.stored[..] else { panic!("{:?}", systemd.fdstore) };
        let inode = |descriptor| rustix::fs::fstat(descriptor).unwrap().st_ino;
        assert_ne!(inode(kept), inode(&wrong));
        child.stop();
        systemd.fdstore.messages().unwrap();
    }
}
