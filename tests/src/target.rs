//! What can be tested, with one face.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt, future};
use xenstore_transport::memory::Pipe;
use xenstored::embedded::Store;

use crate::fake_guest::{FakeGuest, PORT, set_state};
use crate::peers::{Daemon, Kind, Quotas};
use crate::raw::{Conn, Link, op};

/// A daemon, or a store in this process.
pub enum Target {
    /// A daemon that we run. Guests speak over rings, if it has the pretend Xen.
    Daemon(Daemon),
    /// The same, where the cases speak over the ring of dom0, which is there once.
    Ring(Daemon, RefCell<Option<Conn>>),
    /// The embedded store.
    Memory(Store),
    /// A daemon that somebody runs; without guests.
    Socket(PathBuf),
}

impl Link for Pipe {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        future::block_on(self.write_all(bytes))
    }

    fn receive(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
        future::block_on(future::or(self.read(buffer), async {
            async_io::Timer::after(limit).await;
            Err(io::ErrorKind::TimedOut.into())
        }))
    }
}

impl Target {
    /// Starts one that we run, with its default quotas.
    pub fn start(kind: Kind) -> Result<Target, String> {
        Daemon::start(kind, Quotas::Default).map(Target::Daemon)
    }

    /// The same, over the ring of dom0.
    pub fn start_ring(kind: Kind) -> Result<Target, String> {
        let daemon = Daemon::start(kind, Quotas::Default)?;
        let dom0 = FakeGuest::create(&daemon.xen(), 0).map_err(|error| error.to_string())?;
        Ok(Target::Ring(daemon, RefCell::new(Some(Conn::new(dom0)))))
    }

    /// The connection that a case is about, as fresh as can be, to be given back.
    pub fn take_main(&self) -> Result<Conn, String> {
        let Target::Ring(_, main) = self else { return self.dom0() };
        let mut main = main.borrow_mut().take().ok_or("a case has kept the connection")?;
        let id = main.start(op::RESET_WATCHES, 0, b"\0")?;
        // What an earlier case did not fetch comes first.
        while main.reply()?.req_id != id {}
        main.events.clear();
        Ok(main)
    }

    /// Gives the connection back.
    pub fn give_back(&self, conn: Conn) {
        if let Target::Ring(_, main) = self {
            *main.borrow_mut() = Some(conn);
        }
    }

    /// The daemon, if it is one that we run.
    fn daemon(&self) -> Option<&Daemon> {
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => Some(daemon),
            Target::Memory(_) | Target::Socket(_) => None,
        }
    }

    /// A connection that may do everything.
    pub fn dom0(&self) -> Result<Conn, String> {
        let connect = |path: PathBuf| {
            Conn::connect(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => connect(daemon.socket()),
            Target::Memory(store) => Ok(Conn::new(store.connect(0))),
            Target::Socket(path) => connect(path.clone()),
        }
    }

    /// Can it have guests?
    pub fn has_guests(&self) -> bool {
        match self {
            Target::Daemon(_) | Target::Ring(..) | Target::Memory(_) => true,
            Target::Socket(_) => false,
        }
    }

    /// A domid that no guest has had yet.
    pub fn fresh_domid(&self) -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(100);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes a domain exist without introducing it.
    pub fn create(&self, domid: u16) -> Result<Option<FakeGuest>, String> {
        let create = |daemon: &Daemon| FakeGuest::create(&daemon.xen(), domid);
        self.daemon().map(create).transpose().map_err(|error| error.to_string())
    }

    /// Makes and introduces a domain; its connection.
    pub fn guest(&self, domid: u16) -> Result<Conn, String> {
        let guest = self.create(domid)?;
        let introduce = format!("{domid}|1|{PORT}|");
        match (self, guest) {
            (Target::Memory(store), _) => {
                self.dom0()?.gives(op::INTRODUCE, &introduce, "OK|")?;
                Ok(Conn::new(store.connect(domid)))
            }
            (_, Some(guest)) => {
                self.dom0()?.gives(op::INTRODUCE, &introduce, "OK|")?;
                Ok(Conn::new(guest))
            }
            _ => Err("no guests here".into()),
        }
    }

    /// A domain shuts down, or is gone.
    pub fn set_state(&self, domid: u16, gone: bool) -> Result<(), String> {
        match self {
            Target::Daemon(daemon) | Target::Ring(daemon, _) => {
                let state = if gone { "gone" } else { "shutdown" };
                set_state(&daemon.xen(), domid, state).map_err(|e| e.to_string())
            }
            Target::Memory(store) if gone => {
                store.destroy(domid);
                Ok(())
            }
            Target::Memory(store) => {
                store.shut_down(domid);
                Ok(())
            }
            Target::Socket(_) => Err("no guests here".into()),
        }
    }
}
