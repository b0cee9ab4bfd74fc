//! The client for programs without an executor.
//!
//! ```no_run
//! let client = xenstore_client::blocking::Client::connect()?;
//! client.write("/a", "1")?;
//! client.transaction(0, |tx| {
//!     let value = tx.read("/a")?;
//!     tx.write("/b", value)
//! })?;
//! for path in client.watch("/a", None)? {
//!     println!("{} changed", path?);
//! }
//! # Ok::<(), xenstore_client::Error>(())
//! ```

use std::path::Path;

use futures_lite::future::block_on;
use futures_lite::{AsyncRead, AsyncWrite};
use xenstore_protocol::{DomId, EvtchnPort, Gfn, Perm};

use crate::error::Error;
use crate::tree::Tree as _;

/// A blocking [`crate::Client`].
#[derive(Clone, Debug)]
pub struct Client(crate::Client);

/// A blocking [`crate::Transaction`].
#[derive(Debug)]
pub struct Transaction<'a>(&'a crate::Transaction);

/// A blocking [`crate::Watch`]: an iterator that waits for each event, and ends after its first error.
#[derive(Debug)]
pub struct Watch {
    watch: crate::Watch,
    broken: bool,
}

macro_rules! tree_requests {
    ($type:ty) => {
        /// Requests on nodes; see [`crate::Tree`].
        #[allow(missing_docs, clippy::missing_errors_doc)] // documented in `Tree`
        impl $type {
            pub fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
                block_on(self.0.read(path))
            }
            pub fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<(), Error> {
                block_on(self.0.write(path, value))
            }
            pub fn mkdir(&self, path: &str) -> Result<(), Error> {
                block_on(self.0.mkdir(path))
            }
            pub fn rm(&self, path: &str) -> Result<(), Error> {
                block_on(self.0.rm(path))
            }
            pub fn exists(&self, path: &str) -> Result<bool, Error> {
                block_on(self.0.exists(path))
            }
            pub fn list(&self, path: &str) -> Result<Vec<String>, Error> {
                block_on(self.0.list(path))
            }
            pub fn perms(&self, path: &str) -> Result<Vec<Perm>, Error> {
                block_on(self.0.perms(path))
            }
            pub fn set_perms(&self, path: &str, perms: &str) -> Result<(), Error> {
                block_on(self.0.set_perms(path, perms))
            }
        }
    };
}

tree_requests!(Client);
tree_requests!(Transaction<'_>);

impl Client {
    /// Creates a client of a connected stream of bytes: a socket, or one end of a pipe in memory.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Client {
        Client(crate::Client::new(stream))
    }

    /// Connects to the daemon of this host.
    ///
    /// # Errors
    ///
    /// As [`crate::Client::connect`].
    pub fn connect() -> Result<Client, Error> {
        block_on(crate::Client::connect()).map(Client)
    }

    /// Connects to a socket.
    ///
    /// # Errors
    ///
    /// As [`crate::Client::connect_to`].
    pub fn connect_to(path: impl AsRef<Path>) -> Result<Client, Error> {
        block_on(crate::Client::connect_to(path)).map(Client)
    }

    /// See [`crate::Client::transaction`].
    ///
    /// # Errors
    ///
    /// As [`crate::Client::transaction`].
    pub fn transaction<R>(
        &self,
        tries: u32,
        mut body: impl FnMut(&Transaction<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        block_on(self.0.transaction(tries, async |tx| body(&Transaction(tx))))
    }

    /// See [`crate::Client::watch`].
    ///
    /// # Errors
    ///
    /// As [`crate::Client::watch`].
    pub fn watch(&self, path: &str, depth: Option<u32>) -> Result<Watch, Error> {
        block_on(self.0.watch(path, depth)).map(|watch| Watch { watch, broken: false })
    }

    /// See [`crate::Client::introduce`].
    ///
    /// # Errors
    ///
    /// As [`crate::Client::introduce`].
    pub fn introduce(&self, domid: DomId, gfn: Gfn, port: EvtchnPort) -> Result<(), Error> {
        block_on(self.0.introduce(domid, gfn, port))
    }

    /// See [`crate::Client::release`].
    ///
    /// # Errors
    ///
    /// As [`crate::Client::release`].
    pub fn release(&self, domid: DomId) -> Result<(), Error> {
        block_on(self.0.release(domid))
    }

    /// See [`crate::Client::control`].
    ///
    /// # Errors
    ///
    /// As [`crate::Client::control`].
    pub fn control(&self, command: &str, args: &[&str]) -> Result<Vec<u8>, Error> {
        block_on(self.0.control(command, args))
    }

    /// Returns the async client of this connection, which has all requests.
    pub fn inner(&self) -> &crate::Client {
        &self.0
    }
}

impl Iterator for Watch {
    type Item = Result<String, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.broken {
            return None;
        }
        let event = block_on(self.watch.next());
        self.broken = event.is_err();
        Some(event)
    }
}
