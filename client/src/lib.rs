//! XenStore clients: async over any transport and any executor, and blocking.
//!
//! ```
//! use xenstore_client::{Client, DomId, Tree};
//! use xenstore_embedded::Store;
//!
//! let store = Store::start(); // or Client::connect() to the daemon of this host
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
//! Nothing is spawned. A future that waits for a reply or an event also transfers the bytes of all
//! other futures that wait on the same client; requests from several tasks are pipelined. A future that is
//! dropped half-way leaves the connection sound: its answer is thrown away when it comes.

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
