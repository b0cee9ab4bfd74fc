//! One interface for all systems under test.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};

use xenstore_embedded::{DomId, Store};

use crate::fake_guest::{FakeGuest, PORT, set_state};
use crate::peers::{Daemon, Kind, Quotas};
use crate::raw::{Conn, op};

/// A daemon, or a store in this process.
pub enum Target {
    /// A daemon started by the tests. Guests use rings, if it has the pretend Xen.
    Daemon(Daemon),
    /// The same; the cases use the ring of dom0, of which there is one.
    Ring(Daemon, RefCell<Option<Conn>>),
    /// The embedded store.
    Memory(Store),
    /// A daemon that runs already; without guests.
    Socket(PathBuf),
}

impl Target {
    /// Starts a daemon with its default quotas.
    pub fn start(kind: Kind) -> Result<Target, String> {
        Daemon::start(kind, Quotas::Default).map(Target::Daemon)
    }

    /// The same, for the ring of dom0.
    pub fn start_ring(kind: Kind) -> Result<Target, String> {
        let daemon = Daemon::start(kind, Quotas::Default)?;
        let dom0 = FakeGuest::create(&daemon.xen(), 0).map_err(|error| error.to_string())?;
        Ok(Target::Ring(daemon, RefCell::new(Some(Conn::new(dom0)))))
    }

    /// Returns the connection that a case uses, reset. Return it with [`Target::return_main`].
    pub fn take_main(&self) -> Result<Conn, String> {
        let Target::Ring(_, main) = self else { return self.dom0() };
        let mut main = main.borrow_mut().take().ok_or("a case has kept the connection")?;
        let id = main.start(op::RESET_WATCHES, 0, b"\0")?;
        // Events and replies that an earlier case has not fetched come first.
        while main.reply()?.req_id != id {}
        main.events.clear();
        Ok(main)
    }

    /// Returns the connection of [`Target::take_main`].
    pub fn return_main(&self, conn: Conn) {
        if let Target::Ring(_, main) = self {
            *main.borrow_mut() = Some(conn);
        }
    }

    /// Returns the daemon, if the tests started one.
    fn daemon(&self) -> Option<&Daemon> {
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => Some(daemon),
            Target::Memory(_) | Target::Socket(_) => None,
        }
    }

    /// Returns a connection of the control domain.
    pub fn dom0(&self) -> Result<Conn, String> {
        let connect = |path: PathBuf| {
            Conn::connect(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => connect(daemon.socket()),
            Target::Memory(store) => Ok(Conn::new(store.connect(DomId::DOM0))),
            Target::Socket(path) => connect(path.clone()),
        }
    }

    /// Returns true if guests are possible.
    pub fn has_guests(&self) -> bool {
        match self {
            Target::Daemon(_) | Target::Ring(..) | Target::Memory(_) => true,
            Target::Socket(_) => false,
        }
    }

    /// Returns a domid that no guest has had yet.
    pub fn fresh_domid(&self) -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(100);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// Creates a domain without introducing it.
    pub fn create(&self, domid: u16) -> Result<Option<FakeGuest>, String> {
        let create = |daemon: &Daemon| FakeGuest::create(&daemon.xen(), domid);
        self.daemon().map(create).transpose().map_err(|error| error.to_string())
    }

    /// Creates and introduces a domain, and returns its connection.
    pub fn guest(&self, domid: u16) -> Result<Conn, String> {
        let guest = self.create(domid)?;
        let introduce = format!("{domid}|1|{PORT}|");
        match (self, guest) {
            (Target::Memory(store), _) => {
                self.dom0()?.gives(op::INTRODUCE, &introduce, "OK|")?;
                Ok(Conn::new(store.connect(DomId(domid))))
            }
            (_, Some(guest)) => {
                self.dom0()?.gives(op::INTRODUCE, &introduce, "OK|")?;
                Ok(Conn::new(guest))
            }
            _ => Err("no guests here".into()),
        }
    }

    /// Shuts down a domain, or destroys it if `gone`.
    pub fn set_state(&self, domid: u16, gone: bool) -> Result<(), String> {
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => {
                let state = if gone { "gone" } else { "shutdown" };
                set_state(&daemon.xen(), domid, state).map_err(|e| e.to_string())
            }
            Target::Memory(store) if gone => {
                store.destroy(DomId(domid));
                Ok(())
            }
            Target::Memory(store) => {
                store.shut_down(DomId(domid));
                Ok(())
            }
            Target::Socket(_) => Err("no guests here".into()),
        }
    }
}
