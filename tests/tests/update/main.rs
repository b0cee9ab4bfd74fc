//! Live update between versions of this project's daemon, and from and to the packaged daemons, on
//! the pretend Xen.

#![allow(clippy::print_stderr)] // it says what is skipped, and figures

mod failures;
mod guard;
mod options;
mod scarce;
mod steps;
mod takeover;

use std::path::{Path, PathBuf};

use xenstore_tests::fake_guest::{FakeGuest, PORT};
use xenstore_tests::peers::{self, Daemon, Kind, Quotas};
use xenstore_tests::raw::{Conn, op};

/// A daemon, and the client that updates it.
struct Host {
    daemon: Daemon,
    dom0: Conn,
}

/// This project's daemon as a file.
fn ours() -> PathBuf {
    peers::program("xenstored").unwrap()
}

impl Host {
    fn start() -> Host {
        let daemon = Daemon::start(Kind::Ours, Quotas::Default).unwrap();
        let dom0 = Conn::connect(&daemon.socket()).unwrap();
        Host { daemon, dom0 }
    }

    /// Connects another client.
    fn client(&self) -> Conn {
        Conn::connect(&self.daemon.socket()).unwrap()
    }

    /// Creates a guest with a home, and returns its connection.
    fn guest(&mut self, domid: u16) -> Conn {
        let guest = FakeGuest::create(&self.daemon.xen(), domid).unwrap();
        self.dom0.gives(op::INTRODUCE, &format!("{domid}|1|{PORT}|"), "OK|").unwrap();
        self.dom0.ok(op::WRITE, &format!("/local/domain/{domid}|")).unwrap();
        self.dom0.ok(op::SET_PERMS, &format!("/local/domain/{domid}|n{domid}|")).unwrap();
        Conn::new(guest)
    }

    /// Sends CONTROL `live-update` with these arguments, and returns the text of the reply.
    fn control(&mut self, args: &[&str]) -> Result<String, String> {
        let payload: String = ["live-update"].iter().chain(args).map(|a| format!("{a}|")).collect();
        let reply = self.dom0.tx(0, op::CONTROL, &payload).unwrap();
        reply.map(|text| text.trim_end_matches('|').to_owned())
    }

    /// Executes all steps of an update to this program, and returns the reply.
    fn update_to(&mut self, program: &Path) -> String {
        let begun = self.control(&["-f", program.to_str().unwrap()]).unwrap();
        match begun.as_str() {
            "OK" => self.control(&["-s", "-t", "5"]).unwrap(),
            _ => begun,
        }
    }

    fn update(&mut self) {
        assert_eq!(self.update_to(&ours()), "OK", "{}", self.daemon.log());
    }

    /// Returns how many updates the log reports.
    fn updates(&self) -> usize {
        self.daemon.log().matches("taken over").count()
    }

    /// Checks all invariants of the daemon.
    fn assert_sound(&mut self) {
        self.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
        let log = self.daemon.log();
        assert!(!log.contains("panic") && !log.contains("ERROR"), "{log}");
    }
}
