//! Rings of guests that violate the protocol, are created and destroyed, or are older than the
//! daemon: on the pretend Xen, with the daemon as a process.

#![allow(clippy::print_stderr)] // it says what is skipped

mod hostile;
mod leaks;
mod lifecycle;

use xenstore_tests::fake_guest::{FakeGuest, PORT};
use xenstore_tests::peers::{self, Daemon, Kind, Quotas};
use xenstore_tests::raw::{Conn, op};
use xenstore_tests::skip;

/// A daemon, dom0 on its socket, and a guest that follows the protocol.
struct Host {
    daemon: Daemon,
    dom0: Conn,
    other: Conn,
}

/// The guest that follows the protocol.
const OTHER: u16 = 77;

impl Host {
    fn start(kind: Kind) -> Host {
        let daemon = Daemon::start(kind, Quotas::Default).unwrap();
        let dom0 = Conn::connect(&daemon.socket()).unwrap();
        let other = Conn::new(FakeGuest::create(&daemon.xen(), OTHER).unwrap());
        let mut host = Host { daemon, dom0, other };
        host.introduce(OTHER, PORT);
        host.home(OTHER);
        host
    }

    fn ours() -> Host {
        Host::start(Kind::Ours)
    }

    /// Another end of the ring of a domain, which is created if necessary.
    fn fake(&self, domid: u16) -> FakeGuest {
        FakeGuest::create(&self.daemon.xen(), domid).unwrap()
    }

    fn introduce(&mut self, domid: u16, port: u32) {
        self.dom0.gives(op::INTRODUCE, &format!("{domid}|1|{port}|"), "OK|").unwrap();
    }

    fn home(&mut self, domid: u16) {
        self.dom0.ok(op::WRITE, &format!("/local/domain/{domid}|")).unwrap();
        self.dom0.ok(op::SET_PERMS, &format!("/local/domain/{domid}|n{domid}|")).unwrap();
    }

    /// Creates a guest with a home. Returns its ring, and a connection over it.
    fn guest(&mut self, domid: u16) -> (FakeGuest, Conn) {
        let (fake, link) = (self.fake(domid), self.fake(domid));
        self.introduce(domid, PORT);
        self.home(domid);
        (fake, Conn::new(link))
    }

    /// Checks that dom0 and the other guest are served normally.
    fn assert_others_served(&mut self) {
        for value in ["1", "2"] {
            self.other.gives(op::WRITE, &format!("x|{value}"), "OK|").unwrap();
            self.dom0.gives(op::READ, &format!("/local/domain/{OTHER}/x|"), value).unwrap();
        }
    }

    /// Checks all invariants of the daemon.
    fn assert_sound(&mut self) {
        self.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
        assert!(!self.daemon.log().contains("panic"), "{}", self.daemon.log());
    }
}

/// Runs a test on this project's daemon, and on the packaged daemons that can run here.
fn on_each(what: &str, test: impl Fn(&mut Host)) {
    on(&[Kind::Ours, Kind::C, Kind::Ocaml], what, test);
}

fn on(kinds: &[Kind], what: &str, test: impl Fn(&mut Host)) {
    for kind in kinds.iter().copied() {
        match peers::available(kind) {
            Err(why) => skip(&format!("{what} on {}", kind.name()), &why),
            Ok(()) => {
                eprintln!("{what} on {}", kind.name());
                let mut host = Host::start(kind);
                test(&mut host);
                host.assert_others_served();
                assert!(host.daemon.is_running(), "{what} on {}", kind.name());
                if kind == Kind::Ours {
                    host.assert_sound();
                }
            }
        }
    }
}
