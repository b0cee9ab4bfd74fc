//! XenStore clients: an async one for any stream of bytes and any executor, and a blocking one.
//!
//! ```
//! use xenstore_client::{Client, DomId, Tree};
//! use xenstore_embedded::Store;
//!
//! let store = Store::start(); // for tests; Client::connect() finds the daemon of this host
//! let dom0 = Client::new(store.connect(DomId::DOM0));
//! let guest = Client::new(store.connect(DomId(5)));
//! futures_lite::future::block_on(async {
//!     dom0.write("/local/domain/5/name", "guest").await?;
//!     dom0.set_perms("/local/domain/5/name", "n0 r5").await?;
//!     assert_eq!(guest.read("name").await?, b"guest");
//!     Ok::<(), xenstore_client::Error>(())
//! })?;
//! # Ok::<(), xenstore_client::Error>(())
//! ```
//!
//! ```text
//!  Client::read, Watch::next, …      several tasks, one connection
//!        │ start          ▲ poll
//!        ▼                │
//!  requests ─► unsent ─► stream ─► replies by request id, events by watch
//! ```
//!
//! The client spawns no task. A task that waits for a reply or an event reads and writes for all tasks
//! of the client, and wakes them. Requests of several tasks are pipelined. A future may be dropped at any
//! time: its reply is discarded when it arrives.
#![warn(clippy::missing_errors_doc)]

pub mod blocking;
mod client;
mod error;
mod io;
mod path;
mod socket;
mod transaction;
mod tree;
mod watch;

pub use client::Client;
pub use error::Error;
pub use path::socket_path;
pub use transaction::Transaction;
pub use tree::Tree;
pub use watch::Watch;
pub use xenstore_protocol::{Access, DomId, Errno, EvtchnPort, Features, Gfn, Perm, Quota};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
