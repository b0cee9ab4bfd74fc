//! A XenStore in memory, for tests of programs that use one: without Xen, root or sockets.
//!
//! ```
//! use xenstore_embedded::{DomId, Store};
//!
//! let store = Store::start();
//! let guest = store.connect(DomId(5)); // bytes of the protocol, as domain 5
//! let dom0 = store.connect(DomId::DOM0);
//! # drop((guest, dom0));
//! ```
//!
//! A [`Connection`] is a stream of bytes; `xenstore_client::Client::new` takes it as it is.
//!
//! ```text
//!   Connection ──poll_write──► deframe ──► Engine ──► replies, events ──poll_read──► Connection
//!                                            ▲
//!            introduce, destroy, set_time, inject_eagain: Store
//! ```
//!
//! Requests are executed by the thread that writes them, before `poll_write` returns. The clock stands
//! at 0 until [`Store::set_time`]. So a test that runs on one thread is deterministic, unless it causes
//! a request to be deferred: a thread executes that request when its time limit has passed. The engine is
//! that of the daemon, with the same limits and errors.
#![forbid(unsafe_code)]

mod connection;
mod state;

use std::sync::{Arc, Mutex};

pub use connection::Connection;
pub use xenstore_protocol::{DomId, Errno};
pub use xenstore_store::{Config, Millis, Violation};

use state::{Shared, State};
use xenstore_protocol::Operation;

/// A store. When it is dropped, its connections end.
#[derive(Debug)]
pub struct Store(Arc<Mutex<State>>);

impl Store {
    /// Starts a store with the defaults of the daemon.
    pub fn start() -> Store {
        Store::with_config(&Config::default())
    }

    /// Starts a store.
    pub fn with_config(config: &Config) -> Store {
        Store(Arc::new_cyclic(|shared| Mutex::new(State::new(config, shared.clone()))))
    }

    /// Connects as a domain. The domain is introduced if it is not yet. Any number of connections may
    /// speak for one domain; [`DomId::DOM0`] may do everything.
    ///
    /// # Panics
    ///
    /// If the domain cannot be introduced: its number is reserved (above 0x7FEF).
    pub fn connect(&self, domid: DomId) -> Connection {
        let introduced = domid == DomId::DOM0 || self.is_introduced(domid);
        if !introduced && let Err(error) = self.introduce(domid) {
            panic!("domain {domid} cannot be introduced: {error}");
        }
        let id = self.0.change(|state| state.connect(domid));
        Connection::new(self.0.clone(), id)
    }

    /// Introduces a domain, as a toolstack does when it starts one.
    ///
    /// # Errors
    ///
    /// Fails with the error of INTRODUCE: `EINVAL` for a reserved number.
    pub fn introduce(&self, domid: DomId) -> Result<(), Errno> {
        self.request(Operation::Introduce, &format!("{domid}\x001\x001\0")).map(|_| ())
    }

    /// Releases a domain: its connections end, its nodes are removed.
    ///
    /// # Errors
    ///
    /// Fails with the error of RELEASE: `ENOENT` if the domain is not introduced.
    pub fn release(&self, domid: DomId) -> Result<(), Errno> {
        self.request(Operation::Release, &format!("{domid}\0")).map(|_| ())
    }

    /// Shuts a domain down: `@releaseDomain` fires, its nodes and connections stay.
    pub fn shut_down(&self, domid: DomId) {
        self.0.change(|state| state.change_domains(|host| host.shut_down(domid)));
    }

    /// Destroys a domain, as `xl destroy` does.
    pub fn destroy(&self, domid: DomId) {
        self.0.change(|state| state.change_domains(|host| host.destroy(domid)));
    }

    /// Sets the time, in milliseconds since the start. Deferred requests whose time has come are
    /// executed.
    pub fn set_time(&self, now: Millis) {
        self.0.change(|state| state.set_time(now));
    }

    /// The next `count` commits fail with `EAGAIN`.
    pub fn inject_eagain(&self, count: u32) {
        self.0.change(|state| state.engine().inject_eagain(count));
    }

    /// Checks the invariants of the store.
    ///
    /// # Errors
    ///
    /// Returns the first invariant that does not hold, which is a bug in this library.
    pub fn check(&self) -> Result<(), Violation> {
        self.0.change(|state| state.engine().check())
    }

    fn is_introduced(&self, domid: DomId) -> bool {
        let reply = self.request(Operation::IsDomainIntroduced, &format!("{domid}\0"));
        reply.is_ok_and(|payload| payload == b"T\0")
    }

    fn request(&self, op: Operation, payload: &str) -> Result<Vec<u8>, Errno> {
        self.0.change(|state| state.request(op, payload.as_bytes()))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.0.change(State::close_all);
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
