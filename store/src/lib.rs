//! The XenStore database, without I/O.
//!
//! An [`Engine`] holds the tree, its permissions, transactions, watches, domains and quotas. It is
//! deterministic: its replies and events depend only on its inputs and their order. Time is an argument,
//! and the machine is behind the [`Host`] trait.
//!
//! ```text
//!           ┌──────────── Engine ────────────────────────────────────────────────┐
//!  Input ──►│ admit ─► execute on Staged (tree, charges, changes) ─► fire watches ─┼─► replies
//!           │             ▲                                            │           │
//!           │        Transaction (snapshot, Staged, log)          queue of each    │
//!           │        commit = replay of the log                   connection ──────┼─► events
//!           └──────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! [`Engine::apply`] is the only mutation by clients: requests, connections, events, changes of domains and
//! deferred work are kinds of [`Input`]. After each input, drain [`Engine::pop_ready`] (connections with
//! events to fetch, or with a deferred request to retry) and [`Engine::pop_closed`]. [`Engine::pop_warning`]
//! returns lines for the log. A request is rarely deferred; see [`Outcome::Deferred`].
//!
//! ```
//! use xenstore_protocol::{DomId, Header, Operation, RequestId, TxId};
//! use xenstore_store::{Caller, Config, Engine, Input, NoHost};
//!
//! /// Returns the bytes of one request.
//! fn request(op: Operation, payload: &[u8]) -> Vec<u8> {
//!     let len = payload.len() as u32;
//!     let header = Header { ty: op.as_wire(), req_id: RequestId(7), tx_id: TxId::NONE, len };
//!     [&header.emit()[..], payload].concat()
//! }
//!
//! let mut engine = Engine::new(&Config::default());
//! let conn = engine.connect(Caller::Socket);
//! let frames =
//!     [request(Operation::Write, b"/hello\0world"), request(Operation::Read, b"/hello\0")].concat();
//! let mut out = Vec::new();
//! let input = Input::Requests { conn, now: 0, frames: &frames };
//! let applied = engine.apply(&input, &mut NoHost, &mut out);
//! assert_eq!(applied.executed, frames.len());
//! assert!(out.ends_with(b"world"));
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod domain;
mod engine;
mod ids;
mod mru_map;
mod snapshot;
mod transaction;
mod tree;
mod watch;

pub use domain::host::{AllDomains, DomainInfo, Host, NoHost};
pub use domain::quotas::{Config, Quotas};
pub use domain::recorded::{Recorded, Replayed};
pub use engine::Engine;
pub use engine::apply::Applied;
pub use engine::conflicts::Conflict;
pub use engine::fairness::{FAILURES, HELD_FOR, Outcome, PROTECTED_FOR};
pub use engine::input::Input;
pub use engine::invariants::Violation;
pub use engine::restore::RestoreError;
pub use ids::{Caller, ConnId, Millis};
pub use snapshot::{
    Base, CFormat, ConnectionIo, ConnectionState, DomainState, ServerIo, State, WatchState,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
