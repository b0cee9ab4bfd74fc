//! Event channels that systemd stores while no process runs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use xenstore_tests::fake_guest::{FakeGuest, PORT, set_state};
use xenstore_tests::peers::{self, Daemon, Kind};
use xenstore_tests::raw::{Conn, op};
use xenstore_tests::skip;

/// The name under which the daemon stores them.
const STORED: &str = "xenstored-evtchn";

/// Kind, domid and remote port of each bound port (`tests/peers/README.md`).
pub(super) type Table = BTreeMap<usize, [u32; 3]>;

const ENTRY: usize = 16;
const INTERDOMAIN: u32 = 1;
const VIRQ: [u32; 3] = [2, u32::MAX, 3];

pub(super) fn table(xen: &Path) -> Table {
    let bytes = std::fs::read(xen.join("ports")).unwrap();
    let words = |entry: &[u8]| {
        [0, 4, 8].map(|at| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()))
    };
    let entries = bytes.chunks(ENTRY).map(words).enumerate();
    entries.filter(|(_, entry)| entry[0] != 0).collect()
}

fn set(xen: &Path, port: usize, entry: [u32; 3]) {
    let path = xen.join("ports");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[port * ENTRY..][..12].copy_from_slice(&entry.map(u32::to_le_bytes).concat());
    std::fs::write(path, bytes).unwrap();
}

pub(super) fn port_of(table: &Table, domid: u32) -> usize {
    let mut ports = table.iter().filter(|(_, entry)| entry[..2] == [INTERDOMAIN, domid]);
    let port = *ports.next().unwrap_or_else(|| panic!("{domid} in {table:?}")).0;
    assert!(ports.next().is_none(), "{domid} twice in {table:?}");
    port
}

/// A host with two guests, whose ports would change if they were bound again.
struct Host {
    daemon: Daemon,
    dom0: Conn,
    guests: [Conn; 2],
    round: u32,
}

impl Host {
    fn new() -> Host {
        let daemon = Daemon::start_with_fdstore().unwrap();
        let mut dom0 = Conn::connect(&daemon.socket()).unwrap();
        dom0.watch("@releaseDomain|gone|").unwrap();
        let guests = [4, 5, 6].map(|domid| {
            let guest = FakeGuest::create(&daemon.xen(), domid).unwrap();
            dom0.gives(op::INTRODUCE, &format!("{domid}|1|{PORT}|"), "OK|").unwrap();
            let home = format!("/local/domain/{domid}|");
            dom0.ok(op::WRITE, &home).unwrap();
            dom0.ok(op::SET_PERMS, &format!("{home}n{domid}|")).unwrap();
            Conn::new(guest)
        });
        dom0.gives(op::RELEASE, "4|", "OK|").unwrap();
        let [_, guests @ ..] = guests;
        let mut host = Host { daemon, dom0, guests, round: 0 };
        host.guests.iter_mut().for_each(|guest| guest.watch("n|w|").unwrap());
        host.assert_served();
        host
    }

    /// Each guest gets each reply once.
    fn assert_served(&mut self) {
        self.round += 1;
        for guest in &mut self.guests {
            guest.gives(op::WRITE, &format!("n|{}", self.round), "OK|").unwrap();
            guest.event("n|w|").unwrap();
            guest.events(&[]).unwrap();
        }
    }

    /// Kills the daemon and returns the ports that were bound.
    fn kill(&mut self) -> Table {
        let before = table(&self.daemon.xen());
        self.daemon.kill().unwrap();
        self.daemon.fdstore.as_mut().unwrap().messages().unwrap();
        before
    }

    /// Starts the daemon again.
    fn restart(&mut self) {
        self.daemon.start_again(&[]).unwrap();
        self.daemon.wait().unwrap();
        self.dom0 = Conn::connect(&self.daemon.socket()).unwrap();
    }

    fn is_stored(&mut self) -> bool {
        let fdstore = self.daemon.fdstore.as_mut().unwrap();
        fdstore.messages().unwrap();
        fdstore.number(STORED).is_some()
    }

    fn expect(&self, line: &str) {
        let log = self.daemon.log();
        assert!(log.contains(line), "no {line:?} in\n{log}");
    }
}

// Fails if the next process binds ports again, misses an event that came while no process ran, or
// leaves a port bound when it is stopped.
#[test]
fn bound_ports_survive_a_crash() {
    let mut host = Host::new();
    for _ in 0..3 {
        let before = host.kill();
        assert!(port_of(&before, 5) > 3, "{before:?}");
        // An event while no process runs, and one that is pending.
        host.guests[0].send(&xenstore_tests::raw::frame(op::WRITE, 77, 0, b"x\x001")).unwrap();
        host.restart();
        assert_eq!(table(&host.daemon.xen()), before);
        let answer = host.guests[0].message(crate::LIMIT).unwrap().unwrap();
        assert_eq!((answer.req_id, &answer.payload[..]), (77, &b"OK\0"[..]));
        host.assert_served();
    }
    host.expect("event channels were stored adopted=4");
    host.daemon.stop().unwrap();
    assert_eq!(table(&host.daemon.xen()), Table::new());
    assert!(!host.is_stored());
    host.restart();
    host.assert_served();
}

// Fails if a port that the last process had not bound is missed, a bound port that no domain needs
// remains bound, or a port whose other end the guest has bound again is closed.
#[test]
fn ports_are_adopted_as_the_hypervisor_reports_them() {
    let mut host = Host::new();
    let before = host.kill();
    let (five, six) = (port_of(&before, 5), port_of(&before, 6));
    let xen = host.daemon.xen();
    set(&xen, five, [0; 3]);
    set(&xen, six, [INTERDOMAIN, 6, 9]);
    set(&xen, six + 1, [INTERDOMAIN, 7, 1]);
    host.restart();
    let after = table(&host.daemon.xen());
    assert_eq!(after.len(), before.len(), "{after:?}");
    assert_eq!(after[&six], [INTERDOMAIN, 6, 9]);
    assert_ne!(port_of(&after, 5), five);
    assert!(after.values().any(|entry| *entry == VIRQ));
    host.expect("event channels were stored adopted=3");
    // The pretend domain 6 sends events at its old port.
    host.guests[0].gives(op::WRITE, "n|x", "OK|").unwrap();
}

// Fails if the death of a domain while no process runs is not reported, or its port remains bound.
#[test]
fn death_during_a_restart_is_reported() {
    let mut host = Host::new();
    host.kill();
    set_state(&host.daemon.xen(), 6, "gone").unwrap();
    host.restart();
    while host.dom0.ok(op::READ, "/local/domain/6|").is_ok() {}
    assert!(table(&host.daemon.xen()).values().all(|entry| entry[1] != 6));
    host.guests[0].gives(op::WRITE, "n|x", "OK|").unwrap();
}

// Fails if a wrong descriptor prevents the start of the daemon or the service of its guests, or
// remains stored instead of the right one.
#[test]
fn wrong_stored_descriptor_is_not_adopted() {
    let mut host = Host::new();
    host.kill();
    let other = OwnedFd::from(tempfile::tempfile().unwrap());
    let fdstore = host.daemon.fdstore.as_mut().unwrap();
    let kept = fdstore.stored.iter_mut().find(|(name, _)| name == STORED).unwrap();
    kept.1 = other;
    host.restart();
    host.expect("systemd has not stored the event channels");
    host.assert_served();
    assert!(host.is_stored());
    let before = host.kill();
    host.restart();
    assert_eq!(table(&host.daemon.xen()), before);
    host.expect("event channels were stored adopted=4");
    host.assert_served();
}

// Fails if a process that does not recover from the last one leaves its ports bound, or stores
// event channels without a journal.
#[test]
fn nothing_is_stored_without_a_journal() {
    let mut host = Host::new();
    host.kill();
    std::fs::read_dir(host.daemon.socket().parent().unwrap()).unwrap().flatten().for_each(|file| {
        if file.file_name().to_string_lossy().starts_with("journal") {
            std::fs::remove_file(file.path()).unwrap();
        }
    });
    host.restart();
    let after = table(&host.daemon.xen());
    let others = after.values().filter(|entry| entry[1] != 0 && **entry != VIRQ);
    assert_eq!(others.count(), 0, "{after:?}");
    // Nor VIRQ_DOM_EXC: a process that binds it again is notified of all domains.
    host.expect("event channels were stored adopted=0");
    for domid in [5, 6] {
        // A bound port cannot be bound again.
        host.dom0.gives(op::INTRODUCE, &format!("{domid}|1|{PORT}|"), "OK|").unwrap();
    }
    assert!(host.is_stored());
    host.daemon.kill().unwrap();
    host.daemon.args = ["--journal", "none"].map(String::from).into();
    host.restart();
    assert!(!host.is_stored());
}

// Fails if the descriptors are not stored after an update to this daemon, or are stored after an
// update to C xenstored, whose ports no other process could use.
#[test]
fn descriptors_stay_stored_only_for_this_daemon() {
    let mut host = Host::new();
    let ours = peers::program("xenstored").unwrap();
    update(&mut host.dom0, &ours);
    host.assert_served();
    let before = host.kill();
    host.restart();
    assert_eq!(table(&host.daemon.xen()), before);
    host.assert_served();
    if let Err(why) = peers::available(Kind::C) {
        return skip("live update to C xenstored", &why);
    }
    let c = host.daemon.stand_in(Kind::C).unwrap();
    update(&mut host.dom0, &c);
    assert!(!host.is_stored());
    host.assert_served();
}

pub(super) fn update(dom0: &mut Conn, program: &Path) {
    dom0.ok(op::CONTROL, &format!("live-update|-f|{}|", program.display())).unwrap();
    dom0.gives(op::CONTROL, "live-update|-s|", "OK|").unwrap();
}
